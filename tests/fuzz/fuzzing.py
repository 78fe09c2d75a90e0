"""What the fuzz tests share: how many inputs they try, and inputs that have broken something before."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

# Inputs by test, of this run.
TRIED: Counter[str] = Counter()
# Of a test in the suite; a campaign says how many by the environment.
_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0")) or 60

Test = Callable[..., None]


def fuzz(*args: st.SearchStrategy[Any], share: float = 1.0, **kwargs: st.SearchStrategy[Any]) -> Callable[[Test], Test]:
    """`hypothesis.given` with the number of inputs that this run wants; `share` of it for a test that takes long."""

    def decorate(test: Test) -> Test:
        @wraps(test)
        def counted(*given_args: Any, **given_kwargs: Any) -> None:
            TRIED[test.__name__] += 1
            test(*given_args, **given_kwargs)

        limited = settings(max_examples=max(3, int(_EXAMPLES * share)), print_blob=True)
        return limited(given(*args, **kwargs)(counted))

    return decorate


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


# Text with halves of surrogate pairs, control characters, and letters that grow or shrink with their case.
texts = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(codec=None), max_size=12),
    st.sampled_from(["", " ", "\0", "\ud800", "a\udfff", "\n", "İ", "ß", "１", "9" * 400, "9" * 5000, "1e999", "nan"]),
    st.sampled_from(["x" * 10_000, "[" * 20_000, '{"a":' * 20_000, "../../etc/passwd", "\\\\host\\share", "C:\\x"]),
)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.sampled_from([10**400, -(10**400), 10**4299, 2**63, 0, -0.0, 1e308, 5e-324]),
)
# Whatever JSON may hold, and a value nested too deeply for most readers.
json_values = st.one_of(
    st.recursive(
        st.none() | numbers | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from([nested(900), {"a": nested(900)}]),
)


def assert_said(line: str, most: int = 4000, begins: str = "", without: str = "\n") -> None:
    """A message is one line that every output can take, and no longer than needed."""
    assert line.startswith(begins)
    assert without not in line
    assert line
    assert "\n" not in line
    assert len(line.encode("utf-8")) <= 4 * most
    assert len(line) <= most
