"""Toy checkpoints: the real file layout, tensor names and module structure, in a few MB of seeded random numbers.

Those of the image tasks are larger (about 75 MB), because the DiT's image embedding fixes CLIP's width at 1280.

Weights are scaled so that activations stay near 1 and every tensor that a real run uses changes the result: no weight
is zero, and gates, prompts and images all have an effect.
"""

import json
import math
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from easydict import EasyDict
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from leanwan.errors import InputError

from .configs.encoders import IMAGE_TOKENS, TEXT_TOKENS
from .configs.tiny import TINY_CONFIGS
from .utils.files import user_cache

VERSION = 2  # of the checkpoints' contents; raise it when any tensor or file changes

CLIP_TEXT = {"vocab": 64, "positions": 514, "width": 16, "layers": 1}
CLIP_EMBED_DIM = 32

TRAINING_TEXT = """
a red ball rolls to the right across a green table while the camera follows it
a small boat drifts along the river in the morning, and the light on the water is soft
two cats sit at the window, one of them looks up at the rain, the other sleeps
the old tower stands on a hill, clouds pass behind it and birds turn around it
a child throws a blue kite into the wind and runs over the sand by the sea
snow falls slowly on a quiet street, a lamp glows, a dog walks through the picture from left to right
a close view of hands that shape a bowl of clay on a turning wheel
blurred picture, low quality, noise, text over the image, static camera, bad hands
"""


def checkpoint(task: str) -> Path:
    """The directory of a toy task's checkpoint, written on first use into the user's cache directory.

    The cache is `$XDG_CACHE_HOME/wan-tiny`, or `~/.cache/wan-tiny` without it.

    Raises:
        InputError: unknown task, or a cache directory that cannot be written.
    """
    return cached(
        user_cache("wan-tiny") / f"v{VERSION}" / task, lambda directory: write_checkpoint(directory, task)
    )


def cached(directory: Path, write: Callable[[Path], object]) -> Path:
    """A checkpoint's directory in the user's cache, written if it is missing; raises InputError if that fails."""
    if not directory.is_dir():
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            write(directory)
        except OSError as error:
            raise InputError(
                f"{directory}: the toy checkpoint cannot be written ({error.strerror}), set XDG_CACHE_HOME"
            ) from error
        except InputError:
            if not directory.is_dir():  # else another process was faster
                raise
    return directory


def write_checkpoint(directory: str | Path, task: str, seed: int = 0, shards: int = 1) -> Path:
    """Writes a toy task's checkpoint; the directory appears when it is complete.

    Args:
        directory: must not exist, or be empty.
        task: t2v-tiny, t2i-tiny, i2v-tiny, flf2v-tiny or vace-tiny.
        seed: of the weights; the tokenizer does not depend on it.
        shards: files that the DiT is split into; with more than one comes an index file, as for the 14B models.

    Returns:
        The directory.

    Raises:
        InputError: unknown task, or a directory that holds something.
    """
    if task not in TINY_CONFIGS:
        raise InputError(f"no toy task, choose from {', '.join(TINY_CONFIGS)}", "task", task)
    config = TINY_CONFIGS[task]

    def write(folder: Path) -> None:
        write_dit(folder, config, dit_weights(config, seed), shards)
        torch.save(vae_weights(config, seed), folder / config.vae_checkpoint)
        write_encoders(folder, config, seed, train_tokenizer(config.t5_config["vocab_size"]))

    return write_whole(Path(directory), write)


def write_whole(directory: Path, write: Callable[[Path], None]) -> Path:
    """Has `write` fill a directory that appears only when complete; raises InputError if it exists and is not empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: exists and is not an empty directory, choose another")
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        write(unfinished)
        unfinished.chmod(0o755)
        with suppress(FileNotFoundError):
            directory.rmdir()  # Windows renames over nothing, POSIX over an empty directory
        os.replace(unfinished, directory)
    except OSError as error:
        if directory.is_dir() and any(directory.iterdir()):
            raise InputError(f"{directory}: exists and is not an empty directory, choose another") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def write_encoders(folder: Path, config: EasyDict, seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the files of the text encoder and, where the config has one, of the image encoder."""
    torch.save(t5_weights(config, seed), folder / config.t5_checkpoint)
    _write_tokenizer(folder / config.t5_tokenizer, tokenizer)
    if "clip_config" in config:
        torch.save(clip_weights(config, seed), folder / config.clip_checkpoint)
        _write_tokenizer(folder / config.clip_tokenizer, tokenizer)


