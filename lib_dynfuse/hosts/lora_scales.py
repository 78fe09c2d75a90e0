"""The scale of a network where its file does not hold it as alpha: what peft and diffusers write beside the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib_dynfuse.errors import DynFuseError, shown, without_folders

_METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True)
class PeftConfig:
    """What peft knows of an adapter's scale: alpha and rank, for all layers and for some."""

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def scale(self, path: str, rank: int | None) -> float | None:
        """alpha / rank of a layer (alpha / √rank with `use_rslora`); None where another rank is written than it has."""
        r = _of_layer(self.rank_pattern, path, self.r)
        if rank is not None and rank != r:
            return None
        return float(_of_layer(self.alpha_pattern, path, self.lora_alpha) / (r**0.5 if self.use_rslora else r))


def config_beside(path: Path) -> PeftConfig | None:
    """Of the `adapter_config.json` that peft saves beside its weights. DynFuseError where it cannot be read."""
    file = path.with_name("adapter_config.json")
    if not file.is_file():
        return None
    try:
        return _config(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, re.error) as error:
        raise DynFuseError(
            f"{path.name}: the adapter_config.json beside it cannot be read ({shown(without_folders(str(error)))})"
        ) from error


def configs_inside(name: str, metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """Of a file's own metadata, by component, as diffusers writes it. DynFuseError where it cannot be read."""
    text = metadata.get(_METADATA_KEY)
    if text is None:
        return {}
    try:
        grouped: dict[str, dict[str, Any]] = {}
        for key, value in json.loads(text).items():
            component, _, rest = key.partition(".")
            grouped.setdefault(component, {})[rest] = value
        found = {component: _config(values) for component, values in grouped.items()}
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise DynFuseError(
            f"{name}: its metadata {_METADATA_KEY} cannot be read ({shown(without_folders(str(error)))})"
        ) from error
    return {component: config for component, config in found.items() if config is not None}


def _config(values: Mapping[str, Any]) -> PeftConfig | None:
    r, alpha = values.get("r"), values.get("lora_alpha", values.get("alpha"))
    if not r or alpha is None:
        return None
    ranks, alphas = dict(values.get("rank_pattern") or {}), dict(values.get("alpha_pattern") or {})
    for pattern in (*ranks, *alphas):
        re.compile(pattern)
    return PeftConfig(int(r), float(alpha), ranks, alphas, bool(values.get("use_rslora")))


def _of_layer(pattern: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """peft's patterns are regular expressions for the end of a layer's path."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)
