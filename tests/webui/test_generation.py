"""One generation as the WebUI's script drives it: a processing object in, infotext, comments and pictures out."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lib_dynfuse import __version__
from lib_dynfuse import session as sessions
from lib_dynfuse.core import strategies
from lib_dynfuse.core.delta import LowRank
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.guidance.pictures import PictureFile
from lib_dynfuse.hosts.base import Before, Layers, Place, Tag, Unsupported
from lib_dynfuse.webui import generation, guided, traces

LORAS = {"lora": [Tag("fox", 1.0, Role.SUBJECT), Tag("ink", 0.9, Role.STYLE)]}
NONE: dict[str, list[Any]] = {"lora": []}


class Hand:
    """A host of one layer."""

    name = "hand"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = nn.Linear(6, 6)
        self.tokens = 4

    def read_tags(self, networks: Mapping[str, Sequence[Any]]) -> list[Tag]:
        return list(networks["lora"])

    def take(self, tags: Sequence[Tag]) -> list[str]:
        return []

    def layers(self) -> Layers:
        return {
            "attn": (self.unet, {role: LowRank(torch.randn(2, 6), torch.randn(6, 2)) for role in Role}),
        }

    def watch(self, before: Before) -> Callable[[], None]:
        return self.unet.register_forward_pre_hook(lambda module, args: before(self.rows)).remove

    def place(self, params: Any) -> Place:
        self.rows = [Row(image, cond, 40 + image) for cond in (True, False) for image in range(params.images)]
        return Place(params.step, params.total, None)

    def give_back(self) -> None:
        pass


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The host's `modules`, as far as it is asked; what it saves."""
    found: list[tuple[str, str]] = []
    modules: Any = ModuleType("modules")
    modules.images = SimpleNamespace(save_image=lambda image, path, name, *_, **__: found.append((path, name)))
    modules.shared = ModuleType("modules.shared")
    modules.shared.opts = SimpleNamespace(grid_save=True, grid_format="png", grid_extended_filename=False)
    for name, module in (("", modules), (".images", modules.images), (".shared", modules.shared)):
        monkeypatch.setitem(sys.modules, f"modules{name}", module)
    return found


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch, saved: list[tuple[str, str]]) -> Iterator[Hand]:
    host = Hand()
    monkeypatch.setattr(generation, "detect", lambda: host)
    yield host
    assert sessions._open == []


class Processing(SimpleNamespace):
    """What the script sees of the host's processing object."""

    def comment(self, text: str) -> None:
        self.comments.append(text)


def processing(**values: Any) -> Any:
    given: dict[str, Any] = {
        "extra_generation_params": {},
        "comments": [],
        "steps": 3,
        "batch_size": 1,
        "iteration": 0,
        "all_prompts": ["a fox <lora:fox:1:role=subject> <lora:ink:0.9:role=style>"],
        "all_seeds": [5],
        "outpath_grids": "grids",
        "do_not_save_grid": False,
    }
    return Processing(**{**given, **values})


@torch.no_grad()
def sample(p: Any, host: Hand, networks: Any = LORAS, images: int = 1) -> Tensor:
    """What the host does for one batch of pictures."""
    generation.activate(p, networks)
    generation.attach(p)
    for number in range(p.steps):
        call = SimpleNamespace(step=number, total=p.steps, images=images, denoiser=SimpleNamespace(p=p))
        generation.step(call)
        output: Tensor = host.unet(torch.ones(2 * images, host.tokens, 6))
    generation.finish_batch(p, torch.rand(images, 3, 8, 8))
    return output


def written(p: Any, index: int = 0) -> dict[str, Any]:
    """The infotext of one picture, as the host makes it."""
    found = {k: v(p=p, index=index) if callable(v) else v for k, v in p.extra_generation_params.items()}
    return {key: value for key, value in found.items() if value is not None}


def test_a_picture_says_what_it_was_made_with_and_what_was_chosen(hand: Hand) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True, "strategy": "kl", "balance": 0.5}])
    before = written(p)
    sample(p, hand)
    generation.finish(p, SimpleNamespace())
    after = written(p)
    assert before == {}
    chosen = after.pop("DynFuse chosen")
    assert after == {"DynFuse": __version__, "DynFuse strategy": "kl", "DynFuse balance": "0.5"}
    assert re.fullmatch(r"subject fox (\d+)% style ink (\d+)%", chosen)
    assert p.comments == []


