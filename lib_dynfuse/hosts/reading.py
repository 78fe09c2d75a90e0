"""What every WebUI of the family tells alike: the tags of the prompt, where its denoiser stands, what is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lib_dynfuse.core.types import Role
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.hosts.base import Place, Tag
from lib_dynfuse.roles import RoleError, parse_role, strengths


def read_tags(networks: Mapping[str, Sequence[Any]]) -> list[Tag]:
    """The LoRAs of the prompt as the host has split them.

    Raises DynFuseError for a role that cannot be read, and for a strength at which the host gave all LoRAs up.
    """
    written = [params for kind in ("lora", "lyco") for params in networks.get(kind, ())]
    for params in written:
        _check_strengths(params)
    tags = [_tag(params.items) for params in written]
    roles: dict[str, Role] = {}
    for tag in tags:
        if tag.role is not None and roles.setdefault(tag.name, tag.role) is not tag.role:
            raise DynFuseError(f"{tag.name} is subject and style at once; a LoRA can have one role only")
    return tags


def _raw(items: Sequence[Any]) -> str:
    return f"<lora:{':'.join(map(str, items))}>"


def _check_strengths(params: Any) -> None:
    """Looks at the host's own reading, from which an extension takes away what only that extension can read."""
    positional = [str(one) for one in getattr(params, "positional", params.items[:1])]
    named = {str(key): str(value) for key, value in getattr(params, "named", {}).items()}
    try:
        strengths(_raw(params.items), positional, named)
    except RoleError as error:
        raise RoleError(f"{error}; for a number that it cannot read, the WebUI leaves out all LoRAs") from error


def _tag(items: Sequence[Any]) -> Tag:
    """One tag as the host has split it at its colons. Raises RoleError.

    Read from `items`: extensions that move strengths with the steps empty the host's own reading of them.
    """
    positional: list[str] = []
    named: dict[str, str] = {}
    for item in map(str, items):
        key, equals, value = item.partition("=")
        if equals:
            named[key.strip().lower()] = value
        else:
            positional.append(item)
    role = parse_role(named["role"], _raw(items)) if "role" in named else None
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
