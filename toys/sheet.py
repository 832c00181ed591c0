"""Contact sheets of what the trained toys show, and the README's first video: `python -m toys.sheet --out docs`.

What is asked for is held out, and the first that chance gives: nothing is chosen by its result.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from wan.tasks import TASKS

from .clips import FRAMES, HEIGHT, WIDTH
from .shown import KINDS, Asked, Toy, asked, picture, text

COUNT = 16  # prompts on a sheet
EVERY = 4  # one of so many frames of a video is on the sheet
GAP, LINE = 6, 16  # pixels: between pictures, and height of a prompt's line
FIRST = "toy-first.gif"
FIRST_SCALE, FIRST_COLOURS = 4, 64
FRAME_MS, LAST_MS = 60, 900  # a GIF's times are in steps of 10 ms; the last frame stays


def strip(request: Asked, video: np.ndarray) -> Image.Image:
    """A prompt, and below it the given pictures, a gap, and frames of the result."""
    frames = video[:, ::EVERY].swapaxes(0, 1)
    scale = 2 if len(frames) > 1 else 3
    width, height = scale * WIDTH, scale * HEIGHT
    count = len(request.pictures)
    lefts = [(width + GAP) * n + 2 * GAP * (0 < count <= n) for n in range(count + len(frames))]
    canvas = Image.new("RGB", (lefts[-1] + width, LINE + height), "white")
    ImageDraw.Draw(canvas).text((0, 2), request.prompt, "black")
    for left, frame in zip(lefts, (*request.pictures, *frames)):
        canvas.paste(enlarged(frame, scale), (left, LINE))
    return canvas


def grid(strips: Sequence[Image.Image], across: int) -> Image.Image:
    """Pictures of one size as one picture, `across` in a row."""
    width, height = strips[0].width + 2 * GAP, strips[0].height + GAP
    canvas = Image.new("RGB", (width * across, height * -(-len(strips) // across)), "white")
    for number, image in enumerate(strips):
        canvas.paste(image, (number % across * width, number // across * height))
    return canvas


def enlarged(frame: np.ndarray, scale: int) -> Image.Image:
    """A frame [3, H, W] in [-1, 1], each pixel as a square of `scale` pixels."""
    return picture(frame).resize((scale * WIDTH, scale * HEIGHT), Image.Resampling.NEAREST)


def sheet(kind: str) -> Image.Image:
    """The contact sheet of a kind: its first COUNT requests and their results."""
    toy = Toy(KINDS[kind][0])
    requests = [asked(kind, number) for number in range(COUNT)]
    videos = [toy.show(request, number) for number, request in enumerate(requests)]
    return grid(list(map(strip, requests, videos)), 1 if videos[0].shape[1] > 1 else 4)


def first_video(path: Path) -> None:
    """Writes the result of the README's first command as a GIF."""
    task = KINDS["text"][0]
    video = Toy(task).show(text(TASKS[task].prompt), seed=0)
    frames = [enlarged(frame, FIRST_SCALE) for frame in video.swapaxes(0, 1)]
    colours = frames[0].quantize(FIRST_COLOURS)
    frames = [frame.quantize(palette=colours, dither=Image.Dither.NONE) for frame in frames]
    shown = [FRAME_MS] * (FRAMES - 1) + [LAST_MS]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=shown, loop=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    folder = parser.parse_args().out
    first_video(folder / FIRST)
    for kind in KINDS:
        sheet(kind).save(folder / f"toys-{kind}.png", optimize=True)


if __name__ == "__main__":
    main()
