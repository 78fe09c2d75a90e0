"""The records of the last pictures, for the API: each under a name that only the answer to its own request has."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence

from lib_dynfuse.trace import Record

MOST_BATCHES = 16
MOST_BYTES = 64 * 2**20


class Traces:
    """At most `most` batches of pictures and `most_bytes` of them, but always the last batch. Any thread may ask."""

    def __init__(self, most: int = MOST_BATCHES, most_bytes: int = MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        # A batch's record, and its pictures by the names that they were given.
        self._batches: OrderedDict[int, tuple[Record, dict[str, int]]] = OrderedDict()
        self._count = 0

    def keep(self, record: Record, images: Sequence[int]) -> list[str]:
        """A name for each of these pictures of the record, by which it is found for as long as it is kept."""
        names = [secrets.token_urlsafe(16) for _ in images]
        with self._lock:
            self._count += 1
            self._batches[self._count] = record, dict(zip(names, images, strict=True))
            while len(self._batches) > 1 and (len(self._batches) > self._most or self._bytes() > self._most_bytes):
                self._batches.popitem(last=False)
        return names

    def find(self, name: str) -> tuple[Record, int] | None:
        """The record and the number of the picture in it; None for a name that was never given, or is forgotten."""
        with self._lock:
            return next(((record, names[name]) for record, names in self._batches.values() if name in names), None)

    def _bytes(self) -> int:
        records = (record for record, _ in self._batches.values())
        return sum(one.values.nbytes + sum(each.nbytes for each in one.tokens.values()) for one in records)


kept = Traces()
