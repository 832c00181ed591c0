"""The device memory that a DiT's conditioning takes: embedded time, prompt and image, and their keys and values."""

from __future__ import annotations

from torch import nn

from leanwan.record.ledger import Ledger

from ...configs.encoders import IMAGE_TOKENS
from .image_encoder import layer_norm


class ContextRequests:
    """Records the tensors that leanwan/dit/conditioning.py's functions make and drop.

    Args:
        model: a DiT.
        pictures: number of pictures that CLIP encodes.
        itemsize: bytes of a number of the model's compute type.
    """

    def __init__(self, ledger: Ledger, model: nn.Module, pictures: int, itemsize: int):
        self.ledger, self.model, self.pictures, self.itemsize = ledger, model, pictures, itemsize
        self.narrow, self.dim = itemsize < 4, model.dim
        self.image = hasattr(model, "img_emb")

    def embed_time(self) -> int:
        ledger, row = self.ledger, 4 * self.dim
        position = ledger.take(4 * self.model.freq_dim)
        hidden = ledger.take(row)
        hidden = ledger.become(row, hidden)
        return ledger.become(row, hidden, position)

    def embed_text(self) -> int:
        ledger, model = self.ledger, self.model
        row = model.text_len * self.dim * self.itemsize
        padded = ledger.take(model.text_len * model.text_embedding[0].in_features * self.itemsize)
        hidden = ledger.become(row, ledger.take(row))
        return ledger.become(row, hidden, padded)

    def embed_image(self) -> int:
        """The image features of a sample, embedded in fp32: MLPProj."""
        ledger, proj = self.ledger, self.model.img_emb.proj
        tokens, width, itemsize = (
            self.pictures * IMAGE_TOKENS,
            proj[0].normalized_shape[0],
            self.itemsize,
        )
        x = ledger.take(4 * tokens * width) if self.narrow else None
        if hasattr(self.model.img_emb, "emb_pos"):
            x = ledger.become(4 * tokens * width, x)
        normed = layer_norm(ledger, tokens, width)
        cast = ledger.become(tokens * width * itemsize, normed) if self.narrow else normed
        x = ledger.become(tokens * width * itemsize, cast, x)
        hidden = ledger.take(tokens * width * itemsize)
        x = ledger.become(tokens * self.dim * itemsize, hidden, x)
        wide = ledger.take(4 * tokens * self.dim) if self.narrow else None
        out = layer_norm(ledger, tokens, self.dim)
        ledger.drop(wide, x)
        return out

    def context(self, prompts: int) -> list[tuple[int, int]]:
        """Keys and values of prompts, and of the image if there is one."""
        found = self.text_context(prompts)
        return [*found, self.image_context()] if self.image else found

    def text_context(self, prompts: int) -> list[tuple[int, int]]:
        return [self._keys_and_values(self.model.text_len) for _ in range(prompts)]

    def image_context(self) -> tuple[int, int]:
        tokens = self.pictures * IMAGE_TOKENS
        cast = self.ledger.take(tokens * self.dim * self.itemsize) if self.narrow else None
        found = self._keys_and_values(tokens)
        self.ledger.drop(cast)
        return found

    def _keys_and_values(self, tokens: int) -> tuple[int, int]:
        ledger, row = self.ledger, tokens * self.dim * self.itemsize
        value = ledger.take(row)
        key = ledger.take(row)
        normed = self.rms_norm(tokens, key)
        return (ledger.become(row, normed) if self.narrow else normed), value

    def rms_norm(self, tokens: int, x: int) -> int:
        """WanRMSNorm of x, which is freed; the result is fp32, as the norm's weight is."""
        ledger, row = self.ledger, 4 * tokens * self.dim
        mean = ledger.become(4 * tokens, ledger.take(row))
        scale = ledger.become(4 * tokens, ledger.take(4 * tokens))
        normed = ledger.take(row)
        if self.narrow:
            normed = ledger.become(tokens * self.dim * self.itemsize, normed)
        out = ledger.become(row, normed)
        ledger.drop(mean, scale, x)
        return out
