"""Draws the inputs that trained toys work from by default: `python -m toys.examples`, in a checkout."""

from __future__ import annotations

from pathlib import Path

import torch

from wan.tasks import EXAMPLES
from wan.utils.video import save_image, save_video

from .clips import Clip
from .lessons import hole_about, masked, reference

# The default prompts that describe them are in wan/tasks.py.
BEGUN = Clip("square", "blue", "white", "right", x=14.5, y=25, radius=10, reach=50)
FRAMED = Clip("triangle", "pink", "black", "left", x=65.5, y=24, radius=10, reach=50)
REPLACED = Clip("ball", "red", "grey", "right", x=14.5, y=24, radius=10, reach=50)
REFERRED = ("square", "turquoise")


def draw(folder: Path) -> None:
    """Writes all example files, replacing those that exist."""
    framed, source = FRAMED.video(), REPLACED.video()
    *_, mask = masked(source, hole_about(REPLACED))
    pictures = {
        "toy_image": BEGUN.video(1),
        "toy_first": framed[:, :1],
        "toy_last": framed[:, -1:],
        "toy_ref": reference(*REFERRED),
    }
    for name, picture in pictures.items():
        save_image(torch.from_numpy(picture), folder / f"{name}.png")
    for name, video in {"toy_video": source, "toy_mask": mask.repeat(3, 0) * 2 - 1}.items():
        save_video(torch.from_numpy(video), folder / f"{name}.mp4")


if __name__ == "__main__":
    draw(EXAMPLES)
