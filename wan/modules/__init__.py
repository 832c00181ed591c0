"""The networks; the names that programs written for Wan2.1 import from here are imported when used."""

from leanwan.lazy import lazily

_HOMES = {
    "flash_attention": "attention",
    "WanModel": "model",
    "T5EncoderModel": "t5",
    "HuggingfaceTokenizer": "tokenizers",
    "VaceWanModel": "vace_model",
    "WanVAE": "vae",
}

__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
