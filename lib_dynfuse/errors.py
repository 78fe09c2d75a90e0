"""The one exception that is meant for a person to read."""

from __future__ import annotations


class DynFuseError(ValueError):
    """Something a person gave us cannot be used.

    The message is one clear line that names the thing, says what is wrong with it and what would be right.
    """
