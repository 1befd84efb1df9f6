"""Which providers exist: one explicit tuple of ours, and those that other packages register."""

from __future__ import annotations

from importlib.metadata import entry_points

from . import attention, gdn, kda, mamba2, mdn
from .provider import Operator, Provider

ENTRY_POINT_GROUP = "mdnbench.providers"

OPERATORS: tuple[Operator, ...] = (mdn.OPERATOR, gdn.OPERATOR, kda.OPERATOR, mamba2.OPERATOR, attention.OPERATOR)

_PROVIDERS: tuple[type[Provider], ...] = (
    mdn.MdnTorch,
    gdn.GdnTorch,
    kda.KdaTorch,
    mamba2.Mamba2Torch,
    attention.SdpaFlash,
    attention.SdpaCudnn,
    attention.SdpaEfficient,
    attention.SdpaMath,
)
