"""Text to video."""

from collections.abc import Callable
from typing import Any

import torch

from .pipeline import Conditioning, WanPipeline, check_frame_num


class WanT2V(WanPipeline):
    """Makes videos, or with one frame images, from text."""

    def arguments(self, request: Any) -> dict[str, Any]:
        """prepare()'s own arguments for a request."""
        return {"size": request.pixels}

    def prepare(  # type: ignore[override]
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
        n_prompt: str = "",
        offload_model: bool | None = None,
    ) -> Conditioning:
        """Encodes the prompt. Arguments and errors as generate()'s."""
        check_frame_num(frame_num)
        shape = self._latent_shape(size, frame_num)
        return Conditioning(shape, *self._encode_prompts(input_prompt, n_prompt, offload_model))

    def generate(
        self,
        input_prompt: str,
        size: tuple[int, int] = (1280, 720),
        frame_num: int = 81,
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
            size: (width, height) in pixels; multiples of 16.
            frame_num: frames, 4n+1.
            shift: of the noise schedule.
            sample_solver: "unipc", "dpm++" or "euler".
            sampling_steps: solver steps.
            guide_scale: strength of classifier-free guidance; 1 is none, with one pass per step.
            n_prompt: what to avoid; if empty, the config's negative prompt.
            seed: of the noise; negative for a random one.
            offload_model: move each component back to the CPU after use; None for the option's value, True by default.
            on_latents: called with the finished latents [16, F, H / 8, W / 8] before they are decoded.

        Returns:
            [3, frame_num, H, W] fp32 in [-1, 1] on the CPU.

        Raises:
            InputError: `frame_num` is not 4n+1, or `size` is not in multiples of 16.
        """
        return self._finish(
            self.prepare(input_prompt, size, frame_num, n_prompt, offload_model),
            on_latents,
            shift=shift,
            sample_solver=sample_solver,
            sampling_steps=sampling_steps,
            guide_scale=guide_scale,
            seed=seed,
            offload_model=offload_model,
        )