@pytest.mark.parametrize("rule", sorted(strategies()))
def test_what_is_said_of_a_choice_is_true_for_the_rule(hand: Hand, rule: str) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True, "strategy": rule}])
    sample(p, hand)
    generation.finish(p, SimpleNamespace())
    chosen = written(p).get("DynFuse chosen")
    if rule in ("sum", "np"):
        assert chosen is None, "nothing is chosen there"
        return
    assert chosen is not None
    assert chosen.startswith("subject fox ")
    assert chosen.endswith(" of the weights") is (rule in ("sum-cfg", "kl-cfg", "kl-soft"))


def test_every_picture_of_a_batch_has_its_own_share(hand: Hand) -> None:
    p = processing(batch_size=6, all_prompts=["a <lora:fox:1>"] * 6)
    generation.begin(p, [{"enabled": True, "strategy": "random"}])
    p.steps = 1
    sample(p, hand, images=6)
    assert len({written(p, index)["DynFuse chosen"] for index in range(6)}) > 1
    assert "DynFuse chosen" not in written(p, 6)


def test_a_picture_that_was_not_fused_says_nothing_of_a_rule(hand: Hand) -> None:
    p = processing(all_prompts=["a fox <lora:fox:1>"])
    generation.begin(p, [{"enabled": True, "strategy": "kl", "balance": 0.5}])
    sample(p, hand, NONE)
    assert list(written(p)) == ["DynFuse note"]
    generation.finish(p, SimpleNamespace())


def test_fusion_that_could_not_begin_leaves_no_rule_in_the_infotext(hand: Hand, monkeypatch: Any) -> None:
    def fail() -> Layers:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(hand, "layers", fail)
    p = processing()
    generation.begin(p, [{"enabled": True, "strategy": "kl"}])
    sample(p, hand)
    assert list(written(p)) == ["DynFuse note"]


def test_each_batch_says_whether_it_was_fused(hand: Hand) -> None:
    p = processing(all_prompts=["a fox <lora:fox:1>"] * 3)
    generation.begin(p, [{"enabled": True, "strategy": "kl"}])
    said = []
    for p.iteration, networks in enumerate((NONE, LORAS, NONE)):
        sample(p, hand, networks)
        said.append("DynFuse strategy" in written(p))
    assert said == [False, True, False]


def test_a_picture_is_fused_whose_hires_pass_alone_is_not(hand: Hand) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True, "strategy": "kl"}])
    generation.activate(p, LORAS)
    generation.attach(p)
    generation.activate(p, NONE)
    generation.attach(p)
    generation.finish_batch(p, torch.rand(1, 3, 8, 8))
    assert written(p)["DynFuse strategy"] == "kl"


def test_a_picture_that_was_only_compared_says_with_what_and_of_no_rule(hand: Hand, monkeypatch: Any) -> None:
    compared = SimpleNamespace(decoder=None, guide=lambda p: None, scores=lambda p, images: [{"harmonic_mean": 0.5}])
    monkeypatch.setattr(guided, "begin", lambda *_: compared)
    p = processing(all_prompts=["a fox <lora:fox:1>"])
    generation.begin(p, [{"enabled": True, "strategy": "kl", "balance": 0.5, "score": True, "clip": "mine"}])
    sample(p, hand, NONE)
    said = written(p)
    generation.finish(p, SimpleNamespace())
    assert {key: said[key] for key in ("DynFuse", "DynFuse clip")} == {"DynFuse": __version__, "DynFuse clip": "mine"}
    assert not {"DynFuse strategy", "DynFuse balance"} & set(said)


ROLES = "a fox <lora:fox:1:role=subject> <lora:ink:0.9:role=style>"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"all_prompts": [ROLES]}, True),
        ({"all_prompts": ["a fox <lora:fox:1>", ROLES, ROLES]}, True),
        ({"all_prompts": ["a <lora:fox:1: Role = Subject>"]}, True),
        ({"all_prompts": ["a <lora:fox:role=sbject>"]}, True),
        ({"all_prompts": ["a <lora:fox:1> role=subject <lora:ink:1:role=none>"]}, False),
        ({"all_prompts": ["a fox"], "all_hr_prompts": [ROLES], "enable_hr": True}, True),
        ({"all_prompts": ["a fox"], "all_hr_prompts": [ROLES], "enable_hr": False}, False),
    ],
)
def test_roles_that_nobody_looks_at_are_told_once(hand: Hand, values: dict[str, Any], told: bool) -> None:
    p = processing(**values)
    plain = hand.unet(torch.ones(2, 4, 6))
    generation.begin(p, [{"enabled": False}])
    for p.iteration in range(2):
        assert torch.equal(sample(p, hand), plain)
    said = "LoRAs have roles, but Dynamic LoRA Fusion is not ticked (enabled): they are added as without roles"
    assert p.comments == ([f"DynFuse: {said}"] if told else [])
    assert written(p) == ({"DynFuse note": said} if told else {})


