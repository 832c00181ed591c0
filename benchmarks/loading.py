"""Peak RAM of loading a DiT checkpoint, measured in a process of its own.

    python -m benchmarks.loading                           # a 1.3B DiT's 5.3 GiB in fp32, kept in bf16
    python -m benchmarks.loading --offload_folder DIR      # converted into DIR, and mapped from there
    python -m benchmarks.loading --lora_rank 64            # with a LoRA merged into every matrix

The checkpoint is generated, sharded like the 14B files, in a temporary directory. Two peaks count, sampled every
5 ms: resident memory, file pages that the process maps included, and anonymous memory, which the system cannot take
back without swapping. Both are without what the process needs before it loads anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.random_weights import dit_config, random
from wan.modules.model import WanModel
from wan.weights.converted import OffloadFolder
from wan.weights.lora import Loras

GIB = 2**30


def write_checkpoint(directory: Path, task: str, layers: int | None, shards: int = 4) -> None:
    """Writes config.json and fp32 weights, sharded, of a task's DiT with `layers` blocks (None for all)."""
    config = dit_config(task)
    config["num_layers"] = layers or config["num_layers"]
    (directory / "config.json").write_text(json.dumps(config))
    expected = WanModel.from_config(directory).state_dict()
    names = sorted(expected)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: random(expected[name].shape, torch.float32) for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def write_lora(path: Path, directory: Path, rank: int) -> None:
    """Writes a LoRA in bf16 for every matrix of a checkpoint's DiT."""
    tensors = {}
    for name, parameter in WanModel.from_config(directory).state_dict().items():
        if name.endswith(".weight") and parameter.dim() == 2:
            rows, columns = parameter.shape
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            tensors[f"{layer}.lora_A.weight"] = random((rank, columns), torch.bfloat16)
            tensors[f"{layer}.lora_B.weight"] = random((rows, rank), torch.bfloat16)
    save_file(tensors, path)


def measure(
    directory: str | Path, offload_folder: str | Path | None = None, lora: str | Path | None = None
) -> dict[str, int]:
    """Loads a checkpoint in a fresh process. Returns a dict of bytes: kept, anonymous, resident."""
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.loading", "--load", directory]
    command += ["--offload_folder", offload_folder] if offload_folder else []
    command += ["--lora", lora] if lora else []
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return json.loads(result.stdout.splitlines()[-1])


def load(
    directory: str | Path, offload_folder: str | Path | None = None, lora: str | Path | None = None
) -> dict[str, int]:
    """Loads a checkpoint in this process. Returns what `measure` does."""
    folder = OffloadFolder(offload_folder) if offload_folder else None
    parameters = WanModel.from_config(directory).state_dict()
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    loras = Loras([(lora, 1.0)], shapes) if lora else None
    before, peak, done = _memory(), _memory(), threading.Event()

    def sample() -> None:
        while not done.is_set():
            for name, value in _memory().items():
                peak[name] = max(peak[name], value)
            time.sleep(0.005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    model = WanModel.from_pretrained(directory, torch.bfloat16, folder, loras)
    done.set()
    sampler.join()
    kept = sum(parameter.nbytes for parameter in model.parameters())
    return {"kept": kept} | {name: peak[name] - before[name] for name in peak}


def _memory() -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="t2v-1.3B", choices=["t2v-1.3B", "t2v-14B"])
    parser.add_argument("--layers", type=int, help="blocks of the DiT (default: all)")
    parser.add_argument("--offload_folder", metavar="DIR", help="convert into DIR first; measure both runs")
    parser.add_argument("--lora_rank", type=int, help="rank of a generated LoRA to merge (default: none)")
    parser.add_argument("--lora", metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--load", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.load:
        print(json.dumps(load(args.load, args.offload_folder, args.lora)))
        return
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), args.task, args.layers)
        lora = Path(name) / "lora.safetensors" if args.lora_rank else None
        if lora:
            write_lora(lora, Path(name), args.lora_rank)
        stored = sum(file.stat().st_size for file in Path(name).glob("diffusion*.safetensors"))
        print(f"stored {stored / GIB:.2f} GiB in fp32")
        for run in ("first run", "later run") if args.offload_folder else ("",):
            result = measure(name, args.offload_folder, lora)
            print(
                f"{run or 'kept'} {result['kept'] / GIB:.2f} GiB; peak resident {result['resident'] / GIB:.2f} GiB "
                f"({result['resident'] / result['kept']:.2f} times), anonymous {result['anonymous'] / GIB:.2f} GiB "
                f"({result['anonymous'] / result['kept']:.2f} times)"
            )


if __name__ == "__main__":
    main()
