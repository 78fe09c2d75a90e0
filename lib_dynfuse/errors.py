"""The one exception that is meant for a person to read, how a value from outside is shown in its message, and what
keeps the machine's paths out of other messages."""

from __future__ import annotations

import re
import reprlib

# Letters of a value from outside in a message: a prompt, a file or a request may be megabytes.
MOST_SHOWN = 200
_ELLIPSIS = "..."
# The folders of an absolute path: a POSIX one, one with a drive letter, one of another machine.
_ROOT = r"(?:(?<![\w./\\])/(?!/)|(?<![\w.])[A-Za-z]:[\\/]|(?<![\w.\\])\\\\)"
_QUOTED_FOLDERS = re.compile(rf"(?<=['\"]){_ROOT}[^'\"\n]*[\\/](?=[^'\"\n\\/]+['\"])")
_FOLDERS = re.compile(rf"{_ROOT}(?:[^\s'\"\\/]+[\\/]+)+")


class DynFuseError(ValueError):
    """Something a person gave us cannot be used.

    The message is one clear line that names the thing, says what is wrong with it and what would be right.
    """


def shown(text: str, most: int = MOST_SHOWN) -> str:
    """`text` in one line of at most `most` letters, as every output can write it; the middle of a longer one is left
    out."""
    if len(text) > most:
        head = (most - len(_ELLIPSIS)) * 2 // 3
        text = f"{text[:head]}{_ELLIPSIS}{text[len(text) - (most - len(_ELLIPSIS) - head) :]}"
    written = writable(" ".join(text.split()))
    return written if len(written) <= most else f"{written[: most - len(_ELLIPSIS)]}{_ELLIPSIS}"


def quoted(value: object, most: int = MOST_SHOWN) -> str:
    """`value` as Python writes it, in at most `most` letters, however large or deeply nested it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    try:
        return shown(short.repr(value), most)
    except (ValueError, RecursionError):  # Python writes no integer of more than 4300 digits
        return f"a value of type {type(value).__name__} that cannot be shown"


def writable(text: str) -> str:
    """`text` with an escape for every half of a surrogate pair: no file, terminal or answer can take one alone."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def without_folders(text: str) -> str:
    """A message in which of every absolute path its last name is left.

    For what libraries say. A folder with a space in its name is known as one only where the path is quoted.
    """
    return _FOLDERS.sub("", _QUOTED_FOLDERS.sub("", text))
