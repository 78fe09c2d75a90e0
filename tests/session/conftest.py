"""What every test of a generation begins with, and has to leave behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hand import Hand

from lib_dynfuse import session as sessions


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert sessions._open == []
