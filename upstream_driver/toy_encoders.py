"""Runs upstream's text or image encoder in a process of its own, on a CPU, with given sizes.

    python -m upstream_driver.toy_encoders TREE FOLDER

FOLDER holds request.json: {"encoder": "text" or "image", "dtype": "float32", "sizes": arguments of upstream's builder,
"texts": [...], "text_len": N}, weights.pth, tokenizer/ and, for images, videos.safetensors. The results go to
out.safetensors, named by their numbers.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from .driver import environment
from .surroundings import load_tree


def encode(tree: str | Path, folder: Path, **request: Any) -> list[torch.Tensor]:
    """The results of upstream's encoder for a request, see above. The folder must hold the other files."""
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "upstream_driver.toy_encoders", str(tree), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise RuntimeError(f"upstream's encoder failed:\n{done.stderr[-4000:]}")
    results = load_file(folder / "out.safetensors")
    return [results[str(i)] for i in range(len(results))]


def _text(wan: Any, folder: Path, request: dict[str, Any]) -> list[torch.Tensor]:
    t5 = wan.modules.t5
    t5.umt5_xxl = partial(t5.umt5_xxl, **request["sizes"])
    encoder = t5.T5EncoderModel(
        text_len=request["text_len"],
        dtype=getattr(torch, request["dtype"]),
        device="cpu",
        checkpoint_path=folder / "weights.pth",
        tokenizer_path=str(folder / "tokenizer"),
    )
    return encoder(request["texts"], "cpu")


def _image(wan: Any, folder: Path, request: dict[str, Any]) -> list[torch.Tensor]:
    clip = wan.modules.clip
    clip.clip_xlm_roberta_vit_h_14 = partial(clip.clip_xlm_roberta_vit_h_14, **request["sizes"])
    # CUDA's autocast runs layer norm in fp32, weights included; the CPU's does not.
    clip.LayerNorm.forward = lambda norm, x: F.layer_norm(
        x.float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps
    ).to(x.dtype)
    encoder = clip.CLIPModel(
        dtype=getattr(torch, request["dtype"]),
        device="cpu",
        checkpoint_path=folder / "weights.pth",
        tokenizer_path=str(folder / "tokenizer"),
    )
    videos = load_file(folder / "videos.safetensors")
    return [encoder.visual([videos[name] for name in sorted(videos)])]


def main() -> None:
    tree, folder = sys.argv[1], Path(sys.argv[2])
    request = json.loads((folder / "request.json").read_text())
    wan = load_tree(tree)
    results = {"text": _text, "image": _image}[request["encoder"]](wan, folder, request)
    save_file({str(i): t.contiguous() for i, t in enumerate(results)}, folder / "out.safetensors")


if __name__ == "__main__":
    main()
