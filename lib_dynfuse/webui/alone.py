"""Pictures by one role's LoRAs alone, made in the WebUI itself: what guidance compares with where nothing was given.

docs/method.md, section 1: "image generated with the subject LoRA alone". They are made in the script's `process`, when
prompts and seeds of a run are known and nothing of it has begun.
"""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.guidance.references import Cache, Wanted, find_preview
from lib_dynfuse.hosts.reading import read_tags
from lib_dynfuse.webui.loras import on_disk

# The host's own pattern of whatever it takes out of a prompt.
# No `<` inside, so that a prompt of many unclosed tags is read in linear time.
_NETWORK = re.compile(r"<(\w+):([^<>]+)>")
_LORA = ("lora", "lyco")
# What a picture by one LoRA has in common with the picture it is for; a host that knows one of them not has it not.
_SAME = (
    *("width", "height", "steps", "sampler_name", "scheduler", "cfg_scale", "distilled_cfg_scale"),
    *("subseed_strength", "seed_resize_from_h", "seed_resize_from_w", "tiling", "token_merging_ratio"),
    *("eta", "ddim_discretize", "s_min_uncond", "s_churn", "s_tmin", "s_tmax", "s_noise"),
)
# Options that change pictures, besides those that the host writes into infotexts.
_OPTIONS = (
    *("sd_lora", "extra_networks_default_multiplier", "lora_functional", "comma_padding_backtrack"),
    *("sdxl_crop_left", "sdxl_crop_top", "fp8_storage", "cache_fp16_weight"),
    *("forge_additional_modules", "forge_unet_storage_dtype"),
)
_log = logging.getLogger("lib_dynfuse")


class NotMade(DynFuseError):
    """Pictures by a role's LoRAs alone could not be made, or somebody stopped it; the message says which."""


@dataclass(frozen=True)
class _Picture:
    """One that is wanted: its key in the cache, and what the host needs to make it. Those with the same `networks`, the
    tags left in the prompt, can be made in one batch."""

    key: str
    networks: str
    text: str
    negative: str
    seed: int
    subseed: int


def reference_cache() -> Cache:
    """Where pictures made are kept: the folder `dynfuse-references` in the WebUI's own folder of caches."""
    from modules.cache import cache_dir

    return Cache(Path(cache_dir) / "dynfuse-references")


def preview_of(name: str) -> Path | None:
    """The picture that the WebUI shows for a LoRA, by the name or the alias in its tag; None where there is none."""
    found = on_disk(name)
    return None if found is None else find_preview(Path(found.filename))


def pictures_alone(p: Any, role: Role, cache: Cache) -> list[Tensor]:
    """Each picture of the run `p` as it would be without the other role's LoRAs, [1, 3, H, W] in 0..1; empty where
    some picture has no LoRA of this role. LoRAs without a role stay.

    Same prompt, seed, size (a hires pass's first), sampler and settings; no refiner, no scripts, nothing saved; txt2img
    also where `p` is img2img. Those that the cache has are not made again. Call it from the script's `process`: the
    host's state is as before when it returns. Raises NotMade, also on interrupt and skip.
    """
    try:
        wanted = _wanted(p, role)
        found: dict[str, Tensor] = {}
        missing: dict[str, _Picture] = {}
        for one in wanted:
            if one.key not in found and one.key not in missing:
                kept = cache.get(one.key)
                if kept is None:
                    missing[one.key] = one
                else:
                    found[one.key] = kept
        batches = _batches(list(missing.values()), p.batch_size)
        if batches:
            with _aside(p, len(batches)):
                for number, batch in enumerate(batches):
                    for one, picture in zip(batch, _made(p, role, batch, number, len(batches)), strict=True):
                        cache.put(one.key, picture)
                        found[one.key] = picture
        if wanted:
            made, count = len(missing), len(wanted)
            _log.info("%s's LoRA alone: %d of %d pictures made, the others were there", role.value, made, count)
        return [found[one.key] for one in wanted]
    except DynFuseError:
        raise
    except Exception as error:
        _log.exception("pictures by the %s's LoRA alone could not be made", role.value)
        # Without its cause, which holds on to whatever was on the GPU.
        raise _not_made(role, f"{type(error).__name__}: {error}") from None


