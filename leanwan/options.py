"""The memory options, their allowed values, and --low_vram, which sets them all."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass

from .dit.chunks import check_chunk
from .errors import InputError
from .flags import boolean, check_options, option
from .vae.tiles import SMALLEST_TILE, TILE_STEP, check_tile

GROUP = "memory (none of these changes the video)"


def parse_tile(text: str) -> int | str:
    """A flag's text to a tile size."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number of pixels") from None


@dataclass(frozen=True)
class MemoryOptions:
    """Which memory is saved, and how. None of them changes the video.

    Raises InputError for a value that cannot work.
    """

    offload_model: bool = option(
        True,
        "Send each model back to the CPU when it is done (default True).",
        parse=boolean,
        group=GROUP,
        metavar="BOOL",
    )
    t5_cpu: bool = option(False, "Compute the text encoder on the CPU (slow, no GPU memory).", group=GROUP)
    t5_stream: bool = option(
        False, "Pass the text encoder's layers, and CLIP's, through the GPU in turn.", group=GROUP
    )
    vae_cpu: bool = option(False, "Keep the VAE on the CPU but for encoding and decoding.", group=GROUP)
    vae_tile: int | str = option(
        "auto",
        f"Side of the tiles in which the VAE works: a multiple of {TILE_STEP} from {SMALLEST_TILE} on, 0 for whole "
        "frames, auto for the fewest that fit the card (default).",
        parse=parse_tile,
        group=GROUP,
        metavar="PIXELS",
    )
    dit_stream: float | None = option(
        None,
        "Pass the DiT's layers through the GPU in turn; GIB of them stay there (default 0).",
        at_least=0,
        at_most=2**20,
        bare=0.0,
        group=GROUP,
        metavar="GIB",
    )
    stream_buffers: int = option(
        2,
        "GPU buffers that streamed layers pass through (default 2).",
        at_least=2,
        also=("stream_ring",),
        group=GROUP,
        metavar="N",
    )
    dit_chunk: int = option(
        0,
        "Pass this many tokens through a DiT layer at a time (2048 without a number); 0 for all.",
        bare=2048,
        group=GROUP,
        metavar="TOKENS",
    )
    activation_offload: bool = option(
        False,
        "Keep what grows with the video in RAM while the DiT computes; pieces of --dit_chunk tokens visit the GPU.",
        parse=boolean,
        bare=True,
        group=GROUP,
        metavar="BOOL",
    )
    guidance_together: bool = option(
        False,
        "Let each layer, once it is on the GPU, serve the prompt and the negative prompt in turn: half the copying of "
        "--dit_stream, for a second residual stream.",
        parse=boolean,
        bare=True,
        group=GROUP,
        metavar="BOOL",
    )
    offload_folder: str | os.PathLike | None = option(
        None,
        "Keep converted weights in DIR and map them from there, so that they take no RAM of their own.",
        parse=str,
        group=GROUP,
        metavar="DIR",
    )

    def __post_init__(self) -> None:
        check_options(self)
        check_tile(self.vae_tile)
        check_chunk(self.dit_chunk)
        if self.t5_cpu and self.t5_stream:
            raise InputError("choose one, where the text encoder computes", ("t5_stream", "t5_cpu"))
        folder = self.offload_folder
        if folder is not None and (
            not os.fspath(folder) or (os.path.exists(folder) and not os.path.isdir(folder))
        ):
            raise InputError("is no folder, give another place", "offload_folder", folder)


# --low_vram: values that hold every task's peak at 720p to about 1 GiB.
LOW_VRAM = {
    "offload_model": True,
    "vae_cpu": True,
    "vae_tile": 128,
    "t5_stream": True,
    "dit_stream": 0.0,
    "dit_chunk": 1024,
    "activation_offload": True,
}


def add_low_vram(parser: argparse.ArgumentParser) -> None:
    """Adds --low_vram to a parser that has the flags of the options; `set_low_vram` applies it."""
    offload = " --activation_offload" if parser.get_default("activation_offload") is not None else ""
    parser.add_argument(
        "--low_vram",
        action="store_true",
        help=f"All of it: --offload_model True --vae_cpu --vae_tile {LOW_VRAM['vae_tile']} --t5_stream --dit_stream "
        f"--dit_chunk {LOW_VRAM['dit_chunk']}{offload}; a flag given beside it keeps its own value.",
    )


def set_low_vram(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> None:
    """Makes LOW_VRAM the parser's defaults if the arguments have --low_vram, so that flags given beside it win."""
    given, _ = parser.parse_known_args(arguments)
    if given.low_vram:
        known = {name: value for name, value in LOW_VRAM.items() if hasattr(given, name)}
        parser.set_defaults(**known | {"t5_stream": not given.t5_cpu})
