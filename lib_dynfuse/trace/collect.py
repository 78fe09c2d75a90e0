"""Collects what was chosen while the model samples, without ever waiting for the device; read back once at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .record import FIELDS, Item, Pass, Record


class RowLike(Protocol):
    """What a trace reads of a batch item: the core's `Row`, or anything like it."""

    @property
    def image(self) -> int: ...

    @property
    def cond(self) -> bool: ...


class Trace:
    """Collects a generation's selections for `Fusion`.

    Numbers that are known on the host stay there. Tensors of the pass in progress are kept by reference, so whoever
    adds one must not change it in place before the next pass begins; each pass is then packed into one buffer,
    preallocated for `passes` forward passes on the device of the first tensor, which grows by doubling.

    `sigma` is the host's to set before a pass; it is stored with it. With `tokens`, the subject's share of every token
    is kept too, summed over the passes.
    """

    def __init__(self, *, passes: int, tokens: bool = False) -> None:
        """Raises ValueError if `passes` is not positive."""
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        self.sigma: float | None = None
        self._expected = passes
        self._keep_tokens = tokens
        self._names: list[str] = []
        self._attached: list[int] = []  # layer number of the current Fusion -> place in _names
        self._passes: list[Pass] = []
        self._floats: list[dict[tuple[int, int], float]] = []  # per pass: (layer, field) -> value for every row
        self._pending: list[list[Tensor | None]] = []  # [field][layer] of the pass in progress
        self._buffer: Tensor | None = None  # [passes, fields, layers, rows]
        self._token_sums: dict[int, Tensor] = {}  # layer -> [images, tokens + 1], the last column counts

    def attach(self, names: Sequence[str]) -> None:
        """Say which layers the numbers of `add` mean from now on. Layers of an earlier model stay in the record."""
        self._pack()
        places = {name: place for place, name in enumerate(self._names)}
        for name in names:
            places.setdefault(name, len(places))
        self._names = list(places)
        self._attached = [places[name] for name in names]

    def begin(self, step: int, progress: float, rows: Sequence[RowLike]) -> None:
        """Begin a forward pass over the batch items `rows`."""
        self._pack()
        items = tuple(Item(int(row.image), bool(row.cond)) for row in rows)
        self._passes.append(Pass(int(step), float(progress), self.sigma, items))
        self._floats.append({})

    def add(
        self,
        layer: int,
        subject: Tensor | float,
        style: Tensor | float,
        d_subject: Tensor | None = None,
        d_style: Tensor | None = None,
    ) -> None:
        """Add one layer's selection to the pass in progress; a layer that runs twice in it counts as it ran last.

        layer: its number in the names attached. subject, style: the weights applied, one number, [B], or [B, T] with T
        tokens (pixels, row by row). d_subject, d_style: the divergences, [B]. B is at most the number of rows begun.
        Raises RuntimeError if no pass has begun.
        """
        if not self._passes:
            raise RuntimeError("no forward pass has begun")
        place = self._attached[layer]
        if self._keep_tokens and isinstance(subject, Tensor) and subject.dim() > 1:
            self._add_tokens(place, subject, style)
        for index, value in enumerate((subject, style, d_subject, d_style)):
            if isinstance(value, Tensor):
                self._put(index, place, value)
            elif value is not None:
                self._floats[-1][place, index] = float(value)

    def read(self) -> Record:
        """Everything collected so far, in one copy from the device."""
        self._pack()
        most = max((len(one.rows) for one in self._passes), default=0)
        values = np.full((len(self._passes), len(self._names), most, len(FIELDS)), np.nan, np.float32)
        packed = [] if self._buffer is None else [self._buffer[: len(self._passes)].flatten()]
        device = packed[0].device if packed else torch.device("cpu")
        packed += [sums.to(device).flatten() for sums in self._token_sums.values()]
        flat = torch.cat(packed).cpu().numpy() if packed else np.empty(0, np.float32)
        if self._buffer is not None:
            shape = (len(self._passes), *self._buffer.shape[1:])
            size = int(np.prod(shape))
            stored, flat = flat[:size].reshape(shape).transpose(0, 2, 3, 1), flat[size:]
            values[:, : stored.shape[1], : stored.shape[2]] = stored[:, :, :most]
        for index, numbers in enumerate(self._floats):
            for (place, kind), number in numbers.items():
                values[index, place, : len(self._passes[index].rows), kind] = number
        tokens = {}
        for place, sums in self._token_sums.items():
            part, flat = flat[: sums.numel()].reshape(tuple(sums.shape)), flat[sums.numel() :]
            tokens[self._names[place]] = part[:, :-1] / np.maximum(part[:, -1:], 1)
        return Record(list(self._names), list(self._passes), values, tokens)

    def _put(self, field: int, place: int, value: Tensor) -> None:
        if not self._pending:
            self._pending = [[None] * len(self._names) for _ in FIELDS]
        self._floats[-1].pop((place, field), None)
        value = value.detach()
        self._pending[field][place] = value.flatten(1).float().mean(dim=1) if value.dim() > 1 else value.float()

    def _add_tokens(self, place: int, subject: Tensor, style: Tensor | float) -> None:
        with torch.inference_mode(False), torch.no_grad():
            weight = subject.float().abs()
            total = weight + (style.float().abs() if isinstance(style, Tensor) else abs(style))
            share = torch.where(total > 0, weight / total, 0.5).flatten(1)
            images = [row.image for row in self._passes[-1].rows[: share.shape[0]]]
            sums = self._token_sums.get(place)
            # Another picture size, as in a hires pass, starts anew.
            if sums is None or sums.shape[1] != share.shape[1] + 1:
                sums = share.new_zeros((max(images) + 1, share.shape[1] + 1))
            elif sums.shape[0] <= max(images):
                sums = torch.nn.functional.pad(sums, (0, 0, 0, max(images) + 1 - sums.shape[0]))
            # Row by row: an index tensor would have to be copied to the device, which waits for it
            for row, image in enumerate(images):
                sums[image, :-1] += share[row]
                sums[image, -1] += 1
            self._token_sums[place] = sums

    def _pack(self) -> None:
        """Move the pass in progress into the buffer: one stack and one copy for each field that has tensors."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        # Buffers outlive the host's inference mode, and an inference tensor could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            first = next(value for values in pending for value in values if value is not None)
            rows = max(value.shape[0] for values in pending for value in values if value is not None)
            buffer = self._reserve(first.device, rows)
            absent = torch.full((rows,), torch.nan, device=buffer.device)
            for field, values in enumerate(pending):
                if any(value is not None for value in values):
                    lines = [absent if value is None else _padded(value.to(buffer.device), rows) for value in values]
                    buffer[len(self._passes) - 1, field, : len(lines), :rows] = torch.stack(lines)

    def _reserve(self, device: torch.device, rows: int) -> Tensor:
        """The buffer, made or grown so that it holds the pass in progress."""
        needed = (len(self._passes), len(FIELDS), len(self._names), rows)
        old = self._buffer
        if old is not None and all(have >= want for have, want in zip(old.shape, needed, strict=True)):
            return old
        passes = self._expected if old is None else old.shape[0]
        while passes < needed[0]:
            passes *= 2
        widest = needed if old is None else tuple(map(max, needed, old.shape))
        new = torch.full((passes, *widest[1:]), torch.nan, device=device if old is None else old.device)
        if old is not None:
            new[tuple(slice(size) for size in old.shape)] = old
        self._buffer = new
        return new


def _padded(value: Tensor, rows: int) -> Tensor:
    missing = rows - value.shape[0]
    return torch.nn.functional.pad(value, (0, missing), value=torch.nan) if missing else value
