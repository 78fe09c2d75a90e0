"""Dynamic LoRA Fusion: choose, layer by layer and step by step, between a subject LoRA and a style LoRA."""

from __future__ import annotations

__version__ = "0.1.0"
