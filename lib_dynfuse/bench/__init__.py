"""What fusing costs: time per forward pass of a real UNet, as a ratio to the same UNet with both networks merged."""

from __future__ import annotations

from lib_dynfuse.bench.run import METHODS, UNETS, Result, bench

__all__ = ["METHODS", "UNETS", "Result", "bench"]
