"""Seconds per sampling step: the DiT resident, streamed, with its activations in RAM too, and upstream's, in one run.

    python -m benchmarks.speed                              # what the machine can: full size on CUDA, else toy size
    python -m benchmarks.speed --task t2v-14B --tree PATH   # one task, beside upstream's checkout

A step is two forward passes of the DiT, with the prompt and without it, which cost the same: one is timed, and
doubled; where both are done in turns, both. What is computed once per run is not counted. Weights are random numbers
in the types that they run in. Each time is the median of some rounds; a round times every variant once, so that what
slows the machine down slows all of them. One round before is not counted.

GB/s are the weights that a pass copies to the device over the time that it takes: what is needed, not what the bus
could give.
On a CPU nothing is streamed, for the weights are where they are used: there the rows tell that the code runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_weights
from leanwan.accelerator import is_out_of_memory, release_memory
from leanwan.activations import apply_activation_offload
from leanwan.dit.ahead import Ahead, streamed_ahead
from leanwan.dit.chunks import apply_chunking
from leanwan.errors import InputError
from leanwan.options import LOW_VRAM
from leanwan.residency import Component
from wan.configs import SIZE_CONFIGS, WAN_CONFIGS
from wan.modules.model import WanModel

GIB = 2**30
PASSES = 2  # per step
STRIDE = (4, 8, 8)  # of the VAE: frames, rows, columns
TOY = "t2v-tiny"
CHUNK = int(LOW_VRAM["dit_chunk"])
_OnDevice = contextlib.AbstractContextManager[Ahead | None]
TimePass = Callable[[], tuple[float, int] | None]  # one pass: (seconds, peak bytes), None if it does not fit


@dataclass(frozen=True)
class Case:
    """A forward pass to time."""

    task: str
    size: str
    frame_num: int
    chunk: int  # tokens, where a variant chunks
    layers: int | None = None  # of the DiT, None for the task's

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        width, height = SIZE_CONFIGS[self.size]
        temporal, vertical, horizontal = STRIDE
        return (16, (self.frame_num - 1) // temporal + 1, height // vertical, width // horizontal)

    @property
    def tokens(self) -> int:
        _, frames, rows, columns = self.latent_shape
        return frames * (rows // 2) * (columns // 2)


CASES = {
    "t2v-1.3B": Case("t2v-1.3B", "832*480", 81, CHUNK),
    "t2v-14B": Case("t2v-14B", "1280*720", 81, CHUNK),
    TOY: Case(TOY, "128*96", 9, 64),
}


@dataclass
class Row:
    """The measurements of one variant.

    Attributes:
        passes: seconds of a forward pass, in each round that counts.
        peak_bytes: of device memory, 0 on a CPU.
        streamed_bytes: of the weights that a pass copies to the device.
        out_of_memory: whether the variant did not fit the device.
    """

    name: str
    passes: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    streamed_bytes: int = 0
    out_of_memory: bool = False

    @property
    def step(self) -> float:
        """Seconds per step."""
        return PASSES * statistics.median(self.passes)


def measure(case: Case, device: torch.device, rounds: int, tree: str | None = None) -> list[Row]:
    """The Rows of a case, the resident model's first; upstream's last if `tree`, its checkout, is given."""
    variants, rows = _variants(case, device), []
    with contextlib.ExitStack() as stack:
        if tree is not None:
            variants.append((Row("upstream, resident"), stack.enter_context(_upstream(case, device, tree))))
        rows = [row for row, _ in variants]
        for counted in [False] + [True] * rounds:
            for row, time_pass in variants:
                if row.out_of_memory:
                    continue
                result = time_pass()
                if result is None:
                    row.out_of_memory = True
                elif counted:
                    seconds, peak_bytes = result
                    row.passes.append(seconds)
                    row.peak_bytes = max(row.peak_bytes, peak_bytes)
    return rows


def _variants(case: Case, device: torch.device) -> list[tuple[Row, TimePass]]:
    """This project's variants of a case: for each a Row, and a function that times a pass."""
    dtype = WAN_CONFIGS[case.task].param_dtype
    with tempfile.TemporaryDirectory() as folder:
        random_weights.write_checkpoint(folder, case.task, case.layers)
        with random_weights.weights_from(random_weights.random):
            model = WanModel.from_pretrained(folder, dtype=dtype)
    inputs = pass_inputs(case.latent_shape, case.tokens, device, dtype)
    (prompt,), (latent,) = inputs["context"], inputs["x"]
    prompts = [prompt, torch.randn_like(prompt)]
    resident = Component([model], device)

    def variant(
        name: str, stream: bool = True, chunk: int = 0, in_ram: bool = False, together: bool = False
    ) -> tuple[Row, TimePass]:
        row, count = Row(name), PASSES if together else 1
        given = {"x": [latent] * count, "t": inputs["t"].expand(count), "context": prompts[:count]}

        def call(ahead: Ahead | None) -> None:
            conditions = [ahead(0, prompt) for prompt in range(count)] if ahead else None
            model(**inputs | given, together=together, conditions=conditions)

        def time_pass() -> tuple[float, int] | None:
            with contextlib.ExitStack() as stack:
                stack.callback(apply_chunking(model, chunk))
                if in_ram:
                    stack.callback(apply_activation_offload(model, device, chunk))
                on_device: _OnDevice = resident.on_device()
                if stream:
                    on_device = streamed_ahead(model, device, [inputs["t"]], prompts, None, dtype)
                timed = _timed(on_device, call, device)
            if timed is None:
                return None
            seconds, peak_bytes, visiting = timed
            row.streamed_bytes = visiting // count
            return seconds / count, peak_bytes

        return row, time_pass

    chunk = case.chunk
    return [
        variant("resident", stream=False),
        variant("streamed"),
        variant(f"streamed, chunks of {chunk}", chunk=chunk),
        variant(f"streamed, chunks of {chunk}, activations in RAM", chunk=chunk, in_ram=True),
        variant("the same, guidance together", chunk=chunk, in_ram=True, together=True),
    ]


