"""Every toy task with every memory option through the command line, on the CPU and on the stand-in's card.

    python -m stand_in_driver [--late kernels] python tests/stand_in/toys.py TASK ...

Prints as JSON, of each run, its largest difference from the CPU's latents without an option.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

import generate

SMALL = [
    "--size",
    "128*96",
    "--frame_num",
    "9",
    "--sample_steps",
    "2",
    "--base_seed",
    "5",
    "--prompt_cache",
    "off",
]
STREAMED = ["--dit_stream", "--dit_chunk", "64"]
OPTIONS = {
    "planned": [],
    "nothing": ["--offload_model", "False", "--vae_tile", "0"],
    "t5_cpu": ["--t5_cpu"],
    "t5_stream": ["--t5_stream"],
    "vae_cpu": ["--vae_cpu"],
    "vae_tile": ["--vae_tile", "128"],
    "dit_stream": ["--dit_stream"],
    "some of it resident": ["--dit_stream", "0.0001", "--stream_buffers", "3"],
    "dit_chunk": ["--dit_chunk", "64"],
    "activation_offload": [*STREAMED, "--activation_offload"],
    "guidance_together": [*STREAMED, "--guidance_together"],
    "both": [*STREAMED, "--activation_offload", "--guidance_together"],
    "low_vram": ["--low_vram"],
}


def latents(folder: Path, task: str, device: str, options: list[str]) -> torch.Tensor:
    made = folder / "latents.safetensors"
    still = task.startswith("t2i")
    few = SMALL if not still else [x for x in SMALL if x not in ("--frame_num", "9")]
    files = ["--save_file", str(folder / ("out.png" if still else "out.mp4")), "--save_latents", str(made)]
    code = generate.main(["--task", task, *few, *files, "--overwrite", "--device", device, *options])
    if code:
        raise SystemExit(f"{task} {device} {options}: exit code {code}")
    (latent,) = load_file(made).values()
    return latent.float()


def main(tasks: list[str]) -> None:
    told = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks:
            expected = latents(Path(folder), task, "cpu", OPTIONS["nothing"])
            converted = {"offload_folder": ["--offload_folder", f"{folder}/converted", "--dit_stream"]}
            for name, options in (OPTIONS | converted).items():
                found = latents(Path(folder), task, "cuda", options)
                told[f"{task} {name}"] = float((found - expected).abs().max())
    print(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
