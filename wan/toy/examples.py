"""Writes the example inputs of the toy tasks: `python -m wan.toy.examples FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..utils.video import save_video
from .clips import Clip
from .lessons import hole_about, masked, reference


def picture(video: np.ndarray, frame: int) -> Image.Image:
    """A frame of a video [3, F, H, W] in [-1, 1]."""
    pixels = (video[:, frame].transpose(1, 2, 0) + 1) * 127.5
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def write(folder: Path) -> None:
    """What the toy tasks start from where nothing is given, and a video with a mask for VACE."""
    sliding = Clip("square", "blue", "white", "right", 18, 26, 8, 38)
    rising = Clip("ball", "pink", "grey", "up", 42, 35, 8, 21)
    rolling = Clip("ball", "green", "black", "left", 62, 25, 8, 40)
    picture(sliding.video(), 0).save(folder / "toy_image.png")
    picture(rising.video(), 0).save(folder / "toy_first_frame.png")
    picture(rising.video(), -1).save(folder / "toy_last_frame.png")
    picture(reference("triangle", "turquoise"), 0).save(folder / "toy_reference.png")
    _, _, mask = masked(rolling.video(), hole_about(rolling))
    for name, video in (("toy_video", rolling.video()), ("toy_mask", mask.repeat(3, 0) * 2 - 1)):
        save_video(torch.from_numpy(video), folder / f"{name}.mp4", fps=16)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
