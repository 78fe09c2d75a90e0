"""The README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lib_dynfuse.options import options_table, rules_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("table", [options_table, rules_table])
def test_its_tables_are_the_ones_made_from_the_code(table: object) -> None:
    assert callable(table)
    assert table() in README


def test_every_picture_and_file_it_points_at_is_there() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert targets
    for target in targets:
        assert (ROOT / target).is_file(), target
