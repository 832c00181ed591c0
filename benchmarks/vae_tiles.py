"""The VAE in tiles: memory, time, and how far from whole frames, beside tiles that are blended.

    python -m benchmarks.vae_tiles
    python -m benchmarks.vae_tiles --size 832*480 --tiles 416 272 --blended 416 --picture docs/vae_tiling_difference.png
    python -m benchmarks.vae_tiles --tree PATH      # beside upstream's checkout, too

Whole frames, this project's tiles, upstream's VAE and diffusers' AutoencoderKLWan, whole and with its tiling, all with
the same random weights at the published width, on the same machine, one after the other in each of several rounds.
Times are also given as multiples of the first row's in the same round, of which the median counts. Peaks are counted
on the virtual GPU, weights of the working half included, or measured where there is CUDA, which then also computes.
`--count` counts peaks of a larger video, too, without computing it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from PIL import Image, ImageDraw

from leanwan.vae import tiles as vae_tiling
from leanwan.vae.geometry import STRIDE
from leanwan.vae.passes import encoded_frames
from virtual_gpu import LACK, VirtualGPU
from wan.modules.vae import LATENT_MEAN, LATENT_STD, VAE
from wan.utils.files import replacing
from wan.utils.video import to_uint8

GIB = 2**30
MEAN, STD = torch.tensor(LATENT_MEAN), torch.tensor(LATENT_STD)
HALVES = {"decode": ("decoder", "conv2", "post_quant_conv"), "encode": ("encoder", "conv1", "quant_conv")}
OVERLAP = 4  # a blended tile shares one part in so many with its neighbour, as diffusers' default does
WHITE = 0.25  # difference on [-1, 1] that the maps show as white, 32 of 256 steps


def randomized(model: VAE) -> VAE:
    """Gives a VAE seeded weights that keep the spread of activations, so that all layers have an effect."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.eval().requires_grad_(False).named_parameters():
        if "gamma" not in name:
            std = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=random) * std)
    return model


def as_diffusers(model: VAE, dim: int) -> Any:
    """diffusers' AutoencoderKLWan with the weights of our VAE."""
    weights = convert_wan_vae_to_diffusers(dict(model.state_dict()))
    with torch.device("meta"):
        other = AutoencoderKLWan(base_dim=dim)
    other.load_state_dict(weights, strict=True, assign=True)
    return other.eval().requires_grad_(False)


def from_tree(tree: str, model: VAE, dim: int) -> Any:
    """The VAE of upstream's checkout `tree` with the weights of ours. Its file imports nothing else of the checkout."""
    spec = importlib.util.spec_from_file_location("upstream_vae", Path(tree) / "wan/modules/vae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.device("meta"):
        other = module.WanVAE_(dim=dim, z_dim=len(MEAN), temperal_downsample=[False, True, True])
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    return other.eval().requires_grad_(False)


@dataclass
class Coder:
    """One way to decode and encode. `run`: a function of direction and sample; `model`: the VAE that it runs."""

    name: str
    model: torch.nn.Module
    run: Callable[[str, torch.Tensor], torch.Tensor]
    seconds: list = field(default_factory=list)
    peak: int = 0
    result: torch.Tensor | None = None


def ours(model: VAE, tile: int, direction: str, sample: torch.Tensor) -> torch.Tensor:
    return getattr(vae_tiling, direction)(model, sample, [MEAN, 1 / STD], tile)


@torch.no_grad()
def theirs(model: Any, tile: int, direction: str, sample: torch.Tensor) -> torch.Tensor:
    """diffusers' VAE with tiles of `tile` pixels, or whole frames for 0; inputs and results as of `ours`."""
    model.disable_tiling()
    if tile:
        stride = tile - tile // OVERLAP // STRIDE * STRIDE
        model.enable_tiling(tile, tile, stride, stride)
    device = next(getattr(model, HALVES[direction][0]).parameters()).device
    mean, std = (statistic.view(1, -1, 1, 1, 1).to(device) for statistic in (MEAN, STD))
    sample = sample.to(device).unsqueeze(0)
    if direction == "decode":
        return model.decode(sample * std + mean).sample[0].clamp_(-1, 1)
    return ((model.encode(sample).latent_dist.mode() - mean) / std)[0]


@torch.no_grad()
def upstreams(model: Any, direction: str, sample: torch.Tensor) -> torch.Tensor:
    """Upstream's VAE; inputs and results as of `ours`."""
    device = next(getattr(model, HALVES[direction][0]).parameters()).device
    result = getattr(model, direction)(sample.to(device)[None], [MEAN.to(device), 1 / STD.to(device)])[0]
    return result.clamp_(-1, 1) if direction == "decode" else result


def coders(
    model: VAE, tree: str | None, tiles: Sequence[int], blended: Sequence[int], dim: int
) -> list[Coder]:
    """The Coders, ours first, with the weights of `model`; upstream's only if its checkout `tree` is given."""
    other = as_diffusers(model, dim)
    upstream = [from_tree(tree, model, dim)] if tree else []
    return [
        Coder("whole frames", model, partial(ours, model, 0)),
        *(Coder(f"tiles of {tile}", model, partial(ours, model, tile)) for tile in tiles),
        *(Coder("upstream, whole frames", vae, partial(upstreams, vae)) for vae in upstream),
        Coder("diffusers, whole frames", other, partial(theirs, other, 0)),
        *(
            Coder(f"diffusers, blended tiles of {tile}", other, partial(theirs, other, tile))
            for tile in blended
        ),
    ]


def samples(direction: str, frames: int, height: int, width: int) -> torch.Tensor:
    """A seeded input: latents of normal spread, or a clip in [-1, 1] that moves."""
    if direction == "decode":
        shape = (len(MEAN), encoded_frames(frames), height // STRIDE, width // STRIDE)
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))
    axes = (torch.linspace(0, 6, n) for n in (frames, height, width))
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack([torch.sin(x * (1 + c) + 2 * t) * torch.cos(y * 2 - t) for c in range(3)])


