"""The DiT's training by flow matching (Lipman et al., 2023), with whole batches through the modules of a pipeline."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from leanwan.dit.conditioning import sinusoidal_embedding
from leanwan.dit.forward import patches_to_video
from wan.modules.model import WanModel

from .places import BLOCKS, Places, look_around
from .training_steps import set_rates, share_of_rate, steps

SHIFT = 3.0  # of the noise levels in training, towards noise
PLACES_SHARE = 0.1  # weight of the places' loss in the whole loss
MUON = 3.0  # Muon's learning rate, as a multiple of AdamW's
Batch = dict[str, torch.Tensor]


def flow(
    model: WanModel,
    x: torch.Tensor,
    t: torch.Tensor,
    context: torch.Tensor,
    y: torch.Tensor | None = None,
    vace_context: torch.Tensor | None = None,
    midst: Callable[[torch.Tensor, tuple[int, int, int]], None] = lambda tokens, grid: None,
) -> torch.Tensor:
    """The model's forward pass, fp32 and differentiable, without the image encoder's tokens: the predicted flow.

    Args:
        x: [B, 16, F, H, W] noisy latents.
        t: [B] in [0, 1000].
        context: [B, text_len, text_dim], prompts padded with zeros.
        y: [B, 20, F, H, W], concatenated to x, for an image model.
        vace_context: [B, 96, F, H, W], for a VACE model.
        midst: called with the tokens [B, L, dim] after the first BLOCKS blocks, and their (frames, rows, columns).
    """
    tokens, grid = _patches(model.patch_embedding, x if y is None else torch.cat([x, y], 1))
    time = model.time_embedding(sinusoidal_embedding(model.freq_dim, t))
    modulation = model.time_projection(time).unflatten(1, (6, -1))
    text = model.text_embedding(context)
    turn = _turn(model.freqs, grid)
    hinted = {}
    if vace_context is not None:
        hints, _ = _patches(model.vace_patch_embedding, vace_context)
        hints = model.vace_blocks[0].before_proj(hints) + tokens
        hinted = dict(zip(model.vace_layers, model.vace_blocks))
    for i, block in enumerate(model.blocks):
        tokens = _block(block, tokens, modulation, text, turn)
        if i in hinted:
            hints = _block(hinted[i], hints, modulation, text, turn)
            tokens = tokens + hinted[i].after_proj(hints)
        if i + 1 == BLOCKS:
            midst(tokens, grid)
    shift, scale = (model.head.modulation + time[:, None]).chunk(2, dim=1)
    patches = model.head.head(_normed(model.head.norm, tokens) * (1 + scale) + shift)
    time_step, down, right = model.patch_size
    return torch.stack([patches_to_video(sample, grid, (time_step, down, right)) for sample in patches])


def _patches(embedding: nn.Conv3d, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    patches = embedding(x)
    frames, rows, columns = patches.shape[2:]
    return patches.flatten(2).transpose(1, 2), (frames, rows, columns)


def _turn(freqs: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
    """The rotary embedding of every token, complex64 [L, head_dim / 2]."""
    half = freqs.size(1)
    tables = freqs.split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    places = torch.cartesian_prod(*(torch.arange(length) for length in grid))
    turn = torch.cat([table[place] for table, place in zip(tables, places.unbind(1))], dim=1)
    return turn.to(torch.complex64)


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Applies the rotary embedding to x, [B, heads, L, head_dim]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _heads(attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _key_normed(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def _block(
    block: nn.Module,
    x: torch.Tensor,
    modulation: torch.Tensor,
    text: torch.Tensor,
    turn: torch.Tensor,
) -> torch.Tensor:
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + modulation).chunk(6, dim=1)
    own, cross = block.self_attn, block.cross_attn
    hidden = _normed(block.norm1, x) * (1 + scale) + shift
    q, k = (
        _turned(_heads(own, _key_normed(norm, layer(hidden))), turn)
        for norm, layer in ((own.norm_q, own.q), (own.norm_k, own.k))
    )
    out = F.scaled_dot_product_attention(q, k, _heads(own, own.v(hidden)))
    x = x + own.o(out.transpose(1, 2).flatten(2)) * gate
    q = _heads(cross, _key_normed(cross.norm_q, cross.q(_normed(block.norm3, x))))
    k, v = _heads(cross, _key_normed(cross.norm_k, cross.k(text))), _heads(cross, cross.v(text))
    x = x + cross.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.ffn(_normed(block.norm2, x) * (1 + ffn_scale) + ffn_shift) * ffn_gate


def start(model: WanModel, seed: int) -> None:
    """Initialises weights: matrices keep their input's scale, modulation and head are near zero, heads look around."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("modulation"):
                parameter.normal_(std=parameter.size(-1) ** -0.5, generator=generator)
            elif name.startswith("head.head") or ".after_proj" in name or name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() > 1:
                width = math.prod(parameter.shape[1:])
                parameter.normal_(std=width**-0.5, generator=generator)
    look_around(model)


