"""Which providers exist: one explicit tuple of ours, and those that other packages register."""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from . import attention, gdn, kda, mamba2, mdn
from .provider import ENTRY_POINT_GROUP, Operator, Provider
from .workload import DEVICES, DTYPES, Workload

OPERATORS: tuple[Operator, ...] = (mdn.OPERATOR, gdn.OPERATOR, kda.OPERATOR, mamba2.OPERATOR, attention.OPERATOR)

_PROVIDERS: tuple[type[Provider], ...] = (
    mdn.MdnTorch,
    mdn.MdnTriton,
    mdn.MdnFla,
    mdn.MdnAuthors,
    gdn.GdnTorch,
    gdn.GdnFla,
    gdn.GdnFlashQla,
    kda.KdaTorch,
    kda.KdaFla,
    kda.KdaFlashKda,
    mamba2.Mamba2Torch,
    mamba2.Mamba2Ssd,
    attention.SdpaFlash,
    attention.SdpaCudnn,
    attention.SdpaEfficient,
    attention.SdpaMath,
    attention.FlashAttention2,
    attention.FlashAttention3,
    attention.FlashAttention4,
)


def providers() -> dict[str, Provider]:
    """Every provider by name: ours first, then those of the entry-point group `mdnbench.providers`.

    An entry point names a `Provider` subclass. One that is broken does not hide the others: it is listed as a provider
    that supports nothing and says why.
    """
    found = {cls.name: cls() for cls in _PROVIDERS}
    operators_by_name = {operator.name: operator for operator in OPERATORS}
    for entry_point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value)):
        try:
            provider = entry_point.load()()
            _check(provider, found, operators_by_name)
        except Exception as error:  # a third party's fault: a reason, not the end of a sweep
            provider = _broken(entry_point, f"{type(error).__name__}: {error}", found)
        else:
            operators_by_name[provider.operator.name] = provider.operator
        found[provider.name] = provider
    return found


def get_provider(name: str) -> Provider:
    """The provider called `name`.

    Raises:
        ValueError: when there is none, with the nearest names.
    """
    found = providers()
    if name not in found:
        near = difflib.get_close_matches(name, found, cutoff=0.4) or list(found)
        raise ValueError(f"provider={name!r} is unknown: choose {', '.join(near)}")
    return found[name]


def operators() -> tuple[Operator, ...]:
    """Every operator that a provider computes, ours first."""
    found = {operator.name: operator for operator in OPERATORS}
    for provider in providers().values():
        if not isinstance(provider, BrokenProvider):
            found.setdefault(provider.operator.name, provider.operator)
    return tuple(found.values())


class BrokenProvider(Provider):
    """Stands for an entry point that gave no usable provider: supports nothing, and says why."""

    operator = Operator(name="unknown", title="Unknown", gates=(), select=lambda w, i: i, truth=lambda w, i: i["v"])

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self.reason = reason

    def supports(self, workload: Workload, mode: str = "forward") -> str | None:
        """The reason, whatever the workload."""
        return self.reason


def _check(provider: object, found: dict[str, Provider], operators_by_name: dict[str, Operator]) -> None:
    if not isinstance(provider, Provider):
        raise TypeError(f"it gives {provider!r}, which is no mdnbench.baselines.provider.Provider")
    for attribute in ("name", "operator"):
        if not hasattr(provider, attribute):
            raise TypeError(f"{type(provider).__name__} has no attribute {attribute}")
    for attribute, known in (("devices", DEVICES), ("dtypes", DTYPES), ("modes", Provider.modes)):
        values = getattr(provider, attribute)
        if not isinstance(values, (tuple, list)) or not values or not set(values) <= set(known):
            raise ValueError(f"{attribute}={values!r} must be a tuple of {', '.join(known)}, or of some of them")
    sizes = provider.chunk_sizes
    if sizes is not None and not (isinstance(sizes, (tuple, list)) and sizes and all(type(x) is int for x in sizes)):
        raise ValueError(f"chunk_sizes={sizes!r} must be a tuple of whole numbers, or None")
    if provider.name in found:
        raise ValueError(f"the provider name {provider.name!r} is taken")
    known = operators_by_name.get(provider.operator.name)
    if known is not None and known is not provider.operator:
        raise ValueError(f"the operator name {known.name!r} is taken: use that operator, or another name")


def _broken(entry_point: EntryPoint, reason: str, found: dict[str, Provider]) -> BrokenProvider:
    package = entry_point.dist.name if entry_point.dist else "an unknown package"
    name = entry_point.name if entry_point.name not in found else f"{entry_point.name} ({package})"
    return BrokenProvider(name, f"entry point {entry_point.name} = {entry_point.value} of {package}: {reason}")
