"""The diffusion transformer (DiT): its modules, named as the checkpoints name them.

The forward pass is in leanwan/dit/forward.py, which uses these names.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from safetensors.torch import save_file
from torch import nn

from leanwan.dit.conditioning import Conditions
from leanwan.dit.conditioning import sinusoidal_embedding as sinusoidal_embedding_1d  # noqa: F401  a name that programs import
from leanwan.dit.forward import RunBlock, dit_forward, embedding_layers, layer_groups, storage_dtype
from leanwan.dit.tokens import ON_DEVICE, Attention, Place
from leanwan.errors import InputError

from ..configs.encoders import IMAGE_TOKENS, TEXT_TOKENS
from ..utils.outside import parse_json
from ..weights.converted import OffloadFolder
from ..weights.filling import load_weights
from ..weights.lora import Loras
from .attention import flash_attention
from .parts import block_forward, head_forward, unpatchify

CLIP_WIDTH = 1280
SINGLE_FILE = "diffusion_pytorch_model.safetensors"
# Upper bounds of the sizes in config.json.
LARGEST = {"num_layers": 1000} | dict.fromkeys(
    ("dim", "ffn_dim", "freq_dim", "in_dim", "out_dim", "num_heads", "text_dim", "text_len", "vace_in_dim"),
    2**17,
)


@functools.lru_cache
def rope_frequencies(head_dim: int, positions: int = 1024, theta: float = 10000.0) -> torch.Tensor:
    """Unit complex numbers of the rotary embedding of frame, row and column (Su et al., RoFormer, 2021).

    Returns [positions, head_dim / 2] complex128, the columns being those of the frame axis, the row axis and the
    column axis; the frame axis takes what is left when a third each has gone to the other two.
    """
    with torch.device("cpu"):
        per_axis = [head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6)]
        tables = []
        for dim in per_axis:
            rates = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(torch.arange(positions, dtype=torch.float64), rates)
            tables.append(torch.polar(torch.ones_like(angles), angles))
        return torch.cat(tables, dim=1)


class WanRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, in fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = x.to(torch.float32, copy=True).square_().mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(mean_square + self.eps)
        return x.to(torch.float32, copy=True).mul_(scale).type_as(x) * self.weight


class WanLayerNorm(nn.LayerNorm):
    """Layer norm in fp32, its result in the input's type."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = False):
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = super().forward(x.float())
        return normed.to(x.dtype)


def _query_key_norm(dim: int, wanted: bool, eps: float) -> nn.Module:
    return WanRMSNorm(dim, eps) if wanted else nn.Identity()


class WanSelfAttention(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int] = (-1, -1),
        qk_norm: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        if tuple(window_size) != (-1, -1):
            raise InputError(f"config.json: window_size {window_size} is not supported, only (-1, -1)")
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (_query_key_norm(dim, qk_norm, eps) for _ in range(2))


class WanT2VCrossAttention(WanSelfAttention):
    """Cross attention to the text."""


