"""The one exception that is meant for a person to read, and what keeps the machine's paths out of other messages."""

from __future__ import annotations

import re

# The folders of an absolute path: a POSIX one, one with a drive letter, one of another machine.
_ROOT = r"(?:(?<![\w./\\])/(?!/)|(?<![\w.])[A-Za-z]:[\\/]|(?<![\w.\\])\\\\)"
_QUOTED_FOLDERS = re.compile(rf"(?<=['\"]){_ROOT}[^'\"\n]*[\\/](?=[^'\"\n\\/]+['\"])")
_FOLDERS = re.compile(rf"{_ROOT}(?:[^\s'\"\\/]+[\\/]+)+")


class DynFuseError(ValueError):
    """Something a person gave us cannot be used.

    The message is one clear line that names the thing, says what is wrong with it and what would be right.
    """


def without_folders(text: str) -> str:
    """A message in which of every absolute path its last name is left.

    For what libraries say. A folder with a space in its name is known as one only where the path is quoted.
    """
    return _FOLDERS.sub("", _QUOTED_FOLDERS.sub("", text))
