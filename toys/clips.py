"""Synthetic clips: one plain shape on a plain ground, moving as its caption says.

Code draws them from a seed: videos, captions for training on text, and the shape's own pixels for masks and tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from wan.trained_toys.captions import COLOURS, GROUNDS, MOTIONS, SHAPES, VERBS

WIDTH, HEIGHT, FRAMES = 80, 48, 17


@dataclass(frozen=True)
class Clip:
    """The content of a clip.

    Attributes:
        shape, colour, ground, motion: of SHAPES, COLOURS, GROUNDS, MOTIONS.
        x, y: of the centre in the first frame, in pixels.
        radius: in the first frame, in pixels; a square's and a triangle's are of about the same area.
        reach: by how many pixels the centre moves, or by how many the radius grows or shrinks.
    """

    shape: str
    colour: str
    ground: str
    motion: str
    x: float
    y: float
    radius: float
    reach: float

    def at(self, time: float) -> tuple[float, float, float]:
        """Centre and radius at a time in [0, 1]."""
        x, y, radius, way = self.x, self.y, self.radius, self.reach * time
        if self.motion == "right":
            return x + way, y, radius
        if self.motion == "left":
            return x - way, y, radius
        if self.motion == "up":
            return x, y - way, radius
        if self.motion == "down":
            return x, y + way, radius
        if self.motion == "bounces":
            return x, y - self.reach * abs(math.sin(2 * math.pi * time)), radius
        return x, y, radius + (way if self.motion == "grows" else -way)

    def coverage(self, frames: int = FRAMES, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
        """The share of each pixel that the shape covers, [frames, height, width] in [0, 1]."""
        across, down = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
        drawn: np.ndarray = np.empty((frames, height, width), np.float32)
        for frame in range(frames):
            x, y, radius = self.at(frame / (FRAMES - 1))
            drawn[frame] = np.clip(0.5 - DISTANCES[self.shape](across - x, down - y, radius), 0, 1)
        return drawn

    def video(self, frames: int = FRAMES) -> np.ndarray:
        """[3, frames, height, width] float32 in [-1, 1]."""
        share = self.coverage(frames)[None]
        shape, ground = (
            np.array(colour, np.float32)[:, None, None, None] / 127.5 - 1
            for colour in (COLOURS[self.colour], GROUNDS[self.ground])
        )
        return ground + (shape - ground) * share

    def caption(self, rng: np.random.Generator | None = None, still: bool = False) -> str:
        """The caption: in the first wording and with the ground or, with `rng`, in any wording and maybe without.

        still: leave the motion out.
        """
        wordings = MOTIONS[self.motion]
        wording = wordings[0 if rng is None else rng.integers(len(wordings))]
        parts = [f"a {self.colour} {self.shape}"]
        if not still:
            parts.append(wording.format(go=VERBS[self.shape]))
        if rng is None or rng.random() < 0.5:
            parts.append(f"on a {self.ground} ground")
        return " ".join(parts)


def _ball(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(x, y) - radius


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius


def _triangle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Equilateral, its tip above, its centre of mass at the middle."""
    return np.maximum(y, math.sqrt(0.75) * np.abs(x) - 0.5 * y) - 0.75 * radius


# The signed distance from a shape's outline in pixels, negative inside.
DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "ball": _ball,
    "square": _square,
    "triangle": _triangle,
}


def random_clip(rng: np.random.Generator, **fixed: str) -> Clip:
    """A random clip whose shape stays in the picture but for a tip at most; `fixed` gives attributes."""
    names = {"shape": SHAPES, "colour": COLOURS, "ground": GROUNDS, "motion": MOTIONS}
    drawn = {name: str(rng.choice(list(choices))) for name, choices in names.items()} | fixed
    motion = drawn["motion"]
    x, y, radius = rng.uniform(30, WIDTH - 30), rng.uniform(21, HEIGHT - 21), rng.uniform(9.5, 11.5)
    if motion in ("right", "left"):
        x, reach = rng.uniform(13, 16), rng.uniform(48, 51)
        x = WIDTH - x if motion == "left" else x
    elif motion in ("up", "down"):
        y, reach = rng.uniform(14, 15), rng.uniform(18, 20)
        y = HEIGHT - y if motion == "up" else y
    elif motion == "bounces":
        y, reach = rng.uniform(33, 36), rng.uniform(15, 18)
    else:
        small, reach = rng.uniform(5, 6.5), rng.uniform(8, 10)
        radius = small if motion == "grows" else small + reach
    return Clip(**drawn, x=float(x), y=float(y), radius=float(radius), reach=float(reach))
