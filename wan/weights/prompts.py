"""Keeps encoded prompts, so that the next run with the same words does not load the text encoder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch

from ..utils.files import replacing, sweep
from .fingerprints import file_fingerprint
from .writing import write_tensors

log = logging.getLogger(__name__)

FORMAT = "wan-prompt-1"  # raise it when the text encoder computes otherwise
LIMIT = 256 * 2**20  # bytes in RAM, and in a folder; a prompt takes up to 4 MiB


class PromptCache:
    """Encoded prompts, in RAM and, if there is a folder, in files of it; the least recently used ones go first.

    Args:
        folder: made when it is needed; None for RAM alone.
        limit: bytes in RAM, and of all files together.
    """

    def __init__(self, folder: str | os.PathLike | None = None, limit: int = LIMIT):
        self.folder = Path(folder) if folder is not None else None
        self._limit = limit
        self._here: dict[str, torch.Tensor] = {}

    def get(self, key: Mapping[str, Any]) -> torch.Tensor | None:
        """The embedding that was put under this key, [L, width] on the CPU, bit for bit; None if none is intact."""
        name = _name(key)
        if name not in self._here and self.folder is not None:
            path = self.folder / f"{name}.safetensors"
            with contextlib.suppress(OSError, safetensors.SafetensorError, KeyError, TypeError):
                with safetensors.safe_open(path, framework="pt") as file:
                    metadata, tensor = file.metadata(), file.get_tensor("prompt").clone()
                if metadata == {"key": _text(key), "checksum": _checksum(tensor)}:
                    self._remember(name, tensor)
                    os.utime(path)
        return self._here.get(name)

    def put(self, key: Mapping[str, Any], embedding: torch.Tensor) -> None:
        """Keeps an embedding [L, width]. If the folder cannot be written to, that is logged and the run goes on."""
        name, tensor = _name(key), embedding.detach().to("cpu", copy=True).contiguous()
        self._remember(name, tensor)
        if self.folder is None:
            return
        metadata = {"key": _text(key), "checksum": _checksum(tensor)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            with replacing(self.folder / f"{name}.safetensors") as temporary:
                write_tensors(temporary, {"prompt": tensor}, metadata)
            self._shrink()
        except OSError as error:
            log.warning(
                f"The encoded prompt could not be kept in {self.folder}: {' '.join(str(error).split())}"
            )

    def _remember(self, name: str, tensor: torch.Tensor) -> None:
        self._here[name] = tensor
        while len(self._here) > 1 and sum(kept.nbytes for kept in self._here.values()) > self._limit:
            del self._here[next(iter(self._here))]

    def _shrink(self) -> None:
        """Removes the files that were not used for longest, until the rest is within the limit."""
        assert self.folder is not None
        files = []
        for path in self.folder.glob("[!.]*.safetensors"):
            with contextlib.suppress(OSError):  # another run removed it
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        room = self._limit
        for _, size, path in sorted(files, reverse=True):
            room -= size
            if room < 0:
                with contextlib.suppress(OSError):
                    path.unlink()


class EncodedPrompts:
    """The prompts in a cache that one text encoder made, from its files, on its device.

    Args:
        cache: where prompts are kept; None keeps and finds nothing.
        weights, tokenizer: the encoder's file, and the folder of its tokenizer.
        device: where the encoder computes.
        settings: all else that the embedding of a text depends on.
    """

    def __init__(
        self, cache: PromptCache | None, weights: Path, tokenizer: Path, device: torch.device, **settings: Any
    ):
        self._cache, self._weights, self._tokenizer = cache, weights, tokenizer
        self._device, self._settings = device, settings

    def get(self, text: str) -> torch.Tensor | None:
        """The embedding of a text, as PromptCache.get returns it."""
        return self._cache.get(self._key(text)) if self._cache else None

    def put(self, text: str, embedding: torch.Tensor) -> None:
        """Keeps the embedding of a text, as PromptCache.put does."""
        if self._cache:
            self._cache.put(self._key(text), embedding)

    def _key(self, text: str) -> dict[str, Any]:
        return self._files | self._settings | {"text": text, "by": _computed_by(self._device)}

    @cached_property
    def _files(self) -> dict[str, Any]:
        tokenizer = [path for path in sorted(self._tokenizer.glob("*")) if path.is_file()]
        return {
            "weights": file_fingerprint(self._weights),
            "tokenizer": {path.name: file_fingerprint(path) for path in tokenizer},
        }


def _computed_by(device: torch.device) -> dict[str, Any]:
    """The facts about a device, its libraries and their settings that can change the last bits of its results."""
    cpu = device.type == "cpu"
    named = None if cpu else getattr(torch.get_device_module(device), "get_device_name", None)
    return {
        "torch": str(torch.__version__),
        "kind": device.type,
        "name": named(device) if named else platform.machine(),
        "kernels": [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()] if cpu else None,
        "exact": torch.are_deterministic_algorithms_enabled(),
    }


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **key}, sort_keys=True)


def _name(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(key).encode()).hexdigest()[:32]


def _checksum(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
