"""The benchmark measures what it says: the same layers, the same deltas, rows that a script can read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from lib_dynfuse.bench import METHODS, bench, rounds
from lib_dynfuse.bench.by_layer import by_layer
from lib_dynfuse.bench.by_layer import table as layers_table
from lib_dynfuse.bench.count import count, counted
from lib_dynfuse.bench.count import table as counts_table
from lib_dynfuse.bench.rivals import klora_published, with_peft
from lib_dynfuse.bench.run import on_gpu, table
from lib_dynfuse.bench.startup import start_up
from lib_dynfuse.bench.unets import covered, make_inputs, make_layers, make_unet
from lib_dynfuse.core import Fusion, kernels, strategy


def test_peft_computes_what_the_engine_computes() -> None:
    unet = make_unet("tiny", torch.device("cpu"), torch.float32)
    forward, layers = make_inputs(unet, 64, 2), make_layers(unet, 4)
    rival = with_peft(unet, layers, 4)
    with torch.inference_mode():
        plain = forward()
        with Fusion(layers, strategy("sum")):
            found = forward()
        torch.testing.assert_close(found, forward(rival), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, plain, rtol=1e-2)
        assert torch.equal(forward(), plain), "neither changes the model itself"


def test_published_klora_chooses_one_delta_per_layer() -> None:
    unet = make_unet("tiny", torch.device("cpu"), torch.float32)
    forward, layers = make_inputs(unet, 64, 2), make_layers(unet, 4)
    with torch.inference_mode():
        plain = forward()
        with klora_published(layers):
            chosen = forward()
        with Fusion(layers, strategy("sum")):
            summed = forward()
        assert not torch.allclose(chosen, plain)
        assert not torch.allclose(chosen, summed)
        assert torch.equal(forward(), plain)


def test_attention_feed_forward_and_convolutions_are_covered() -> None:
    names = covered(make_unet("tiny", torch.device("cpu"), torch.float32))
    for part in ("attn1.to_q", "attn2.to_out.0", "ff.net.2", "proj_in", "resnets.0.conv1"):
        assert any(name.endswith(part) for name in names), part
    assert not any("time_emb" in name or "sampler" in name for name in names)


def test_every_method_has_a_row_and_the_rows_are_written(tmp_path: Path) -> None:
    rows = bench("tiny", pixels=64, rank=2, methods=METHODS, repeats=1, out=tmp_path / "bench.json")
    assert [row.method for row in rows] == list(METHODS)
    assert rows[0].ratio == rows[0].low == rows[0].high == 1.0
    assert all(row.seconds > 0 and len(row.rounds) == 1 for row in rows)
    written = json.loads((tmp_path / "bench.json").read_text())
    keys = {"unet", "pixels", "batch", "rank", "cover", "device", "dtype", "method", "seconds", "ratio", "low", "high"}
    assert {*keys, "rounds"} < set(written[0])
    assert len(table(rows).splitlines()) == 4 + len(METHODS)


def test_every_round_begins_with_another_method_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(rounds, "_timed", lambda forward, place: (order.append(forward), (1.0 + len(order), None))[1])
    rows = bench("tiny", pixels=64, rank=2, methods=["merged", "peft"], repeats=2)
    assert [forward is order[0] for forward in order] == [True, False, False, True, True, False]
    assert [row.rounds for row in rows] == [(5.0, 6.0), (4.0, 7.0)]
    assert rows[1].ratio == pytest.approx((4 / 5 + 7 / 6) / 2)


def test_what_is_added_is_measured_layer_by_layer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = []

    def timed(forward: partial[object], place: torch.device) -> tuple[float, None]:
        forward()
        ran.append(forward)
        return 1.0, None

    monkeypatch.setattr(rounds, "_timed", timed)
    rows = by_layer("tiny", pixels=64, rank=2, methods=["kl", "peft"], repeats=2, out=tmp_path / "added.json")
    assert [row["method"] for row in json.loads((tmp_path / "added.json").read_text())] == ["merged", "kl", "peft"]
    assert [row.method for row in rows] == ["merged", "kl", "peft"]
    # Every kind of layer in every round, the first one included, by every method; each counts as often as it occurs.
    layers = covered(make_unet("tiny", torch.device("cpu"), torch.float32), "attention")
    assert [row.seconds for row in rows] == [len(layers)] * 3
    assert len(ran) % 9 == 0
    assert len(ran) < 9 * len(layers)
    assert all(row.added == 0 for row in rows)
    assert len(layers_table(rows).splitlines()) == 5


def test_the_way_a_method_is_computed_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    enter = Fusion.__enter__
    monkeypatch.setattr(Fusion, "__enter__", lambda fusion: (taken.append(kernels._path), enter(fusion))[1])
    monkeypatch.setattr(kernels, "why_not", lambda device, dtype: "")
    # Not the kernels themselves, which take a minute in the interpreter.
    monkeypatch.setattr(kernels, "usable", lambda tokens: False)
    rows = bench("tiny", pixels=64, rank=2, methods=["kl", "kl-torch", "kl-sampled-triton"], repeats=1)
    assert [row.method for row in rows] == ["kl", "kl-torch", "kl-sampled-triton"]
    assert set(taken) == {"auto", "torch", "triton"}


def test_without_triton_its_rows_are_refused_and_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="no method can end in -triton: there is no Triton for cpu"):
        bench("tiny", pixels=64, rank=2, methods=["merged", "kl-triton"], repeats=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no GPU here"):
        on_gpu()


def test_a_linear_layers_cost_is_counted_by_hand() -> None:
    layer = torch.nn.Linear(64, 32, bias=False, device="meta", dtype=torch.float16)
    x = torch.empty(2, 10, 64, device="meta", dtype=torch.float16)
    with torch.inference_mode():
        cost = counted(lambda: layer(x).add_(1).view(20, 32).transpose(0, 1))
    product, added = 2 * (2 * 10 * 64 + 64 * 32 + 2 * 10 * 32), 2 * 2 * (2 * 10 * 32)
    assert (cost.calls, cost.operations, cost.bytes) == (2, 2 * 20 * 64 * 32, product + added)


def test_the_costs_bounds_stand_in_order() -> None:
    costs = count("tiny", 64, 2, 4, methods=("sum", "peft"))
    seconds = [costs[name].seconds for name in ("merged", "both products", "choice, one read")]
    assert seconds == sorted(seconds)
    assert costs["choice, sampled"].bytes <= costs["choice, one read"].bytes
    # Torch's own sum is what the bound of both products says: both downs in one product, both ups in another.
    assert costs["torch: sum"].operations == costs["both products"].operations == costs["torch: peft"].operations
    assert len(counts_table(costs).splitlines()) == 2 + len(costs)


def test_beginning_is_timed_for_the_engine_and_for_the_host() -> None:
    seconds = start_up("tiny", rank=2)
    assert all(value > 0 for value in seconds.values())
    assert any("fuse_lora" in what for what in seconds)
    with pytest.raises(ValueError, match="unknown unet 'sd3'"):
        start_up("sd3")


def test_convolutions_of_residual_blocks_can_be_left_out() -> None:
    unet = make_unet("tiny", torch.device("meta"), torch.float16)
    attention, everything = covered(unet, "attention"), covered(unet)
    assert set(attention) < set(everything)
    assert not any("resnets" in name for name in attention)
    for part in ("attn1.to_q", "ff.net.0.proj", "proj_in"):
        assert any(name.endswith(part) for name in attention), part


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unet": "sd3"}, "unknown unet 'sd3'; there are: sd15, sdxl"),
        ({"methods": ["fast"]}, "unknown method 'fast'; there are: merged"),
        ({"methods": ["merged-torch"]}, "unknown method 'merged-torch'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"cover": "text"}, "unknown cover 'text'; there are: all, attention"),
        ({"pixels": 100}, "pixels must be a multiple of 64"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(**given)  # type: ignore[arg-type]
