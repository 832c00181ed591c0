"""Full disks, folders that go, processes that get in each other's way or are killed: no finished work is lost."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
from PIL import Image
from test_resume import OFTEN, SETTINGS, command, in_a_child, states, whole  # noqa: F401

from wan import random_models
from wan.configs.tiny import TINY_CONFIGS
from wan.run.state import read_state
from wan.tasks import TASKS
from wan.utils import files, progress, video
from wan.utils.events import StageStarted

ALL = bool(os.environ.get("WAN_EVERY_KILL"))  # for an hour when nothing else is to be done


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "other"))


class FullDisk:
    """The disk under the working directory takes some writes, and no more after that; or all but one."""

    # Where files are written and named: who does it, and which of the arguments says where, by its number.
    POINTS = [
        (os, "replace", 1),
        (os, "link", 1),
        (os, "fsync", 0),
        (safetensors.torch, "save_file", 1),
        (video, "_encode", 1),
        (Image.Image, "save", 1),
    ]

    def __init__(self, takes=None, once=False):
        self.count, self._takes, self._once = 0, takes, once

    @contextlib.contextmanager
    def __call__(self):
        with pytest.MonkeyPatch.context() as patch:
            for owner, name, place in self.POINTS:
                patch.setattr(owner, name, self._limited(getattr(owner, name), place))
            yield

    def _limited(self, write, place):
        def writing(*args, **kwargs):
            where = f"/proc/self/fd/{args[0]}" if isinstance(args[place], int) else args[place]
            if Path(where).resolve().is_relative_to(Path.cwd()):
                self.count += 1
                full = self._takes is not None and self.count > self._takes
                if full and not (self._once and self.count > self._takes + 1):
                    if write.__name__ == "save_file":
                        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
                    raise OSError(errno.ENOSPC, "No space left on device")
            return write(*args, **kwargs)

        return writing


KEPT = ["--offload_folder", "converted", "--prompt_cache", "prompts", "--preview", "previews"]
LINE = ["--task", "t2v-tiny", *SETTINGS, *OFTEN, *KEPT, "--save_file", "out.mp4"]


def strays(folder):
    return list(Path(folder).rglob(".wan-*"))


def empty(*folders):
    for path in (path for folder in folders for path in folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("once", [False, True] if ALL else [False])
def test_a_disk_that_is_full_at_any_write(once, whole, tmp_path):  # noqa: F811
    expected, counted, other = whole("t2v-tiny"), FullDisk(), tmp_path / "other"
    with counted():
        assert command(*LINE) == 0
    assert counted.count > 20
    seen = set()
    for takes in range(counted.count) if ALL else (0, counted.count - 2):
        empty(Path.cwd(), other)
        with FullDisk(takes, once)():
            code = command(*LINE)
        results = [path for path in (Path("out.mp4"), other / "out.mp4") if path.exists()]
        kept = [*states(), *other.glob("*.state")]
        seen.add((code, len(results), len(kept)))
        if code == 0:
            assert len(results) == 1 and not kept
        elif kept:
            read_state(kept[0])
            assert command("--resume", kept[0]) == 0
        else:  # at the very start
            assert command(*LINE) == 0
        (result,) = [path for path in (Path("out.mp4"), other / "out.mp4") if path.exists()]
        assert result.read_bytes() == expected
        assert not strays(".") and not strays(other) and not list(other.glob("*.state")) and not states()
    assert len(seen) > 1


def test_an_encoder_that_fails_at_its_end_leaves_the_state(whole, monkeypatch):  # noqa: F811
    """Also where all frames are in its file."""
    line = ["--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4"]
    with monkeypatch.context() as patch:
        encode = video._encode
        patch.setattr(video, "_encode", lambda *args: encode(*args) or 1)
        assert command(*line) == 1
    assert not Path("out.mp4").exists() and not strays(".")
    (state,) = states()
    assert command("--resume", state) == 0
    assert Path("out.mp4").read_bytes() == whole("t2v-tiny") and not states()


@pytest.mark.parametrize("stage", ["text", "denoise", "decode"] if ALL else ["denoise"])
@pytest.mark.parametrize("gone", ["weights", "results"])
def test_a_folder_that_goes_in_mid_run(gone, stage, whole, tmp_path, monkeypatch):  # noqa: F811
    checkpoint = shutil.copytree(random_models.checkpoint("t2v-tiny"), tmp_path / "weights")
    (tmp_path / "results").mkdir()
    expected = whole("t2v-tiny", "--ckpt_dir", str(checkpoint))
    tell = progress.ProgressBars.__call__

    def removing(bars, event):
        tell(bars, event)
        if event == StageStarted(stage):
            shutil.rmtree(tmp_path / gone)

    monkeypatch.setattr(progress.ProgressBars, "__call__", removing)
    line = ["--task", "t2v-tiny", *SETTINGS, *OFTEN, "--ckpt_dir", checkpoint]
    assert command(*line, "--save_file", tmp_path / "results" / "out.mp4") == 0
    (result,) = tmp_path.rglob("out.mp4")
    assert result.parent.name == ("results" if gone == "weights" else "other")
    assert result.read_bytes() == expected and not list(tmp_path.rglob("*.state"))


def test_three_runs_at_once_on_one_name_and_one_folder(whole):  # noqa: F811
    """All of them have begun before the first has its result."""
    expected, line = whole("t2v-tiny"), ["--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4"]

    def disturb():
        tell = progress.ProgressBars.__call__

        def waiting(bars, event):
            tell(bars, event)
            if event == StageStarted("save"):
                Path(f"ready {os.getpid()}").touch()
                while len(list(Path().glob("ready *"))) < 3:
                    time.sleep(0.01)

        progress.ProgressBars.__call__ = waiting

    codes = []
    runs = [
        threading.Thread(
            target=lambda: codes.append(in_a_child([*line, "--offload_folder", "folder"], disturb))
        )
        for _ in range(3)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert codes == [0, 0, 0]
    assert sorted(path.name for path in Path().glob("out*")) == ["out.mp4", "out_2.mp4", "out_3.mp4"]
    assert all(path.read_bytes() == expected for path in Path().glob("out*.mp4"))
    assert sorted(path.suffix for path in Path("folder").iterdir()) == [".json", ".safetensors"]


KILLS = 20
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


@pytest.mark.skipif(not ALL, reason="takes long: set WAN_EVERY_KILL=1")
@pytest.mark.parametrize("task", TINY_CONFIGS)
def test_killed_at_random_moments(task, whole):  # noqa: F811
    name = "out.png" if TASKS[task].still else "out.mp4"
    few = ["--frame_num", "1"] if TASKS[task].still else []
    line = ["--task", task, *SETTINGS, *few, *OFTEN, *KEPT, "--save_file", name]
    started = time.monotonic()
    assert in_a_child(line) == 0
    seconds, expected = time.monotonic() - started, Path(name).read_bytes()
    chance = random.Random(task)
    outcomes = []
    for number in range(KILLS):
        empty(Path.cwd())
        moment, kind = chance.random() * seconds, SIGNALS[number % 3]

        def killed_then(moment=moment, kind=kind):
            code = f"import os, sys, time; time.sleep({moment}); os.kill({os.getpid()}, {int(kind)})"
            subprocess.Popen([sys.executable, "-S", "-c", code])

        code = in_a_child(line, killed_then)
        found = sorted(Path().glob(f"{name}.*.state"))
        outcomes.append((code, len(found), Path(name).exists()))
        if found:
            assert command("--resume", found[0]) == 0
        elif not Path(name).exists():
            assert command(*line) == 0
        assert Path(name).read_bytes() == expected, outcomes
        assert not strays(".") and not list(Path().glob("*.state")), outcomes
    print(task, outcomes)