def write_dit(directory: Path, config: EasyDict, weights: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Writes the DiT's config.json, and its tensors in `shards` files."""
    (directory / "config.json").write_text(json.dumps(config.dit_config, indent=2) + "\n")
    stem = "diffusion_pytorch_model"
    if shards == 1:
        save_file(weights, directory / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for part in range(shards):
        shard = f"{stem}-{part + 1:05d}-of-{shards:05d}.safetensors"
        held = {name: weights[name] for name in names[part::shards]}
        save_file(held, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, shard)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": weight_map}
    (directory / f"{stem}.safetensors.index.json").write_text(
        json.dumps(index, indent=2, sort_keys=True) + "\n"
    )


def _write_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(directory)
    special = json.dumps(
        tokenizer.special_tokens_map, indent=2
    )  # not every version of the library writes this file
    (directory / "special_tokens_map.json").write_text(special + "\n")


# Weights


def _normal(seed: int, name: str, shape: Sequence[int], mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    """Normal fp32 tensor that depends on the seed and the name alone."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = generator.standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(values * np.float32(std) + np.float32(mean))


def _layer(seed: int, name: str, shape: Sequence[int], gain: float = 1.0) -> torch.Tensor:
    """A tensor by its kind: norms near 1, biases near 0; matrices, kernels keep their input's scale, times `gain`."""
    if name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
        return _normal(seed, name, shape, mean=1.0, std=0.1)
    if len(shape) == 1:
        return _normal(seed, name, shape, std=0.1)
    return _normal(seed, name, shape, std=gain / math.sqrt(math.prod(shape[1:])))


def dit_weights(config: EasyDict, seed: int = 0) -> dict[str, torch.Tensor]:
    """The DiT's tensors, fp32, by their names in the file."""
    from .modules.model import WanModel
    from .modules.vace_model import VaceWanModel

    sizes = {key: value for key, value in config.dit_config.items() if not key.startswith("_")}
    with torch.device("meta"):
        model = (VaceWanModel if "vace_layers" in sizes else WanModel)(**sizes)
    weights = {}
    for name, parameter in model.state_dict().items():
        if name.endswith(("modulation", "emb_pos")):
            weights[name] = _normal(seed, name, parameter.shape, std=0.5)
            continue
        gain = 1.0
        if ".cross_attn." in name and name.endswith(("norm_q.weight", "v.weight")):
            gain = 3.0  # most of the 512 text tokens are padding: the few real ones get sharp attention, large values
        elif name == "head.head.weight":
            gain = 0.4  # guidance makes the flow larger
        weights[name] = _layer(seed, name, parameter.shape) * gain
    return weights


def vae_weights(config: EasyDict, seed: int = 0) -> dict[str, torch.Tensor]:
    """The VAE's tensors, fp32, by their names in the file."""
    from .modules.vae import VAE

    with torch.device("meta"):
        model = VAE(config.vae_dim)
    weights = {}
    for name, parameter in model.state_dict().items():
        gain = 1.0
        if "residual" in name or name.endswith("proj.weight"):
            gain = 2.0  # makes a branch noticeable beside the residual stream
        elif ".head." in name:
            gain = (
                0.45 if name.startswith("decoder") else 3.0
            )  # keeps frames well inside [-1, 1] and latents at their usual spread
        weights[name] = _layer(seed, name, parameter.shape, gain)
    return weights


def t5_weights(config: EasyDict, seed: int = 0) -> dict[str, torch.Tensor]:
    """The T5 encoder's tensors, bf16, by their names in the file."""
    sizes = config.t5_config
    model, inner, ffn = sizes["d_model"], sizes["d_kv"] * sizes["num_heads"], sizes["d_ff"]
    shapes = {"token_embedding.weight": (sizes["vocab_size"], model), "norm.weight": (model,)}
    for block in range(sizes["num_layers"]):
        shapes |= {
            f"blocks.{block}.norm1.weight": (model,),
            f"blocks.{block}.attn.q.weight": (inner, model),
            f"blocks.{block}.attn.k.weight": (inner, model),
            f"blocks.{block}.attn.v.weight": (inner, model),
            f"blocks.{block}.attn.o.weight": (model, inner),
            f"blocks.{block}.norm2.weight": (model,),
            f"blocks.{block}.ffn.gate.0.weight": (ffn, model),
            f"blocks.{block}.ffn.fc1.weight": (ffn, model),
            f"blocks.{block}.ffn.fc2.weight": (model, ffn),
            f"blocks.{block}.pos_embedding.embedding.weight": (32, sizes["num_heads"]),
        }
    weights = {}
    for name, shape in shapes.items():
        if "embedding" in name:
            tensor = _normal(seed, name, shape)
        else:
            # T5 does not divide its scores by the square root of the head's width, so the queries' weights are.
            tensor = _layer(seed, name, shape, gain=sizes["d_kv"] ** -0.5 if ".attn.q." in name else 1.0)
        weights[name] = tensor.bfloat16()
    return weights


def clip_weights(config: EasyDict, seed: int = 0) -> dict[str, torch.Tensor]:
    """CLIP's tensors, image and text tower, fp16, by their names in the file."""
    width, mlp = 1280, config.clip_config["intermediate_size"]
    shapes = {
        "log_scale": (),
        "visual.cls_embedding": (1, 1, width),
        "visual.pos_embedding": (1, IMAGE_TOKENS, width),
        "visual.patch_embedding.weight": (width, 3, 14, 14),
        "visual.head": (width, CLIP_EMBED_DIM),
        **_affine("visual.pre_norm", width),
        **_affine("visual.post_norm", width),
    }
    for layer in range(config.clip_config["num_hidden_layers"]):
        prefix = f"visual.transformer.{layer}"
        shapes |= _affine(f"{prefix}.norm1", width) | _affine(f"{prefix}.norm2", width)
        shapes |= _linear(f"{prefix}.attn.to_qkv", width, 3 * width) | _linear(
            f"{prefix}.attn.proj", width, width
        )
        shapes |= _linear(f"{prefix}.mlp.0", width, mlp) | _linear(f"{prefix}.mlp.2", mlp, width)
    width, middle = CLIP_TEXT["width"], (CLIP_TEXT["width"] + CLIP_EMBED_DIM) // 2
    shapes |= {
        "textual.token_embedding.weight": (CLIP_TEXT["vocab"], width),
        "textual.type_embedding.weight": (1, width),
        "textual.pos_embedding.weight": (CLIP_TEXT["positions"], width),
        "textual.head.0.weight": (middle, width),
        "textual.head.2.weight": (CLIP_EMBED_DIM, middle),
        **_affine("textual.norm", width),
    }
    for layer in range(CLIP_TEXT["layers"]):
        prefix = f"textual.blocks.{layer}"
        shapes |= _affine(f"{prefix}.norm1", width) | _affine(f"{prefix}.norm2", width)
        for projection in "qkvo":
            shapes |= _linear(f"{prefix}.attn.{projection}", width, width)
        shapes |= _linear(f"{prefix}.ffn.0", width, 4 * width) | _linear(f"{prefix}.ffn.2", 4 * width, width)
    weights = {}
    for name, shape in shapes.items():
        tensor = _normal(seed, name, shape) if "embedding" in name else _layer(seed, name, shape or (1,))
        if name == "visual.patch_embedding.weight":
            tensor = _layer(seed, name, shape)
        weights[name] = tensor.reshape(shape).half()
    return weights


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _affine(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# Tokenizer


def train_tokenizer(vocab_size: int, text: str = TRAINING_TEXT) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer with byte fallback: <pad> is 0, </s> is 1 and ends every text, <unk> is 2.

    The pieces are the most frequent substrings of the words in `text`, their scores the logarithms of their
    shares.
    """
    special = ["<pad>", "</s>", "<unk>"]
    byte_pieces = [f"<0x{value:02X}>" for value in range(256)]
    words = [f"▁{word}" for word in text.split()]
    counts = Counter(
        word[start:end]
        for word in words
        for start in range(len(word))
        for end in range(start + 1, len(word) + 1)
    )
    # Single characters first, so that every word of the text can be spelt; then the pieces that save most characters.
    ranked = sorted(counts, key=lambda piece: (len(piece) > 1, -counts[piece] * (len(piece) - 1), piece))
    pieces = ranked[: vocab_size - len(special) - len(byte_pieces)]
    total = sum(counts[piece] for piece in pieces)
    vocab = [(token, 0.0) for token in special]
    vocab += [(piece, math.log(counts[piece] / total)) for piece in pieces]
    vocab += [(piece, -20.0) for piece in byte_pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_TOKENS,
    )
