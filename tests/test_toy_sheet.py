"""Contact sheets, of toys that show just what they are asked for, and what the documents say of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toys import sheet
from toys.clips import Clip
from toys.seen import seen
from toys.shown import KINDS
from wan.tasks import TASKS

ROOT = Path(__file__).parent.parent
BALL = Clip("ball", "red", "white", "right", 14, 24, 9, 50)


class Perfect:
    def __init__(self, task):
        pass

    def show(self, asked, seed):
        video = (asked.clip or BALL).video(asked.given.get("frame_num", 17))
        return (video + np.random.default_rng(seed).normal(0, 0.05, video.shape)).clip(-1, 1)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "Toy", Perfect)
    monkeypatch.setattr(sheet, "COUNT", 4)
    monkeypatch.setattr("sys.argv", ["sheet", "--out", str(tmp_path)])
    sheet.main()
    return tmp_path


def test_a_sheet_for_each_kind_and_the_first_video(drawn):
    assert {path.name for path in drawn.iterdir()} == {sheet.FIRST, *(f"toys-{kind}.png" for kind in KINDS)}
    for kind in KINDS:
        image = Image.open(drawn / f"toys-{kind}.png")
        apart = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(sheet.sheet(kind)))
        assert apart.max() < 40  # few colours, but those of all shapes
        across, down = (4, 1) if kind == "still" else (1, 4)
        assert image.height // down in range(96 + sheet.LINE, 3 * 48 + 2 * sheet.LINE)
        assert image.width // across in range(240, 1200)
    with Image.open(drawn / sheet.FIRST) as first:
        assert (first.n_frames, first.size) == (17, (320, 192))
        frames = []
        for number in range(first.n_frames):
            first.seek(number)
            frames.append(np.asarray(first.convert("RGB"))[2::4, 2::4])
    there = seen(np.stack(frames).transpose(3, 0, 1, 2) / np.float32(127.5) - 1)
    assert (there.colour, there.shape, there.motion, there.ground) == ("red", "ball", "right", "white")


def test_documents_show_what_is_drawn():
    command = f'python generate.py --task t2v-toy --prompt "{TASKS["t2v-toy"].prompt}" --base_seed 0 '
    document = (ROOT / "docs" / "toys.md").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    assert command in readme and f"docs/{sheet.FIRST}" in readme and command in document
    for kind, (task, _) in KINDS.items():
        assert f"toys-{kind}.png" in document and f"--task {task} " in document
