"""No message that a person sees has a path of the machine in it."""

from __future__ import annotations

import pytest

from lib_dynfuse.errors import without_folders


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("No such file: '/srv/my webui/models/fox.safetensors'", "No such file: 'fox.safetensors'"),
        ('in "/home/me/a b/c.py", line 3', 'in "c.py", line 3'),
        ("[WinError 3] not found: 'C:\\\\Users\\\\John Smith\\\\x.png'", "[WinError 3] not found: 'x.png'"),
        (r"cannot open \\server\share\a\b.png now", "cannot open b.png now"),
        ("D:/x/y.pt is no model", "y.pt is no model"),
        ("CLIP:/abs/path/w.pt (/tmp/gradio/0123/a.png)", "CLIP:w.pt (a.png)"),
    ],
)
def test_of_an_absolute_path_the_last_name_is_left(said: str, left: str) -> None:
    assert without_folders(said) == left


@pytest.mark.parametrize(
    "said",
    [
        "facebook/dino-vits16 and/or ViT-B-32:laion2b_s34b_b79k",
        "<lora:people/fox:1:role=subject> has 1/2 of it",
        "see https://example.org/a/b",
        "balance: 3 is not allowed; allowed: -1 to 1",
        "a name relative to models/dynfuse",
    ],
)
def test_what_is_no_absolute_path_stays(said: str) -> None:
    assert without_folders(said) == said
