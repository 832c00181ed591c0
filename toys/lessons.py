"""The training data of the DiTs: clips as latents, captions as embeddings, and the other inputs of each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from wan.configs.toy import TEXT_LEN, TOY_CONFIGS
from wan.image2video import known_mask
from wan.modules.t5 import T5EncoderModel
from wan.modules.vae import LATENT_MEAN, LATENT_STD, VAE
from wan.trained_toys.captions import COLOURS, MOTIONS, SHAPES
from wan.vace import WanVace

from .clips import FRAMES, HEIGHT, WIDTH, Clip, random_clip
from .dit_training import Batch
from .vae_training import encoded_by_frames

BATCH = 16
GIVEN = (3, 2)  # clips of a batch whose first frame is given, and whose first and last are
UNSAID = 0.1  # share of clips without a caption, for guidance


class Texts:
    """Embeds captions with the toy's own text encoder."""

    def __init__(self, folder: Path):
        """folder: a toy's checkpoint."""
        config = TOY_CONFIGS["t2v-toy"]
        self.encoder = T5EncoderModel(
            TEXT_LEN,
            torch.float32,
            checkpoint_path=folder / config.t5_checkpoint,
            tokenizer_path=folder / config.t5_tokenizer,
            config=config.t5_config,
        )
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        """[B, text_len, text_dim], padded with zeros."""
        for caption in set(captions) - self.known.keys():
            with torch.no_grad():
                tokens = self.encoder([caption], "cpu")[0]
            self.known[caption] = torch.nn.functional.pad(tokens, (0, 0, 0, TEXT_LEN - len(tokens)))
        return torch.stack([self.known[caption] for caption in captions])


def latents_of(vae: VAE, videos: Sequence[np.ndarray], batch: int = 8) -> torch.Tensor:
    """Videos [3, F, H, W] to the latents that pipelines work on, [B, 16, F', H / 8, W / 8]."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    with torch.no_grad():
        parts = [
            encoded_by_frames(vae, torch.from_numpy(np.stack(videos[first : first + batch])))
            for first in range(0, len(videos), batch)
        ]
    return (torch.cat(parts) - mean) / std


def _heard(caption: str, rng: np.random.Generator) -> str:
    return "" if rng.random() < UNSAID else caption


class Lessons:
    """Clips with their captions; for some in a batch the first frame is given, for some the last as well.

    What a model learns of motion from given frames helps it where it has to start from noise. Every eighth batch has
    twice as many clips, but of each only the first frame.
    """

    def __init__(self, vae: VAE, texts: Texts, count: int, seed: int):
        self.seed, self.texts = seed, texts
        rng = np.random.default_rng([seed, 1])
        self.clips = [random_clip(rng) for _ in range(count)]
        self.latents = latents_of(vae, [clip.video() for clip in self.clips])
        self.given = [self._given(vae, last) for last in (False, True)]

    def _given(self, vae: VAE, last: bool) -> torch.Tensor:
        """Mask and latents of the frames that are known, [count, 20, F, h, w]."""
        videos = []
        for clip in self.clips:
            video = clip.video()
            video[:, 1 : FRAMES - last] = 0
            videos.append(video)
        latents = latents_of(vae, videos)
        mask = known_mask(latents.shape[1:], last).expand(len(videos), -1, -1, -1, -1)
        return torch.cat([mask, latents], 1)

    def draw(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, 1, step])
        still = step % 8 == 7
        chosen = rng.integers(len(self.clips), size=BATCH * (1 + still))
        captions = [_heard(self.clips[i].caption(rng, still), rng) for i in chosen]
        latents = self.latents[chosen, :, : 1 if still else None]
        y = torch.zeros(len(latents), self.given[0].size(1), *latents.shape[2:])
        if not still:
            ends = np.cumsum([0, *GIVEN])
            for start, end, given in zip(ends, ends[1:], self.given):
                y[start:end] = given[chosen[start:end]]
        return {"latents": latents, "context": self.texts(captions), "y": y}


def reference(shape: str, colour: str) -> np.ndarray:
    """A picture of a shape on white, [3, 1, H, W]."""
    clip = Clip(shape, colour, "white", "right", WIDTH / 2, HEIGHT / 2, 13, 0)
    video = clip.video(1)
    return np.where(clip.coverage(1)[None] == 0, np.float32(1), video)


def referring(clip: Clip) -> str:
    """A caption that leaves shape and colour to the reference image."""
    return f"it {MOTIONS[clip.motion][0].format(go='moves')} on a {clip.ground} ground"


def hole_about(*clips: Clip) -> tuple[slice, slice]:
    """(rows, columns) of the smallest rectangle of whole latent cells that holds the shapes of all frames of clips."""
    covered = np.any([clip.coverage().max(0) > 0 for clip in clips], axis=0)
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    low = [int(side[0]) // 8 * 8 for side in (rows, columns)]
    high = [-(-(int(side[-1]) + 1) // 8) * 8 for side in (rows, columns)]
    return slice(low[0], high[0]), slice(low[1], high[1])


def masked(source: np.ndarray, hole: tuple[slice, slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(what stays of a video, what is to be made anew, its mask [1, F, H, W])."""
    mask = np.zeros((1, *source.shape[1:]), np.float32)
    mask[:, :, hole[0], hole[1]] = 1
    return source * (1 - mask), source * mask, mask


