"""The configurations that are shipped in kernels/tuned."""

import pytest

from mdnbench.kernels import store
from mdnbench.kernels.space import CONFIGS, Shape, table_config, why_invalid

FILES = sorted(store.SHIPPED_FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_entries_are_valid_and_those_of_the_table_are_as_in_the_table(path):
    gpu, entries = store.read(path)
    assert path == store.file_of(store.SHIPPED_FOLDER, gpu.name)
    assert entries
    for entry in entries:
        key = entry.key
        shapes = [
            Shape(
                key.head_dim_k, key.head_dim_v, key.chunk_size, 4 if key.dtype == "float32" else 2, heads, key.free_p,
                gpu.shared_memory_bytes, gpu.multiprocessors,
            )
            for heads in range((1 << key.heads_bucket) // 2 + 1, (1 << key.heads_bucket) + 1)
        ]  # fmt: skip
        config = CONFIGS[key.direction](**entry.config)
        assert why_invalid(key.direction, config, shapes[-1]) is None
        if entry.source == store.HAND_CHOSEN:
            assert entry.latency_ms is None
            assert entry.versions is None
            assert config in [table_config(key.direction, shape) for shape in shapes], (
                f"{store.describe(key)}: the table of config.py has changed since: run mdnbench tune --export"
            )
        else:
            assert entry.versions is not None
            assert entry.latency_ms > 0


def test_the_h200_has_entries():
    assert "NVIDIA-H200.json" in {path.name for path in FILES}
