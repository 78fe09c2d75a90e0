"""What belongs to the machine and not to a picture: the WebUI's Settings page "Dynamic LoRA Fusion"."""

from __future__ import annotations

import logging
from dataclasses import dataclass

LOG_LEVEL = "dynfuse_log_level"
SECTION = ("dynfuse", "Dynamic LoRA Fusion")


@dataclass(frozen=True)
class Setting:
    """One setting; `key` is its name in the host's config.json; without `choices` it is a line of text."""

    key: str
    label: str
    default: str
    choices: tuple[str, ...]
    help: str


_DEVICES = ("auto", "cpu", "cuda", "mps")
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_LEVELS = ("WARNING", "INFO", "DEBUG")
SETTINGS = (
    Setting("dynfuse_encoder_folder", "Encoder folder", "", (), "where CLIP and DINO are; empty: the hub's cache"),
    Setting("dynfuse_guidance_device", "Guidance device", "auto", _DEVICES, "auto: the UNet's"),
    Setting("dynfuse_guidance_dtype", "Guidance dtype", "auto", _DTYPES, "auto: the UNet's"),
    Setting(LOG_LEVEL, "Log level", "INFO", _LEVELS, "INFO: one line for each generation"),
)
_BY_KEY = {setting.key: setting for setting in SETTINGS}


def on_ui_settings() -> None:
    """Add the settings to the host's page; the callback of the same name."""
    import gradio as gr
    from modules import shared

    for setting in SETTINGS:
        info = shared.OptionInfo(
            setting.default,
            setting.label,
            gr.Radio if setting.choices else gr.Textbox,
            {"choices": list(setting.choices)} if setting.choices else {},
            section=SECTION,
        )
        shared.opts.add_option(setting.key, info.info(setting.help))
    shared.opts.onchange(LOG_LEVEL, apply_log_level)


def value(key: str) -> str:
    """What a setting is set to; the default where the host has no such option or a value that is not allowed."""
    from modules import shared

    setting = _BY_KEY[key]
    stored = getattr(shared.opts, key, setting.default)
    usable = isinstance(stored, str) and (not setting.choices or stored in setting.choices)
    return stored if usable else setting.default


def apply_log_level() -> None:
    """Make our loggers as talkative as the setting says."""
    logging.getLogger("lib_dynfuse").setLevel(value(LOG_LEVEL))
