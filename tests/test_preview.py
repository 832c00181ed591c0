"""Previews show what is coming, and change nothing of it."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_resume import SETTINGS, command

from wan.run import Request, run
from wan.run.preview import fit_colours, to_frames
from wan.sampling import SOLVERS, Solver, denoise
from wan.utils.events import Previewed


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_tells_the_clean_latent_that_it_predicts(name):
    """On straight paths every step predicts the same one."""
    clean, noise = torch.randn(2, 4, 2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    solver, seen = Solver(name, 5, 3.0, "cpu"), []
    denoise(
        lambda latent, t: noise - clean,
        solver,
        noise,
        on_step=lambda latent, solver: seen.append(solver.clean(latent)),
    )
    assert len(seen) == 5
    for found in seen[
        1:
    ]:  # the first step of the schedule is not quite at pure noise, where this walk starts
        assert (found - clean).abs().max() < 2e-2


def test_colours_are_found_by_least_squares():
    weights = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))

    def encode(clip):
        cells = F.avg_pool2d(clip.transpose(0, 1), 8)[::4]
        return torch.einsum("fchw,kc->kfhw", cells, weights) + 0.3

    colours = fit_colours(encode)
    clip = torch.rand(3, 5, 64, 48) * 2 - 1
    shown = to_frames(encode(clip), colours)
    expected = F.avg_pool2d(clip.transpose(0, 1), 8)[::4].permute(0, 2, 3, 1)
    assert shown.shape == (2, 8, 6, 3) and shown.dtype is torch.uint8
    assert (shown / 127.5 - 1 - expected).abs().max() < 0.03


@pytest.mark.parametrize("task, solver", [("t2v-tiny", "unipc"), ("vace-tiny", "euler")])
def test_a_preview_changes_nothing(task, solver):
    few = {"frame_num": 5, "sample_steps": 3, "base_seed": 3, "sample_solver": solver}
    if task == "vace-tiny":
        few["src_ref_images"] = Request(task=task).src_ref_images
    run(Request(task=task, save_file="a.mp4", **few))
    events = []
    run(Request(task=task, save_file="b.mp4", preview="new/folder", preview_every=2, **few), events.append)
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    (path,) = Path("new/folder").absolute().iterdir()
    told = [event for event in events if isinstance(event, Previewed)]
    assert [(event.path.absolute(), event.step) for event in told] == [(path, 2), (path, 3)]
    with Image.open(path) as picture:
        assert picture.n_frames == 2 and picture.size == (16, 12)


def test_previews_that_cannot_be_written_stop_nothing(monkeypatch, caplog):
    def full(picture, path, *args, **options):
        if "save_all" in options:
            raise OSError("No space left on device")
        save(picture, path, *args, **options)

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", full)
    assert (
        command(
            "--task", "t2i-tiny", *SETTINGS, "--frame_num", "1", "--save_file", "a.png", "--preview", "folder"
        )
        == 0
    )
    assert caplog.text.count("No preview: No space left on device") == 1 and os.listdir("folder") == []


def test_a_folder_that_is_none_is_refused(capsys):
    Path("file").write_text("precious")
    assert command("--task", "t2v-tiny", "--save_file", "a.mp4", "--preview", "file") == 2
    assert "--preview file: cannot be made a folder" in capsys.readouterr().err
    assert os.listdir() == ["file"]
