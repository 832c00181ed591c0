"""Image to video."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from leanwan.errors import InputError

from .pipeline import Conditioning, WanPipeline, check_frame_num
from .utils.video import fitted_size, open_image


class WanI2V(WanPipeline):
    """Makes videos that start with a given image."""

    uses_clip = True

    def __init__(
        self,
        config: Any,
        checkpoint_dir: str | Path,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_usp: bool = False,
        t5_cpu: bool = False,
        init_on_cpu: bool = True,
        **options: Any,
    ):
        """As WanPipeline's; `init_on_cpu` is accepted for call compatibility, loading is always on the CPU."""
        super().__init__(
            config, checkpoint_dir, device_id, rank, t5_fsdp, dit_fsdp, use_usp, t5_cpu, **options
        )

    def arguments(self, request: Any) -> dict[str, Any]:
        """prepare()'s own arguments for a request."""
        width, height = request.pixels
        return {"img": open_image(request.image, "image"), "max_area": width * height}

    def prepare(  # type: ignore[override]
        self,
        input_prompt: str,
        img: Image.Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        n_prompt: str = "",
        offload_model: bool | None = None,
    ) -> Conditioning:
        """Encodes prompt and image. Arguments and errors as generate()'s."""
        check_frame_num(frame_num)
        return self._prepare(input_prompt, n_prompt, [to_tensor(img)], max_area, frame_num, offload_model)

    def generate(
        self,
        input_prompt: str,
        img: Image.Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 5.0,
        sample_solver: str = "unipc",
        sampling_steps: int = 40,
        guide_scale: float = 5.0,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool | None = None,
        *,
        on_latents: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_prompt: what happens.
            img: PIL image, the first frame; the video keeps its aspect.
            max_area: pixels of a frame, at most.
            frame_num: frames, 4n+1.
            shift: of the noise schedule; 3 suits 480p.
            sample_solver, sampling_steps, guide_scale, n_prompt, seed, offload_model, on_latents: as WanT2V's.

        Returns:
            [3, frame_num, H, W] fp32 in [-1, 1] on the CPU.

        Raises:
            InputError: `frame_num` is not 4n+1, or the image is too narrow.
        """
        return self._finish(
            self.prepare(input_prompt, img, max_area, frame_num, n_prompt, offload_model),
            on_latents,
            shift=shift,
            sample_solver=sample_solver,
            sampling_steps=sampling_steps,
            guide_scale=guide_scale,
            seed=seed,
            offload_model=offload_model,
        )

    def _prepare(
        self,
        prompt: str,
        n_prompt: str,
        images: Sequence[torch.Tensor],
        max_area: int,
        frame_num: int,
        offload_model: bool | None,
    ) -> Conditioning:
        """Encodes a prompt and the known frames of a video.

        images: the first frame, or the first and the last, [3, H, W] each in [-1, 1].
        """
        height, width = self._latent_size(images[0], max_area)
        shape = (self.vae.model.z_dim, (frame_num - 1) // self.vae_stride[0] + 1, height, width)
        contexts = self._encode_prompts(prompt, n_prompt, offload_model)
        features = self._encode_images([image[:, None] for image in images], offload_model)
        with self.stages("encode"):
            known = self._known_frames(images, frame_num, height, width)
            known = self.vae.encode([known])[0].to(self.device)
            known = torch.cat([known_mask(shape, last=len(images) > 1).to(self.device), known])
        return Conditioning(shape, *contexts, {"clip_fea": features, "y": [known]})

    def _latent_size(self, image: torch.Tensor, max_area: int) -> tuple[int, int]:
        """(height, width) of the latents: the image's aspect, at most max_area pixels of video, whole patches.

        Raises InputError if the image is so narrow that it would be less than one patch across.
        """
        _, down, right = self.vae_stride
        step = down * self.patch_size[1]
        height, width = fitted_size(image.shape[1], image.shape[2], max_area, step)
        if min(height, width) < 1:
            raise InputError(
                f"an image of {image.shape[2]}x{image.shape[1]} is too narrow for {max_area} pixels, crop it"
            )
        return height // down, width // right

    def _known_frames(
        self, images: Sequence[torch.Tensor], frame_num: int, height: int, width: int
    ) -> torch.Tensor:
        """[3, frame_num, H, W]: the images, scaled to the video's size, as first and last frame; grey elsewhere."""
        _, down, right = self.vae_stride
        frames = torch.zeros(3, frame_num, height * down, width * right)
        for position, image in zip((0, -1), images):
            frames[:, position] = F.interpolate(image[None], size=frames.shape[2:], mode="bicubic")[0]
        return frames


def to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL image to [3, H, W] fp32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return pixels.float().div(255).sub_(0.5).div_(0.5)


def known_mask(shape: Sequence[int], last: bool) -> torch.Tensor:
    """The mask of known frames on the latents' grid, [4, F, H, W]: 1 for a known frame, else 0.

    A latent frame codes four video frames, each with a channel. The first latent frame codes the first video frame
    alone, so all four channels there are that frame's.
    """
    mask = torch.zeros(4, *shape[1:])
    mask[:, 0] = 1
    if last:
        mask[-1, -1] = 1
    return mask
