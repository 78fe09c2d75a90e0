"""Trace: collects selections on the device, reads them back once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_dynfuse.core.types import Row
from lib_dynfuse.trace import Item, Trace

ROWS = [Row(0, cond=False), Row(0, cond=True)]


def one_pass(trace: Trace, step: int = 0, subject: float = 1.0) -> None:
    trace.begin(step, step / 3, ROWS)
    trace.add(0, torch.tensor([subject, 0.0]), torch.tensor([1 - subject, 1.0]), torch.tensor([3.0, 4.0]), None)
    trace.add(1, 1.0, 0.5)


def traced(passes: int = 1, **kwargs: Any) -> Trace:
    trace = Trace(passes=passes, **kwargs)
    trace.attach(["down.0", "up.0"])
    return trace


def test_what_is_added_is_read_back_with_its_pass_layer_and_row() -> None:
    trace = traced()
    trace.sigma = 14.6
    one_pass(trace)
    record = trace.read()
    assert record.layers == ["down.0", "up.0"]
    (only,) = record.passes
    assert (only.step, only.progress, only.sigma, only.rows) == (0, 0.0, 14.6, (Item(0, False), Item(0, True)))
    nan = np.nan
    np.testing.assert_array_equal(
        record.values,
        np.array([[[[1, 0, 3, nan], [0, 1, 4, nan]], [[1, 0.5, nan, nan], [1, 0.5, nan, nan]]]], np.float32),
    )


def test_more_passes_layers_and_rows_than_expected_lose_nothing() -> None:
    trace = traced(passes=1)
    for step in range(5):
        one_pass(trace, step, subject=step / 4)
    trace.attach(["up.0", "refiner.0"])
    trace.begin(5, 1.0, [Row(image) for image in range(3)])
    trace.add(1, torch.tensor([0.1, 0.2, 0.3]), 0.0)
    record = trace.read()
    assert record.layers == ["down.0", "up.0", "refiner.0"]
    assert record.values.shape == (6, 3, 3, 4)
    np.testing.assert_allclose(record.values[:5, 0, 0, 0], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(record.values[5, 2, :, 0], [0.1, 0.2, 0.3], rtol=1e-6)
    assert np.isnan(record.values[:5, 2]).all()
    assert np.isnan(record.values[:5, :, 2]).all()
    assert np.isnan(record.values[5, :2]).all()


def test_a_pass_over_part_of_the_batch_leaves_the_other_rows_empty() -> None:
    trace = traced()
    one_pass(trace)
    trace.begin(1, 1.0, [Row(0)])
    trace.add(0, torch.tensor([0.5]), torch.tensor([0.5]))
    values = trace.read().values
    assert values[1, 0, 0, 0] == 0.5
    assert np.isnan(values[1, 0, 1]).all()


def test_a_layer_that_runs_twice_counts_as_it_ran_last() -> None:
    trace = traced()
    trace.begin(0, 0.0, [Row(0)])
    trace.add(0, 1.0, torch.tensor([0.0]))
    trace.add(0, torch.tensor([0.25]), 0.75)
    assert trace.read().values[0, 0, 0, :2].tolist() == [0.25, 0.75]


def test_reading_twice_gives_the_same_and_collecting_goes_on() -> None:
    trace = traced()
    one_pass(trace)
    first = trace.read()
    np.testing.assert_array_equal(first.values, trace.read().values)
    one_pass(trace, 1)
    assert len(trace.read().passes) == 2
    assert len(first.passes) == 1


def test_nothing_collected_is_an_empty_record() -> None:
    record = traced().read()
    assert record.values.shape == (0, 2, 0, 4)
    assert record.images == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool])
def test_weights_of_any_dtype_are_kept_in_float32(dtype: torch.dtype) -> None:
    trace = traced()
    trace.begin(0, 0.0, ROWS)
    trace.add(0, torch.tensor([1, 0], dtype=dtype), torch.tensor([0, 1], dtype=dtype))
    values = trace.read().values
    assert values.dtype == np.float32
    assert values[0, 0, :, 0].tolist() == [1, 0]


def test_what_was_collected_in_inference_mode_is_readable_outside_it_and_goes_on_there() -> None:
    trace = traced(tokens=True)
    with torch.inference_mode():
        one_pass(trace)
        trace.begin(1, 1.0, ROWS)
        trace.add(0, torch.ones(2, 4), 0.0)
    one_pass(trace, 2)
    trace.add(0, torch.ones(2, 4), 0.0)
    assert trace.read().values.shape[0] == 3


def test_weights_that_need_gradients_are_recorded_without_them() -> None:
    trace = traced()
    trace.begin(0, 0.0, [Row(0)])
    trace.add(0, torch.ones(1, requires_grad=True) * 0.5, 0.5)
    assert trace.read().values[0, 0, 0, 0] == 0.5


def test_per_token_weights_are_recorded_as_their_mean_and_tokens_only_on_request() -> None:
    choice = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    for tokens in (False, True):
        trace = traced(tokens=tokens)
        trace.begin(0, 0.0, [Row(0)])
        trace.add(0, choice, 1 - choice)
        record = trace.read()
        assert record.values[0, 0, 0, :2].tolist() == [0.75, 0.25]
        assert ("down.0" in record.tokens) == tokens


def test_tokens_are_the_subjects_mean_share_per_picture_over_passes_and_halves() -> None:
    trace = traced(tokens=True)
    choice = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.5]])
    trace.begin(0, 0.0, [Row(0, False), Row(0, True), Row(1, True)])
    trace.add(0, choice, 1 - choice)
    trace.begin(1, 1.0, [Row(1, True), Row(0, True), Row(2, True)])
    trace.add(0, choice, 1 - choice)
    (tokens,) = trace.read().tokens.values()
    np.testing.assert_allclose(tokens, [[1, 0, 1 / 3], [0.5, 0, 0.75], [0, 0, 0.5]], rtol=1e-6)


def test_tokens_of_another_picture_size_replace_the_earlier_ones() -> None:
    trace = traced(tokens=True)
    for size in (4, 9):
        trace.begin(0, 0.0, [Row(0)])
        trace.add(0, torch.ones(1, size), 0.0)
    assert trace.read().tokens["down.0"].tolist() == [[1.0] * 9]


class HostCopies(TorchDispatchMode):
    """Counts the operations that wait for a device, and copies to another one; `meta` stands in for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "item", "nonzero", "equal"} or (kwargs or {}).get("device") is not None:
            moved = torch.device((kwargs or {}).get("device", "cpu")).type != "meta"
            if moved:
                self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_collecting_stays_on_the_device() -> None:
    """On the `meta` device any read of a value, or copy to the host, fails or is counted."""
    trace = traced(passes=1, tokens=True)
    with HostCopies() as copies:
        for step in range(3):
            trace.begin(step, step / 2, ROWS)
            weights = torch.empty(2, 4, device="meta")
            trace.add(0, weights, 1 - weights, torch.empty(2, device="meta"), torch.empty(2, device="meta"))
            trace.add(1, 1.0, torch.empty(2, device="meta"))
        trace.begin(3, 1.0, ROWS)
    assert copies.seen == []


def test_reading_copies_from_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced(tokens=True)
    for step in range(3):
        one_pass(trace, step)
        trace.add(0, torch.ones(2, 4), 0.0)
    called = []
    for name in ("cpu", "numpy", "item", "tolist", "to"):
        plain = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *args: Any, plain: Any = plain, name: str = name) -> Any:
            called.append(name)
            return plain(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    trace.read()
    assert [name for name in called if name != "to"] == ["cpu", "numpy"]


def test_a_pass_is_packed_when_the_next_begins_so_that_its_tensors_may_be_used_again() -> None:
    trace = traced(passes=4)
    trace.begin(0, 0.0, [Row(0)])
    weight = torch.tensor([0.25])
    trace.add(0, weight, 0.75)
    trace.begin(1, 1.0, [Row(0)])
    weight.fill_(1.0)
    assert trace.read().values[0, 0, 0, 0] == 0.25


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="passes"):
        Trace(passes=0)
    with pytest.raises(RuntimeError, match="begun"):
        traced().add(0, 1.0, 0.0)
