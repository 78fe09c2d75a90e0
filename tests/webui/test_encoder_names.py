"""An encoder's name from the panel, the API, an X/Y/Z plot or a picture opens no file that a stranger chose."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lib_dynfuse.options import OptionsError
from lib_dynfuse.webui import api, xyz
from lib_dynfuse.webui.arguments import ORDER, read_arguments
from lib_dynfuse.webui.infotext import fields_from_infotext

FOREIGN = ["/etc/passwd", "../x.pt", "a/../../x", "\\\\server\\share\\x", "C:\\x.pt", "~/x", "ViT-B-32:/etc/passwd"]


def by_name(option: str, value: str) -> None:
    read_arguments([{"enabled": True, "nudge": True, option: value}])


def by_place(option: str, value: str) -> None:
    args: list[Any] = [None] * len(ORDER)
    args[ORDER.index(option)] = value
    read_arguments(args)


def by_axis(option: str, value: str) -> None:
    module = SimpleNamespace(AxisOption=lambda label, kind, apply, **more: SimpleNamespace(
        label=label, apply=apply, **more), axis_options=[])  # fmt: skip
    xyz.register([SimpleNamespace(script_class=SimpleNamespace(__module__="xyz_grid.py"), module=module)])
    axis = next(one for one in module.axis_options if one.label == f"[DynFuse] {option.upper()}")
    p = SimpleNamespace()
    axis.apply(p, value, [value])
    with pytest.raises(OptionsError):
        axis.confirm(SimpleNamespace(), [value])
    read_arguments([{"enabled": True}], xyz.overrides(p))


@pytest.mark.parametrize("way", [by_name, by_place, by_axis])
@pytest.mark.parametrize("option", ["clip", "dino"])
def test_a_path_is_refused_with_one_answer_whether_or_not_it_is_there(way: Any, option: str, tmp_path: Path):
    (tmp_path / "there.safetensors").touch()
    answers = set()
    for value in (*FOREIGN, str(tmp_path / "there.safetensors"), str(tmp_path / "gone.safetensors")):
        with pytest.raises(OptionsError) as error:
            way(option, value)
        answers.add(str(error.value))
    (answer,) = answers
    assert answer.startswith(
        f"{option}: this {option.upper()} may not be used; allowed are files and folders in models/"
    )


@pytest.mark.parametrize("option", ["clip", "dino"])
def test_the_api_answers_alike(option: str, tmp_path: Path):
    (tmp_path / "there.safetensors").touch()
    answers = {
        api.wrong_arguments({"alwayson_scripts": {"DynFuse": {"args": [{option: value}]}}})
        for value in (*FOREIGN, str(tmp_path / "there.safetensors"), str(tmp_path / "gone.safetensors"))
    }
    assert len(answers) == 1
    assert answers != {""}


@pytest.mark.parametrize("value", ["dino-vits16", "mine/dino", "ViT-B-32:laion2b_s34b_b79k", "none", "NONE"])
def test_a_plain_name_passes(value: str):
    by_name("clip", value)
    by_name("dino", value)


@pytest.mark.parametrize("value", [*FOREIGN, "stranger/model", "ViT-B-32:openai"])
def test_a_pasted_picture_names_no_encoder(value: str):
    params = {"DynFuse": "1.0", "DynFuse nudge": "True", "DynFuse nudge decoder": "vae",
              "DynFuse clip": value, "DynFuse dino": value}  # fmt: skip
    assert not {"clip", "dino", "nudge_decoder"} & set(fields_from_infotext(params))