def pass_inputs(
    latent_shape: Sequence[int], tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments of a text-to-video DiT: one sample, a prompt as long as can be."""
    return {
        "x": [torch.randn(latent_shape, device=device)],
        "t": torch.tensor([999], device=device),
        "context": [torch.randn(512, 4096, device=device, dtype=dtype)],
        "seq_len": tokens,
    }


def _timed(
    on_device: _OnDevice,
    call: Callable[[Ahead | None], None],
    device: torch.device,
) -> tuple[float, int, int] | None:
    """Times a call while the model is on the device, or while its layer groups stream.

    Returns:
        (seconds, peak bytes, bytes of the streamed groups); None if the device has not the room.
    """
    backend = None if device.type == "cpu" else torch.get_device_module(device)
    try:
        with torch.no_grad(), on_device as ahead:
            if backend:
                backend.reset_peak_memory_stats(device)
                backend.synchronize(device)
            start = time.perf_counter()
            call(ahead)
            if backend:
                backend.synchronize(device)
            seconds = time.perf_counter() - start
            if backend is None:
                return seconds, 0, 0
            nbytes = sum(
                weight.nbytes for group in (ahead.groups if ahead else ()) for weight in group.parameters()
            )
            return seconds, backend.max_memory_allocated(device), nbytes
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    release_memory(device)  # here the exception no longer keeps tensors alive
    return None


@contextlib.contextmanager
def _upstream(case: Case, device: torch.device, tree: str) -> Iterator[TimePass]:
    """Yields a function that times a pass of upstream's model in a process of its own, see upstream_speed.py."""
    job = {
        "tree": str(Path(tree).resolve()),
        "config": random_weights.dit_config(case.task, case.layers),
        "latent_shape": case.latent_shape,
        "tokens": case.tokens,
        "device": str(device),
        "dtype": str(WAN_CONFIGS[case.task].param_dtype).removeprefix("torch."),
    }
    script = Path(__file__).with_name("upstream_speed.py")
    with subprocess.Popen(
        [sys.executable, script, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def time_pass() -> tuple[float, int] | None:
            process.stdin.write("pass\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                raise InputError(f"--tree {tree}: upstream's model does not run, see its message above")
            return json.loads(answer)

        try:
            yield time_pass
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()  # ends it


def table(rows: Sequence[Row]) -> str:
    """A markdown table, times as ratios to the first row's too."""
    lines = ["| weights | s/step | ratio | peak GiB | GB/s to the device |", "|---|---:|---:|---:|---:|"]
    base = rows[0]
    for row in rows:
        if row.out_of_memory:
            cells = ["does not fit", "", "", ""]
        else:
            ratio = "" if base.out_of_memory else f"{row.step / base.step:.2f}"
            rate = f"{PASSES * row.streamed_bytes / row.step / 1e9:.1f}" if row.streamed_bytes else ""
            peak = f"{row.peak_bytes / GIB:.2f}" if row.peak_bytes else ""
            cells = [f"{row.step:.4g}", ratio, peak, rate]
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code: 0, also if something did not fit the device; 2 for bad input."""
    try:
        args = parse_arguments(argv)
        device = torch.device(args.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(f"{name}, torch {torch.__version__}, median of {args.rounds}; a step is {PASSES} passes")
        if device.type == "cpu":
            print("On a CPU streaming does nothing: its times are resident ones.")
        for case in args.cases:
            rows = measure(case, device, args.rounds, args.tree)
            title = f"{case.task}, {case.size}, {case.frame_num} frames ({case.tokens} tokens)"
            title += f", {case.layers} layers" if case.layers else ""
            print(f"\n{title}\n\n{table(rows)}", flush=True)
    except InputError as error:
        print(f"benchmarks.speed: {error.told('--')}", file=sys.stderr)
        return 2
    return 0


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], help="default cuda where there is one")
    add("--task", choices=list(CASES), help=f"default t2v-1.3B and t2v-14B on cuda, {TOY} on cpu")
    add(
        "--layers",
        type=int,
        help="time a DiT of so many layers, where the whole takes too long or too much memory",
    )
    add("--rounds", type=int, default=3, help="default 3")
    add("--tree", metavar="PATH", help="also time the model of this checkout of upstream")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no CUDA device here, use --device cpu")
    on_cuda = args.device == "cuda" or (args.device is None and torch.cuda.is_available())
    args.device = "cuda:0" if on_cuda else "cpu"
    if args.rounds < 1:
        raise InputError(f"--rounds {args.rounds}: give 1 or more")
    if args.tree is not None and not (Path(args.tree) / "wan" / "text2video.py").is_file():
        raise InputError(f"--tree {args.tree}: no checkout of upstream is there")
    tasks = ["t2v-1.3B", "t2v-14B"] if on_cuda else [TOY]
    if args.layers is not None and args.layers < 1:
        raise InputError(f"--layers {args.layers}: give 1 or more")
    cases = [CASES[task] for task in ([args.task] if args.task else tasks)]
    args.cases = [replace(case, layers=args.layers) for case in cases]
    return args


if __name__ == "__main__":
    sys.exit(main())