class WanI2VCrossAttention(WanSelfAttention):
    """Cross attention to the text and, with keys and values of its own, to the image features."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Sequence[int] = (-1, -1),
        qk_norm: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__(dim, num_heads, window_size=window_size, qk_norm=qk_norm, eps=eps)
        self.k_img, self.v_img = (nn.Linear(dim, dim) for _ in range(2))
        self.norm_k_img = _query_key_norm(dim, qk_norm, eps)


WAN_CROSSATTENTION_CLASSES = {"t2v_cross_attn": WanT2VCrossAttention, "i2v_cross_attn": WanI2VCrossAttention}


class WanAttentionBlock(nn.Module):
    forward = block_forward

    def __init__(
        self,
        cross_attn_type: str,
        dim: int,
        ffn_dim: int,
        num_heads: int,
        window_size: Sequence[int] = (-1, -1),
        qk_norm: bool = True,
        cross_attn_norm: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.norm1 = WanLayerNorm(dim, eps=eps)
        self.self_attn = WanSelfAttention(dim, num_heads, window_size, qk_norm, eps)
        self.norm3 = WanLayerNorm(dim, eps, elementwise_affine=True) if cross_attn_norm else nn.Identity()
        cross_attention = WAN_CROSSATTENTION_CLASSES[cross_attn_type]
        self.cross_attn = cross_attention(dim, num_heads, window_size, qk_norm, eps)
        self.norm2 = WanLayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))  # shift, scale, gate of attention and of FFN


class Head(nn.Module):
    forward = head_forward

    def __init__(self, dim: int, out_dim: int, patch_size: Sequence[int], eps: float = 1e-6):
        super().__init__()
        self.norm = WanLayerNorm(dim, eps=eps)
        self.head = nn.Linear(dim, math.prod(patch_size) * out_dim)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))  # shift, scale


class MLPProj(nn.Module):
    """Image features to context tokens; the norms compute in fp32, the layers in their own type."""

    def __init__(self, in_dim: int, out_dim: int, flf_pos_emb: bool = False):
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(in_dim),
            nn.Linear(in_dim, in_dim),
            nn.GELU(),
            nn.Linear(in_dim, out_dim),
            nn.LayerNorm(out_dim),
        )
        if flf_pos_emb:
            self.emb_pos = nn.Parameter(torch.zeros(1, 2 * IMAGE_TOKENS, CLIP_WIDTH))

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """image_embeds: [B, 257, 1280], or [2 B, 257, 1280] for pairs of frames. Returns [B, 257 or 514, dim] fp32."""
        x, dtype = image_embeds.float(), self.proj[1].weight.dtype
        if hasattr(self, "emb_pos"):
            x = x.reshape(-1, 2 * x.size(1), x.size(2)) + self.emb_pos
        x = self.proj[1](self.proj[0](x).to(dtype))
        x = self.proj[3](self.proj[2](x))
        return self.proj[4](x.float())


def keeps_config(init: Callable[..., None]) -> Callable[..., None]:
    """Makes a constructor keep all its arguments as the model's `config`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def keeping(model: WanModel, *args: Any, **kwargs: Any) -> None:
        init(model, *args, **kwargs)
        given = signature.bind(model, *args, **kwargs)
        given.apply_defaults()
        _, *arguments = given.arguments.items()
        model.config = EasyDict(arguments)

    return keeping