def place(direction: str, model: torch.nn.Module, device: torch.device | str) -> None:
    for name in HALVES[direction]:
        if hasattr(model, name):
            getattr(model, name).to(device)


def compute(
    direction: str, all_coders: Sequence[Coder], sample: torch.Tensor, rounds: int, device: torch.device
) -> None:
    """Times the coders in turn, `rounds` times; with CUDA measures their peaks.

    On the CPU, processor time of all threads counts, which other programs disturb less than wall time.
    """
    cuda = device.type == "cuda"
    for _ in range(rounds):
        for coder in all_coders:
            place(direction, coder.model, device)
            if cuda:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
            clock = time.perf_counter if cuda else time.process_time
            start = clock()
            coder.result = coder.run(direction, sample).cpu()
            coder.seconds.append(clock() - start)
            if cuda:
                coder.peak = torch.cuda.max_memory_allocated(device)
                place(direction, coder.model, "cpu")
                torch.cuda.empty_cache()


def count(
    direction: str, make_coders: Callable[[VAE], list[Coder]], dim: int, shape: tuple[int, int, int]
) -> dict[str, int]:
    """Peak bytes of make_coders(model) by name, for a video of shape (frames, height, width)."""
    sample = torch.zeros(samples(direction, *(min(n, 8) for n in shape)).shape[0], 1, 1, 1)
    frames, height, width = shape
    if direction == "decode":
        frames, height, width = (
            encoded_frames(frames),
            height // STRIDE,
            width // STRIDE,
        )
    sample = sample.expand(-1, frames, height, width)
    with torch.device("meta"):
        names = [coder.name for coder in make_coders(VAE(dim))]
    peaks = {}
    for i, name in enumerate(names):
        with torch.device("meta"):
            coder = make_coders(VAE(dim).requires_grad_(False))[i]
        with VirtualGPU(meta=True) as gpu:
            place(direction, coder.model, "vgpu")
            coder.run(direction, sample)
            peaks[name] = gpu.peak
    return peaks


