"""Which LoRAs the WebUI has, as the page asks for them."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from lib_dynfuse.webui import loras


class Networks(SimpleNamespace):
    """The host's module: a file named after its alias too, one whose alias may not be used, one that is new on disk."""

    def __init__(self) -> None:
        super().__init__(looked=0, forbidden_network_aliases={"none": 1})
        self.available_networks = {"fox_v2": "fox", "none": "a file"}
        self.available_network_aliases = {"fox_v2": "fox", "My Fox": "fox", "None": "another", "NONE": "another"}

    def list_available_networks(self) -> None:
        self.looked += 1
        self.available_network_aliases["new"] = "new file"


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Networks:
    found = Networks()
    monkeypatch.setitem(sys.modules, "networks", found)
    return found


def unlisted(names: Any) -> Any:
    return json.loads(loras.answer(json.dumps({"turn": 1, "names": names})))["unlisted"]


def test_names_and_aliases_are_known_as_the_host_knows_them(networks: Networks) -> None:
    assert unlisted(["fox_v2", "My Fox", "my fox", "", "fox", "none", "None"]) == ["my fox", "", "fox", "None"]


def test_asking_looks_at_no_file(networks: Networks) -> None:
    assert unlisted(["new"]) == ["new"]
    assert networks.looked == 0
    assert loras.on_disk("new") == "new file"
    assert networks.looked == 1
    assert unlisted(["new"]) == []


def test_without_a_list_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    assert unlisted(["fox"]) == []
    assert loras.on_disk("fox") is None


@pytest.mark.parametrize(
    "question", ["", "{", "[]", "3", "null", '{"names": 3}', '{"names": [3, null, []]}', "[" * 90_000, "x" * 200_000]
)
def test_whatever_is_asked_is_answered(networks: Networks, question: str) -> None:
    assert json.loads(loras.answer(question)) == {"unlisted": []}
