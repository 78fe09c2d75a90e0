"""`python -m lib_dynfuse generate`, on the tiny pipelines: what it writes, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import Factors, in_layout, random_factors, unet
from typer.testing import CliRunner

from lib_dynfuse.__main__ import app
from lib_dynfuse.hosts.diffusers import Embedded
from lib_dynfuse.hosts.lora_files import find_lora
from lib_dynfuse.trace import Record

HADA = ("w1_a", "w1_b", "w2_a", "w2_b")
ROLES = "a fox <lora:fox:0.8:role=subject> in ink <lora:ink:0.6:role=style>"


class Said:
    """What a run of the command line left behind."""

    def __init__(self, result: Any, out: Path) -> None:
        self.code: int = result.exit_code
        self.errors: str = result.stderr
        self.lines: list[str] = result.stdout.splitlines()
        self.files = sorted(path.name for path in out.rglob("*")) if os.path.exists(out) else []
        self.out = out
        self.result = result


Generate = Callable[..., Said]


@pytest.fixture
def generate(sd_folder: Path, lora_dir: Path, tmp_path: Path) -> Generate:
    """Run `generate`; an option is a keyword, True for a switch, None to leave one out."""

    def run(prompt: str = ROLES, **options: Any) -> Said:
        given: dict[str, Any] = {
            "model": sd_folder,
            "lora_dir": lora_dir,
            "out": tmp_path / "out",
            "steps": 2,
            "cfg": 3,
            "seed": 7,
            "device": "cpu",
            **options,
        }
        words = ["generate", "--prompt", prompt]
        for name, value in given.items():
            flag = f"--{name.replace('_', '-')}"
            words += [] if value is None else [flag] if value is True else [flag, str(value)]
        return Said(CliRunner().invoke(app, words), Path(given["out"]))

    return run


def broken(lora_dir: Path, name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """A copy of fox under another name, with `change` made to its tensors."""
    state = load_file(lora_dir / "fox.safetensors")
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, lora_dir / f"{name}.safetensors")
    return f"a fox <lora:{name}:1:role=subject>"


def test_pictures_trace_and_heat_map_are_written_and_named(generate: Generate):
    said = generate(batch=2, negative="blurry, dark", strategy="kl-soft", set="softness=0.5", sampler="Euler a")
    assert said.code == 0, said.errors
    assert said.files == [
        "00000-7-chosen.png",
        "00000-7-trace.json",
        "00000-7.png",
        "00001-8-chosen.png",
        "00001-8.png",
    ]
    assert sorted(Path(line).name for line in said.lines) == said.files
    with Image.open(said.out / "00001-8.png") as picture:
        assert picture.size == (64, 64)
        assert picture.info["parameters"] == (
            f"{ROLES}\nNegative prompt: blurry, dark\n"
            "Steps: 2, Sampler: Euler a, CFG scale: 3, Seed: 8, Size: 64x64, Model: tiny-sd, DynFuse: 0.1.0, "
            'DynFuse strategy: kl-soft, DynFuse parameters: "{\\"softness\\": 0.5}"'
        )
    record = Record.from_json(said.out / "00000-7-trace.json")
    assert [one.step for one in record.passes] == [0, 1]
    assert "picture 00000-7: subject" in said.errors


def test_a_rule_that_decides_place_by_place_also_shows_where(generate: Generate):
    said = generate(strategy="kl-token", steps=1)
    assert said.files == ["00000-7-chosen.png", "00000-7-trace.json", "00000-7-where.png", "00000-7.png"]


def test_the_next_run_goes_on_counting(generate: Generate):
    generate("a fox", trace=True)
    assert generate("a fox", seed=9, size="64x128").files == ["00000-7.png", "00001-9.png"]


def test_a_seed_gives_the_same_picture_in_any_batch(generate: Generate, tmp_path: Path):
    generate(batch=2, out=tmp_path / "two")
    generate(seed=8, out=tmp_path / "one")
    with Image.open(tmp_path / "two" / "00001-8.png") as a, Image.open(tmp_path / "one" / "00000-8.png") as b:
        differences = [abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)]
    assert max(differences) <= 1


def test_no_role_at_all_is_said_and_made_as_the_host_would(generate: Generate):
    said = generate("a fox <lora:fox:0.8>")
    assert said.code == 0
    assert "no LoRA has a role" in said.errors
    assert said.files == ["00000-7.png"]
    with Image.open(said.out / "00000-7.png") as picture:
        assert "DynFuse" not in picture.info["parameters"]


def test_an_option_that_means_nothing_to_the_rule_is_said(generate: Generate):
    said = generate(strategy="sum", balance=0.5)
    assert said.code == 0
    assert "the rule sum has no balance" in said.errors


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<lora:fox:1:role=subjekt>", ["<lora:fox:1:role=subjekt>", "did you mean subject?", "subject, style, none"]),
        ("<lora:fox:1:role=a=b>", ["role=a=b", "more than one '='"]),
        ("<lora:fox:loud:role=style>", ["'loud' is not a number"]),
        ("<lora:fix:1:role=style>", ["<lora:fix>", "did you mean fox?", "ink", "detail"]),
        ("<lora:fox:1:role=style><lora:fox:1:role=subject>", ["fox.safetensors", "subject and style at once"]),
    ],
)
def test_a_wrong_tag_is_one_clear_line(generate: Generate, prompt: str, words: list[str]):
    assert_refused(generate(f"a fox {prompt}"), words)


def assert_refused(said: Said, words: list[str]) -> None:
    assert said.code == 2, said.result.output
    (line,) = [line for line in said.errors.splitlines() if line.startswith("error: ")]
    for word in words:
        assert word in line
    assert "Traceback" not in said.errors
    assert said.files == []
    assert said.lines == []


def test_an_empty_file_is_refused(generate: Generate, lora_dir: Path):
    (lora_dir / "empty.safetensors").write_bytes(b"")
    assert_refused(generate("<lora:empty:1:role=style>"), ["empty.safetensors", "is empty"])


def test_a_truncated_file_is_refused(generate: Generate, lora_dir: Path):
    whole = (lora_dir / "fox.safetensors").read_bytes()
    (lora_dir / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    assert_refused(generate("<lora:short:1:role=style>"), ["short.safetensors", "damaged"])


def test_a_file_that_is_something_else_is_refused(generate: Generate, lora_dir: Path):
    (lora_dir / "text.safetensors").write_text("a shopping list, longer than eight bytes")
    assert_refused(generate("<lora:text:1:role=style>"), ["text.safetensors", "not a .safetensors file"])
    torch.save({}, lora_dir / "old.pt")
    assert_refused(generate("<lora:old:1:role=style>"), ["old.pt is not a .safetensors file"])
    save_file({"conv.weight": torch.ones(1)}, lora_dir / "other.safetensors")
    assert_refused(generate("<lora:other:1:role=style>"), ["other.safetensors: not a LoRA", "conv.weight", "expected"])


def test_a_tensor_of_more_dimensions_than_torch_takes_is_refused(generate: Generate, lora_dir: Path):
    header = b'{"lora_unet_x.lora_down.weight":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % b",".join(
        [b"1"] * 65
    )
    (lora_dir / "deep.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    words = ["deep.safetensors: lora_unet_x.lora_down.weight has 65 dimensions, at most 5"]
    assert_refused(generate("<lora:deep:1:role=style>"), words)


@pytest.mark.parametrize(("kind", "size"), [("F6_E2M3", 3), ("F4", 2)])
def test_numbers_of_a_kind_that_torch_cannot_compute_with_are_refused(
    generate: Generate, lora_dir: Path, kind: str, size: int
):
    header = b'{"lora_unet_x.lora_down.weight":{"dtype":"%s","shape":[4,1],"data_offsets":[0,%d]}}' % (
        kind.encode(),
        size,
    )
    (lora_dir / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    assert_refused(generate("<lora:odd:1:role=style>"), ["odd.safetensors"])


def test_a_link_that_leads_nowhere_is_named_and_in_nobodys_way(generate: Generate, lora_dir: Path, tmp_path: Path):
    folder = tmp_path / "loras"
    folder.mkdir()
    (folder / "gone.safetensors").symlink_to(tmp_path / "nowhere.safetensors")
    (folder / "fox.safetensors").symlink_to(lora_dir / "fox.safetensors")
    assert_refused(
        generate("<lora:gone:1:role=style>", lora_dir=folder), ["<lora:gone>: gone.safetensors is", "a link"]
    )
    assert generate("<lora:fox:1:role=style>", lora_dir=folder).code == 0


def test_a_linked_folder_is_searched_once(lora_dir: Path, tmp_path: Path):
    folder, elsewhere = tmp_path / "loras", tmp_path / "elsewhere"
    folder.mkdir()
    (elsewhere / "deeper").mkdir(parents=True)
    (elsewhere / "deeper" / "fox.safetensors").write_bytes(b"fox")
    (folder / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    assert find_lora(folder, "fox") == folder / "linked" / "deeper" / "fox.safetensors"
    assert find_lora(folder, "linked/deeper/fox") == folder / "linked" / "deeper" / "fox.safetensors"


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta", "cpu:x"])
@pytest.mark.parametrize("command", ["generate", "bench"])
def test_a_device_that_is_not_there_is_one_clear_line(generate: Generate, command: str, device: str, tmp_path: Path):
    if command == "generate":
        assert_refused(generate(device=device), [f"--device {device}: there is no such device here"])
        return
    result = CliRunner().invoke(app, ["bench", "--unet", "tiny", "--pixels", "64", "--device", device])
    assert result.exit_code == 2
    assert result.stderr == f"error: --device {device}: there is no such device here\n"


@pytest.mark.parametrize("option", ["out", "model", "lora_dir", "config", "subject_reference"])
def test_a_name_that_is_too_long_for_a_file_is_one_clear_line(generate: Generate, tmp_path: Path, option: str):
    said = generate(**{"score": True, "out": tmp_path / "out", option: tmp_path / ("x" * 300)})
    assert said.code == 2
    (line,) = [line for line in said.errors.splitlines() if line.startswith("error: ")]
    assert "xxx" in line
    assert "Traceback" not in said.errors
    assert sorted(path.name for path in tmp_path.iterdir()) == []


def test_a_lora_with_a_name_that_is_too_long_is_not_found(generate: Generate):
    assert_refused(generate(f"<lora:{'x' * 100_000}:1:role=style>"), ["<lora:xxx", "fox", "ink"])


@pytest.mark.parametrize("option", ["prompt", "negative"])
def test_half_a_surrogate_pair_is_one_clear_line(generate: Generate, option: str):
    said = generate(**{"prompt": "a fox", option: "a \ud800 fox"})
    assert_refused(said, [f"--{option}: letter 3 is half a surrogate pair"])


def test_half_a_surrogate_pair_in_a_name_is_written_as_an_escape(generate: Generate, tmp_path: Path):
    """A file system may have names that are not UTF-8."""
    out = tmp_path / "out-\udcff"
    try:
        out.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("not on this file system")
    said = generate("a fox", out=out)
    assert said.code == 0, said.errors
    assert said.lines[0].endswith("out-\\udcff/00000-7.png")
    assert_refused(generate(strategy="\ud800"), ["strategy"])
    assert_refused(generate(model=tmp_path / "\udcff"), ["\\udcff does not exist"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(generate: Generate, lora_dir: Path, value: float):
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"][0, 0] = value

    words = ["spoilt.safetensors", "NaN or infinite", "lora_unet_mid_block_resnets_0_conv1.lora_up.weight"]
    assert_refused(generate(broken(lora_dir, "spoilt", spoil)), words)


@pytest.mark.parametrize("tag", ["<lora:huge:1:role=style>", "<lora:huge:1>"])
def test_a_picture_of_nans_is_said_and_not_written_as_black(generate: Generate, lora_dir: Path, fox: Factors, tag: str):
    save_file(in_layout("kohya", fox, alpha=1e30), lora_dir / "huge.safetensors")
    assert_refused(generate(f"a fox {tag}", batch=2), ["seed 7, 8", "NaN", "float32"])


def test_a_file_of_another_kind_of_network_makes_a_picture_and_nothing_else_is_said(generate: Generate, lora_dir: Path):
    loha = {f"hada_{name}": torch.randn(16, 2) if name.endswith("a") else torch.randn(2, 16) for name in HADA}
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    save_file({f"{key}.{name}": value for name, value in loha.items()}, lora_dir / "loha.safetensors")
    said = generate("a fox <lora:loha:1:role=style>", trace=None)
    assert said.code == 0
    assert said.files == ["00000-7.png"]
    notes = [line for line in said.errors.splitlines() if line.strip() and "Sampling" not in line]
    assert notes == ["note: no LoRA has role=subject: nothing to choose from, loha is applied as it is"]


def test_rank_0_is_refused(generate: Generate, lora_dir: Path):
    def hollow(state: dict[str, torch.Tensor]) -> None:
        for key, value in state.items():
            if key.endswith("lora_down.weight"):
                state[key] = value[:0]
            elif key.endswith("lora_up.weight"):
                state[key] = value[:, :0]

    assert_refused(generate(broken(lora_dir, "hollow", hollow)), ["hollow.safetensors", "rank 0"])


def test_a_lora_for_another_architecture_says_which_it_is_for_and_which_the_model_is(
    generate: Generate, lora_dir: Path, sdxl_folder: Path
):
    save_file(in_layout("kohya", random_factors(unet(768), seed=1)), lora_dir / "for-sd1.safetensors")
    words = ["for-sd1.safetensors", "SD 1.x (prompt vectors 768 wide)", "tiny-sd", "prompt vectors 32 wide"]
    assert_refused(generate("<lora:for-sd1:1:role=style>"), words)
    assert_refused(generate("<lora:for-sd1:1>", model=sdxl_folder), ["SD 1.x", "tiny-sdxl is SDXL"])

    flux = {f"transformer.single_transformer_blocks.0.attn.to_q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"}
    save_file(flux, lora_dir / "for-flux.safetensors")
    assert_refused(generate("<lora:for-flux:1:role=style>"), ["for-flux.safetensors is made for Flux", "tiny-sd"])


def test_a_lora_of_the_same_kind_that_fits_no_layer_is_refused(generate: Generate, lora_dir: Path, fox: Factors):
    elsewhere = {f"nowhere.{name}": factors for name, factors in fox.items()}
    save_file(in_layout("peft", elsewhere), lora_dir / "elsewhere.safetensors")
    assert_refused(generate("<lora:elsewhere:1:role=style>"), ["elsewhere.safetensors", "fits no layer"])


def test_layers_that_the_model_does_not_have_are_left_out_and_said(generate: Generate, lora_dir: Path, fox: Factors):
    more = {**fox, "nowhere.to_q": (torch.ones(2, 4), torch.ones(4, 2))}
    save_file(in_layout("peft", more), lora_dir / "more.safetensors")
    said = generate("<lora:more:1:role=style>")
    assert said.code == 0
    assert f"more.safetensors: 1 of {len(fox) + 1} layers are not in the model" in said.errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "kll"}, ["'kll'", "kl-token"]),
        ({"balance": 2}, ["balance", "-1 to 1"]),
        ({"set": "softness=1"}, ["'kl-cfg'", "'softness'"]),
        ({"set": "softness"}, ["--set softness", "NAME=VALUE"]),
        ({"strategy": "klora", "set": f"alpha={'9' * 400}"}, ["--set alpha=999", "not finite"]),
        ({"strategy": "klora", "set": "alpha=1e999"}, ["--set alpha=1e999", "not finite"]),
        ({"weight": f"clip_style={'9' * 400}"}, ["--weight clip_style=999", "not finite"]),
        ({"size": "wide"}, ["--size wide", "512x768"]),
        ({"size": "60x64"}, ["60x64", "multiples of 8"]),
        ({"sampler": "Oiler"}, ["'Oiler'", "did you mean Euler?", "DPM++ 2M Karras"]),
        ({"model": "nowhere"}, ["nowhere", "does not exist"]),
        ({"lora_dir": "nowhere"}, ["LoRA folder nowhere does not exist"]),
        ({"lora_dir": None}, ["--lora-dir"]),
        ({"start": 0.9, "stop": 0.1}, ["start 0.9", "stop 0.1"]),
    ],
)
def test_a_wrong_option_is_one_clear_line(generate: Generate, options: dict[str, Any], words: list[str]):
    assert_refused(generate(**options), words)


def test_a_model_of_another_kind_or_a_damaged_one_is_refused(generate: Generate, tmp_path: Path, sd_folder: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert_refused(generate(model=folder), ["no diffusers folder"])
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert_refused(generate(model=folder), ["is a FluxPipeline", "SDXL models can be used"])
    (folder / "model_index.json").write_text("{")
    assert_refused(generate(model=folder), ["model_index.json is damaged"])
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes(b"nothing")
    assert_refused(generate(model=checkpoint), ["damaged"])
    save_file({"weight": torch.ones(1)}, checkpoint)
    assert_refused(generate(model=checkpoint), ["not a Stable Diffusion checkpoint"])
    save_file({"model.diffusion_model.x": torch.ones(1), "cond_stage_model.y": torch.ones(1)}, checkpoint)
    assert_refused(generate(model=checkpoint, config=sd_folder), ["model.safetensors cannot be loaded"])


def test_a_file_where_the_pictures_should_go_is_refused(generate: Generate, tmp_path: Path):
    (tmp_path / "file").write_text("")
    said = generate(out=tmp_path / "file" / "out")
    assert_refused(said, ["is a file"])


def test_what_breaks_while_pictures_are_written_leaves_no_picture(generate: Generate, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lib_dynfuse.trace.pictures.save", full)
    assert_refused(generate(), ["error: No space left on device"])


def test_a_full_disk_is_one_clear_line_and_leaves_no_picture(generate: Generate, monkeypatch: pytest.MonkeyPatch):
    def full(image: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("PIL.Image.Image.save", full)
    assert_refused(generate(), ["error: 0-7.png: No space left on device"])


def test_too_little_memory_is_one_clear_line(generate: Generate, monkeypatch: pytest.MonkeyPatch):
    def starve(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(Embedded, "generate", starve)
    assert_refused(generate(), ["not enough memory", "--size", "--batch"])


def test_the_help_names_every_rule_and_the_tag_syntax():
    result = CliRunner().invoke(app, ["generate", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})
    assert result.exit_code == 0
    for word in ("role=subject", "role=style", "kl-token", "--lora-dir", "--negative", "--sampler"):
        assert word in result.stdout


def test_the_benchmark_says_a_table_and_writes_rows(tmp_path: Path):
    file = tmp_path / "rows.json"
    words = [
        "bench",
        "--unet",
        "tiny",
        "--pixels",
        "64",
        "--methods",
        "merged,kl",
        "--repeats",
        "1",
        "--json",
        str(file),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert [row["method"] for row in json.loads(file.read_text())] == ["merged", "kl"]
    assert "| kl |" in result.stdout


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["bench", "--unet", "sd3"], ["'sd3'", "sd15", "sdxl"]),
        (["bench", "--methods", "merged,fast"], ["'fast'", "kl-sampled"]),
        (["train-demo", "--stage", "polish"], ["polish", "unet"]),
    ],
)
def test_other_commands_refuse_what_they_do_not_know_in_one_line(words: list[str], named: list[str], tmp_path: Path):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    for word in named:
        assert word in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_version_is_said():
    assert CliRunner().invoke(app, ["--version"]).stdout == "0.1.0\n"
