"""What belongs to the machine and not to a picture: the WebUI's Settings page "Dynamic LoRA Fusion"."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

ENCODER_FOLDER = "dynfuse_encoder_folder"
ENCODERS_REST = "dynfuse_encoders_rest"
LOG_LEVEL = "dynfuse_log_level"
SECTION = ("dynfuse", "Dynamic LoRA Fusion")
_LOGGER = "lib_dynfuse"


@dataclass(frozen=True)
class Setting:
    """One setting; `key` is its name in the host's config.json. Without `choices` it is a line of text, or a switch
    where its default is one."""

    key: str
    label: str
    default: str | bool
    choices: tuple[str, ...]
    help: str


_DEVICES = ("auto", "cpu", "cuda", "mps")
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_LEVELS = ("WARNING", "INFO", "DEBUG")
SETTINGS = (
    Setting(
        ENCODER_FOLDER,
        "Encoder folder",
        "",
        (),
        "where CLIP and DINO are looked for before the model hub; empty: models/dynfuse of the WebUI",
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


def encoder_folder() -> Path:
    """Where CLIP and DINO are looked for first, whether it is there or not."""
    from modules import paths

    named = value(ENCODER_FOLDER).strip()
    return Path(named).expanduser() if named else Path(paths.models_path) / "dynfuse"


def _stored(key: str) -> str | bool:
    from modules import shared

    setting = _BY_KEY[key]
    stored = getattr(shared.opts, key, setting.default)
    usable = type(stored) is type(setting.default) and (not setting.choices or stored in setting.choices)
    return stored if usable else setting.default


def apply_log_level() -> None:
    """Make our loggers as talkative as the setting says.

    A WebUI that is not told a level of its own has no handler, and Python then prints warnings alone: so ours is added.
    """
    logger = logging.getLogger(_LOGGER)
    logger.setLevel(value(LOG_LEVEL))
    own = next((handler for handler in logger.handlers if handler.get_name() == _LOGGER), None)
    if logging.root.handlers and own is not None:
        logger.removeHandler(own)
    elif not logging.root.handlers and own is None:
        own = logging.StreamHandler()
        own.set_name(_LOGGER)
        own.setFormatter(logging.Formatter("DynFuse: %(message)s"))
        logger.addHandler(own)
