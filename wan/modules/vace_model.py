"""The DiT of VACE (Jiang et al., VACE: All-in-One Video Creation and Editing, 2025): a second stack of blocks
reads the source material and gives hints to the first."""

from collections.abc import Sequence

import torch
from torch import nn

from leanwan.dit.conditioning import Conditions
from leanwan.dit.forward import RunBlock, dit_forward
from leanwan.dit.tokens import ON_DEVICE, Attention, Place
from leanwan.errors import InputError

from ..configs.encoders import TEXT_TOKENS
from .attention import flash_attention
from .model import WanModel, keeps_config


class VaceWanModel(WanModel):
    """WanModel with `vace_blocks`, one for every block number in `vace_layers`.

    Raises InputError as WanModel does, and for layers that do not start with 0.
    """

    @keeps_config
    def __init__(
        self,
        vace_layers: Sequence[int] | None = None,
        vace_in_dim: int | None = None,
        model_type: str = "vace",
        patch_size: Sequence[int] = (1, 2, 2),
        text_len: int = TEXT_TOKENS,
        in_dim: int = 16,
        dim: int = 2048,
        ffn_dim: int = 8192,
        freq_dim: int = 256,
        text_dim: int = 4096,
        out_dim: int = 16,
        num_heads: int = 16,
        num_layers: int = 32,
        window_size: Sequence[int] = (-1, -1),
        qk_norm: bool = True,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__(
            model_type,
            patch_size,
            text_len,
            in_dim,
            dim,
            ffn_dim,
            freq_dim,
            text_dim,
            out_dim,
            num_heads,
            num_layers,
            window_size,
            qk_norm,
            cross_attn_norm,
            eps,
        )
        self.vace_layers = list(range(0, self.num_layers, 2)) if vace_layers is None else list(vace_layers)
        if self.vace_layers[:1] != [0] or self.vace_layers != sorted(set(self.vace_layers)):
            raise InputError(f"config.json: vace_layers {self.vace_layers} must rise from 0")
        self.vace_blocks = nn.ModuleList(self._new_block() for _ in self.vace_layers)
        for block in self.vace_blocks:
            block.after_proj = nn.Linear(self.dim, self.dim)
        self.vace_blocks[0].before_proj = nn.Linear(self.dim, self.dim)
        self.vace_patch_embedding = nn.Conv3d(
            vace_in_dim or in_dim, self.dim, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(  # type: ignore[override]
        self,
        x: list[torch.Tensor],
        t: torch.Tensor,
        vace_context: list[torch.Tensor],
        context: list[torch.Tensor],
        seq_len: int,
        vace_context_scale: float = 1.0,
        clip_fea: torch.Tensor | None = None,
        y: list[torch.Tensor] | None = None,
        *,
        chunk: int = 0,
        place: Place = ON_DEVICE,
        attention: Attention | None = None,
        run_block: RunBlock | None = None,
        together: bool = False,
        conditions: Sequence[Conditions] | None = None,
    ) -> list[torch.Tensor]:
        """As WanModel's, with `vace_context`, a list of [C, F, H, W] source latents and masks, and its strength.

        clip_fea and y are accepted for call compatibility and not used.
        """
        return dit_forward(
            self,
            x,
            t,
            context,
            seq_len,
            attention=attention or flash_attention,
            dtype=self.compute_dtype,
            vace_context=vace_context,
            vace_context_scale=vace_context_scale,
            chunk=chunk,
            place=place,
            run_block=run_block,
            together=together,
            conditions=conditions,
        )