@pytest.mark.parametrize(
    ("enabled", "negative", "told"),
    [
        (True, "blurry <lora:ink:1>", "<lora:ink:1>"),
        (True, "<lora:ink:1> <lora:fox:1:role=style> <lora:ink:1>", "<lora:ink:1>, <lora:fox:1:role=style>"),
        (False, "<lora:ink:1> <lora:fox:1:role=style>", "<lora:fox:1:role=style>"),
        (False, "<lora:ink:1>", ""),
        (True, "blurry", ""),
    ],
)
def test_a_lora_in_the_negative_prompt_is_told(hand: Hand, enabled: bool, negative: str, told: str) -> None:
    p = processing(all_prompts=["a fox"], all_negative_prompts=[negative, negative])
    generation.begin(p, [{"enabled": enabled}])
    sessions.close_all()
    said = f"DynFuse: {told}: a LoRA in the negative prompt does nothing; write it into the prompt"
    assert p.comments == ([said] if told else [])


@pytest.mark.parametrize(
    ("networks", "batches", "said"),
    [
        (LORAS, 1, "1 picture, fused by kl (subject fox 1; style ink 0.9)"),
        (LORAS, 2, "2 pictures, fused by kl (subject fox 1; style ink 0.9)"),
        (NONE, 1, "1 picture, not fused"),
    ],
)
def test_the_log_has_one_line_a_generation_and_what_is_wrong(
    hand: Hand, caplog: pytest.LogCaptureFixture, networks: Any, batches: int, said: str
) -> None:
    p = processing(all_prompts=["a fox <lora:fox:1>"] * batches)
    generation.begin(p, [{"enabled": True, "strategy": "kl"}])
    for p.iteration in range(batches):
        sample(p, hand, networks)
    generation.finish(p, SimpleNamespace())
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines[-1] == ("INFO", said)
    assert [level for level, _ in lines[:-1]] == (["WARNING"] if networks is NONE else [])


def test_the_log_says_nothing_of_a_generation_that_is_none_of_ours(
    hand: Hand, caplog: pytest.LogCaptureFixture
) -> None:
    p = processing(all_prompts=["a fox <lora:fox:1>"])
    generation.begin(p, [{"enabled": False}])
    sample(p, hand)
    generation.finish(p, SimpleNamespace())
    assert caplog.records == []


def test_off_leaves_no_trace(hand: Hand) -> None:
    p = processing(all_prompts=["a fox <lora:fox:1>"])
    plain = hand.unet(torch.ones(2, 4, 6))
    generation.begin(p, [{"enabled": False, "balance": 0.5}])
    assert torch.equal(sample(p, hand), plain)
    assert (p.extra_generation_params, p.comments) == ({}, [])


def test_wrong_options_are_told_and_nothing_is_fused(hand: Hand) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True, "balance": 3}])
    plain = hand.unet(torch.ones(2, 4, 6))
    assert torch.equal(sample(p, hand), plain)
    assert p.comments[0].startswith("DynFuse: not fused: balance: ")
    assert written(p)["DynFuse note"].startswith("not fused: balance: ")


def test_a_host_that_lacks_something_is_named(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise Unsupported("the WebUI's own Lora extension is not there")

    monkeypatch.setattr(generation, "detect", fail)
    p = processing()
    generation.begin(p, [{"enabled": True}])
    assert p.comments == ["DynFuse: not fused: the WebUI's own Lora extension is not there"]


def test_options_that_mean_nothing_to_the_rule_are_told(hand: Hand) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True, "strategy": "sum", "balance": 0.5}])
    assert p.comments == ["DynFuse: the rule sum has no balance: it changes nothing"]


