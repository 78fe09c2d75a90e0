from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from lib_dynfuse.infotext import infotext, quote

# The WebUI's own reader of the last line (modules/infotext_utils.py): the oracle for what we write.
WEBUI_PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_by_the_webui(line: str) -> dict[str, str]:
    values = {}
    for key, value in WEBUI_PAIR.findall(line):
        values[key] = json.loads(value) if value.startswith('"') and value.endswith('"') else value
    return values


def test_the_text_has_the_webui_layout():
    text = infotext("a fox", "blurry, dark", {"Steps": 20, "Sampler": "Euler a", "Size": "512x512"})
    assert text == "a fox\nNegative prompt: blurry, dark\nSteps: 20, Sampler: Euler a, Size: 512x512"


def test_no_negative_prompt_and_no_value_leave_no_trace():
    assert infotext("a fox", "", {"Steps": 20, "Clip skip": None}) == "a fox\nSteps: 20"


@given(
    st.text(alphabet=st.characters(codec="utf-8"), min_size=1).filter(
        lambda text: text.strip('" \t\r\n\x0b\x0c') == text
    )
)
def test_the_webui_reads_back_every_value_that_has_a_comma_colon_or_line_break(text: str):
    value = f"{text},:\n{text}"
    assert read_by_the_webui(f"Steps: 4, DynFuse strategy: {quote(value)}, Size: 8x8") == {
        "Steps": "4",
        "DynFuse strategy": value,
        "Size": "8x8",
    }


def test_plain_values_stay_unquoted():
    assert quote("kl-token") == "kl-token"
    assert quote(0.5) == "0.5"
