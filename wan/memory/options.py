"""The memory options: what each is, what it may be, how the command line spells it."""

import argparse
import math
import os
from dataclasses import dataclass, fields

from ..utils.errors import InputError
from .chunking import check_chunk
from .streaming import check_buffers
from .vae_tiling import check_tile


@dataclass(frozen=True)
class MemoryOptions:
    """Which memory is saved, and how. None of them changes the video.

    Raises InputError, naming the flag, for a value that cannot work.
    """

    t5_cpu: bool = False  # the text encoder computes on the CPU
    t5_stream: bool = False  # the text encoder's layers visit the device one after another
    vae_cpu: bool = False  # the VAE lives on the CPU and visits the device to encode or decode
    vae_tile: int | str = "auto"  # side of a VAE tile in pixels, 0 for whole frames, "auto" for what fits
    dit_stream: float | None = None  # the DiT's layers visit the device; this many GiB of them stay there
    stream_ring: int = 2  # device buffers that streamed layers pass through
    dit_chunk: int = 0  # tokens that go through a DiT layer at a time, 0 for all
    offload_folder: str | os.PathLike | None = None  # where weights are kept, converted, to be memory-mapped

    def __post_init__(self):
        check_tile(self.vae_tile)
        check_chunk(self.dit_chunk)
        check_buffers(self.stream_ring)
        if self.t5_cpu and self.t5_stream:
            raise InputError("--t5_stream and --t5_cpu: choose one, where the text encoder computes")
        if self.dit_stream is not None and not 0 <= self.dit_stream < math.inf:
            raise InputError(f"--dit_stream {self.dit_stream}: give the GiB of layers to keep, 0 or more")


# --low_vram: values that hold every task's peak to a few GiB at little cost in time.
LOW_VRAM = {"vae_cpu": True, "vae_tile": 272, "t5_stream": True, "dit_stream": 0.0, "dit_chunk": 2048}


def add_memory_arguments(parser):
    """Adds a flag for every memory option to an argparse parser."""
    group = parser.add_argument_group("memory", "none of these changes the video")
    group.add_argument(
        "--t5_cpu", action="store_true", help="Compute the text encoder on the CPU (slow, no GPU memory)."
    )
    group.add_argument(
        "--t5_stream", action="store_true", help="Pass the text encoder's layers through the GPU in turn."
    )
    group.add_argument(
        "--vae_cpu", action="store_true", help="Keep the VAE on the CPU but for encoding and decoding."
    )
    group.add_argument(
        "--vae_tile",
        type=_tile,
        default="auto",
        metavar="PIXELS",
        help="Side of the tiles in which the VAE works: a multiple of 16 from 64 on, 0 for whole frames, "
        "auto for the fewest that fit (default).",
    )
    group.add_argument(
        "--dit_stream",
        type=float,
        nargs="?",
        const=0.0,
        metavar="GIB",
        help="Pass the DiT's layers through the GPU in turn; GIB of them stay there (default 0).",
    )
    group.add_argument(
        "--stream_ring", type=int, default=2, metavar="N", help="Buffers that streamed layers pass through."
    )
    group.add_argument(
        "--dit_chunk",
        type=int,
        nargs="?",
        const=LOW_VRAM["dit_chunk"],
        default=0,
        metavar="TOKENS",
        help="Pass this many tokens through a DiT layer at a time (2048 without a number); 0 for all.",
    )
    group.add_argument(
        "--offload_folder",
        metavar="DIR",
        help="Keep converted weights in DIR and map them from there, so that they take no RAM of their own.",
    )
    group.add_argument(
        "--low_vram",
        action="store_true",
        help="All of it: --offload_model True --vae_cpu --vae_tile 272 --t5_stream --dit_stream "
        "--dit_chunk; a flag given beside it keeps its own value.",
    )


def memory_options(args):
    """The MemoryOptions of parsed arguments; sets args.offload_model if --low_vram is what decides it.

    Raises InputError.
    """
    defaults = {field.name: field.default for field in fields(MemoryOptions)}
    values = {name: getattr(args, name) for name in defaults}
    if args.low_vram:
        if args.offload_model is None:
            args.offload_model = True
        for name, value in LOW_VRAM.items():
            if values[name] == defaults[name] and not (name == "t5_stream" and args.t5_cpu):
                values[name] = value
    return MemoryOptions(**values)


def _tile(text):
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of pixels") from None
