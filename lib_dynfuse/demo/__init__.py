"""The small trained model in the box, its LoRAs, and how they are made."""

from __future__ import annotations

from lib_dynfuse.guidance.libraries import skip_missing_operators

# Its worker processes begin here, and not at the command line.
skip_missing_operators()
