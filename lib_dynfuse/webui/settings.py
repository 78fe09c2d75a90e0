"""What belongs to the machine and not to a picture: the WebUI's Settings page "Dynamic LoRA Fusion"."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lib_dynfuse.guidance.sources import MODELS, Source

DOWNLOAD = "dynfuse_download"
ENCODERS_REST = "dynfuse_encoders_rest"
LOG_LEVEL = "dynfuse_log_level"
SECTION = ("dynfuse", "Dynamic LoRA Fusion")
_LOGGER = "lib_dynfuse"
# Of the command line (preload.py), as the Settings page is open to whoever reaches it: other names on the hub than
# the published ones, and another folder than models/dynfuse.
ENCODER_FLAG, FOLDER_FLAG = "--dynfuse-encoder", "--dynfuse-encoder-folder"
CONSENT = "tick Download missing encoders in Settings, Dynamic LoRA Fusion"


@dataclass(frozen=True)
class Setting:
    """One setting; `key` is its name in the host's config.json. Without `choices` it is a line of text, or a switch
    where its default is one. `owners`: what is fetched depends on it, so no request may change it."""

    key: str
    label: str
    default: str | bool
    choices: tuple[str, ...]
    help: str
    owners: bool = False


_DEVICES = ("auto", "cpu", "cuda", "mps")
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_LEVELS = ("WARNING", "INFO", "DEBUG")
SETTINGS = (
    Setting(
        DOWNLOAD,
        "Download missing encoders",
        False,
        (),
        "when they are first needed: CLIP (605 MB) and DINO (87 MB) from huggingface.co, and the preview decoder TAESD "
        "(5 MB) from github.com",
        owners=True,
    ),
    Setting("dynfuse_guidance_device", "Guidance device", "auto", _DEVICES, "auto: the UNet's"),
    Setting("dynfuse_guidance_dtype", "Guidance dtype", "auto", _DTYPES, "auto: the UNet's"),
    Setting(
        ENCODERS_REST,
        "Move encoders off the GPU when idle",
        True,
        (),
        "between generations CLIP and DINO wait in main memory",
    ),
    Setting(
        LOG_LEVEL,
        "Log level",
        "INFO",
        _LEVELS,
        "WARNING: what is wrong, as under the picture; INFO: one line for each generation too",
    ),
)
_BY_KEY = {setting.key: setting for setting in SETTINGS}


def on_ui_settings() -> None:
    """Add the settings to the host's page; the callback of the same name."""
    import gradio as gr
    from modules import shared

    for setting in SETTINGS:
        plain = gr.Checkbox if isinstance(setting.default, bool) else gr.Textbox
        info = shared.OptionInfo(
            setting.default,
            setting.label,
            gr.Radio if setting.choices else plain,
            {"choices": list(setting.choices)} if setting.choices else {},
            section=SECTION,
            restrict_api=setting.owners,
        )
        shared.opts.add_option(setting.key, info.info(setting.help))
    shared.opts.onchange(LOG_LEVEL, apply_log_level)


def value(key: str) -> str:
    """What a line of text or a choice is set to; the default where the host has no such option, or a value that is not
    allowed."""
    return str(_stored(key))


def is_on(key: str) -> bool:
    """Whether a switch is on; the default as for `value`."""
    return bool(_stored(key))


def encoder_source() -> Source:
    """Where CLIP and DINO may come from, whether the folder is there or not."""
    from modules import paths

    named = _started_with(FOLDER_FLAG)
    return Source(
        folder=Path(named) if named else Path(paths.models_path) / "dynfuse",
        title="the encoder folder" if named else MODELS,
        allowed=tuple(_started_with(ENCODER_FLAG) or ()),
        download=is_on(DOWNLOAD),
        consent="" if is_on(DOWNLOAD) else CONSENT,
        pickles=not named,
        check_pickle=_host_check(),
    )


def _started_with(flag: str) -> Any:
    """What the server was started with; None where the flag was not given, or not read."""
    from modules import shared

    return getattr(getattr(shared, "cmd_opts", None), flag.strip("-").replace("-", "_"), None)


def _host_check() -> Callable[[BinaryIO], None] | None:
    """The host's own check of a pickle, whether or not it is told to leave it out for its own files."""
    try:
        from modules import safe
    except ImportError:
        return None
    check = getattr(safe, "check_pt", None)
    return None if check is None else functools.partial(check, extra_handler=None)


def _stored(key: str) -> str | bool:
    from modules import shared

    setting = _BY_KEY[key]
    stored = getattr(shared.opts, key, setting.default)
    usable = type(stored) is type(setting.default) and (not setting.choices or stored in setting.choices)
    return stored if usable else setting.default


def apply_log_level() -> None:
    """Make our loggers as talkative as the setting says.

    A WebUI that is not told a level of its own has no handler, and Python then prints warnings alone: so there is one
    of ours, for as long as the WebUI has none.
    """
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(value(LOG_LEVEL))
    if all(handler.get_name() != _LOGGER for handler in logger.handlers):
        own = logging.StreamHandler()
        own.set_name(_LOGGER)
        own.setFormatter(logging.Formatter("DynFuse: %(message)s"))
        own.addFilter(lambda record: not logging.root.handlers)
        logger.addHandler(own)
