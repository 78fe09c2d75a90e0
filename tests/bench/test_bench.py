"""The benchmark measures what it says: the same layers, the same deltas, rows that a script can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lib_dynfuse.bench import METHODS, bench
from lib_dynfuse.bench.rivals import klora_published, with_peft
from lib_dynfuse.bench.run import table
from lib_dynfuse.bench.unets import covered, make_inputs, make_layers, make_unet
from lib_dynfuse.core import Fusion, strategy


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
    assert rows[0].ratio == 1.0
    assert all(row.seconds > 0 for row in rows)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert set(written[0]) == {"unet", "pixels", "batch", "rank", "device", "dtype", "method", "seconds", "ratio"}
    assert len(table(rows).splitlines()) == 4 + len(METHODS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unet": "sd3"}, "unknown unet 'sd3'; there are: sd15, sdxl"),
        ({"methods": ["fast"]}, "unknown method 'fast'; there are: merged"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"pixels": 100}, "pixels must be a multiple of 64"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench(**given)  # type: ignore[arg-type]
