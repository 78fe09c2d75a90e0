"""Which subjects and styles the base model learns, and which are kept for LoRAs and for judging.

Nothing is ever trained on a *truth picture*: a kept subject in a kept style. Subjects that are in no picture of the
data file are not here at all.
"""

from __future__ import annotations

from lib_dynfuse.demo.split import (
    BASE_SUBJECTS,
    FRESH_SUBJECTS,
    HELD_SUBJECTS,
    REPORTED_SUBJECTS,
)

DRAWN_STYLES = ("flat", "noto", "3d")  # drawn by a set's own artists; all others are filters
BASE_FILTERS = ("chalk", "papercut", "mint")
BASE_STYLES = (*DRAWN_STYLES, *BASE_FILTERS)
KEPT_STYLES = ("ink", "neon", "blueprint", "woodcut", "sunset", "pixels", "glass")
STYLES = (*BASE_STYLES, *KEPT_STYLES)

STYLE_WORDS = {
    "flat": "flat",
    "noto": "noto",
    "3d": "3d",
    "chalk": "chalk",
    "papercut": "paper cut",
    "mint": "mint",
    "ink": "ink",
    "neon": "neon",
    "blueprint": "blueprint",
    "woodcut": "woodcut",
    "sunset": "sunset",
    "pixels": "pixel art",
    "glass": "stained glass",
}

# Rules are tuned on pairs of the first and reported on pairs of the second.
TUNING_SUBJECTS = HELD_SUBJECTS
REPORT_SUBJECTS = (*REPORTED_SUBJECTS, *FRESH_SUBJECTS)
KEPT_SUBJECTS = (*TUNING_SUBJECTS, *REPORT_SUBJECTS)

__all__ = ["BASE_SUBJECTS"]


def caption(name: str, style: str) -> str:
    """What a person types to get this subject in this style, for example `fox emoji, pixel art style`."""
    return f"{name} emoji, {STYLE_WORDS[style]} style"


def is_truth(name: str, style: str) -> bool:
    """Whether a picture of this subject in this style is kept for judging."""
    return name in KEPT_SUBJECTS and style in KEPT_STYLES
