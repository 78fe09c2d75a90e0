from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from lib_dynfuse import output
from lib_dynfuse.errors import DynFuseError
from lib_dynfuse.output import Batch, finish_killed, next_number

RED = Image.new("RGB", (8, 8), "red")


def fill(batch: Batch, seeds: list[int]) -> None:
    for index in range(len(seeds)):
        batch.picture(index, RED, "a fox — 狐")
    batch.file(0, "-trace.json", lambda path: path.write_text("{}"))


def write(folder: Path, seeds: list[int]) -> list[str]:
    with Batch(folder, seeds) as batch:
        fill(batch, seeds)
        return [path.name for path in batch.keep()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_numbered_on_from_what_is_there(tmp_path: Path):
    folder = tmp_path / "new" / "out"
    assert write(folder, [5, 6]) == ["00000-5-trace.json", "00000-5.png", "00001-6.png"]
    (folder / "00007-1-trace.json").touch()
    (folder / "holiday.png").touch()
    assert write(folder, [5]) == ["00008-5-trace.json", "00008-5.png"]


def test_counting_goes_on_beyond_five_digits(tmp_path: Path):
    (tmp_path / "99999-5.png").touch()
    for number in (100_000, 100_001, 100_002):
        assert write(tmp_path, [5]) == [f"{number}-5-trace.json", f"{number}-5.png"]
    (tmp_path / "1234567890-is-a-date.png").touch()
    assert next_number(tmp_path) == 100_003


def test_text_in_any_script_is_kept_in_the_chunk_that_the_webui_reads(tmp_path: Path):
    write(tmp_path, [1])
    with Image.open(tmp_path / "00000-1.png") as picture:
        assert picture.info["parameters"] == "a fox — 狐"


def write_half(folder: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError(f"{len(list(folder.glob('*.png')))} pictures so far")

    with Batch(folder, [1]) as batch:
        batch.picture(0, RED, "")
        batch.file(0, ".json", fail)


def test_nothing_appears_before_everything_is_written(tmp_path: Path):
    with pytest.raises(RuntimeError, match="0 pictures so far"):
        write_half(tmp_path)
    assert names(tmp_path) == []


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path):
    (tmp_path / "out").touch()
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(DynFuseError, match="is a file"):
            Batch(folder, [1])


def test_an_empty_folder_starts_at_0(tmp_path: Path):
    assert next_number(tmp_path) == 0


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with hard links, and one without, as on a memory card."""

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("links")
def test_two_at_once_in_one_folder_keep_all_their_files(tmp_path: Path):
    with Batch(tmp_path, [7, 8]) as one, Batch(tmp_path, [7, 8]) as other:
        fill(one, [7, 8])
        fill(other, [7, 8])
        assert [path.name for path in one.keep()] == ["00000-7-trace.json", "00000-7.png", "00001-8.png"]
        assert [path.name for path in other.keep()] == ["00002-7-trace.json", "00002-7.png", "00003-8.png"]
        assert (one.stem(1), other.stem(1)) == ("00001-8", "00003-8")
    assert len(names(tmp_path)) == 6


@pytest.mark.usefixtures("links")
def test_a_name_that_is_taken_in_the_last_moment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The number is found, and then somebody writes a file of it."""
    found = output.next_number

    def late(folder: Path) -> int:
        number = found(folder)
        if number == 0:
            (folder / "00001-8.png").write_text("mine")
        return number

    monkeypatch.setattr(output, "next_number", late)
    assert write(tmp_path, [7, 8]) == ["00002-7-trace.json", "00002-7.png", "00003-8.png"]
    assert (tmp_path / "00001-8.png").read_text() == "mine"
    assert len(names(tmp_path)) == 4


@pytest.mark.usefixtures("links")
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_breaks_while_files_are_moved_moves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    claim = output._claim

    def break_at_the_third(made: Path, final: Path) -> None:
        if len(list(tmp_path.glob("*.*"))) == 2:
            raise error
        claim(made, final)

    monkeypatch.setattr(output, "_claim", break_at_the_third)
    with pytest.raises((DynFuseError, KeyboardInterrupt)):
        write(tmp_path, [7, 8])
    assert names(tmp_path) == []


def test_a_generation_at_work_is_left_alone(tmp_path: Path):
    with Batch(tmp_path, [7]) as batch:
        fill(batch, [7])
        assert finish_killed(tmp_path) == []
        batch.keep()
    assert names(tmp_path) == ["00000-7-trace.json", "00000-7.png"]


# Writes batches for ever, or is killed by itself at the moment that the second argument names.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from PIL import Image
from lib_dynfuse import output

folder, moment = Path(sys.argv[1]), sys.argv[2]
claim, count = output._claim, 0

def die(made, final):
    global count
    if count == int(moment):
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    claim(made, final)

if moment != "any":
    output._claim = die
print("begun", flush=True)
while True:
    with output.Batch(folder, [7, 8]) as batch:
        batch.picture(0, Image.new("RGB", (64, 64)), "")
        batch.picture(1, Image.new("RGB", (64, 64)), "")
        batch.file(0, "-trace.json", lambda path: path.write_text("{}"))
        if moment == "unfinished":
            os.kill(os.getpid(), signal.SIGKILL)
        batch.keep()
"""
posix = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill here")


def run_until_killed(folder: Path, moment: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), moment], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


@posix
def test_what_a_killed_run_had_not_finished_is_removed_and_said(tmp_path: Path):
    run_until_killed(tmp_path, "unfinished")
    assert [name[:8] for name in names(tmp_path)] == [".making-"]
    assert finish_killed(tmp_path) == ["a run that was killed had not finished its files: they were removed"]
    assert names(tmp_path) == []
    assert finish_killed(tmp_path) == []


@posix
@pytest.mark.parametrize("moment", ["0", "1", "2"])
def test_what_a_killed_run_had_finished_is_moved_and_said(tmp_path: Path, moment: str):
    run_until_killed(tmp_path, moment)
    there = names(tmp_path)[1:]
    # The record comes first: no picture is ever there without it.
    assert there == ["00000-7-trace.json", "00000-7.png"][: int(moment)]
    (said,) = finish_killed(tmp_path)
    assert "00000-7-trace.json, 00000-7.png, 00001-8.png" in said
    assert names(tmp_path) == ["00000-7-trace.json", "00000-7.png", "00001-8.png"]


@posix
def test_what_a_killed_run_had_finished_takes_other_names_where_its_own_are_taken_since(tmp_path: Path):
    run_until_killed(tmp_path, "1")
    (tmp_path / "00001-8.png").write_text("mine")
    finish_killed(tmp_path)
    assert (tmp_path / "00001-8.png").read_text() == "mine"
    assert names(tmp_path) == ["00001-8.png", "00002-7-trace.json", "00002-7.png", "00003-8.png"]


@posix
def test_two_runs_that_are_killed_at_any_moment_lose_nothing_that_was_there(tmp_path: Path):
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments drawn with {seed}")
    draw = random.Random(seed)
    for _ in range(3):
        before = {path.name: path.stat().st_ino for path in tmp_path.glob("*.*") if path.is_file()}
        runs = [
            subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), "any"], stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for run in runs:
            assert run.stdout is not None
            run.stdout.readline()
        for run in runs:
            time.sleep(draw.uniform(0, 0.3))
            run.kill()
            run.wait()
            run.stdout.close()
        finish_killed(tmp_path)
        after = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
        assert before.items() <= after.items()
        pictures = [name for name in after if name.endswith(".png")]
        for name in pictures:
            with Image.open(tmp_path / name) as picture:
                picture.load()
        assert len(pictures) == 2 * len([name for name in after if name.endswith("-trace.json")])
        # A run that was killed before its folder had a lock leaves it empty: for an hour it may be of a living one.
        assert not [name for name in after if name.startswith(".") and any((tmp_path / name).iterdir())]


@pytest.mark.parametrize(
    "plan",
    [
        "",
        "[]",
        '{"first": "x", "files": []}',
        '{"first": 0, "files": [{"made": "../mine", "index": 0, "tail": "-7.png"}]}',
        '{"first": 0, "files": [{"made": "0-7.png", "index": 0, "tail": "/../../mine"}]}',
    ],
)
def test_a_plan_that_is_none_of_ours_moves_nothing(tmp_path: Path, plan: str):
    folder = tmp_path / "out"
    making = folder / ".making-x"
    making.mkdir(parents=True)
    (tmp_path / "mine").write_text("mine")
    (making / "0-7.png").touch()
    (making / "lock").touch()
    (making / "plan.json").write_text(plan)
    assert "removed" in finish_killed(folder)[0]
    assert names(tmp_path) == ["mine", "out"]
    assert names(folder) == []


def test_a_folder_without_a_lock_is_left_alone_for_an_hour(tmp_path: Path):
    making = tmp_path / ".making-x"
    making.mkdir()
    (making / "00000-7.png").touch()
    assert finish_killed(tmp_path) == []
    assert making.exists()
    os.utime(making, (0, 0))
    assert len(finish_killed(tmp_path)) == 1
    assert names(tmp_path) == []


def test_a_link_is_not_followed_and_no_folder_is_no_matter(tmp_path: Path):
    target = tmp_path / "mine"
    target.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".making-x").symlink_to(target, target_is_directory=True)
    os.utime(target, (0, 0))
    assert finish_killed(tmp_path / "out") == []
    assert target.exists()
    assert finish_killed(tmp_path / "nowhere") == []
