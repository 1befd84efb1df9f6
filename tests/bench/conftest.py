"""Providers of a third party, registered as entry points the way an installed package does it."""

import ast
import os
from pathlib import Path

import pytest

TOY_PROVIDERS = Path(__file__).with_name("toy_providers.py")


@pytest.fixture(scope="session")
def toy_path(tmp_path_factory) -> Path:
    """A directory for PYTHONPATH that holds the distribution `toys` with the providers of toy_providers.py."""
    folder = tmp_path_factory.mktemp("toys")
    source = TOY_PROVIDERS.read_text()
    (folder / "mdnbench_toys.py").write_text(source)
    classes = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    info = folder / "toys-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    entry_points = "\n".join(f"{name} = mdnbench_toys:{name}" for name in classes)
    (info / "entry_points.txt").write_text(f"[mdnbench.providers]\n{entry_points}\n")
    return folder


@pytest.fixture
def toys(toy_path: Path, monkeypatch) -> Path:
    """The toy providers are registered, here and in processes started from here."""
    monkeypatch.syspath_prepend(str(toy_path))
    paths = [str(toy_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return toy_path


@pytest.fixture
def nothing_stored(tmp_path: Path, monkeypatch) -> None:
    """No configurations in the user's store at the start, and a working directory of its own."""
    from mdnbench.kernels import store  # loads torch, which few tests here need

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    store.forget()
    store._notice.cache_clear()
    yield
    store.forget()