def _not_made(role: Role, why: str) -> NotMade:
    return NotMade(f"no pictures were made by the {role.value}'s LoRA alone ({why})")


def _wanted(p: Any, role: Role) -> list[_Picture]:
    from modules import shared

    if p.disable_extra_networks:
        return []
    settings = {
        "same": {name: getattr(p, name) for name in _SAME if hasattr(p, name)},
        "options": _options(shared.opts),
        "vae": [getattr(p, "sd_vae_name", None), getattr(p, "sd_vae_hash", None)],
    }
    checkpoint = shared.sd_model.sd_checkpoint_info
    model = f"{checkpoint.sha256 or checkpoint.hash} {_version(checkpoint.filename)}"
    wanted = []
    for index, prompt in enumerate(p.all_prompts[: p.n_iter * p.batch_size]):
        # The host takes a batch's networks from its first prompt.
        first = p.all_prompts[index // p.batch_size * p.batch_size]
        tags = [tag for tag in map(_Tag, _NETWORK.finditer(first)) if tag.role in (None, role)]
        if not any(tag.role for tag in tags):
            return []
        seed, subseed = int(p.all_seeds[index]), int(p.all_subseeds[index])
        text, negative = _NETWORK.sub("", prompt), p.all_negative_prompts[index]
        key = Wanted(
            model,
            tuple((tag.file(), tag.strength) for tag in tags if tag.is_lora),
            text,
            negative,
            seed,
            (p.width, p.height),
            {**settings, "tags": [tag.settings for tag in tags], "subseed": subseed if p.subseed_strength else None},
        ).key
        wanted.append(_Picture(key, "".join(tag.raw for tag in tags), text, negative, seed, subseed))
    return wanted


class _Tag:
    """A tag as the host reads it: `raw` as written, `settings` without what a picture does not depend on."""

    def __init__(self, match: re.Match[str]) -> None:
        kind, items = match[1], match[2].split(":")
        self.raw = match[0]
        self.is_lora = kind in _LORA
        self.role: Role | None = None
        self.settings = [kind, *items]
        if self.is_lora:
            (read,) = read_tags({kind: [SimpleNamespace(items=items)]})
            self.role, self.strength, self._name = read.role, read.unet, read.name
            # The file says more than its name.
            self.settings = [kind, *(item for item in items[1:] if item.partition("=")[0].strip().lower() != "role")]

    def file(self) -> str:
        """Which file, and which version of it. Raises DynFuseError where the LoRA of a role is not there."""
        found = on_disk(self._name)
        if found is None:
            if self.role is not None:
                raise _not_made(self.role, f"no LoRA {self._name} was found")
            return ""
        found.read_hash()
        return f"{found.hash or found.name} {_version(found.filename)}"


def _version(filename: str) -> str:
    """Of a file that may have been replaced under the same name; the host's hash may be that of the old one."""
    told = Path(filename).stat()
    return f"{told.st_size} {told.st_mtime_ns}"


def _options(opts: Any) -> dict[str, Any]:
    """The options that change pictures: those that the host writes into infotexts, and a few more."""
    return {
        name: opts.data.get(name, info.default)
        for name, info in opts.data_labels.items()
        # The checkpoint's title changes when its hash becomes known.
        if (getattr(info, "infotext", None) or name in _OPTIONS) and name != "sd_model_checkpoint"
    }


def _batches(pictures: Sequence[_Picture], size: int) -> list[list[_Picture]]:
    """Of the same networks each: the host would take those of a batch's first picture for all."""
    alike: dict[str, list[_Picture]] = {}
    for picture in pictures:
        alike.setdefault(picture.networks, []).append(picture)
    return [group[start : start + size] for group in alike.values() for start in range(0, len(group), size)]


def _made(p: Any, role: Role, batch: Sequence[_Picture], number: int, count: int) -> list[Tensor]:
    """Raises NotMade where somebody stopped it."""
    from modules import shared
    from modules.processing import process_images

    state = shared.state
    if why := _stopped(state) or ("interrupted" if getattr(state, "stopping_generation", False) else ""):
        raise _not_made(role, why)
    state.textinfo = f"DynFuse: the {role.value}'s LoRA alone, batch {number + 1} of {count}"
    with closing(_processing(p, batch)) as inner:
        try:
            processed = process_images(inner)
        except Exception:
            if why := _stopped(state):  # before the first step there is no picture that could be decoded
                raise _not_made(role, why) from None
            raise
    if why := _stopped(state):  # the pictures may be half done
        raise _not_made(role, why)
    first = processed.index_of_first_image
    return [_tensor(image) for image in processed.images[first : first + len(batch)]]


def _stopped(state: Any) -> str:
    """What somebody did to the pictures under way, empty where nobody did."""
    return "interrupted" if state.interrupted else "skipped" if state.skipped else ""


def _processing(p: Any, batch: Sequence[_Picture]) -> Any:
    from modules.processing import StableDiffusionProcessingTxt2Img
    from modules.scripts import ScriptRunner

    inner = StableDiffusionProcessingTxt2Img(
        prompt=[f"{one.text}{one.networks}" for one in batch],
        negative_prompt=[one.negative for one in batch],
        seed=[one.seed for one in batch],
        subseed=[one.subseed for one in batch],
        batch_size=len(batch),
        n_iter=1,
        restore_faces=False,
        do_not_save_samples=True,
        do_not_save_grid=True,
        do_not_reload_embeddings=True,
    )
    for name in _SAME:
        if hasattr(p, name):
            setattr(inner, name, getattr(p, name))
    # None runs, but reForge looks for one of its own in every run.
    inner.scripts, inner.script_args = ScriptRunner(), ()
    # The host keeps the last prompts encoded for the next run: those of the run itself are to stay.
    inner.cached_c, inner.cached_uc = [None] * len(inner.cached_c), [None] * len(inner.cached_uc)
    return inner


def _tensor(image: Any) -> Tensor:
    """[1, 3, H, W] in 0..1 of a picture of PIL's."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255


@contextmanager
def _aside(p: Any, batches: int) -> Iterator[None]:
    """What the host keeps for the one run that is under way is, afterwards, as it was."""
    from modules import sd_models, shared

    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with ExitStack() as stack, torch.random.fork_rng(gpus):

        def put(owner: Any, name: str, value: Any) -> None:
            if hasattr(owner, name):  # not every host has all of them
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, value)

        state = shared.state
        for name, value in (
            ("job", "DynFuse"),
            ("job_no", 0),
            ("job_count", batches),
            ("sampling_step", 0),
            ("sampling_steps", p.steps),
            ("current_latent", None),
            ("current_image", getattr(state, "current_image", None)),
            ("current_image_sampling_step", 0),
            ("textinfo", None),
        ):
            put(state, name, value)
        put(shared, "total_tqdm", type(shared.total_tqdm)())
        stack.callback(lambda bar: bar.clear(), shared.total_tqdm)
        # Else the text of the last run, which a person may read back, would be that of ours.
        put(shared.cmd_opts, "no_prompt_history", True)
        for owner in (_hijack(), shared.sd_model):
            for name in ("comments", "extra_generation_params"):
                put(owner, name, getattr(owner, name, None))
        if hasattr(shared.sd_model, "applied_token_merged_ratio"):  # which the host takes back after each run
            stack.callback(sd_models.apply_token_merging, shared.sd_model, p.get_token_merging_ratio())
        yield


def _hijack() -> Any:
    """What collects comments on hosts that change the model's own classes; Forge Neo has none."""
    try:
        return importlib.import_module("modules.sd_hijack").model_hijack
    except (ImportError, AttributeError):
        return None
