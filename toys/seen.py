"""Measures from a clip's pixels what it shows: the ground's colour, and the shape's colour, kind and motion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from wan.trained_toys.captions import COLOURS, GROUNDS

DISTINCT = 60.0  # distance in RGB from the ground, above which a pixel is the shape's
LEAST_AREA = 20  # in pixels, of a shape
MOVED = 6.0  # pixels; a shape whose centre moves farther has moved
GROWN = 1.35  # ratio of last to first area, above which a shape has grown


@dataclass(frozen=True)
class Seen:
    """What a clip shows. Names are those of toys.clips, or "" where nothing can be told.

    Attributes:
        places: [F, 2] of the shape's centre in each frame, x and y in pixels; NaN where there is none.
        areas: [F] of the shape, in pixels.
    """

    ground: str
    colour: str
    shape: str
    motion: str
    places: np.ndarray
    areas: np.ndarray


def seen(video: np.ndarray) -> Seen:
    """Measures a clip of one shape on a plain ground.

    video: [3, F, H, W] in [-1, 1].
    """
    pixels = (np.asarray(video, np.float32) + 1) * 127.5
    edge = np.concatenate([pixels[:, :, 0], pixels[:, :, -1], pixels[..., 0], pixels[..., -1]], axis=2)
    ground = np.median(edge, axis=(1, 2))
    apart = np.linalg.norm(pixels - ground[:, None, None, None], axis=0)
    shown = apart > DISTINCT
    areas = shown.sum((1, 2)).astype(float)
    down, across = np.mgrid[: shown.shape[1], : shown.shape[2]] + 0.5
    with np.errstate(invalid="ignore"):
        places = np.stack([(shown * axis).sum((1, 2)) / areas for axis in (across, down)], 1)
    places[areas < LEAST_AREA] = np.nan
    if areas.max() < LEAST_AREA:
        return Seen(_nearest(ground, GROUNDS), "", "", "", places, areas)
    # The colour is that of the shape's inner pixels: those at its edge are mixed with the ground.
    inner = apart > 0.8 * np.quantile(apart[shown], 0.9)
    colour = np.median(pixels[:, inner], axis=1)
    return Seen(
        _nearest(ground, GROUNDS),
        _nearest(colour, COLOURS),
        _shape(shown),
        _motion(places, areas),
        places,
        areas,
    )


def _nearest(colour: np.ndarray, named: dict[str, tuple[int, int, int]]) -> str:
    return min(named, key=lambda name: math.dist(colour, named[name]))


def _shape(shown: np.ndarray) -> str:
    """The kind, by the share of its bounding box that a shape fills, a median over frames: 1, pi / 4 or a half."""
    filled = []
    for frame in shown:
        rows, columns = np.flatnonzero(frame.any(1)), np.flatnonzero(frame.any(0))
        if frame.sum() >= LEAST_AREA:
            filled.append(frame.sum() / ((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)))
    share = float(np.median(filled))
    return "square" if share > 0.88 else "ball" if share > 0.68 else "triangle"


def _motion(places: np.ndarray, areas: np.ndarray) -> str:
    there = np.flatnonzero(~np.isnan(places[:, 0]))
    first, last = there[0], there[-1]
    x, y = places[last] - places[first]
    if max(abs(x), abs(y)) > MOVED:
        if abs(x) > abs(y):
            return "right" if x > 0 else "left"
        return "down" if y > 0 else "up"
    if np.ptp(places[there, 1]) > MOVED:
        return "bounces"
    ratio = areas[last] / areas[first]
    return "grows" if ratio > GROWN else "shrinks" if ratio < 1 / GROWN else ""
