"""What was chosen is kept for a while, for who was told its name."""

from __future__ import annotations

import numpy as np

from lib_dynfuse.trace import Record
from lib_dynfuse.webui.traces import Traces


def record(numbers: int = 4) -> Record:
    return Record(["attn"], [], np.zeros((1, 1, numbers // 4, 4), np.float32))


def test_a_name_finds_its_own_picture_and_no_other_name_finds_one() -> None:
    kept = Traces()
    first, second = record(), record()
    names = [*kept.keep(first, [0, 2]), *kept.keep(second, [0])]
    assert [kept.find(name) for name in names] == [(first, 0), (first, 2), (second, 0)]
    assert len(set(names)) == 3
    for guess in ("", "0", names[0][:-1], names[0] + "A"):
        assert kept.find(guess) is None


def test_only_so_many_batches_are_kept() -> None:
    kept = Traces(most=3)
    names = [kept.keep(record(), [0])[0] for _ in range(10)]
    assert [kept.find(name) is not None for name in names] == [False] * 7 + [True] * 3


def test_only_so_many_bytes_are_kept_but_always_the_last_batch() -> None:
    kept = Traces(most_bytes=100)
    small = [kept.keep(record(8), [0])[0] for _ in range(4)]
    assert [kept.find(name) is not None for name in small] == [False, True, True, True]
    (large,) = kept.keep(record(400), [0])
    assert [kept.find(name) is not None for name in (*small, large)] == [False] * 4 + [True]


def test_what_was_chosen_token_by_token_counts_too() -> None:
    kept = Traces(most_bytes=100)
    one = record()
    one.tokens = {"attn": np.zeros((1, 100), np.float32)}
    (first,) = kept.keep(one, [0])
    kept.keep(record(), [0])
    assert kept.find(first) is None
