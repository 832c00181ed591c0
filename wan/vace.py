"""VACE: video from source frames, masks and reference images, each alone or together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange

from leanwan.errors import InputError

from .modules.vace_model import VaceWanModel
from .modules.vae import WanVAE
from .pipeline import Conditioning
from .text2video import WanT2V
from .utils.vace_processor import Sources, VaceVideoProcessor, load_sources, processor_of

if TYPE_CHECKING:
    from .distributed.ranks import Ranks

References = Sequence[Sequence[torch.Tensor] | None] | None  # per sample, [3, 1, H, W] each


class WanVace(WanT2V):
    """Makes videos from text and source material: edits, extends or fills in a video, or shows reference images."""

    model_class = VaceWanModel

    @cached_property
    def vid_proc(self) -> VaceVideoProcessor:
        """Chooses size and frames of source videos."""
        return processor_of(self.config)

    def arguments(self, request: Any) -> dict[str, Any]:
        """prepare()'s own arguments for a request."""
        sources = self.prepare_source(
            [request.src_video],
            [request.src_mask],
            [request.references],
            request.frame_num,
            request.pixels,
            self.device,
        )
        names = ("input_frames", "input_masks", "input_ref_images")
        return dict(zip(names, sources)) | {"size": request.pixels}

    def prepare_source(
        self,
        src_video: Sequence[str | None],
        src_mask: Sequence[str | None],
        src_ref_images: Sequence[Sequence[str] | None],
        num_frames: int,
        image_size: tuple[int, int],
        device: torch.device | str,
    ) -> Sources:
        """Loads the source files of each sample.

        Args:
            src_video, src_mask: list of path or None.
            src_ref_images: list of (list of paths) or None.
            num_frames: frames where there is no source video.
            image_size: (width, height) in pixels.
            device: accepted for call compatibility; sources stay on the CPU, frames leave it one at a time.

        Returns:
            Videos [3, F, H, W] in [-1, 1], masks [1, F, H, W] in [0, 1], references [3, 1, H, W]: a list each.

        Raises:
            InputError: files that cannot be read or do not belong together.
        """
        return load_sources(self.vid_proc, src_video, src_mask, src_ref_images, num_frames, image_size, "cpu")

    def prepare(  # type: ignore[override]
        self,
        input_prompt: str,
        input_frames: Sequence[torch.Tensor],
        input_masks: Sequence[torch.Tensor] | None,
        input_ref_images: References,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        context_scale: float = 1.0,
        n_prompt: str = "",
        offload_model: bool | None = None,
    ) -> Conditioning:
        """Encodes prompt and source material. Arguments as generate()'s."""
        if input_masks is None:
            input_masks = [torch.ones_like(frames[:1]) for frames in input_frames]
        contexts = self._encode_prompts(input_prompt, n_prompt, offload_model)
        with self.stages("encode"):
            coded = self.vace_encode_frames(input_frames, input_ref_images, masks=input_masks)
            masks = self.vace_encode_masks(input_masks, input_ref_images)
            # Kept on the CPU, where they take no device memory: each pass reads them once, frame by frame.
            source = [latent.cpu() for latent in self.vace_latent(coded, masks)]
        channels, *shape = coded[0].shape
        references = len((input_ref_images and input_ref_images[0]) or ())
        inputs = {"vace_context": source, "vace_context_scale": context_scale}
        return Conditioning((channels // 2, *shape), *contexts, host_inputs=inputs, references=references)

    def generate(  # type: ignore[override]
        self,
        input_prompt: str,
        input_frames: Sequence[torch.Tensor],
        input_masks: Sequence[torch.Tensor] | None,
        input_ref_images: References,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        context_scale: float = 1.0,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool | None = None,
        *,
        on_latents: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_prompt: what to show.
            input_frames: list of one video [3, F, H, W] in [-1, 1]; it sets the size and length of the result.
            input_masks: list of one mask [1 or 3, F, H, W], 1 where the video is to be made anew; None for all.
            input_ref_images: list of one list of [3, 1, H, W] in [-1, 1], or of None, or None.
            size, frame_num: accepted for call compatibility.
            context_scale: strength of the source material.
            shift, sample_solver, sampling_steps, guide_scale, n_prompt, seed, offload_model, on_latents: as WanT2V's.

        Returns:
            [3, F, H, W] fp32 in [-1, 1] on the CPU.
        """
        return self._finish(
            self.prepare(
                input_prompt,
                input_frames,
                input_masks,
                input_ref_images,
                context_scale=context_scale,
                n_prompt=n_prompt,
                offload_model=offload_model,
            ),
            on_latents,
            shift=shift,
            sample_solver=sample_solver,
            sampling_steps=sampling_steps,
            guide_scale=guide_scale,
            seed=seed,
            offload_model=offload_model,
        )

    def vace_encode_frames(
        self,
        frames: Sequence[torch.Tensor],
        ref_images: References,
        masks: Sequence[torch.Tensor] | None = None,
        vae: WanVAE | None = None,
    ) -> list[torch.Tensor]:
        """Encodes each video in two halves, what stays and what is to be made anew, behind its reference images.

        Returns a list of [32, references + F, h, w]; without masks, of [16, ...], the videos encoded whole.
        """
        vae = vae or self.vae
        if masks is None:
            coded = vae.encode(frames)
        else:
            masks = [(mask > 0.5).to(video) for mask, video in zip(masks, frames)]
            kept = vae.encode([video * (1 - mask) for video, mask in zip(frames, masks)])
            made = vae.encode([video * mask for video, mask in zip(frames, masks)])
            coded = [torch.cat(pair) for pair in zip(kept, made)]
        for i, references in enumerate(_per_sample(ref_images, len(frames))):
            for reference in reversed(vae.encode(references)):
                if reference.size(1) != 1:
                    raise InputError("a reference must be a single image", "src_ref_images")
                if masks is not None:
                    reference = torch.cat([reference, torch.zeros_like(reference)])
                coded[i] = torch.cat([reference, coded[i]], dim=1)
        return coded

    def vace_encode_masks(
        self,
        masks: Sequence[torch.Tensor],
        ref_images: References = None,
        vae_stride: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """Brings the first channel of masks [C, F, H, W] to the latents' grid: list of [64, references + F', h, w].

        Each 8 x 8 square of pixels becomes 64 channels; the mask of a reference image is zeros.
        """
        time, down, right = vae_stride or self.vae_stride
        coded = []
        for mask, references in zip(masks, _per_sample(ref_images, len(masks))):
            height, width = (side // (2 * step) * 2 for side, step in zip(mask.shape[2:], (down, right)))
            squares = rearrange(
                mask[0],
                "f (h down) (w right) -> (down right) f h w",
                h=height,
                w=width,
                down=down,
                right=right,
            )
            frames = (mask.size(1) + time - 1) // time
            squares = F.interpolate(squares[None], size=(frames, height, width), mode="nearest-exact")[0]
            coded.append(
                torch.cat([squares.new_zeros(squares.size(0), len(references), height, width), squares], 1)
            )
        return coded

    def vace_latent(self, z: Sequence[torch.Tensor], m: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Concatenates encoded videos and masks along the channels."""
        return [torch.cat([latent, mask.to(latent)]) for latent, mask in zip(z, m)]

    def decode_latent(
        self, zs: Sequence[torch.Tensor], ref_images: References = None, vae: WanVAE | None = None
    ) -> list[torch.Tensor]:
        """Decodes latents [16, references + F, h, w] without their reference images."""
        references = _per_sample(ref_images, len(zs))
        return (vae or self.vae).decode([latent[:, len(images) :] for latent, images in zip(zs, references)])


class WanVaceMP(WanVace):
    """WanVace on all GPUs of this machine, one process each: this process leads, and starts the others.

    The others import the main program, which must be guarded by `if __name__ == "__main__":`. They end with this
    process, or when `close` is called.
    """

    def __init__(
        self,
        config: Any,
        checkpoint_dir: str | Path,
        use_usp: bool = False,
        ulysses_size: int | None = None,
        ring_size: int | None = None,
        *,
        processes: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        """
        Args:
            config, checkpoint_dir, options: as WanVace's.
            use_usp: accepted for call compatibility; all processes share every pass.
            ulysses_size, ring_size: if given, their product must be the number of processes.
            processes: their number; default: one for each GPU.
            device: kind of GPU, or cpu; default: the accelerator of this machine.
        """
        size = processes or max(1, torch.cuda.device_count())
        if (ulysses_size or 1) * (ring_size or 1) not in (1, size):
            raise InputError(f"there are {size} processes", ("ulysses_size", "ring_size"))
        if size == 1:
            super().__init__(config, checkpoint_dir, device=device, **options)
            return
        from .distributed.spawned import start

        ranks = start(size, partial(_follow, config, checkpoint_dir, options), device)
        super().__init__(config, checkpoint_dir, device=ranks.device, ranks=ranks, **options)

    def close(self) -> None:
        """Ends the other processes."""
        if self._ranks:
            self._ranks.leave()


def _follow(config: Any, checkpoint_dir: str | Path, options: dict[str, Any], ranks: Ranks) -> None:
    """Runs on the processes of WanVaceMP that follow the leading one; they report no events."""
    quiet = options | {"on_event": lambda event: None}
    WanVace(config, checkpoint_dir, device=ranks.device, ranks=ranks, **quiet).follow()


def _per_sample(ref_images: References, samples: int) -> list[Sequence[torch.Tensor]]:
    """The reference images of each of `samples` samples; an empty list for a sample without."""
    return [references or [] for references in ref_images or [None] * samples]