class WanModel(nn.Module):
    """Predicts the flow of a noisy latent video. Constructor arguments are the keys of config.json, and of `config`.

    `compute_dtype` is the type that linear and convolution layers and attention compute in. Those layers are kept in
    it; the parameters that compute in fp32 are fp32 whatever it is, see `storage_dtype`.

    Raises InputError for an unknown model type or a width that its heads cannot share.
    """

    compute_dtype = torch.float32
    storage_dtype = staticmethod(storage_dtype)
    layer_groups = layer_groups
    embedding_layers = embedding_layers
    unpatchify = unpatchify

    @keeps_config
    def __init__(
        self,
        model_type: str = "t2v",
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
        super().__init__()
        if model_type not in ("t2v", "i2v", "flf2v", "vace"):
            raise InputError(f"config.json: model_type {model_type!r} is not one of t2v, i2v, flf2v, vace")
        if dim % (2 * num_heads):
            raise InputError(f"config.json: dim {dim} does not give {num_heads} heads an even width each")
        self.model_type = model_type
        self.patch_size = tuple(patch_size)
        self.text_len = text_len
        self.freq_dim = freq_dim
        self.dim = dim
        self.out_dim = out_dim
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.freqs = rope_frequencies(dim // num_heads)

        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        # VACE reads the text only; its images come in through the latents.
        image = model_type in ("i2v", "flf2v")
        block = functools.partial(
            WanAttentionBlock,
            "i2v_cross_attn" if image else "t2v_cross_attn",
            dim,
            ffn_dim,
            num_heads,
            window_size,
            qk_norm,
            cross_attn_norm,
            eps,
        )
        self.blocks = nn.ModuleList(block() for _ in range(num_layers))
        self._new_block = block
        self.head = Head(dim, out_dim, self.patch_size, eps)
        if image:
            self.img_emb = MLPProj(CLIP_WIDTH, dim, flf_pos_emb=model_type == "flf2v")

    def forward(
        self,
        x: list[torch.Tensor],
        t: torch.Tensor,
        context: list[torch.Tensor],
        seq_len: int,
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
        """Predicts the flow of each sample.

        Args:
            x: list of [C, F, H, W] noisy latents.
            t: [B] timesteps in [0, 1000].
            context: list of [L, text_dim] prompt embeddings, L at most text_len.
            seq_len: upper bound of a sample's tokens. Nothing is padded to it.
            clip_fea: [B, 257, 1280] image features ([2 B, 257, 1280] for first and last frames), or None.
            y: list of [C', F, H, W] that join x along the channels, or None.
            chunk: tokens that go through a layer at a time, 0 for all.
            place: where tensors over all tokens live.
            attention: computes attention in place of flash_attention.
            run_block: runs a whole block, see dit_forward.
            together: whether each layer group serves all samples before the next is visited.
            conditions: each sample's conditioning, computed before from t, context and clip_fea; see dit_forward.

        Returns:
            list of [out_dim, F, H, W] fp32.

        Raises:
            ValueError: more tokens than seq_len, a longer prompt than text_len, image inputs missing.
        """
        image = None
        if clip_fea is not None and hasattr(self, "img_emb"):
            features = clip_fea.chunk(len(x))

            def image(i: int) -> torch.Tensor:
                return self.img_emb(features[i])

        return dit_forward(
            self,
            x,
            t,
            context,
            seq_len,
            attention=attention or flash_attention,
            dtype=self.compute_dtype,
            image=image,
            y=y,
            chunk=chunk,
            place=place,
            run_block=run_block,
            together=together,
            conditions=conditions,
        )

    @classmethod
    def from_pretrained(
        cls,
        checkpoint_dir: str | Path,
        dtype: torch.dtype = torch.float32,
        offload_folder: OffloadFolder | None = None,
        loras: Loras | None = None,
    ) -> WanModel:
        """Loads config.json and diffusion_pytorch_model.safetensors, or its shards, in their lossless types.

        Args:
            checkpoint_dir: directory.
            dtype: the type to compute linear and convolution layers in; norms, modulation, time embedding and
                head are kept in fp32 whatever it is.
            offload_folder: an OffloadFolder to map the converted weights from.
            loras: Loras to merge into the weights before they are converted.

        Raises:
            InputError: missing or damaged files, or tensors that do not fit config.json.
        """
        model = cls.from_config(checkpoint_dir)
        model.compute_dtype = dtype
        source = weights_path(checkpoint_dir)

        def kept(name: str) -> torch.dtype:
            return cls.storage_dtype(name, dtype)

        if offload_folder:
            load_weights(model, offload_folder.converted(source, kept, loras), dtype=kept)
        else:
            load_weights(model, source, dtype=kept, merge=loras.merge if loras else None)
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and diffusion_pytorch_model.safetensors, which from_pretrained reads."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": type(self).__name__, **self.config}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, directory / SINGLE_FILE, metadata={"format": "pt"})

    @classmethod
    def from_config(cls, checkpoint_dir: str | Path) -> WanModel:
        """Builds the model that config.json describes on the meta device, without weights."""
        path = Path(checkpoint_dir) / "config.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file, --ckpt_dir must be a Wan2.1 checkpoint directory")
        try:
            config = {k: v for k, v in parse_json(path.read_text()).items() if not k.startswith("_")}
            _check_sizes(config)
            with torch.device("meta"):
                return cls(**config)
        except (
            ValueError,
            TypeError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
            AssertionError,
        ) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"{path}: does not describe a {cls.__name__} ({reason})") from error


def _check_sizes(config: dict[str, Any]) -> None:
    """Raises ValueError for sizes that no model has, on which building one would take for ever."""
    for name, most in LARGEST.items():
        value = config.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{name} is {value}, not 1 to {most}")
    if not all(side > 0 for side in config.get("patch_size", ())):
        raise ValueError(f"patch_size is {config['patch_size']}")


def weights_path(checkpoint_dir: str | Path) -> Path:
    """The DiT's weight file, or the index of its shards."""
    single = Path(checkpoint_dir) / SINGLE_FILE
    index = single.with_name(single.name + ".index.json")
    return index if index.is_file() and not single.is_file() else single