class Muon(torch.optim.Optimizer):
    """Momentum of matrices, orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024)."""

    def __init__(self, matrices: Iterable[torch.Tensor], lr: float, momentum: float = 0.95):
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in by_shape.items():
                updates = []
                for matrix in matrices:
                    mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                    mean.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(mean, group["momentum"]))
                # 0.2 sqrt(longer side): the root mean square of AdamW's usual steps.
                rate = 0.2 * max(shape) ** 0.5 * group["lr"]
                for matrix, update in zip(matrices, _orthogonal(torch.stack(updates))):
                    matrix.sub_(update, alpha=rate)


def _orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximately the nearest matrices with singular values of 1 to those given, [N, rows, columns]."""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def train_dit(
    model: WanModel,
    draw: Callable[[int], Batch],
    count: int,
    rate: float,
    seed: int,
    tell: Callable[[int, float], None],
    kept: Path,
    trained: Callable[[str], bool] = lambda name: True,
    places_alone: int = 0,
) -> None:
    """Trains a DiT to predict the flow.

    Args:
        model: ends with the running average of its weights.
        draw: returns a step's batch: "latents" [B, 16, F, H, W], "context", and "y" or "vace_context".
        count: number of steps.
        rate: the highest learning rate of AdamW.
        tell: called every 50 steps with the step and a running average of the loss.
        kept: the file from which an interrupted training continues, see training_steps.py.
        trained: whether the parameter of a name is trained.
        places_alone: number of first steps that train the tokens' places alone.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    averaged = copy.deepcopy(model).requires_grad_(False)
    places = Places(model.dim)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = [name for name, p in learning.items() if p.dim() == 2 and "blocks." in name]
    outer = [p for name, p in learning.items() if name not in inner]
    muon = Muon([learning[name] for name in inner], MUON * rate)
    adam = torch.optim.AdamW([*outer, *places.parameters()], rate, betas=(0.9, 0.98), weight_decay=0)
    recent = None
    parts = {"model": model, "averaged": averaged, "places": places, "muon": muon, "adam": adam}
    for step in steps(count, kept, parts):
        set_rates([muon, adam], share_of_rate(step, count))
        loss, lost = _losses(model, places, draw(step), torch.Generator().manual_seed(seed + step))
        muon.zero_grad()
        adam.zero_grad()
        (lost if step < places_alone else loss + PLACES_SHARE * lost).backward()
        nn.utils.clip_grad_norm_(learning.values(), 1.0)
        muon.step()
        adam.step()
        with torch.no_grad():
            for mean, parameter in zip(averaged.parameters(), model.parameters()):
                mean.lerp_(parameter, 1 - min(0.995, (step + 1) / (step + 10)))
        recent = loss.item() if recent is None else recent + 0.05 * (loss.item() - recent)
        if step % 50 == 49:
            tell(step + 1, recent)
    model.load_state_dict(averaged.state_dict())
    model.requires_grad_(False)


def _losses(
    model: WanModel, places: Places, batch: Batch, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean squared error of the flow, loss of the places)."""
    clean = batch.pop("latents")
    even = torch.rand(clean.size(0), generator=generator)
    sigma = SHIFT * even / (1 + (SHIFT - 1) * even)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = clean.lerp(noise, sigma.view(-1, 1, 1, 1, 1))
    asked: list[torch.Tensor] = []
    predicted = flow(
        model, noisy, sigma * 1000, midst=lambda *tokens: asked.append(places.loss(*tokens)), **batch
    )
    return F.mse_loss(predicted, noise - clean), asked[0]
