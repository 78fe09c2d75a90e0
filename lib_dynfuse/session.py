"""One generation in a WebUI: options, host, fusion, guidance and trace. Everything that it holds, it gives back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from lib_dynfuse.core.delta import Delta
from lib_dynfuse.core.fusion import Fusion
from lib_dynfuse.core.rules import Outcome
from lib_dynfuse.core.types import Role, Row
from lib_dynfuse.errors import DynFuseError, shown
from lib_dynfuse.guidance.guide import Guide
from lib_dynfuse.hosts.base import Host, Layers, Place, Tag, Unsupported
from lib_dynfuse.hosts.layer_reports import LayerReports, may_be_tiled
from lib_dynfuse.options import Options
from lib_dynfuse.trace import Record, Trace

_log = logging.getLogger("lib_dynfuse")
_open: list[Session] = []


def close_all() -> None:
    """Close whatever an interrupted generation left behind."""
    while _open:
        _open[-1].close()


class Session:
    """One generation; `say` gets what a person should know, one line at a time and each line once.

    The calls, in order, once per batch of pictures: `activate` (again for a hires pass, with its own LoRAs), `attach`
    (before every sampling), `step`, the UNet's calls, `predicted` and `after_cfg`, `finish_batch`. `close` at any time,
    any number of times.
    """

    def __init__(self, host: Host, options: Options, say: Callable[[str], None]) -> None:
        self.options = options
        self.host = host
        self._say = say
        self._said: set[str] = set()
        self._strategy = options.make_strategy()
        self.fused = False
        """Whether a rule decides, or has decided, on a layer of this batch of pictures."""
        self.roles: dict[Role, list[str]] = {}
        """The LoRAs of either role, with their strengths, as the prompt has them that was read last."""
        self._active = False
        self._fusion: Fusion | None = None
        self._reports = LayerReports(self.tell, always_both=options.strategy == "sum")
        self._steps = 0  # that were begun with this fusion
        self._unreachable = ""  # why no layer could be fused, once that is known
        self._trace: Trace | None = None
        self._names: dict[Role, list[str]] = {}  # of the LoRAs that play
        self._first_step = 0  # of this sampling, in the trace: a hires pass counts on
        self._last_step = -1
        self._at_last_step = False
        self._guide: Guide | None = None
        self._to_nudge: int | None = None  # the step whose prediction comes next
        self._attached = ExitStack()

    def tell(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def activate(self, networks: Mapping[str, Sequence[Any]]) -> None:
        """The host has loaded the prompt's LoRAs: take over those with a role. Never raises; what is wrong is told."""
        under_way = self._fusion is not None and not self._at_last_step
        self._detach()
        self._active = False
        self._list()
        try:
            tags = self._playing(self.host.read_tags(networks))
            if self._worth_taking(tags):
                for line in self.host.take(tags):
                    self.tell(line)
                self._active = True
        except (DynFuseError, Unsupported) as error:
            self._give_up(str(error))
        except Exception as error:
            _log.exception("the LoRAs could not be taken over")
            self._give_up(f"the LoRAs could not be taken over ({type(error).__name__}: {error})")
        if not self._active:
            self.host.give_back()
        elif under_way:
            # A refiner takes over in the middle of a sampling, which no call announces; otherwise `attach` comes again.
            self._install()

    def _playing(self, tags: Sequence[Tag]) -> list[Tag]:
        """The tags, those of strength 0 without their role: the host adds nothing of them, and neither do we."""
        for tag in tags:
            if tag.role is not None and tag.unet == 0.0:
                self.tell(f"{tag.name} has the strength 0: it counts as if it had no role={tag.role.value}")
        return [replace(tag, role=None) if tag.unet == 0.0 else tag for tag in tags]

    def _worth_taking(self, tags: Sequence[Tag]) -> bool:
        names = {role: [str(tag) for tag in tags if tag.role is role] for role in Role}
        self._names = {role: [tag.name for tag in tags if tag.role is role] for role in Role}
        if not any(names.values()):
            if tags:
                self.tell("no LoRA has a role, so all are added as always; give one role=subject and one role=style")
            else:
                self.tell("the prompt has no LoRA; give it one with role=subject and one with role=style")
            return False
        for role, other in ((Role.SUBJECT, Role.STYLE), (Role.STYLE, Role.SUBJECT)):
            if not names[other]:
                are = "is applied as it is" if len(names[role]) == 1 else "are applied as they are"
                self.tell(f"no LoRA has role={other.value}: nothing to choose from, {_listed(names[role])} {are}")
        self.roles = names
        plain = {tag.name for tag in tags if tag.role is None}
        for name in dict.fromkeys(tag.name for tag in tags if tag.role is not None and tag.name in plain):
            self.tell(f"{shown(name)} is in the prompt with a role and without one: write one tag for it")
        return True

    def _list(self) -> None:
        _open[:] = [*(one for one in _open if one is not self), self]

    def attach(self, steps: int, make_guide: Callable[[], Guide | None] = lambda: None) -> None:
        """Sampling is about to begin: fuse in the UNet, and nudge by what `make_guide` makes for these pictures.

        Never raises; without fusion the host's own merge is used.
        """
        self._detach()
        self._list()
        self._first_step = self._last_step + 1
        self._at_last_step = False
        if self._guide is None:
            try:
                self._guide = make_guide()
            except Exception as error:
                _log.exception("nudging could not begin")
                self._stop_nudging(error)
        if not self._active and self._guide is None:
            return
        if self._trace is None:
            self._trace = Trace(passes=max(1, steps), tokens=self.options.strategy == "kl-token")
        self._install()

    def _install(self) -> None:
        if self._guide is not None:
            self._begin_guiding(self._guide)
        if not self._active:
            return
        if self._unreachable:
            self._give_up(self._unreachable)
            return
        try:
            layers = self._fitting(self.host.layers())
            self._tell_what_is_apart(layers)
            fusion = Fusion(
                layers,
                self._strategy,
                None if self._strategy.outcome is Outcome.NOTHING else self._trace,
                window=(self.options.start, self.options.stop),
                tiled=may_be_tiled,
                failed=self._reports.failed,
            )
            self._attached.callback(self.host.watch(self._before_unet))
            self._fusion = self._attached.enter_context(fusion)
            self.fused = self.fused or bool(fusion.names)
        except (DynFuseError, Unsupported) as error:
            self._give_up(str(error))
        except Exception as error:
            _log.exception("fusion could not begin")
            self._give_up(f"fusion could not begin ({type(error).__name__}: {error})")

    def _fitting(self, layers: Layers) -> Layers:
        """Without what was made for other layers than these: a LoRA of another model, which the host leaves out too."""
        fitting: Layers = {}
        said: list[str] = []
        for name, (module, deltas) in layers.items():
            kept = {}
            for role, delta in deltas.items():
                wrong = _misfit(module, delta)
                if wrong:
                    said.append(f"{name} of the {role.value}'s LoRA, {wrong}")
                else:
                    kept[role] = delta
            if kept:
                fitting[name] = (module, kept)
        if said:
            self.tell(f"{len(said)} parts of LoRAs do not fit this model and were left out, first {said[0]}")
        return fitting

    def _begin_guiding(self, guide: Guide) -> None:
        try:
            self._attached.callback(self.host.guiding.begin(guide.through_unet))
        except Exception as error:
            _log.exception("nudging could not begin")
            self._stop_nudging(error)

    def _stop_nudging(self, error: Exception) -> None:
        self._guide = self._to_nudge = None
        self.tell(f"not nudged any more: {type(error).__name__}: {error}")

    def _tell_what_is_apart(self, layers: Layers) -> None:
        roles = {role for _, deltas in layers.values() for role in deltas}
        if len(roles) == 2 and not any(len(deltas) == 2 for _, deltas in layers.values()):
            self.tell("the subject's and the style's LoRA have no layer in common: each is applied as it is")

    def _give_up(self, reason: str) -> None:
        """The picture is made as without us."""
        self._detach()
        self._active = False
        self.host.give_back()
        self.tell(f"not fused: {reason}")
        if self._guide is not None:
            self._begin_guiding(self._guide)

    def step(self, params: Any) -> None:
        """The host is about to call the UNet for one denoising step."""
        self._to_nudge = None
        self._look_back()
        if self._fusion is None and self._guide is None:
            return
        place: Place = self.host.place(params)
        step = self._first_step + place.step
        self._last_step = max(self._last_step, step)
        self._at_last_step = place.step >= place.total - 1
        if self._fusion is not None:
            self._steps += 1
            self._fusion.step = step
            self._fusion.progress = min(1.0, place.step / (place.total - 1)) if place.total > 1 else 0.0
        if self._trace is not None:
            self._trace.sigma = place.sigma
        if self._guide is not None and self._guide.wants(step, place.step, place.total):
            try:
                if self.host.guiding.expect(params, self._guide.through_unet):
                    self._to_nudge = step
            except MemoryError as error:
                self._guide = None
                self.tell(f"not nudged: {error}")
            except Exception as error:
                _log.exception("a nudge could not be prepared")
                self._stop_nudging(error)

    def _look_back(self) -> None:
        """After the first step of a sampling: whether the layers were called at all.

        The host cannot go back to its own merge in mid-sampling, so what was not fused lacks the LoRAs and is said to.
        """
        if self._fusion is None or self._steps != 1:
            return
        self._unreachable = self._reports.unreached(self._fusion)
        if self._unreachable:
            self.tell(f"not fused, and without the LoRAs that have a role: {self._unreachable}")

    @property
    def nudges(self) -> bool:
        """Whether the prediction that the host is working on is to be nudged."""
        return self._to_nudge is not None

    def predicted(self, params: Any) -> None:
        """The UNet's results are there, cond and uncond still apart; only some hosts tell."""
        if self._to_nudge is not None:
            self.host.guiding.predicted(params)

    def after_cfg(self, params: Any) -> None:
        """They are one denoised prediction, which the sampler gets next. Never raises."""
        step, self._to_nudge = self._to_nudge, None
        if step is None or self._guide is None:
            return
        try:
            self.host.guiding.nudge(params, self._guide, step)
        except Exception as error:
            _log.exception("a nudge failed")
            self._stop_nudging(error)

    def _before_unet(self, rows: Sequence[Row] | None) -> None:
        if self._fusion is None:
            return
        self._fusion.paused = rows is None
        self._fusion.adds_both = rows is not None and not rows
        self._fusion.rows = rows or ()
        if self._fusion.adds_both and self._fusion.names:
            self._reports.unknown_batch()

    def finish_batch(self) -> Record | None:
        """The pictures of a batch are sampled: give everything back. Returns what was chosen and how the nudges went,
        None where there is nothing of either."""
        self._look_back()
        trace, guide = self._trace, self._guide
        self.close()
        if trace is None:
            return None
        record = trace.read()
        if not record.passes:
            record = Record([], [], record.values[:, :0])
        record.weighed = self._strategy.outcome is Outcome.WEIGHED
        record.names = {role.value: names for role, names in self._names.items()}
        if guide is not None:
            record.nudges = guide.curve()
            for reason in guide.reasons():
                self.tell(reason)
        if not record.layers and not record.nudges:
            return None
        return record

    def close(self) -> None:
        """Everything is as it was before; safe to call again, and a session may be used again after it."""
        self._detach()
        self._active = self.fused = False
        self._trace = self._guide = self._to_nudge = None
        self._first_step, self._last_step = 0, -1
        self.host.give_back()
        _open[:] = [one for one in _open if one is not self]

    def _detach(self) -> None:
        self._fusion = None
        self._steps = 0
        self._attached.close()


def _listed(names: Sequence[str]) -> str:
    """ "fox 1", "fox 1 and ink 0.9", "fox 1, ink 0.9 and dots 1"."""
    *first, last = names
    return shown(f"{', '.join(first)} and {last}" if first else last)


def _misfit(module: nn.Module, delta: Delta) -> str:
    """What is wrong with the number of channels, as far as the layer tells its own: packed ones may not."""
    has = (
        getattr(module, "in_features", getattr(module, "in_channels", None)),
        getattr(module, "out_features", getattr(module, "out_channels", None)),
    )
    wants = (delta.inputs, delta.outputs)
    if all(None in (one, other) or one == other for one, other in zip(has, wants, strict=True)):
        return ""
    return f"made for {wants[0]} -> {wants[1]} channels where there are {has[0]} -> {has[1]}"