def test_what_is_told_twice_is_written_once_and_different_things_together(hand: Hand) -> None:
    p = processing(all_prompts=["a", "b"], batch_size=1)
    generation.begin(p, [{"enabled": True, "strategy": "sum", "balance": 0.5}])
    for p.iteration in (0, 1):
        sample(p, hand, NONE)
    note = written(p)["DynFuse note"]
    assert note.split("; ")[0] == "the rule sum has no balance: it changes nothing"
    assert note.count("the prompt has no LoRA") == 1


@pytest.mark.parametrize(("hires", "told"), [(False, 1), (True, 0)])
def test_prompts_of_a_batch_with_different_loras_are_told(hand: Hand, hires: bool, told: int) -> None:
    p = processing(
        batch_size=2,
        all_prompts=["a <lora:fox:1:role=subject>", "b <lora:fox:1:role=style>", "c", "d"],
        all_hr_prompts=["a", "b", "c", "d"],
        is_hr_pass=hires,
    )
    generation.begin(p, [{"enabled": True}])
    generation.activate(p, LORAS)
    assert len([line for line in p.comments if "have different LoRAs" in line]) == told
    sessions.close_all()


def test_a_grid_s_cells_do_not_pass_on_what_was_written(hand: Hand) -> None:
    p = processing()
    first = copy(p)
    generation.begin(first, [{"enabled": True}])
    sample(first, hand)
    p.all_prompts[:] = ["a fox"]
    second = copy(first)  # shares extra_generation_params
    generation.begin(second, [{"enabled": False}])
    assert second.extra_generation_params == {}
    assert torch.equal(sample(second, hand), hand.unet(torch.ones(2, 4, 6)))


def test_a_cell_s_own_options_come_from_its_axes(hand: Hand) -> None:
    p = processing(_dynfuse_overrides={"strategy": "sum"})
    generation.begin(p, [{"enabled": True, "strategy": "kl"}])
    sample(p, hand)
    assert written(p)["DynFuse strategy"] == "sum"


@pytest.mark.parametrize("rule", ["kl", "kl-token"])
def test_the_pictures_of_what_was_chosen_come_last_and_beside_the_grids(
    hand: Hand, rule: str, saved: list[tuple[str, str]]
) -> None:
    p = processing(batch_size=2, all_prompts=["a <lora:fox:1>"] * 2)
    generation.begin(p, [{"enabled": True, "strategy": rule, "trace": True}])
    sample(p, hand, images=2)
    grid, made = Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8)) for _ in range(2)]
    processed = SimpleNamespace(images=[grid, *made], infotexts=["grid", "one", "two"], index_of_first_image=1)
    generation.finish(p, processed)
    each = 2 if rule == "kl-token" else 1
    assert processed.images[:3] == [grid, *made]
    assert processed.infotexts == ["grid", "one", "two", *["one"] * each, *["two"] * each]
    assert saved == [("grids", "dynfuse")] * 2 * each
    assert all(image.size[0] > 100 for image in processed.images[3::each])


def test_pictures_of_what_was_chosen_come_only_when_asked_for(hand: Hand) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True}])
    sample(p, hand)
    processed = SimpleNamespace(images=[1], infotexts=["one"], index_of_first_image=0)
    generation.finish(p, processed)
    assert processed.images == [1]


def test_an_inner_generation_does_not_disturb_the_outer_one(hand: Hand) -> None:
    """Some extensions generate again while a picture is being finished."""
    outer, inner = processing(), processing()
    generation.begin(outer, [{"enabled": True}])
    sample(outer, hand)
    generation.begin(inner, [{"enabled": True}])
    sample(inner, hand)
    outer.iteration = 1
    fused = sample(outer, hand)
    assert not torch.equal(fused, hand.unet(torch.ones(2, 4, 6)))
    generation.finish(outer, SimpleNamespace())


def test_a_picture_s_own_trace_is_named_in_the_answer_and_nowhere_else(
    hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces, "kept", traces.Traces())
    p = processing(batch_size=2, all_prompts=["a <lora:fox:1>"] * 4)
    generation.begin(p, [{"enabled": True}])
    for p.iteration in (0, 1):
        sample(p, hand, images=2)
    processed = SimpleNamespace(extra_generation_params=p.extra_generation_params)
    generation.finish(p, processed)
    names = processed.extra_generation_params["DynFuse trace"]
    found = [traces.kept.find(name) for name in names]
    assert [one[1] for one in found if one is not None] == [0, 1, 0, 1]
    assert found[0][0] is found[1][0] is not found[2][0]  # type: ignore[index]
    assert len(set(names)) == 4
    assert all(len(name) >= 20 for name in names)
    assert "DynFuse trace" not in written(p), "a grid's infotext is written from this afterwards"


