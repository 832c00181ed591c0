"""Predicts when a run will end."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from ..utils.events import Event, Step
from .request import Request

# Operations of the VAE's decoder per pixel of each frame at the published width of 96, summed over its convolutions.
DECODER, WIDTH = 8.2e6, 96
# How many times longer an operation of the decoder, in fp32, takes than one of the DiT, in bf16; estimates by device.
SLOWER = {"cpu": 1.0}
SLOWER_GPU = 4.0
PIXELS_PER_SECOND = 1e7  # of the H.264 encoder on a CPU; an estimate


class Forecast:
    """Predicts from a run's events when it will end: the current stage from its pace, later ones from operation counts.

    Args:
        request: the run's request.
        pipeline: the run's pipeline.
    """

    def __init__(self, request: Request, pipeline: Any):
        self._request, self._pipeline = request, pipeline

    def end_after(self, event: Event) -> datetime | None:
        """When the run will end; None if the event does not tell."""
        if not isinstance(event, Step) or event.seconds_left is None:
            return None
        if event.stage == "denoise":
            steps_left = event.total - event.done
            if not steps_left:
                return None
            later = self._decoding(event.seconds_left / steps_left) + self._saving()
        elif event.stage == "decode":
            later = self._saving()
        else:
            return None
        return datetime.now() + timedelta(seconds=event.seconds_left + later)

    def _decoding(self, step_seconds: float) -> float:
        model, device = self._pipeline.model, self._pipeline.device
        passes = 1 if self._request.sample_guide_scale == 1 else 2
        tokens = self._pixels() / 4 / (8 * 8 * 2 * 2)
        layers = len(model.blocks)
        weights = sum(parameter.numel() for parameter in model.blocks.parameters())
        dit = passes * (2 * weights * tokens + 4 * layers * model.dim * tokens**2)
        decoder = DECODER * (self._pipeline.config.get("vae_dim", WIDTH) / WIDTH) ** 2 * self._pixels()
        return step_seconds * decoder / dit * SLOWER.get(device.type, SLOWER_GPU)

    def _saving(self) -> float:
        return self._pixels() / PIXELS_PER_SECOND

    def _pixels(self) -> int:
        width, height = self._request.pixels
        return width * height * self._request.frame_num
