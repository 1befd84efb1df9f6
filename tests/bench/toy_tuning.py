"""What the tests tune: toy candidates that crash, hang, are wrong or slow. Loads no torch, so that it starts fast.

Not a test; the processes of the tuner import it by this name.
"""

import ctypes
import os
import time
from dataclasses import dataclass

from mdnbench.bench.tune_interface import Tunable
from mdnbench.bench.tune_log import Resources


@dataclass(frozen=True)
class Toy(Tunable):
    """Waits `wait_ms` as its work; `fault` says what goes wrong beside it, and when."""

    list: tuple[tuple[str, float], ...]  # (fault, wait_ms), the incumbent first
    name: str = "toy"
    marks: str = ""  # a file that gets a letter a piece of work, to count what is done twice
    shared_memory_bytes: int = 1000

    def candidates(self):
        return [{"fault": fault, "wait_ms": wait_ms} for fault, wait_ms in self.list]

    def mark(self, letter):
        if self.marks:
            with open(self.marks, "a") as file:
                file.write(letter)

    def compile(self, candidate):
        self.mark("c")
        fault = candidate["fault"]
        if fault == "does not compile":
            raise ValueError("unexpected token")
        if fault == "needs many registers":  # as Triton says it, with the command to do it again last
            raise RuntimeError(
                "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n"
                "ptxas fatal   : (C7602) Insufficient registers (128) to compile instruction at line 9\n"
                "ptxas fatal   : Ptx assembly aborted due to errors\n\n"
                "Repro command: ptxas -lineinfo -v /tmp/tmp1.ptx -o /tmp/tmp1.ptx.o\n"
            )
        if fault == "kills the compiler":
            os.abort()
        if fault == "compiles for ever":
            time.sleep(1000)
        spills = 300 if fault == "spills" else 0
        return [Resources("toy_kernel", 100, spills, 2000 if fault == "needs much memory" else 500, 4)]

    def check(self, candidate):
        self.mark("k")
        fault = candidate["fault"]
        if fault == "reads address 8":
            ctypes.string_at(8)
        if fault == "hangs":
            time.sleep(1000)
        if fault == "asserts":
            raise AssertionError("index out of range")
        if fault == "waits to be killed":
            time.sleep(1000)
        return "o has a relative error of 0.3" if fault == "wrong" else None

    def run(self, candidate):
        def call():
            time.sleep(candidate["wait_ms"] / 1e3)  # unlike work, not slowed by what else this machine does
            if candidate["fault"] == "dies when timed":
                os._exit(3)

        return call
