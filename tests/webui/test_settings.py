"""The settings page; the fake has the shape of the host's modules.shared."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import preload
from lib_dynfuse.webui import settings


class OptionInfo:
    def __init__(
        self, default=None, label="", component=None, component_args=None, section=None, restrict_api=False
    ) -> None:
        self.default, self.label, self.component, self.args, self.section = (
            default, label, component, component_args, section,
        )  # fmt: skip
        self.restrict_api = restrict_api
        self.onchange: Any = None
        self.comment = ""

    def info(self, text: str) -> OptionInfo:
        self.comment = text
        return self


class Opts:
    """As the host's: attributes come from the stored data first, then from the known options' defaults."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data, self.data_labels = data, {}

    def __getattr__(self, item: str) -> Any:
        if item in self.data:
            return self.data[item]
        if item in self.data_labels:
            return self.data_labels[item].default
        raise AttributeError(item)

    def add_option(self, key: str, info: OptionInfo) -> None:
        self.data_labels[key] = info

    def onchange(self, key: str, function: Any, call: bool = True) -> None:
        self.data_labels[key].onchange = function
        if call:
            function()


@pytest.fixture
def opts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opts]:
    found = Opts({})
    modules, gradio = ModuleType("modules"), ModuleType("gradio")
    modules.shared = SimpleNamespace(opts=found, OptionInfo=OptionInfo)  # type: ignore[attr-defined]
    modules.paths = SimpleNamespace(models_path="/webui/models")  # type: ignore[attr-defined]
    gradio.Radio, gradio.Textbox, gradio.Checkbox = "radio", "textbox", "checkbox"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    logger = logging.getLogger("lib_dynfuse")
    level = logger.level
    yield found
    logger.setLevel(level)


def test_every_setting_is_on_our_page_with_its_help(opts: Opts):
    settings.on_ui_settings()
    assert list(opts.data_labels) == [
        "dynfuse_download", "dynfuse_guidance_device", "dynfuse_guidance_dtype", "dynfuse_encoders_rest",
        "dynfuse_log_level",
    ]  # fmt: skip
    for info in opts.data_labels.values():
        assert info.section == ("dynfuse", "Dynamic LoRA Fusion")
        assert info.comment
        kind = "checkbox" if isinstance(info.default, bool) else "textbox"
        assert info.component == ("radio" if "choices" in info.args else kind)


def test_no_request_changes_what_is_opened_or_fetched(opts: Opts):
    """A request's override_settings and POST /sdapi/v1/options leave those alone that are restricted."""
    settings.on_ui_settings()
    restricted = {key for key, info in opts.data_labels.items() if info.restrict_api}
    assert restricted == {"dynfuse_download"}


def test_a_value_is_the_stored_one_or_the_default(opts: Opts):
    assert settings.value("dynfuse_guidance_dtype") == "auto"
    settings.on_ui_settings()
    opts.data["dynfuse_guidance_dtype"] = "float16"
    assert settings.value("dynfuse_guidance_dtype") == "float16"


@pytest.mark.parametrize("stored", ["float8", 16, None])
def test_a_stored_value_that_is_not_allowed_is_not_used(opts: Opts, stored: Any):
    opts.data["dynfuse_guidance_dtype"] = stored
    assert settings.value("dynfuse_guidance_dtype") == "auto"


@pytest.mark.parametrize(("stored", "on"), [(True, True), (False, False), ("no", True), (None, True)])
def test_a_switch_is_as_stored_or_as_its_default(opts: Opts, stored: Any, on: bool):
    assert settings.is_on(settings.ENCODERS_REST)
    opts.data[settings.ENCODERS_REST] = stored
    assert settings.is_on(settings.ENCODERS_REST) is on


def started(*words: str) -> None:
    """The server has been started with these."""
    parser = argparse.ArgumentParser()
    preload.preload(parser)
    sys.modules["modules"].shared.cmd_opts = parser.parse_args(words)  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [None, (), ("--dynfuse-encoder-folder", "/encoders")])
