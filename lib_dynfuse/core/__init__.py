"""The host-free engine: fuse two roles' networks in a model's forward passes. Needs torch and nothing else.

from lib_dynfuse.core import Fusion, Role, strategy
from lib_dynfuse.core.delta import LowRank

with Fusion({"mid.to_q": (linear, {Role.SUBJECT: LowRank(a, b), Role.STYLE: LowRank(c, d)})}, strategy("kl")) as fusion:
    fusion.at(step, steps)
    model(x)
"""

from __future__ import annotations

from lib_dynfuse.core.fusion import ForeignBatch, Fusion, TraceSink
from lib_dynfuse.core.rules import Outcome
from lib_dynfuse.core.strategies import Strategy, StrategyInfo, strategies, strategy
from lib_dynfuse.core.types import Role, Row

__all__ = [
    "ForeignBatch",
    "Fusion",
    "Outcome",
    "Role",
    "Row",
    "Strategy",
    "StrategyInfo",
    "TraceSink",
    "strategies",
    "strategy",
]
