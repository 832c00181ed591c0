"""The text encoder: the encoder half of UMT5-XXL, loaded from Wan2.1's file."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import UMT5Config, UMT5EncoderModel

from ..configs.encoders import UMT5_XXL
from ..weights.filling import load_weights
from .tokenizers import HuggingfaceTokenizer

__all__ = ["T5EncoderModel"]

# Names in the file -> names in the library's module; those under a block without their "blocks.N." and "block.N."
OUTER_NAMES = {"token_embedding": "embed_tokens", "norm": "final_layer_norm"}
BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def _library_name(stored_name: str) -> str:
    """The module's name for a tensor of the file; a name that is not known stays, for the loader to report."""
    owner = stored_name.removesuffix(".weight")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", owner)
    if block and block[2] in BLOCK_NAMES:
        return f"block.{block[1]}.{BLOCK_NAMES[block[2]]}.weight"
    return f"{OUTER_NAMES.get(owner, owner)}.weight"


class T5EncoderModel:
    """UMT5 encoder with its tokenizer: prompts in, one embedding per token out.

    `model` is the library's encoder stack: `embed_tokens` (vocabulary table), `block.N.layer.0` (self attention
    with its relative position bias) and `.1` (FFN), `final_layer_norm`. The table may stay on the CPU when the
    rest is elsewhere: it is looked up where it lies. Everything else must be on the device that is passed to
    the call.

    Args:
        text_len: prompts are padded and truncated to this many tokens.
        dtype: type of the weights and of the result.
        device: where the weights go once loaded.
        checkpoint_path: Wan2.1's T5 file. None leaves the weights on the meta device, without storage.
        tokenizer_path: directory of the tokenizer.
        shard_fn: called as `shard_fn(model, sync_module_states=False)` in place of the move to `device`.
        config: fields of `UMT5Config` that differ from UMT5-XXL's.

    Raises:
        InputError: a missing, damaged or unfitting checkpoint or tokenizer.
    """

    def __init__(
        self,
        text_len: int,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        checkpoint_path: str | Path | None = None,
        tokenizer_path: str | Path | None = None,
        shard_fn: Any = None,
        *,
        config: dict[str, Any] | None = None,
    ):
        self.text_len = text_len
        self.dtype = dtype
        self.device = device
        self.checkpoint_path = checkpoint_path
        self.tokenizer_path = tokenizer_path

        self.tokenizer = HuggingfaceTokenizer(tokenizer_path, seq_len=text_len, clean="whitespace")
        # Eager attention: the order and rounding of its score, bias and softmax are those of the original.
        sizes = UMT5Config(**UMT5_XXL | (config or {}), attn_implementation="eager")
        with torch.device("meta"):
            model = UMT5EncoderModel(sizes).encoder.to(dtype)
        self.model = model.eval().requires_grad_(False)
        if checkpoint_path is not None:
            load_weights(model, checkpoint_path, names=_library_name, dtype=lambda name: dtype)
            if shard_fn is not None:
                self.model = shard_fn(model, sync_module_states=False)
            else:
                model.to(device)

    def __call__(self, texts: Sequence[str], device: torch.device | str) -> list[torch.Tensor]:
        """Encodes prompts.

        Args:
            texts: str or list of str.
            device: where the layers are, and the result will be.

        Returns:
            One tensor [L, d_model] of type `dtype` per prompt, L being its number of tokens, at most `text_len`.
        """
        ids, mask = self.tokenizer(texts, return_mask=True, add_special_tokens=True)
        table = self.model.embed_tokens
        embeddings = table(ids.to(table.weight.device)).to(device)
        # Ready to be added to the scores [B, heads, L, L]: no layer expands it, and no step waits for its values.
        padding = torch.zeros(mask.shape, dtype=self.dtype).masked_fill(
            mask == 0, torch.finfo(self.dtype).min
        )
        padding = padding[:, None, None].to(device)
        context = self.model(inputs_embeds=embeddings, attention_mask=padding).last_hidden_state
        return [tokens[:length] for tokens, length in zip(context, mask.sum(dim=1).tolist())]
