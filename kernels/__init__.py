"""Momentum DeltaNet (MDN) operators, usable on their own."""

from .operator import chunk_momentum_delta_rule, fused_recurrent_momentum_delta_rule

__all__ = ["chunk_momentum_delta_rule", "fused_recurrent_momentum_delta_rule"]
