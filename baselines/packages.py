"""How the adapters import the packages they wrap. Everything here runs at the earliest when a provider is built."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType

FLA_INSTALL = "pip install fla-core==0.6.0"  # all operators; flash-linear-attention adds layers and models to it


def import_from_fla(module: str) -> ModuleType:
    """A module of fla-core that runs its own kernels.

    fla hands calls over to FlashQLA, FlashKDA and kernels in TileLang where these are installed. The first two are
    providers of their own here, and a provider's times may not depend on what else is installed.
    """
    for backend in ("FLASH_QLA", "FLASH_KDA", "TILELANG"):
        os.environ[f"FLA_{backend}"] = "0"  # read at every call
    return importlib.import_module(module)


def import_beside(module: str, *packages: str) -> ModuleType:
    """Import `module` without running the `__init__` of its parent `packages`, outermost first.

    For packages whose top level imports parts that are not installed and not needed: a CUDA extension, or other
    packages.
    """
    for name in packages:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.modules[name] = importlib.util.module_from_spec(spec)  # has the path of its modules, and nothing else
    return importlib.import_module(module)
