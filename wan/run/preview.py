"""Previews while denoising: small pictures of the predicted latent, by a linear map in place of the VAE's decoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, features

from ..sampling import Solver
from ..utils.events import Listener, Previewed
from ..utils.files import replacing
from ..utils.video import to_uint8

log = logging.getLogger(__name__)

SIDE, FRAMES = 128, 5  # of the clip that the map is fitted on: pixels per side; frames, two latent ones
CELL = 8  # pixels per side that a latent cell covers
RIDGE = 1e-3  # keeps weights of channels that do not vary in the clip near zero; others vary by about 1
SECONDS = 0.25  # for which a latent frame is shown: it stands for four frames at 16 per second


def fit_colours(encode: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Fits a linear map from a latent cell to its colour, by least squares over a clip that the VAE encodes.

    The clip is a still of random colour fields, coarse and fine. The fit maps a cell's channels to the mean colour of
    its pixels. So it suits whatever VAE encodes, as far as a linear map can: hue, light and place, no texture.

    Args:
        encode: maps a clip [3, F, H, W] in [-1, 1] to its latent [C, F', H / 8, W / 8].

    Returns:
        [C + 1, 3] fp32 on the CPU: the weights, and last the colour of a latent of zeros.
    """
    generator, picture = torch.Generator().manual_seed(0), torch.zeros(1, 3, SIDE, SIDE)
    side = 2
    while side <= SIDE // CELL:
        noise = torch.randn(1, 3, side, side, generator=generator)
        picture += F.interpolate(noise, size=SIDE, mode="bilinear", align_corners=False)
        side *= 2
    picture = picture.tanh()
    latent = encode(picture[0, :, None].expand(-1, FRAMES, -1, -1).contiguous()).float().cpu()
    cells = _with_one(latent).flatten(0, -2).double()
    colours = F.avg_pool2d(picture, CELL).permute(0, 2, 3, 1).expand(latent.size(1), -1, -1, -1)
    normal = cells.T @ cells + RIDGE * len(cells) * torch.eye(cells.size(1), dtype=torch.float64)
    return torch.linalg.solve(normal, cells.T @ colours.flatten(0, -2).double()).float()


def to_frames(latent: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """A latent [C, F, h, w] as pictures [F, h, w, 3], uint8, by a map from `fit_colours`."""
    return to_uint8(_with_one(latent) @ colours)


class Preview:
    """An animated picture in a file, replaced as denoising goes on.

    Attributes:
        path: of the file.

    Args:
        folder: of the file.
        name: of the file, without suffix.
        colours: the map from `fit_colours`.
        every: steps between two previews; the last step always has one.
        references: latent frames at the front that are not part of the video.
        tell: called with an event for each preview.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str,
        colours: torch.Tensor,
        every: int,
        references: int,
        tell: Listener,
    ):
        self.path = Path(folder) / f"{name}{'.webp' if features.check('webp') else '.gif'}"
        self._colours, self._every, self._references, self._tell = colours, every, references, tell
        self._failed = False  # whether the last write failed

    def after_step(self, latent: torch.Tensor, solver: Solver) -> None:
        """Writes a preview of the clean latent that the step predicted; of failures in a row, warns of the first."""
        if solver.done % self._every and solver.done != solver.steps:
            return
        frames = to_frames(solver.clean(latent)[:, self._references :], self._colours)
        first, *rest = (Image.fromarray(frame.numpy()) for frame in frames)
        try:
            with replacing(self.path) as temporary:
                first.save(temporary, save_all=True, append_images=rest, duration=int(1000 * SECONDS), loop=0)
        except OSError as error:
            if not self._failed:
                log.warning(f"No preview: {error}")
            self._failed = True
            return
        self._failed = False
        self._tell(Previewed(self.path, solver.done))


def _with_one(latent: torch.Tensor) -> torch.Tensor:
    """[C, F, h, w] to [F, h, w, C + 1], the last channel being 1."""
    return F.pad(latent.permute(1, 2, 3, 0), (0, 1), value=1.0)
