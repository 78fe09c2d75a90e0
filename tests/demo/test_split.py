"""What the base model learns and what it never sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lib_dynfuse.demo import data, split


def test_twenty_four_subjects_and_two_styles_are_held_out() -> None:
    assert len(set(split.HELD_SUBJECTS)) == 24
    assert set(split.HELD_STYLES) == {"blob", "hc"}
    assert not set(split.HELD_SUBJECTS) & set(split.BASE_SUBJECTS)
    assert len(split.FRESH_SUBJECTS) == len(split.REPORTED_SUBJECTS) == 24
    assert len(set(split.MORE_SUBJECTS)) == 48
    assert not set(split.MORE_SUBJECTS) & {*split.HELD_SUBJECTS, *split.BASE_SUBJECTS}
    assert not set(split.HELD_STYLES) & {*split.BASE_STYLES, *split.SUBJECT_STYLES}


def test_every_subject_is_in_the_catalogue_once() -> None:
    names = [name for name, _, _ in split.catalogue()]
    assert len(names) == len(set(names)) == 801
    assert {*split.BASE_SUBJECTS, *split.HELD_SUBJECTS, *split.MORE_SUBJECTS} <= set(names)


def test_a_caption_says_the_subject_and_the_style_in_words() -> None:
    assert split.caption("hot beverage", "hc") == "hot beverage emoji, high contrast style"


def test_every_style_has_words_and_a_judged_style() -> None:
    assert set(split.STYLES) == set(split.STYLE_WORDS) == set(split.JUDGED_AS)
    assert set(split.JUDGED_AS.values()) == set(split.JUDGED_STYLES)


def test_a_truth_picture_is_a_held_out_subject_in_a_held_out_style(picture_file: Path) -> None:
    pictures = data.load(picture_file, 16)
    truths = {
        (pictures.names[pictures.subject[k]], pictures.styles[pictures.style[k]])
        for k in np.flatnonzero(pictures.truth)
    }
    assert truths == {(name, style) for name in split.HELD_SUBJECTS for style in split.HELD_STYLES}


def test_nothing_is_taught_a_truth_picture(picture_file: Path) -> None:
    pictures = data.load(picture_file, 16)
    base = pictures.where(split.BASE_SUBJECTS, split.BASE_STYLES)
    style_loras = pictures.where(split.BASE_SUBJECTS, split.HELD_STYLES)
    subject_loras = pictures.where(split.HELD_SUBJECTS, split.SUBJECT_STYLES)
    assert len(base) == 300
    assert len(style_loras) == 200
    assert len(subject_loras) == 96
    for taught in (base, style_loras, subject_loras):
        assert not pictures.truth[taught].any()
