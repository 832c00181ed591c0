"""Upstream's models in other than their built-in sizes: those of a checkpoint, or full size without storage."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

CONFIGS = {"t2v": "t2v-1.3B", "i2v": "i2v-14B", "flf2v": "flf2v-14B", "vace": "vace-1.3B"}
DIT_SIZES = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "eps")
Shapes = dict[str, tuple[int, ...]]  # of a checkpoint's tensors, by name
TOKENS = 120  # of a prompt in meta mode


def task_config(wan: Any, task: str, dtype: torch.dtype = torch.float32, name: str | None = None) -> Any:
    """Upstream's config of a task, with `dtype` for the DiT's autocast, T5 and, if it is fp32, CLIP."""
    config = wan.configs.WAN_CONFIGS[name or CONFIGS[task]]
    config.param_dtype = config.t5_dtype = dtype
    if "clip_dtype" in config and dtype is torch.float32:
        config.clip_dtype = dtype
    return config


def fit_sizes(wan: Any, checkpoint: str | Path, config: Any) -> None:
    """Makes upstream build T5, VAE and CLIP in the sizes of the checkpoint's tensors."""

    def shapes(name: str) -> Shapes:
        tensors = torch.load(Path(checkpoint) / name, map_location="meta", weights_only=True)
        return {key: tuple(tensor.shape) for key, tensor in tensors.items()}

    t5 = shapes(config.t5_checkpoint)
    vocab, dim = t5["token_embedding.weight"]
    sizes = {
        "vocab_size": vocab,
        "dim": dim,
        "dim_attn": t5["blocks.0.attn.q.weight"][0],
        "dim_ffn": t5["blocks.0.ffn.fc1.weight"][0],
        "num_heads": t5["blocks.0.pos_embedding.embedding.weight"][1],
        "encoder_layers": _count(t5, "blocks"),
    }
    wan.modules.t5.umt5_xxl = partial(wan.modules.t5.umt5_xxl, **sizes)
    vae_dim = shapes(config.vae_checkpoint)["encoder.conv1.weight"][0]
    wan.modules.vae._video_vae = partial(wan.modules.vae._video_vae, dim=vae_dim)
    if "clip_checkpoint" in config:
        clip = shapes(config.clip_checkpoint)
        vocab, text_dim = clip["textual.token_embedding.weight"]
        clip_sizes: dict[str, Any] = {
            "embed_dim": clip["visual.head"][1],
            "vision_layers": _count(clip, "visual.transformer"),
            "vision_mlp_ratio": clip["visual.transformer.0.mlp.0.weight"][0] / clip["visual.head"][0],
            "vocab_size": vocab,
            "max_text_len": clip["textual.pos_embedding.weight"][0],
            "text_dim": text_dim,
            "text_layers": _count(clip, "textual.blocks"),
        }
        wan.modules.clip.clip_xlm_roberta_vit_h_14 = partial(
            wan.modules.clip.clip_xlm_roberta_vit_h_14, **clip_sizes
        )


def _count(shapes: Shapes, prefix: str) -> int:
    depth = prefix.count(".") + 1
    return 1 + max(int(name.split(".")[depth]) for name in shapes if name.startswith(f"{prefix}."))


def without_weights(wan: Any, config: Any, task: str, storage: bool) -> None:
    """Makes upstream build full-size models of which nothing is read from a checkpoint.

    storage: whether they have memory for numbers, whatever is in it, or none.
    """
    t5, clip, vae = wan.modules.t5, wan.modules.clip, wan.modules.vae

    build_t5 = t5.umt5_xxl
    t5.umt5_xxl = lambda device, **sizes: build_t5(device="meta", **sizes)
    for module in (t5.T5Encoder, clip.XLMRobertaCLIP, vae.WanVAE_):
        module.load_state_dict = _unless_none(module.load_state_dict, _give_storage if storage else _leave)
    t5.HuggingfaceTokenizer = clip.HuggingfaceTokenizer = _Tokenizer

    def build_dit(cls: type, directory: str) -> Any:
        sizes: dict[str, Any] = {"model_type": task} | {key: config[key] for key in DIT_SIZES}
        if task in ("i2v", "flf2v"):
            sizes["in_dim"] = 36
        if task == "vace":
            step = 2 if config.num_layers == 30 else 5  # of the 1.3B and the 14B model
            sizes |= {"vace_layers": list(range(0, config.num_layers, step)), "vace_in_dim": 96}
        with torch.device("meta"):
            model = cls(**sizes)
        return _give_storage(model) if storage else model

    wan.modules.model.WanModel.from_pretrained = classmethod(build_dit)

    def encode(encoder: Any, texts: list[str], device: Any) -> list[torch.Tensor]:
        ids, mask = encoder.tokenizer(texts)
        if torch.device(device).type == "cpu":
            return [torch.zeros(TOKENS, 4096, dtype=encoder.dtype)]
        return [encoder.model(ids.to(device), mask.to(device))[0, :TOKENS]]

    t5.T5EncoderModel.__call__ = encode
    if storage:
        torch.load = lambda *args, **options: None
        return
    _let_meta_modules_be_at_home()
    for solver in (wan.utils.FlowUniPCMultistepScheduler, wan.utils.FlowDPMSolverMultistepScheduler):
        # The solver searches its table of times by value, so the table stays on the CPU, where values are real.
        original = solver.set_timesteps

        def set_timesteps(
            self: Any, *args: Any, original: Callable = original, device: Any = None, **options: Any
        ) -> Any:
            return original(self, *args, device="cpu", **options)

        solver.set_timesteps = set_timesteps


def _unless_none(load: Callable, otherwise: Callable) -> Callable:
    """Nothing is read from a checkpoint; a VAE that goes home still puts its weights back."""
    return lambda self, weights, **options: (
        otherwise(self) if weights is None else load(self, weights, **options)
    )


def _leave(model: torch.nn.Module) -> None:
    pass


def _give_storage(model: torch.nn.Module) -> torch.nn.Module:
    """Gives every tensor of a model without storage memory of the CPU, which takes RAM only where it is written."""
    for module in model.modules():
        for entries in (module._parameters, module._buffers, vars(module)):
            for name, tensor in entries.items():
                if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                    there = torch.empty_like(tensor, device="cpu")
                    like = isinstance(tensor, torch.nn.Parameter)
                    entries[name] = torch.nn.Parameter(there, requires_grad=False) if like else there
    return model


def _let_meta_modules_be_at_home() -> None:
    """Makes moving meta weights to the CPU do nothing: they stand for weights in the CPU's memory."""
    to, cpu = torch.nn.Module.to, torch.nn.Module.cpu

    def at_home(module: torch.nn.Module) -> bool:
        return next(module.parameters()).device.type == "meta"

    def checked_to(module: torch.nn.Module, *args: Any, **options: Any) -> torch.nn.Module:
        home = args and isinstance(args[0], (str, torch.device)) and torch.device(args[0]).type == "cpu"
        return module if home and at_home(module) else to(module, *args, **options)

    torch.nn.Module.to = checked_to
    torch.nn.Module.cpu = lambda module: module if at_home(module) else cpu(module)


class _Tokenizer:
    def __init__(self, name: str, seq_len: int, clean: str | None = None):
        self.seq_len = seq_len

    def __call__(self, texts: list[str], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(1, self.seq_len, dtype=torch.long)
        return ids, (torch.arange(self.seq_len) < TOKENS).long()[None]
