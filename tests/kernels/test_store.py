"""The store of tuned configurations: round trips, which entry serves a call, what a look-up costs; the search space."""

import json
import logging
import timeit
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from mdnbench.kernels import store
from mdnbench.kernels.config import BackwardConfig, KernelConfig
from mdnbench.kernels.problem import is_layer_call, problem_of
from mdnbench.kernels.space import CONFIGS, SPACE, Shape, search_space, table_config, why_invalid
from mdnbench.kernels.versions import code_of, source_hash

GPU = store.Gpu("NVIDIA H200", "9.0", 232448, 132)
VERSIONS = store.Versions("0123456789ab", "3.6.0", "12.8.93", "2.11")
KEY = store.Key("forward", "bfloat16", 128, 128, 64, False, 6, 12)
CONFIG = asdict(KernelConfig(32, 4, 2, 4, 168))
TUNED = store.Entry(KEY, CONFIG, store.TUNED, VERSIONS, 0.25, (asdict(KernelConfig(64, 4, 2)),))


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """No entries but those of the test, on the GPU and with the versions above."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SHIPPED_FOLDER", tmp_path / "shipped")
    monkeypatch.setattr(store, "gpu_of", lambda index: GPU)
    monkeypatch.setattr(store, "installed_versions", lambda capability: VERSIONS)
    store.forget()
    store._notice.cache_clear()
    yield
    store.forget()


def call(B=4, T=4096, H=16, K=128, V=128, dtype=torch.bfloat16, direction="forward", device="cuda:0"):
    """What a call of the operator on a GPU asks for, without one."""
    q = SimpleNamespace(device=torch.device(device), dtype=dtype)
    x = problem_of(torch.Size((B, T, H, K)), torch.Size((B, T, H, V)), dtype, None, None, 64, True)
    return store.tuned_config(direction, x, q, False)


def test_what_is_written_is_read(tmp_path):
    backward = store.Entry(KEY._replace(direction="backward"), asdict(BackwardConfig()), store.HAND_CHOSEN)
    path = store.write(tmp_path / "folder", GPU, [TUNED, backward])
    assert path.name == "NVIDIA-H200.json"
    assert store.read(path) == (GPU, [backward, TUNED])
    # One for the same key and versions is replaced, one of other versions stays, a tuned one replaces the hand-chosen.
    other = replace(TUNED, versions=VERSIONS._replace(triton="3.7.1"))
    faster = replace(TUNED, latency_ms=0.2)
    tuned = replace(backward, source=store.TUNED, versions=VERSIONS)
    store.write(tmp_path / "folder", GPU, [faster, other, tuned])
    assert store.read(path)[1] == [tuned, faster, other]
    assert list((tmp_path / "folder").iterdir()) == [path]


def test_a_call_gets_the_entry_for_its_shape():
    assert call() is None  # nothing is stored: the table decides
    store.write(store.user_folder(), GPU, [TUNED])
    assert call() == KernelConfig(**CONFIG)
    assert call(B=2, H=20) == KernelConfig(**CONFIG)  # 40 heads: of the same power of two
    assert call(direction="backward") is None
    assert call(V=64) is None
    assert call(dtype=torch.float16) is None
    assert call(device="cpu") is None


def test_the_users_entry_goes_before_the_shipped_one():
    store.write(store.SHIPPED_FOLDER, GPU, [replace(TUNED, config=asdict(KernelConfig(16, 4, 2)))])
    assert call() == KernelConfig(16, 4, 2)
    store.write(store.user_folder(), GPU, [TUNED])
    assert call() == KernelConfig(**CONFIG)


def test_the_nearest_neighbour_serves_with_one_notice(caplog):
    far = replace(TUNED, key=KEY._replace(heads_bucket=2), config=asdict(KernelConfig(16, 4, 2)))
    store.write(store.user_folder(), GPU, [far, TUNED])
    with caplog.at_level(logging.WARNING, "mdnbench"):
        assert call(B=8) == KernelConfig(**CONFIG)  # 128 heads
        assert call(B=8) == KernelConfig(**CONFIG)
        assert call(B=1, H=6) == KernelConfig(16, 4, 2)
    assert len(caplog.records) == 2
    assert "up to 128 heads and 4096 tokens is not tuned on this GPU: it uses what was found for" in caplog.text


def test_what_is_far_away_leaves_the_choice_to_the_table(caplog):
    store.write(store.user_folder(), GPU, [replace(TUNED, key=KEY._replace(heads_bucket=0, length_bucket=6))])
    with caplog.at_level(logging.WARNING, "mdnbench"):
        assert call() is None
    assert not caplog.records


@pytest.mark.parametrize(
    ("changes", "serves"),
    [
        ({"heads_bucket": KEY.heads_bucket - 1}, True),
        ({"heads_bucket": KEY.heads_bucket - 1, "length_bucket": KEY.length_bucket + 1}, True),
        ({"length_bucket": KEY.length_bucket - 3}, True),
        ({"heads_bucket": KEY.heads_bucket - 2}, False),  # a quarter of the heads: other tiles fill the GPU
        ({"length_bucket": KEY.length_bucket - 4}, False),
    ],
)
def test_how_far_an_entry_serves(changes, serves):
    store.write(store.user_folder(), GPU, [replace(TUNED, key=KEY._replace(**changes))])
    assert (call() is not None) == serves


def test_unknown_versions_match_nothing():
    unknown = VERSIONS._replace(triton="none")
    store.write(store.user_folder(), GPU, [replace(TUNED, versions=unknown)])
    entry, notice = store.look_up(KEY, GPU, unknown)
    assert entry is None
    assert "Triton none" in notice


def test_a_user_without_a_home_has_a_table(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nobody knows the user
    store.forget()
    assert call() is None


@pytest.mark.parametrize("field", store.Versions._fields)
def test_what_was_tuned_with_other_versions_is_left_out(field, caplog):
    store.write(store.user_folder(), GPU, [replace(TUNED, versions=VERSIONS._replace(**{field: "other"}))])
    with caplog.at_level(logging.WARNING, "mdnbench"):
        assert call() is None
        assert call() is None
    assert len(caplog.records) == 1
    assert " is left out: it is for kernels " in caplog.text
    assert "; `mdnbench tune` finds a configuration (shown once)" in caplog.text


def test_a_notice_says_what_is_wrong_with_a_configuration(caplog):
    store.write(store.user_folder(), GPU, [replace(TUNED, config=asdict(KernelConfig(256, 4, 2)))])
    with caplog.at_level(logging.WARNING, "mdnbench"):
        assert call() is None
    assert "4096 tokens is left out: block_v=256 is no power of two from 16 to 128; `mdnbench tune`" in caplog.text


def test_what_is_far_away_is_not_spoken_of_whatever_its_versions(caplog):
    far = replace(TUNED, key=KEY._replace(heads_bucket=0), versions=VERSIONS._replace(triton="other"))
    store.write(store.user_folder(), GPU, [far])
    with caplog.at_level(logging.WARNING, "mdnbench"):
        assert call() is None
    assert not caplog.records


def test_a_hand_chosen_entry_leaves_the_choice_to_the_table(caplog):
    store.write(store.SHIPPED_FOLDER, GPU, [store.Entry(KEY, CONFIG, store.HAND_CHOSEN)])
    assert call() is None
    assert not caplog.records


def test_what_cannot_run_or_be_read_is_left_out(caplog):
    too_wide = replace(TUNED, config=asdict(KernelConfig(256, 4, 2)))
    of_the_future = replace(TUNED, config={**CONFIG, "clusters": 2})
    for entry in (too_wide, of_the_future):
        store.write(store.user_folder(), GPU, [entry])
        assert call() is None
    path = store.file_of(store.user_folder(), GPU.name)
    for text, fault in (("{", "it is damaged"), (json.dumps({"schema_version": 9}), "its schema version is 9, not 1")):
        path.write_text(text)
        store.forget()
        store._notice.cache_clear()
        with caplog.at_level(logging.WARNING, "mdnbench"):
            assert call() is None
        assert fault in caplog.text


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("key", {"heads_bucket": None}),
        ("key", {"heads_bucket": -1}),
        ("key", {"free_p": 0}),
        ("key", {"direction": "sideways"}),
        ("config", {"scan_warps": 4.0}),
        ("config", {"scan_warps": None}),
        ("config", {"scan_stages": True}),
        ("config", {"clusters": 2}),
        (None, {"versions": {}}),
        (None, {"versions": None}),
        (None, {"versions": {**VERSIONS._asdict(), "triton": 3}}),
        (None, {"latency_ms": "fast"}),
        (None, {"source": "guessed"}),
        (None, {"runner_ups": [{"block_v": 32}]}),
        (None, {"runner_ups": None}),
    ],
)
def test_a_malformed_entry_makes_a_damaged_file_and_no_call_fails(part, change, caplog):
    path = store.write(store.user_folder(), GPU, [TUNED])
    content = json.loads(path.read_text())
    (entry,) = content["entries"]
    (entry[part] if part else entry).update(change)
    path.write_text(json.dumps(content))
    store.forget()
    with caplog.at_level(logging.WARNING, "mdnbench"):
        assert call() is None
    (record,) = caplog.records
    assert f"{path} is left out (it is damaged: " in record.getMessage()


DAMAGED = [b"{", json.dumps({"schema_version": 9}).encode(), b"\xff\xfe"]


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_file_is_set_aside_when_something_is_written(damaged, caplog):
    path = store.file_of(store.user_folder(), GPU.name)
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "mdnbench"):
        store.write(store.user_folder(), GPU, [TUNED])
    assert store.read(path)[1] == [TUNED]
    assert path.with_name("NVIDIA-H200.json.damaged").read_bytes() == damaged
    (record,) = caplog.records
    assert f"{path} is set aside as NVIDIA-H200.json.damaged (it" in record.getMessage()


def test_a_folder_that_cannot_be_written_to_is_known_beforehand():
    store.check_writable(GPU)
    assert list(store.user_folder().iterdir()) == []
    store.user_folder().rmdir()
    store.user_folder().write_text("a file")
    with pytest.raises(ValueError, match=r"H200\.json, where .* cannot be written to \(.+\): set XDG_CACHE_HOME to a "):
        store.check_writable(GPU)


def test_another_compute_capability_under_the_same_name_is_another_gpu():
    store.write(store.user_folder(), GPU._replace(compute_capability="10.0"), [TUNED])
    assert call() is None


def test_a_look_up_after_the_first_takes_under_2_us():
    store.write(store.user_folder(), GPU, [TUNED])
    q = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16)
    shapes = torch.Size((4, 4096, 16, 128))
    x = problem_of(shapes, shapes, torch.bfloat16, None, None, 64, True)
    times = timeit.repeat(lambda: store.tuned_config("forward", x, q, False), number=5000, repeat=9)
    assert min(times) / 5000 < 2e-6


def test_a_call_searches_only_when_asked_to_and_once(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        assert store.AUTOTUNE not in options["env"]
        assert options["env"]["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"  # as in this process, where nobody set it
        store.write(store.user_folder(), GPU, [TUNED])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(store.subprocess, "run", run)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert call() is None
    assert commands == []
    monkeypatch.setattr(store, "_autotune", True)
    monkeypatch.setattr(store, "_searched", set())
    assert call() == KernelConfig(**CONFIG)
    assert call() == KernelConfig(**CONFIG)
    assert call(direction="backward") is None  # the search found nothing for it, and is not repeated
    (command,) = commands
    assert command[3:-1] == [
        "tune", "--batch=4", "--heads=16", "--value-heads=16", "--seq-len=4096", "--head-dim=128", "--v-head-dim=128",
        "--chunk-size=64", "--budget=5m", "--dtype=bfloat16", "--device=cuda:0",
    ]  # fmt: skip


def test_a_search_that_failed_is_not_repeated_for_sizes_of_the_same_bucket(monkeypatch):
    commands = []

    def run(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=2, stderr="mdnbench: no time")

    monkeypatch.setattr(store.subprocess, "run", run)
    monkeypatch.setattr(store, "_autotune", True)
    monkeypatch.setattr(store, "_searched", set())
    for sizes in ({}, {"T": 4000}, {"T": 2049, "B": 3}, {"direction": "backward", "T": 3000}):
        assert call(**sizes) is None
    assert len(commands) == 1
    call(T=4097)  # of the next bucket
    assert len(commands) == 2


def test_value_heads_in_groups_are_not_looked_up():
    """So that nothing is searched for them either: a key does not tell them from others."""
    for heads, expected in ((16, True), (4, False)):
        x = problem_of(
            torch.Size((1, 64, heads, 64)), torch.Size((1, 64, 16, 64)), torch.bfloat16, None, None, 64, True
        )
        gate = torch.empty(1, 64, 16)
        assert is_layer_call(x, True, True, gate, gate, False) == expected


def test_the_hash_of_the_sources_is_of_what_runs():
    source = 'def f(x):\n    """Doubles."""\n    return 2 * x  # twice\n'
    assert code_of(source) == code_of("def f( x ):\n\n    return 2*x\n")
    assert code_of(source) != code_of(source.replace("2 *", "3 *"))
    assert code_of("x = 'a'\n") != code_of("x = 'b'\n")  # a string that is no docstring counts
    assert len(source_hash()) == 12


def test_installed_versions_are_found(monkeypatch):
    monkeypatch.undo()
    versions = store.installed_versions("9.0")
    assert versions.torch == ".".join(torch.__version__.split(".")[:2])
    assert versions.ptxas.count(".") == 2


SHAPES = [
    Shape(K, V, C, size, 64, False, GPU.shared_memory_bytes, GPU.multiprocessors)
    for K, V in ((16, 16), (64, 64), (100, 33), (128, 128), (128, 256), (256, 512))
    for C, size in ((64, 2), (32, 4), (128, 2))
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda it: f"K{it.head_dim_k}-V{it.head_dim_v}-C{it[2]}-{it[3]}B")
def test_the_search_space_starts_with_the_table_and_holds_what_is_valid(shape):
    for direction, kernels in SPACE.items():
        try:
            base = table_config(direction, shape)
        except ValueError:
            continue  # no configuration fits: there is nothing to tune
        assert why_invalid(direction, base, shape) is None
        for kernel, fields in kernels.items():
            found = list(search_space(direction, kernel, shape, base))
            assert found[0] == base
            assert len(set(found)) == len(found) <= 100
            others = [name for name in asdict(base) if name not in fields]
            for config in found:
                assert why_invalid(direction, config, shape) is None
                assert all(getattr(config, name) == getattr(base, name) for name in others)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"block_v": 48}, "block_v=48 is no power of two from 16 to 128"),
        ({"block_v": 256}, "block_v=256 is no power of two from 16 to 128"),
        ({"scan_warps": 3}, "scan_warps=3 is not 1, 2, 4 or 8"),
        ({"scan_stages": 5}, "scan_stages=5 is not from 1 to 4 for 2 bytes an element"),
        ({"scan_stages": 4, "block_v": 64}, "scan needs .* bytes of shared memory of 232448"),
        ({"prepare_max_registers": 255, "prepare_warps": 16}, "prepare_warps=16 is not 1, 2, 4 or 8"),
        ({"scan_max_registers": 300}, "scan_max_registers=300 is not possible with 4 warps"),
    ],
)
def test_what_is_not_valid_says_why(change, reason):
    shape = Shape(128, 128, 64, 2, 64, False, GPU.shared_memory_bytes, GPU.multiprocessors)
    found = why_invalid("forward", replace(table_config("forward", shape), **change), shape)
    with pytest.raises(ValueError, match=f"^{reason}"):
        raise ValueError(found)


def test_with_a_free_p_the_gradients_have_one_width():
    shape = Shape(128, 128, 64, 2, 64, True, GPU.shared_memory_bytes, GPU.multiprocessors)
    base = table_config("backward", shape)
    widths = {it.gradients_block_k for it in search_space("backward", "gradients", shape, base)}
    assert widths == {128}


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize(("direction", "kernel"), [(it, kernel) for it in SPACE for kernel in SPACE[it]])
def test_every_kernel_has_candidates(direction, kernel, element_bytes):
    shape = Shape(
        128, 128, 64 if direction == "forward" or element_bytes == 2 else 32, element_bytes, 64, False, 232448, 132
    )
    assert len(list(search_space(direction, kernel, shape, table_config(direction, shape)))) > 2


@pytest.mark.parametrize(("K", "V", "widest"), [(32, 128, 32), (16, 64, 16), (64, 128, 64)])
def test_tiles_that_are_miscompiled_are_no_candidates(K, V, widest):
    shape = Shape(K, V, 64, 2, 64, False, 232448, 132)
    base = table_config("backward", shape)
    assert (base.matrices_block_v, base.gradients_block_v) == (widest, widest)
    for kernel in ("matrices", "gradients"):
        assert all(
            max(it.matrices_block_v, it.gradients_block_v) <= widest
            for it in search_space("backward", kernel, shape, base)
        )


def test_every_field_of_a_configuration_is_searched():
    for direction, config in CONFIGS.items():
        fields = {name for kernel in SPACE[direction].values() for name in kernel}
        assert fields == set(config.__dataclass_fields__), direction
