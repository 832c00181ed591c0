"""First and last frame to video."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from .image2video import WanI2V, to_tensor
from .pipeline import Conditioning, check_frame_num
from .utils.video import open_image


class WanFLF2V(WanI2V):
    """Makes videos between two given images."""

    def arguments(self, request: Any) -> dict[str, Any]:
        """prepare()'s own arguments for a request."""
        width, height = request.pixels
        frames = {name: open_image(getattr(request, name), name) for name in ("first_frame", "last_frame")}
        return frames | {"max_area": width * height}

    def prepare(  # type: ignore[override]
        self,
        input_prompt: str,
        first_frame: Image.Image,
        last_frame: Image.Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        n_prompt: str = "",
        offload_model: bool | None = None,
    ) -> Conditioning:
        """Encodes prompt and images. Arguments and errors as generate()'s."""
        check_frame_num(frame_num, at_least=5)
        first, last = to_tensor(first_frame), to_tensor(last_frame)
        if first.shape != last.shape:
            ratio = max(first.shape[1] / last.shape[1], first.shape[2] / last.shape[2])
            # The published pipeline swaps height and width here; for the same picture, so does this one.
            last = center_crop(last, round(last.shape[2] * ratio), round(last.shape[1] * ratio))
        return self._prepare(input_prompt, n_prompt, [first, last], max_area, frame_num, offload_model)

    def generate(  # type: ignore[override]
        self,
        input_prompt: str,
        first_frame: Image.Image,
        last_frame: Image.Image,
        max_area: int = 720 * 1280,
        frame_num: int = 81,
        shift: float = 16,
        sample_solver: str = "unipc",
        sampling_steps: int = 50,
        guide_scale: float = 5.5,
        n_prompt: str = "",
        seed: int = -1,
        offload_model: bool | None = None,
        *,
        on_latents: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            input_prompt: what happens.
            first_frame: PIL image; the video keeps its aspect.
            last_frame: PIL image. One of another size than the first is cropped, or padded with grey, about its
                centre, as the published pipeline does, and then scaled to the video's size.
            max_area: pixels of a frame, at most.
            frame_num: frames, 4n+1, at least 5.
            shift, sample_solver, sampling_steps, guide_scale, n_prompt, seed, offload_model, on_latents: as WanT2V's.

        Returns:
            [3, frame_num, H, W] fp32 in [-1, 1] on the CPU.

        Raises:
            InputError: `frame_num` is not 4n+1 or below 5, or the image is too narrow.
        """
        return self._finish(
            self.prepare(input_prompt, first_frame, last_frame, max_area, frame_num, n_prompt, offload_model),
            on_latents,
            shift=shift,
            sample_solver=sample_solver,
            sampling_steps=sampling_steps,
            guide_scale=guide_scale,
            seed=seed,
            offload_model=offload_model,
        )


def center_crop(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Crops [3, H, W] to [3, height, width] about the centre; a side that is shorter is padded with zeros."""
    short, narrow = max(0, height - image.shape[1]), max(0, width - image.shape[2])
    image = F.pad(image, (narrow // 2, (narrow + 1) // 2, short // 2, (short + 1) // 2))
    top = round((image.shape[1] - height) / 2)
    left = round((image.shape[2] - width) / 2)
    return image[:, top : top + height, left : left + width]
