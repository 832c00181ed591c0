"""Contact sheets: `python -m wan.toy.sheet FILE.png [CAPTION...]` shows what a toy makes of captions, 16 by default."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..configs import WAN_CONFIGS
from ..tasks import TASKS
from .checkpoints import checkpoint
from .clips import FRAMES, HEIGHT, WIDTH

SHOWN = (0, 4, 8, 12, 16)  # frames
ENLARGED, COLUMNS, LINE = 2, 2, 16
CAPTIONS = (
    "a red ball rolls to the right",
    "a blue square slides to the left on a white ground",
    "a yellow triangle moves up on a black ground",
    "a green ball falls on a grey ground",
    "a pink square grows on a white ground",
    "a turquoise ball bounces on a black ground",
    "a red triangle slides to the left on a grey ground",
    "a yellow ball shrinks on a black ground",
    "a blue ball rises on a white ground",
    "a green square bounces on a white ground",
    "a pink triangle moves down on a grey ground",
    "a turquoise square slides to the right on a black ground",
    "a red square moves down on a white ground",
    "a blue triangle grows on a grey ground",
    "a pink ball rolls to the left on a black ground",
    "a green triangle moves to the right on a white ground",
)


def strip(video: np.ndarray) -> Image.Image:
    """Some frames of a video [3, F, H, W] in [-1, 1], side by side, enlarged."""
    frames = np.concatenate([video[:, frame] for frame in SHOWN], axis=2)
    pixels = ((frames.transpose(1, 2, 0) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)


def sheet(captions: Sequence[str], seed: int = 0) -> Image.Image:
    """Each caption above its video, one seed each, in two columns where there are more than two."""
    name = "t2v-toy"
    pipeline = TASKS[name].pipeline_class(WAN_CONFIGS[name], checkpoint(name), device="cpu")
    strips = [
        strip(
            pipeline.generate(
                caption,
                (WIDTH, HEIGHT),
                FRAMES,
                shift=TASKS[name].sample_shift,
                sampling_steps=TASKS[name].sample_steps,
                seed=seed + number,
            ).numpy()
        )
        for number, caption in enumerate(captions)
    ]
    columns = COLUMNS if len(strips) > COLUMNS else 1
    width, height = strips[0].width + 8, strips[0].height + LINE + 4
    page = Image.new("RGB", (columns * width - 8, -(-len(strips) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for number, (caption, image) in enumerate(zip(captions, strips)):
        left, top = number % columns * width, number // columns * height
        draw.text((left + 2, top + 2), caption, fill="black")
        page.paste(image, (left, top + LINE))
    return page


if __name__ == "__main__":
    sheet(sys.argv[2:] or CAPTIONS).save(sys.argv[1])