def test_encoders_are_looked_for_in_the_webuis_models_where_nothing_else_is_named(
    opts: Opts, words: tuple[str, ...] | None
):
    # Not on the Settings page: that is open to whoever reaches the page.
    opts.data["dynfuse_encoder_folder"] = "/of-a-stranger"
    if words is not None:
        started(*words)
    source = settings.encoder_source()
    assert source.folder == Path("/encoders" if words else "/webui/models/dynfuse")
    # Elsewhere than in models/dynfuse no pickle is read.
    assert source.pickles is not bool(words)
    assert "/" not in source.title.removeprefix("models/")


def test_nothing_is_downloaded_or_allowed_until_the_owner_says_so(opts: Opts):
    source = settings.encoder_source()
    assert (source.download, source.allowed, source.paths) == (False, (), False)
    assert source.consent == "tick Download missing encoders in Settings, Dynamic LoRA Fusion"
    labels = {setting.key: setting.label for setting in settings.SETTINGS}
    assert labels["dynfuse_download"] in source.consent
    assert settings.SECTION[1] in source.consent
    opts.data.update(dynfuse_download=True, dynfuse_encoder=["of/a-stranger"])
    started("--dynfuse-encoder", "a/b", "--dynfuse-encoder", "ViT-L-14:openai")
    source = settings.encoder_source()
    assert (source.download, source.allowed, source.consent) == (True, ("a/b", "ViT-L-14:openai"), "")


def test_the_host_s_check_of_pickles_is_used_even_where_it_is_switched_off(opts: Opts, monkeypatch: pytest.MonkeyPatch):
    assert settings.encoder_source().check_pickle is None
    seen: list[Any] = []
    safe = ModuleType("modules.safe")
    safe.check_pt = lambda filename, extra_handler: seen.append((filename, extra_handler))  # type: ignore[attr-defined]
    sys.modules["modules"].safe = safe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modules.safe", safe)
    check = settings.encoder_source().check_pickle
    assert check is not None
    check("an open file")  # type: ignore[arg-type]
    assert seen == [("an open file", None)]


def test_the_log_level_is_applied_at_the_start_and_when_it_changes(opts: Opts):
    opts.data["dynfuse_log_level"] = "WARNING"
    settings.on_ui_settings()
    assert logging.getLogger("lib_dynfuse").level == logging.WARNING
    opts.data["dynfuse_log_level"] = "DEBUG"
    opts.data_labels["dynfuse_log_level"].onchange()
    assert logging.getLogger("lib_dynfuse").level == logging.DEBUG


@pytest.fixture
def no_handlers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes logging as a WebUI leaves it that is not told a level: pytest's own handlers are out of the way. To be
    called in the test, as they come only then."""

    def clear() -> None:
        monkeypatch.setattr(logging.root, "handlers", [])
        monkeypatch.setattr(logging.getLogger("lib_dynfuse"), "handlers", [])

    return clear


def test_the_one_line_of_a_generation_is_seen_where_the_webui_has_no_log(
    opts: Opts, no_handlers: Callable[[], None], capsys: pytest.CaptureFixture[str]
):
    no_handlers()
    for _ in range(3):
        settings.apply_log_level()
    logger = logging.getLogger("lib_dynfuse")
    logger.info("1 picture")
    logger.debug("much more")
    opts.data["dynfuse_log_level"] = "WARNING"
    settings.apply_log_level()
    logger.info("1 picture")
    logger.warning("not fused")
    assert capsys.readouterr().err == "DynFuse: 1 picture\nDynFuse: not fused\n"


def test_a_line_is_not_said_twice_where_the_webui_has_a_log(
    opts: Opts, no_handlers: Callable[[], None], capsys: pytest.CaptureFixture[str]
):
    no_handlers()
    settings.apply_log_level()
    logging.root.addHandler(logging.StreamHandler())
    logging.getLogger("lib_dynfuse").info("1 picture")
    assert capsys.readouterr().err == "1 picture\n"
