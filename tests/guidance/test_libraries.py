"""Libraries that are imported only when wanted."""

from __future__ import annotations

import pytest
import torch

from lib_dynfuse.guidance.libraries import EncoderError, library, missing_operators_skipped


def test_a_missing_library_is_told_with_the_package_to_install() -> None:
    with pytest.raises(EncoderError, match=r"no_such_library cannot be imported .*; install the package such-a-one"):
        library("no_such_library", "such-a-one")


def test_torchvision_may_describe_operators_that_could_not_be_loaded() -> None:
    with missing_operators_skipped():

        @torch.library.register_fake("torchvision::no_such_operator")
        def described() -> str:
            return "as it was"

    assert described() == "as it was"


def test_other_libraries_are_still_told_of_a_missing_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.library, "register_fake", asked.append)
    with missing_operators_skipped():
        torch.library.register_fake("elsewhere::no_such_operator")
    assert asked == ["elsewhere::no_such_operator"]


def test_torch_is_given_back_after_a_failed_import() -> None:
    before = torch.library.register_fake
    with pytest.raises(EncoderError):
        library("no_such_library", "such-a-one")
    assert torch.library.register_fake is before


def test_torch_without_such_descriptions_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.library, "register_fake")
    with missing_operators_skipped():
        assert not hasattr(torch.library, "register_fake")
