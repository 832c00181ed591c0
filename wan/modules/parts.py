"""Parts of the DiT's forward pass to be called alone, by programs that write the pass out themselves.

They run the code of leanwan/dit/forward.py on tokens [B, L, dim], in the type of the part's linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from leanwan.dit.conditioning import Context
from leanwan.dit.forward import Layers, Rope, head_patches, patches_to_video
from leanwan.dit.tokens import ON_DEVICE, Tokens

from ..configs.encoders import TEXT_TOKENS
from .attention import flash_attention


def block_forward(
    block: nn.Module,
    x: torch.Tensor,
    e: torch.Tensor,
    seq_lens: torch.Tensor,
    grid_sizes: torch.Tensor,
    freqs: torch.Tensor,
    context: torch.Tensor,
    context_lens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Runs one block.

    Args:
        x: [B, L, dim]; fp32, or in the compute type as patches are embedded.
        e: [B, 6, dim] fp32, the projected timestep.
        seq_lens: [B] tokens of each sample; those after them stay as they are.
        grid_sizes: [B, 3] frames, rows and columns of each sample.
        freqs: the model's `freqs`.
        context: [B, tokens, dim], embedded text; if the block takes image tokens, they come before the 512 of text.
        context_lens: must be None.

    Returns:
        [B, L, dim] fp32.
    """
    if context_lens is not None:
        raise ValueError("context_lens: all tokens of the context are read, leave it at None")
    text, image = context, None
    if hasattr(block.cross_attn, "k_img"):
        image, text = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]
    stream, dtype = x.to(torch.float32, copy=True), block.self_attn.q.weight.dtype
    for i, (length, grid) in enumerate(zip(seq_lens.tolist(), grid_sizes.tolist())):
        layers = Layers(
            e[i : i + 1],
            Context(text[i : i + 1], None if image is None else image[i : i + 1], dtype),
            Rope(freqs.to(x.device), tuple(grid)),
            flash_attention,
            dtype,
            [slice(0, length)],
            ON_DEVICE,
        )
        layers.run(block, _tokens(stream[i : i + 1, :length]), first=x.dtype is not torch.float32)
    return stream


def head_forward(head: nn.Module, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Runs the head on x, [B, L, dim]; e: [B, dim], the embedded timestep. Returns [B, L, values of a patch] fp32."""
    span = slice(0, x.size(1))
    return torch.cat(
        [head_patches(head, _tokens(part[None]), time[None], [span])[0] for part, time in zip(x, e)]
    )


def unpatchify(model: nn.Module, x: Sequence[torch.Tensor], grid_sizes: torch.Tensor) -> list[torch.Tensor]:
    """Arranges the head's output for each sample, [L, values of a patch], as a latent video [out_dim, F, H, W].

    grid_sizes: [B, 3] frames, rows and columns in patches; tokens after them are left out.
    """
    grids = (tuple(grid) for grid in grid_sizes.tolist())
    return [patches_to_video(patches, grid, model.patch_size) for patches, grid in zip(x, grids)]


def _tokens(whole: torch.Tensor) -> Tokens:
    """Wraps a tensor [1, L, dim] fp32 as Tokens; the forward pass changes it in place."""
    tokens = Tokens(whole.size(1), tuple(whole.shape[2:]), torch.float32)
    tokens.whole = whole
    return tokens
