"""What every WebUI of the family tells alike: the tags of the prompt, where its denoiser stands, what is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.base import Place, Tag
from lib_dynfuse.roles import parse_role


def read_tags(networks: Mapping[str, Sequence[Any]]) -> list[Tag]:
    """The LoRAs of the prompt as the host has split them. Raises DynFuseError for a role that cannot be read."""
    tags = [_tag(params.items) for kind in ("lora", "lyco") for params in networks.get(kind, ())]
    roles: dict[str, Role] = {}
    for tag in tags:
        if tag.role is not None and roles.setdefault(tag.name, tag.role) is not tag.role:
            raise DynFuseError(f"{tag.name} is subject and style at once; a LoRA can have one role only")
    return tags


def _tag(items: Sequence[Any]) -> Tag:
    """One tag as the host has split it at its colons. Raises RoleError.

    Read from `items`: extensions that move strengths with the steps empty the host's own reading of them.
    """
    raw = f"<lora:{':'.join(map(str, items))}>"
    positional: list[str] = []
    named: dict[str, str] = {}
    for item in map(str, items):
        key, equals, value = item.partition("=")
        if equals:
            named[key.strip().lower()] = value
        else:
            positional.append(item)
    role = parse_role(named["role"], raw) if "role" in named else None
    # The text encoder's strength is the UNet's too where the UNet has none.
    strength = (
        named.get("unet")
        or next(iter(positional[2:3]), None)
        or named.get("te")
        or next(iter(positional[1:2]), None)
        or "1"
    )
    try:
        unet = float(strength)
    except ValueError:  # a schedule of another extension
        unet = 1.0
    return Tag(positional[0] if positional else "", unet, role)


def place_of(params: Any) -> Place:
    """Where the denoiser call of the host's `cfg_denoiser` callback stands.

    The step is counted from the denoiser's calls, as the host's own number is still that of the step before: a sampler
    of second order makes two calls a step, some make one more at an end.
    """
    denoiser, total, sigma = params.denoiser, params.total_sampling_steps, params.sigma
    config = getattr(denoiser.sampler, "config", None)
    calls = 2 if getattr(config, "options", {}).get("second_order") else 1
    return Place(
        step=max(0, min(denoiser.step // calls, total - 1)),
        total=total,
        sigma=float(sigma[0]) if sigma.device.type == "cpu" else None,
    )


def staying(name: str, keys: Sequence[str]) -> str:
    """What to tell of the layers of a network that nothing can be added to."""
    if len(keys) == 1:
        return f"{name}: one layer stays merged, it cannot be chosen: {keys[0]}"
    return f"{name}: {len(keys)} layers stay merged, they cannot be chosen; first {keys[0]}"
