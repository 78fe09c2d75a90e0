"""A pass of a host that is fused, without a session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lib_dynfuse.core import Fusion, Row, strategy
from lib_dynfuse.hosts.base import Host


@contextmanager
def fused(host: Host, rule: str = "sum") -> Iterator[list[Any]]:
    """The pass that is about to begin is fused; gives the rows that the UNet's calls are told to have."""
    seen: list[Any] = []
    with Fusion(host.layers(), strategy(rule)) as fusion:

        def before(rows: Sequence[Row] | None) -> None:
            seen.append(rows)
            fusion.paused = rows is None

        stop = host.watch(before)
        try:
            yield seen
        finally:
            stop()
