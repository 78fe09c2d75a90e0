"""Making and judging every picture, shared out over processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lib_dynfuse import compared
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.evaluate.methods import Method
from lib_dynfuse.evaluate.plan import Pair
from lib_dynfuse.evaluate.store import Row, add_rows, keep_picture

if TYPE_CHECKING:
    from lib_dynfuse.guidance.sources import Source
    from lib_dynfuse.hosts.diffusers import Embedded

TOGETHER = 4  # pictures of one forward pass: what a kill loses at most, in each process


class Job(NamedTuple):
    """Some seeds of one method on one pair."""

    pair: Pair
    method: Method
    seeds: tuple[int, ...]

    def pictures(
        self, host: Embedded, settings: Mapping[str, Any], model: Path, source: Source, encoders: Mapping[str, str]
    ) -> Tensor:
        """[N, 3, H, W] from 0 to 1, as the embedded host makes them.

        Where the method nudges, towards what each LoRA makes alone: `model` is where the host's came from, `source`
        where encoders may come from, `encoders` has options that say which. Raises DynFuseError where nothing
        is left to nudge by.
        """
        options = self.method.options
        settings = {
            "negative": "",
            "sampler": None,
            "size": None,
            **settings,
            "prompt": self.pair.prompt_of(self.method),
        }
        guide = None
        if options.nudge:
            options = options.model_copy(update=encoders)
            said: list[str] = []
            guidance = compared.guidance(
                host, model, options, self.seeds, settings, source, said.append, progress=False
            )
            if guidance is None or guidance.nudge is None:
                raise DynFuseError(f"the method {self.method.label}: {said[-1] if said else 'there are no nudges'}")
            decoder = host.decoder(options.nudge_decoder, source)
            guide = guidance.guide(range(len(self.seeds)), self.seeds, decoder)
        made: Tensor = host.generate(**settings, options=options, seeds=self.seeds, guide=guide, tensors=True)
        return made


class Maker(Protocol):
    """A model with its judges, opened once for a process."""

    def make(self, job: Job) -> Tensor:
        """[N, 3, H, W] from 0 to 1, a picture a seed."""
        ...

    def judge(self, pair: Pair, pictures: Tensor) -> Sequence[Mapping[str, float]]:
        """What is measured of each of the pair's pictures, by name."""
        ...


Open = Callable[[], Maker]


def jobs(pairs: Sequence[Pair], methods: Sequence[Method], seeds: int, done: set[tuple[str, str, int]]) -> list[Job]:
    """What is still to do, all methods of a pair before the next pair: their LoRAs are read once."""
    found = []
    for pair in pairs:
        for method in methods:
            left = [seed for seed in range(seeds) if (pair.name, method.label, seed) not in done]
            found += [Job(pair, method, tuple(left[k : k + TOGETHER])) for k in range(0, len(left), TOGETHER)]
    return found


def run(out: Path, todo: Sequence[Job], opened: Open, workers: int, shown: int) -> Iterator[list[Row]]:
    """Does the jobs and writes their rows down as they come.

    The pictures of seeds below `shown` are kept, for the sheet. A bar on stderr says how long it still takes.
    """
    total = sum(len(job.seeds) for job in todo)
    with tqdm(desc="Comparing", total=total, unit="picture", smoothing=0.05) as bar, _at_work(opened, workers) as work:
        for rows, pictures in work(todo):
            for row, picture in zip(rows, pictures, strict=True):
                if row.seed < shown:
                    keep_picture(out, row, picture)
            add_rows(out, rows)
            bar.update(len(rows))
            yield rows


Done = tuple[list[Row], Tensor]


@contextmanager
def _at_work(opened: Open, workers: int) -> Iterator[Callable[[Sequence[Job]], Iterator[Done]]]:
    """Here, or in processes of one thread each: a small model loses more to threads that wait for each other than it
    gains."""
    if workers == 1:
        _open(opened)
        yield lambda todo: map(_do, todo)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _open_alone, (opened,))
    try:
        yield lambda todo: pool.map(_do, todo)
    finally:
        # After an interrupt what waits is dropped.
        pool.shutdown(cancel_futures=True)


_opened: list[Maker] = []


def _open(opened: Open) -> None:
    _opened[:] = [opened()]


def _open_alone(opened: Open) -> None:
    torch.set_num_threads(1)
    _open(opened)


def _do(job: Job) -> Done:
    maker = _opened[0]
    pictures = maker.make(job).float().cpu()
    judged = maker.judge(job.pair, pictures)
    rows = [
        Row(job.pair.name, job.method.label, seed, {name: round(float(value), 6) for name, value in values.items()})
        for seed, values in zip(job.seeds, judged, strict=True)
    ]
    return rows, pictures
