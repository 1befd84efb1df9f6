"""What blocks of the same code differed by on this machine: kept from gate to gate, for its noise floor. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .results import Point

MOST_GATES = 10  # a point keeps its latest: a machine changes
_SCHEMA_VERSION = 2


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/mdnbench, or ~/.cache/mdnbench."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mdnbench"


class Floors:
    """The log-ratios of one machine, in a file of its own.

    Args:
        identity: what makes the machine: hardware, threads, driver and versions; plain JSON values.
        time_limit_s: of sampling a point: points that are sampled for longer vary less.
        folder: of the file; None means `cache_folder()`.
    """

    def __init__(self, identity: Mapping[str, Any], time_limit_s: float, folder: Path | None = None) -> None:
        self.identity = {**identity, "time_limit_s": time_limit_s}
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"noise-{digest}.json"

    def load(self) -> dict[str, list[list[float]]]:
        """By the key of the point, the log-ratios of each gate; empty when nothing usable is stored."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["schema_version"] != _SCHEMA_VERSION:
                return {}
            return {key: [list(map(float, gate)) for gate in gates] for key, gates in content["log_ratios"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # measured again by the gates to come
            return {}

    def add(self, measured: Mapping[Point, Sequence[float]]) -> bool:
        """Store the log-ratios of a gate beside those that are there. False when the file cannot be written."""
        found = self.load()
        for point, values in measured.items():
            found[point.key] = [*found.get(point.key, ()), list(values)][-MOST_GATES:]
        content = {"schema_version": _SCHEMA_VERSION, "machine": self.identity, "log_ratios": found}
        draft = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            draft.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            return False
        return True
