"""The workload: everything that decides what an operator has to compute, and on which kind of device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
DEVICES = ("cpu", "cuda")
BYTES_PER_ELEMENT = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Workload:
    """One problem size, the same for every operator that is compared on it.

    q, k: [batch, seq_len, heads, head_dim_k]; v and the output: [batch, seq_len, value_heads, head_dim_v];
    gates: [batch, seq_len, value_heads] in float32.

    Args:
        seq_len: tokens a sequence, >= 1.
        head_dim_k: width of a query or key head, >= 1.
        head_dim_v: width of a value head, >= 1.
        batch: number of sequences, >= 1.
        heads: number of query and key heads, >= 1.
        value_heads: number of value heads, a multiple of `heads`; None means as many as `heads`.
        chunk_size: tokens a chunk; None for operators that have no chunks.
        dtype: of q, k, v and the output: "float32", "float16" or "bfloat16".
        device: "cpu" or "cuda".
        gates: name of the gate profile (`mdnbench.baselines.inputs.GATE_PROFILES`).

    Raises:
        ValueError: naming the argument, its value and what it may be.
    """

    seq_len: int
    head_dim_k: int
    head_dim_v: int
    batch: int = 1
    heads: int = 4
    value_heads: int | None = None
    chunk_size: int | None = 64
    dtype: str = "float32"
    device: str = "cpu"
    gates: str = "mild"

    def __post_init__(self) -> None:
        if self.value_heads is None:
            object.__setattr__(self, "value_heads", self.heads)
        for name in ("seq_len", "head_dim_k", "head_dim_v", "batch", "heads", "value_heads"):
            _require_positive(name, getattr(self, name))
        if self.chunk_size is not None:
            _require_positive("chunk_size", self.chunk_size)
        if self.value_heads % self.heads:
            raise ValueError(f"value_heads={self.value_heads} is not a multiple of heads={self.heads}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown: choose one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise ValueError(f"device={self.device!r} is unknown: choose one of {', '.join(DEVICES)}")

    @property
    def tokens(self) -> int:
        """Tokens in all sequences together."""
        return self.batch * self.seq_len

    @property
    def chunks(self) -> int | None:
        """Chunks in all sequences together, None without a chunk size; a last one that is not full counts as full."""
        return None if self.chunk_size is None else self.batch * -(-self.seq_len // self.chunk_size)

    def with_(self, **changes: Any) -> Workload:
        """This workload with some fields changed."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Workload:
        """The inverse of `to_dict`."""
        return cls(**fields)

    def label(self) -> str:
        """One line for people, such as `B1 T512 H4 K64 V64 C64 float32 cpu`; gates appear when not "mild"."""
        heads = f"H{self.heads}" if self.value_heads == self.heads else f"H{self.heads}/{self.value_heads}"
        chunk = "" if self.chunk_size is None else f" C{self.chunk_size}"
        gates = "" if self.gates == "mild" else f" {self.gates}"
        dims = f"K{self.head_dim_k} V{self.head_dim_v}"
        return f"B{self.batch} T{self.seq_len} {heads} {dims}{chunk} {self.dtype} {self.device}{gates}"


def _require_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
