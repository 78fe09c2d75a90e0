"""What a person is told of layers where nothing could be chosen; each kind of trouble once."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lib_dynfuse.core import ForeignBatch, Fusion

_log = logging.getLogger("lib_dynfuse")


class LayerReports:
    """For one generation; `say` gets one line at a time.

    `always_both`: the rule adds both deltas everywhere, so that a batch nobody can read makes no difference.
    """

    def __init__(self, say: Callable[[str], None], always_both: bool = False) -> None:
        self._say = say
        self._always_both = always_both
        self._said: set[str] = set()

    def _once(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._say(line)

    def failed(self, layer: str, error: Exception) -> None:
        """A layer added both of its deltas because of `error`; for `Fusion(failed=...)`."""
        if isinstance(error, ForeignBatch):
            if self._always_both:
                return
            self._once(
                "batch",
                f"some layers see another batch than the UNet, as with prompts by region: both LoRAs are added there "
                f"(first {error})",
            )
            return
        kind = f"{type(error).__name__} {layer}"
        if kind not in self._said:
            self._said.add(kind)
            _log.error("layer %s could not be decided", layer, exc_info=error)
        # The error's own text may name files of this machine; the log has it.
        reason = f"{type(error).__name__}, see the log"
        self._once("failure", f"layer {layer} could not be decided ({reason}): both LoRAs are added there")

    def unknown_batch(self) -> None:
        """The host cannot say which items of a batch belong to whom."""
        if self._always_both:
            return
        self._once(
            "unknown",
            "it is not known which items of the UNet's batch are of the prompt and which of the negative prompt: both "
            "LoRAs are added there (another extension may have changed the batch)",
        )

    def unreached(self, fusion: Fusion) -> str:
        """To be asked after the first step: says which layers were not called. Why nothing is fused, if none was."""
        total, missing = len(fusion.covered), fusion.unreached
        if not missing:
            return ""
        if len(missing) == total:
            return (
                f"none of the {total} layers to fuse took part in the first step (the UNet may be compiled, or "
                "replaced by another extension)"
            )
        self._once(
            "unreached",
            f"{len(missing)} of the {total} layers to fuse took no part in the first step: nothing was added there; "
            f"first {missing[0]}",
        )
        return ""


def may_be_tiled(layer: str) -> bool:
    """Whether a layer's larger batch can be a picture in tiles, by its name in the UNet.

    Self-attention is fed in tiles by some extensions. Cross-attention never is: a larger batch there holds regions of
    a picture, each with a prompt of its own.
    """
    return "attn2" not in layer.split(".")
