"""The start of the worker process and its loop of requests. Loads torch only in that process.

Whatever a provider does stays here. What it raises becomes a status (`server.py`); what ends, blocks or fills this
process is seen by the parent (`worker.py`), which starts another.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from .requests import Phase

READY = Phase("waiting for a request")
_PR_SET_PDEATHSIG = 1


def main(connection: Connection, device: str, log_path: str, parent_pid: int) -> None:
    """Answer requests until the parent closes its end or dies.

    Args:
        connection: carries requests in; `Phase`s and then one `Prepared`, list of samples in ms, `Profile` or `Failure`
            out.
        device: "cpu", "cuda" or "cuda:N".
        log_path: everything printed in this process is appended to this file.
        parent_pid: ends this process with its parent.
    """
    _settle_in(log_path, parent_pid)
    from .server import Server  # imports torch and third parties' providers, which may print

    try:
        server = Server(device, lambda phase: connection.send(Phase(phase)))
        freeze_what_is_loaded()
        connection.send(READY)
        while True:
            connection.send(server.answer(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(0)  # nothing of a provider's (threads, exit handlers) may keep this process


def freeze_what_is_loaded() -> None:
    """Keep the garbage collector off what is loaded by now: the capture of a CUDA graph begins with a collection, which
    takes a tenth of a second with torch and Triton loaded."""
    gc.collect()
    gc.freeze()


def _settle_in(log_path: str, parent_pid: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this process
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a hanging call does not see the pipe close
        with contextlib.suppress(OSError):  # /proc may be read-only
            # Where memory runs out for all, the system ends this process and not its parent.
            Path("/proc/self/oom_score_adj").write_text("1000")
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(0)
