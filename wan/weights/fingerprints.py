"""Digests that tell one checkpoint from another."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch

from .reading import checkpoint_files, read_tensors

EDGE = 2**20  # bytes at both ends of a file that its fingerprint covers
SMALL = 4096  # numbers in the largest tensor that counts for the fingerprint of a VAE


def checkpoint_fingerprint(source: Path, dtype: Callable[[str], torch.dtype], version: str) -> str:
    """Tells checkpoints, and what is kept of them, apart.

    It covers the names, sizes, times and ends of the files, and each tensor's name and type.

    Args:
        source: a .safetensors, .pth or index .json file.
        dtype: maps a tensor's name to the type to keep it in.
        version: of what is made of the tensors.

    Raises InputError for a missing or damaged file.
    """
    digest = hashlib.sha256(version.encode())
    for path in checkpoint_files(source):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:{path.stat().st_mtime_ns}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(EDGE))
            file.seek(max(0, size - EDGE))
            digest.update(file.read(EDGE))
    for name, _ in read_tensors(source):
        digest.update(f"{name}:{dtype(name)}".encode())
    return digest.hexdigest()


def vae_fingerprint(path: Path) -> str:
    """Digest that tells the decoder of one VAE checkpoint from another's, whatever the format of the file.

    It covers the names of all tensors of the decoder and the values of the small ones: biases, norms, first layer.

    Raises InputError for a missing or damaged file.
    """
    digest = hashlib.sha256()
    for name, read in sorted(read_tensors(path), key=lambda entry: entry[0]):
        if name.startswith(("conv2.", "decoder.")):
            digest.update(name.encode())
            tensor = read()
            if tensor.numel() <= SMALL:
                digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