class VaceLessons:
    """Clips to fill into a hole of another; clips with a reference image of their shape; clips without a source."""

    def __init__(self, vae: VAE, lessons: Lessons, count: int, seed: int):
        self.seed, self.lessons = seed, lessons
        rng = np.random.default_rng([seed, 3])
        kept: list[np.ndarray] = []
        made: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        for clip in lessons.clips[:count]:
            other = random_clip(rng, ground=clip.ground)
            parts = masked(other.video(), hole_about(clip, other))
            for part, parts_of in zip(parts, (kept, made, masks)):
                parts_of.append(part)
        self.filled = _vace_context(latents_of(vae, kept), latents_of(vae, made), masks)
        grey: list[np.ndarray] = [np.zeros((3, FRAMES, HEIGHT, WIDTH), np.float32)]
        nothing = latents_of(vae, grey)
        self.free = _vace_context(nothing, nothing, [np.ones_like(grey[0][:1])])
        names = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        pictures = latents_of(vae, [reference(*name) for name in names])
        self.references = dict(zip(names, pictures))

    def draw(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, 3, step])
        chosen = rng.integers(len(self.filled), size=BATCH)
        clips, latents = [self.lessons.clips[i] for i in chosen], self.lessons.latents[chosen]
        context = self.free.expand(BATCH, -1, -1, -1, -1)
        captions = [clip.caption(rng) for clip in clips]
        if step % 2:
            pictures = torch.stack([self.references[clip.shape, clip.colour] for clip in clips])
            captions = [
                referring(clip) if rng.random() < 0.7 else said for clip, said in zip(clips, captions)
            ]
            front = torch.cat([pictures, torch.zeros(BATCH, 96 - 16, *pictures.shape[2:])], 1)
            latents, context = torch.cat([pictures, latents], 2), torch.cat([front, context], 2)
        elif step % 6:
            context = self.filled[chosen]
        heard = [_heard(said, rng) for said in captions]
        return {"latents": latents, "context": self.lessons.texts(heard), "vace_context": context}


def _vace_context(kept: torch.Tensor, made: torch.Tensor, masks: Sequence[np.ndarray]) -> torch.Tensor:
    """The model's `vace_context`, [B, 96, F, h, w], as the VACE pipeline builds it."""
    coarse = WanVace.vace_encode_masks(None, [torch.from_numpy(mask) for mask in masks], None, (4, 8, 8))
    return torch.cat([kept, made, torch.stack(coarse)], 1)
