"""What was chosen in a generation, recorded without a device synchronisation, and the pictures of it."""

from __future__ import annotations

from .collect import Trace
from .record import Item, Pass, Record

__all__ = ["Item", "Pass", "Record", "Trace"]
