"""The rooms that know a host."""

from __future__ import annotations
