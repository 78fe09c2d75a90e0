from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.output import Batch, next_number


def write(folder: Path, seeds: list[int]) -> list[Path]:
    with Batch(folder, seeds) as batch:
        for index in range(len(seeds)):
            batch.picture(index, Image.new("RGB", (8, 8)), "a fox — 狐")
        return batch.keep()


def test_files_are_numbered_on_from_what_is_there(tmp_path: Path):
    folder = tmp_path / "new" / "out"
    assert [path.name for path in write(folder, [5, 6])] == ["00000-5.png", "00001-6.png"]
    (folder / "00007-1-trace.json").touch()
    (folder / "holiday.png").touch()
    assert [path.name for path in write(folder, [5])] == ["00008-5.png"]


def test_text_in_any_script_is_kept_in_the_chunk_that_the_webui_reads(tmp_path: Path):
    (path,) = write(tmp_path, [1])
    with Image.open(path) as picture:
        assert picture.info["parameters"] == "a fox — 狐"


def write_half(folder: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError(f"{len(list(folder.glob('*.png')))} pictures so far")

    with Batch(folder, [1]) as batch:
        batch.picture(0, Image.new("RGB", (8, 8)), "")
        batch.file("more.json", fail)


def test_nothing_appears_before_everything_is_written(tmp_path: Path):
    with pytest.raises(RuntimeError, match="0 pictures so far"):
        write_half(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path):
    (tmp_path / "out").touch()
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(DynFuseError, match="is a file"):
            Batch(folder, [1])


def test_an_empty_folder_starts_at_0(tmp_path: Path):
    assert next_number(tmp_path) == 0