def table(
    direction: str, all_coders: Sequence[Coder], counted: dict[str, dict[str, int]], clock: str
) -> Iterator[str]:
    """Yields the lines of a markdown table; differences are from the first coder."""
    first, whole = all_coders[0], all_coders[0].result
    heads = ["", clock, "times", "peak GiB", "largest difference", "mean difference"]
    heads += ["8-bit values that differ", "by at most"] if direction == "decode" else []
    heads += [f"peak GiB at {shape}" for shape in counted]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for coder in all_coders:
        difference = (coder.result - whole).abs()
        times = statistics.median(own / ours for own, ours in zip(coder.seconds, first.seconds))
        cells = [
            coder.name,
            f"{statistics.median(coder.seconds):.1f}",
            f"{times:.2f}",
            f"{coder.peak / GIB:.2f}",
        ]
        cells += [f"{difference.max():.1e}", f"{difference.mean():.1e}"]
        if direction == "decode":
            steps = (to_uint8(coder.result).int() - to_uint8(whole).int()).abs()
            cells += [f"{(steps > 0).float().mean() * 100:.3f}%", f"{steps.max()}"]
        cells += [f"{peaks[coder.name] / GIB:.2f}" for peaks in counted.values()]
        yield "| " + " | ".join(cells) + " |"


def save_picture(path: str, compared: Sequence[Coder], whole: torch.Tensor, width: int = 400) -> None:
    """Maps of the last frame's difference from `whole`, the largest of the colours, side by side."""
    maps = []
    for coder in compared:
        difference = (coder.result[:, -1] - whole[:, -1]).abs().amax(0).div(WHITE).clamp(0, 1)
        image = Image.fromarray((difference * 255).to(torch.uint8).numpy())
        maps.append(image.resize((width, width * image.height // image.width), Image.Resampling.BOX))
    canvas = Image.new("L", (len(maps) * (width + 4) - 4, maps[0].height + 16), 255)
    draw = ImageDraw.Draw(canvas)
    for i, (coder, image) in enumerate(zip(compared, maps)):
        draw.text((i * (width + 4) + 2, 1), coder.name, fill=0)
        canvas.paste(image, (i * (width + 4), 16))
    with replacing(path) as temporary:
        canvas.save(temporary, optimize=True)


def parse_size(text: str) -> tuple[int, int]:
    width, height = (int(number) for number in text.replace("x", "*").split("*"))
    return height, width


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=parse_size, default=(256, 384), metavar="W*H", help="Video to compute (384*256).")
    add("--frames", type=int, default=5, help="Its frames, 4n+1 (5).")
    add("--tiles", type=vae_tiling_size, nargs="+", default=[192, 128], help="Our tiles (192 128).")
    add("--blended", type=int, nargs="*", default=[192], help="diffusers' tiles (192).")
    add("--rounds", type=int, default=3, help="Times that each is run; the median counts (3).")
    add("--dim", type=int, default=96, help="Width of the VAE (96, the published one).")
    add("--directions", nargs="+", choices=list(HALVES), default=list(HALVES))
    add("--count", type=parse_size, nargs="*", default=[], metavar="W*H", help="Count peaks of these, too.")
    add("--count_frames", type=int, default=81, help="Frames of the videos that --count counts (81).")
    add("--tree", metavar="PATH", help="Upstream's checkout, to run its VAE beside the others.")
    add("--picture", metavar="PNG", help="Save difference maps of decoding here.")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if LACK and (args.count or device.type == "cpu"):
        parser.error(LACK)
    model = randomized(VAE(args.dim))
    make_coders = partial(coders, tree=args.tree, tiles=args.tiles, blended=args.blended, dim=args.dim)
    shape = (args.frames, *args.size)
    for direction in args.directions:
        all_coders = make_coders(model)
        compute(direction, all_coders, samples(direction, *shape), args.rounds, device)
        if device.type == "cpu":
            peaks = count(direction, make_coders, args.dim, shape)
            for coder in all_coders:
                coder.peak = peaks[coder.name]
        counted = {
            f"{width}x{height}, {args.count_frames} frames": count(
                direction, make_coders, args.dim, (args.count_frames, height, width)
            )
            for height, width in args.count
        }
        peaks_from, clock = ("measured", "seconds") if device.type == "cuda" else ("counted", "CPU seconds")
        print(
            f"\n{direction}, {args.size[1]}x{args.size[0]}, {args.frames} frames, {device}, peaks {peaks_from}\n"
        )
        print("\n".join(table(direction, all_coders, counted, clock)), flush=True)
        if direction == "decode" and args.picture:
            compared = [c for c in all_coders if "tiles" in c.name]
            save_picture(args.picture, compared[:1] + compared[-1:], all_coders[0].result)


def vae_tiling_size(text: str) -> int | str:
    return vae_tiling.check_tile(int(text))


if __name__ == "__main__":
    main()