def test_the_answer_can_be_written_as_json(hand: Hand) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True}])
    sample(p, hand)
    processed = SimpleNamespace()
    generation.finish(p, processed)
    assert json.loads(json.dumps(processed.extra_generation_params))["DynFuse strategy"] == "kl-cfg"


def test_a_picture_that_is_not_fused_has_no_trace(hand: Hand) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True}])
    sample(p, hand, NONE)
    processed = SimpleNamespace()
    generation.finish(p, processed)
    assert "DynFuse trace" not in processed.extra_generation_params


@pytest.mark.parametrize("axis", [False, True])
def test_a_path_in_a_request_is_not_read_and_not_repeated(
    hand: Hand, axis: bool, tmp_path: Any, picture: bytes, allowed: list[str]
) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture)
    given = {"subject_references": [str(secret)]}
    p = processing(**({"_dynfuse_overrides": given} if axis else {}))
    generation.begin(p, [{"enabled": True, "score": True, **({} if axis else given)}])
    sessions.close_all()
    assert p.comments[0].startswith("DynFuse: not scored: subject_references: picture 1: is neither a picture")
    said = " ".join([*p.comments, *map(str, written(p).values())])
    assert str(tmp_path) not in said
    assert "secret" not in said
    assert hashlib.sha256(picture).hexdigest()[:10] not in said
    assert "DynFuse subject references" not in written(p)


def test_a_picture_s_fingerprint_is_written_and_the_picture_decoded_once(
    hand: Hand, text: str, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    real = PictureFile.decode
    monkeypatch.setattr(PictureFile, "decode", lambda self: decoded.append(self.name) or real(self))  # type: ignore[func-returns-value]

    def prepare(options: Any, find: Callable[[Role], Any], *_: Any) -> None:
        assert [None if (found := find(role)) is None else len(found) for role in Role] == [2, None]

    monkeypatch.setattr(guided, "prepare", prepare)
    monkeypatch.setattr(guided, "_preview", lambda p, role: None)
    monkeypatch.setattr(guided, "_device", lambda: None)
    monkeypatch.setattr(guided, "_dtype", lambda: None)
    monkeypatch.setattr(guided.settings, "encoder_source", lambda: None)
    p = processing()
    given = {"subject_references": [text, text], "references": "given"}
    generation.begin(p, [{"enabled": True, "score": True, **given}])
    sessions.close_all()
    name = hashlib.sha256(picture).hexdigest()[:10]
    assert p._dynfuse.described["DynFuse subject references"] == f"2 pictures {name} {name}"
    assert decoded == ["subject_references: picture 1", "subject_references: picture 2"]


def test_no_note_has_a_path_of_the_machine(hand: Hand, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise FileNotFoundError(2, "No such file or directory", "/srv/my webui/models/dynfuse/clip.safetensors")

    monkeypatch.setattr(guided, "begin", fail)
    p = processing()
    generation.begin(p, [{"enabled": True, "nudge": True}])
    sessions.close_all()
    assert p.comments == [f"DynFuse: {written(p)['DynFuse note']}"]
    assert "No such file or directory: 'clip.safetensors'" in p.comments[0]
    assert "srv" not in p.comments[0]


def test_a_note_is_short_and_notes_are_few_whatever_the_prompt_holds(hand: Hand) -> None:
    p = processing()
    generation.begin(p, [{"enabled": True}])
    networks = [Tag("x" * 100_000, 0.0, Role.SUBJECT), *(Tag(f"a{number}", 0.0, Role.STYLE) for number in range(2000))]
    generation.activate(p, {"lora": networks})
    sessions.close_all()
    assert len(p.comments) == 30
    assert p.comments[-1] == "DynFuse: there is more to say of this prompt"
    assert max(map(len, p.comments)) < 1100
    assert len(written(p)["DynFuse note"]) < 40_000
    generation.begin(p, [{"enabled": True, "strategy": "best"}])
    assert p.comments[-1].startswith("DynFuse: not fused: strategy: unknown strategy 'best'")
