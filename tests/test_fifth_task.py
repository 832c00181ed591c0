"""A task that is made up here: one entry in the table and one class, and every way in knows it."""

import dataclasses
import sys
import types

import numpy as np
import pytest
from PIL import Image

from leanwan.errors import InputError
from wan import cli, random_models
from wan.run import Request, run
from wan.tasks import TASKS
from wan.text2video import WanT2V
from wan.utils.events import Finished


class WanMirror(WanT2V):
    """What its parent makes, left and right exchanged."""

    def decode(self, latent):
        return super().decode(latent).flip(-1)


@pytest.fixture
def mirror(monkeypatch):
    module = types.ModuleType("wan.mirror")
    module.WanMirror = WanMirror
    monkeypatch.setitem(sys.modules, "wan.mirror", module)
    task = dataclasses.replace(
        TASKS["t2i-tiny"], pipeline="mirror:WanMirror", sample_steps=2, prompt="a mirror"
    )
    monkeypatch.setitem(TASKS, "mirror-tiny", task)


def arguments(path, task):
    return {
        "task": task,
        "prompt": "a red ball",
        "base_seed": 5,
        "sample_steps": 2,
        "ckpt_dir": str(random_models.checkpoint("t2i-tiny")),
        "device": "cpu",
        "save_file": str(path),
    }


def pixels(path):
    return np.asarray(Image.open(path))


def test_it_runs_from_python_and_from_the_command_line(mirror, tmp_path):
    plain, library, program = (tmp_path / f"{name}.png" for name in ("plain", "library", "program"))
    run(Request(**arguments(plain, "t2i-tiny")))
    events = []
    assert run(Request(**arguments(library, "mirror-tiny")), events.append) == library
    assert isinstance(events[-1], Finished)
    flags = [
        word
        for name, value in arguments(program, "mirror-tiny").items()
        for word in (f"--{name}", str(value))
    ]
    assert cli.main(flags) == 0
    expected = pixels(plain)[:, ::-1]
    assert not np.array_equal(expected, pixels(plain))
    assert np.array_equal(pixels(library), expected) and np.array_equal(pixels(program), expected)


def test_its_defaults_and_limits_are_the_tables(mirror, capsys):
    request = Request(task="mirror-tiny", device="cpu")
    assert (request.frame_num, request.sample_steps, request.prompt) == (1, 2, "a mirror")
    with pytest.raises(InputError, match="mirror-tiny makes one image"):
        Request(task="mirror-tiny", frame_num=5)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "mirror-tiny" in capsys.readouterr().out


def test_without_its_entry_nobody_knows_it():
    with pytest.raises(InputError, match="choose one of"):
        Request(task="mirror-tiny")
    assert cli.main(["--task", "mirror-tiny"]) == 2
