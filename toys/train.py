"""Trains the toys: `python -m toys.train --out FOLDER`.

Stages whose file is there already are not run again, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from wan.configs.toy import TOY_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import VAE
from wan.trained_toys import checkpoints

from . import vae_training
from .clips import random_clip
from .dit_training import start, train_dit
from .lessons import Lessons, Texts, VaceLessons

SEED = 0
Made = TypeVar("Made")
CLIPS = 2000
# The encoder is trained on single frames: a latent frame codes the last of its four frames. Then the decoder, which
# also sees the latent frame before, is trained to fill in the frames between.
VAE_STAGES: dict[str, dict[str, Any]] = {
    "vae-stills": {"frames": 1, "batch": 8, "count": 2500, "rate": 3e-3},
    "vae-decoder": {"frames": 9, "batch": 3, "count": 3000, "rate": 2e-3, "decoder_only": True},
}
PATCHES = "patch_embedding.weight"
IMAGE_BRANCH = ("img_emb", "k_img", "v_img")


class Training:
    """The stages of the training; each leaves a file in `folder`, and a file with its losses beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def teller(self, stage: str) -> Callable[..., None]:
        """A function that prints and keeps a stage's numbers: step, losses."""

        def tell(*numbers: float) -> None:
            line = [round(number, 5) for number in numbers]
            print(stage, *line, flush=True)
            path = self.folder / f"{stage}-losses.json"
            known = json.loads(path.read_text()) if path.is_file() else []
            path.write_text(json.dumps([other for other in known if other[0] < line[0]] + [line]) + "\n")

        return tell

    def kept(self, name: str, make: Callable[[], Made]) -> Made:
        """The result of a stage: read from its file if that exists, else made and written to it."""
        path = self.folder / f"{name}.pt"
        if not path.is_file():
            torch.manual_seed(SEED)
            torch.save(make(), path)
        return torch.load(path, weights_only=False)

    def vae(self, stages: Sequence[str]) -> VAE:
        """The VAE after some stages of VAE_STAGES, with the statistics of its latents that pipelines expect."""
        torch.manual_seed(SEED)
        vae = vae_training.new_vae(TOY_CONFIGS["t2v-toy"].vae_dim)
        for stage in stages:
            vae.load_state_dict(self.kept(stage, partial(self._taught_vae, vae, stage)))
        rng = np.random.default_rng([SEED, 9])
        sample = torch.from_numpy(np.stack([random_clip(rng).video() for _ in range(24)]))
        with torch.no_grad():
            vae_training.standardise(vae, vae_training.encoded_by_frames(vae, sample))
        return vae.requires_grad_(False)

    def _taught_vae(self, vae: VAE, stage: str) -> dict[str, torch.Tensor]:
        kept = self.folder / f"{stage}-unfinished.pt"
        vae_training.train_vae(vae, seed=SEED, tell=self.teller(stage), kept=kept, **VAE_STAGES[stage])
        return vae.state_dict()

    def run(self, only: str | None = None) -> None:
        """Trains everything, or only one of the two parts that need just the encoder: "decoder", or "dits"."""
        stills, decoder = VAE_STAGES
        vae = self.vae([stills])
        if only != "dits":
            checkpoints.save_weights(self.folder, "vae", self.vae([stills, decoder]).state_dict())
        if only != "decoder":
            self.dits(vae)

    def dits(self, vae: VAE) -> None:
        """Trains one DiT for text and images, and from its weights VACE's, on lessons from half of the clips."""
        checkpoints.write_encoders(self.folder, TOY_CONFIGS["t2v-toy"])
        lessons = self.kept("lessons", lambda: Lessons(vae, Texts(self.folder), CLIPS, SEED))
        weights = self.dit("dit", "i2v-toy", lessons, 14_000, 2e-3)
        checkpoints.save_weights(self.folder, "image", {PATCHES: weights[PATCHES]})
        weights[PATCHES] = weights[PATCHES][:, : vae.z_dim]
        checkpoints.save_weights(self.folder, "t2v", weights)
        sources = self.kept("vace-lessons", lambda: VaceLessons(vae, lessons, CLIPS // 2, SEED))
        weights = self.dit("vace", "vace-toy", sources, 4000, 1e-3, weights)
        checkpoints.save_weights(self.folder, "vace", weights)

    def dit(
        self,
        name: str,
        task: str,
        lessons: Lessons | VaceLessons,
        steps: int,
        rate: float,
        before: checkpoints.Weights | None = None,
    ) -> checkpoints.Weights:
        """Trains a task's DiT except for the image branch, starting from the weights `before` if given."""
        sizes = {key: value for key, value in TOY_CONFIGS[task].dit_config.items() if key[0] != "_"}
        model = (VaceWanModel if name == "vace" else WanModel)(**sizes)
        start(model, SEED)
        if before:
            adopt(model, before)

        def trained(parameter: str) -> bool:
            return not any(part in parameter for part in IMAGE_BRANCH)

        def make() -> dict[str, torch.Tensor]:
            kept = self.folder / f"{name}-unfinished.pt"
            first = 0 if before else 200
            train_dit(model, lessons.draw, steps, rate, SEED, self.teller(name), kept, trained, first)
            return {key: tensor for key, tensor in model.state_dict().items() if trained(key)}

        return self.kept(name, make)


def adopt(model: VaceWanModel, other: checkpoints.Weights) -> None:
    """Starts a VACE model from another DiT's weights, each VACE block as a copy of the block at its place."""
    weights = model.state_dict() | other
    for number, layer in enumerate(model.vace_layers):
        for name, tensor in other.items():
            if name.startswith(f"blocks.{layer}."):
                weights[name.replace(f"blocks.{layer}.", f"vace_blocks.{number}.")] = tensor.clone()
    model.load_state_dict(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is trained")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("decoder", "dits"), help="one of two that can run side by side")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    Training(given.out).run(given.only)


if __name__ == "__main__":
    main()
