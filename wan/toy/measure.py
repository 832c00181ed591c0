"""What a video shows, from its pixels alone: whether there is one saturated shape on a neutral ground, and which."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from .clips import COLOURS, GROUNDS, SHAPES

SATURATED = 60  # of 255, between a pixel's highest and lowest channel
FILLED = {"ball": 0.86, "square": 1.0, "triangle": 0.68}  # of a box about it, in the median of clips


@dataclass(frozen=True)
class Seen:
    """What is seen of a video, or of a still.

    Attributes:
        colour, ground: of the names in clips.py; colour is "" where nothing is seen.
        shape: by how much of its box it fills, in the median over the frames.
        motion: of the names in clips.py, or "" without any.
        centres: [F, 2] x and y in pixels, NaN where nothing is seen.
        areas: [F] pixels.
    """

    colour: str
    ground: str
    shape: str
    motion: str
    centres: np.ndarray
    areas: np.ndarray


def seen(video: np.ndarray) -> Seen:
    """video: [3, F, H, W] in [-1, 1]."""
    pixels = (np.clip(video, -1, 1) + 1) * 127.5
    saturation = pixels.max(0) - pixels.min(0)
    coloured = saturation[saturation > SATURATED]
    # Half of what it is inside the shape, so that soft edges make it no larger.
    shape = saturation > (max(SATURATED, np.percentile(coloured, 75) / 2) if len(coloured) else SATURATED)
    areas = shape.sum((1, 2))
    centres = np.full((len(areas), 2), np.nan)
    fills = []
    for frame, covered in enumerate(shape):
        if areas[frame] < 12:
            continue
        y, x = np.nonzero(covered)
        centres[frame] = x.mean() + 0.5, y.mean() + 0.5
        # Ends that a few pixels of an edge do not move.
        (left, right), (top, bottom) = np.percentile(x, (2, 98)), np.percentile(y, (2, 98))
        fills.append(areas[frame] / ((right - left + 1) * (bottom - top + 1)))
    ground = float(np.median(pixels[:, ~shape])) if (~shape).any() else 0.0
    return Seen(
        colour=_colour(pixels[:, shape].mean(1)) if fills else "",
        ground=min(GROUNDS, key=lambda name: abs(GROUNDS[name][0] - ground)),
        shape=min(SHAPES, key=lambda name: abs(FILLED[name] - np.median(fills))) if fills else "",
        motion=_motion(centres, areas),
        centres=centres,
        areas=areas,
    )


def _colour(pixel: np.ndarray) -> str:
    """The named colour of the nearest hue."""
    hue = _hue(pixel)
    apart = {name: abs((hue - _hue(np.array(colour)) + 0.5) % 1 - 0.5) for name, colour in COLOURS.items()}
    return min(apart, key=apart.__getitem__)


def _hue(pixel: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*(pixel / 255))[0]


def _motion(centres: np.ndarray, areas: np.ndarray) -> str:
    there = np.flatnonzero(~np.isnan(centres[:, 0]))
    if len(there) < 2:
        return ""
    first, last = there[0], there[-1]
    right, down = centres[last] - centres[first]
    larger = areas[last] / areas[first]
    if max(abs(right), abs(down)) > 9:
        if abs(right) > abs(down):
            return "right" if right > 0 else "left"
        return "down" if down > 0 else "up"
    if larger > 1.8 or larger < 1 / 1.8:
        return "grows" if larger > 1 else "shrinks"
    return "bounces" if np.ptp(centres[there, 1]) > 6 else ""
