"""The networks; the names that programs written for Wan2.1 import from here are imported when used."""

import importlib
from typing import Any

_HOMES = {
    "flash_attention": "attention",
    "WanModel": "model",
    "T5EncoderModel": "t5",
    "HuggingfaceTokenizer": "tokenizers",
    "VaceWanModel": "vace_model",
    "WanVAE": "vae",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
