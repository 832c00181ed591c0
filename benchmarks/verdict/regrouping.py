"""Compares tiles of the VAE and chunks of the DiT with the whole, in CUDA's default arithmetic and in exact arithmetic.

By default cuDNN convolves in TF32, and the DiT computes in bf16: tiles and chunks, which take other kernels, may then
differ by the noise of that arithmetic. The noise is measured: it is the distance of the whole from the exact whole.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch

from benchmarks.vae_tiles import MEAN, STD, place, randomized, samples
from leanwan.accelerator import exact_arithmetic
from leanwan.activations import apply_activation_offload
from leanwan.dit.chunks import apply_chunking
from leanwan.vae import tiles as vae_tiling
from wan.modules.model import WanModel
from wan.modules.vae import VAE
from wan.utils.video import to_uint8

from . import full_width
from .checks import Bench

EXACT_TILES = 1e-5  # of a range of 2
EXACT_CHUNKS = 1e-5  # of the largest value
NOISE = 2  # two roundings of one number differ by twice the noise of one
FRAMES, SIZE, TILES = 9, (320, 448), (192, 128)
REHEARSED_FRAMES, REHEARSED_SIZE, REHEARSED_TILES = 5, (96, 144), (64,)
LATENT, CHUNKS = (16, 4, 60, 104), (2048, 1000)
REHEARSED_LATENT, REHEARSED_CHUNKS = (16, 2, 16, 18), (64, 100)


def tiles(bench: Bench) -> None:
    """The VAE's output in tiles must equal the whole's within 1e-5 if TF32 is off, and within TF32's noise if on."""
    bench.needs(4, 4)
    frames, size = FRAMES, SIZE
    sides: Sequence[int] = TILES
    if bench.rehearse:
        frames, size, sides = REHEARSED_FRAMES, REHEARSED_SIZE, REHEARSED_TILES
    model = randomized(VAE(4 if bench.rehearse else 96))
    for direction in ("decode", "encode"):
        sample = samples(direction, frames, *size)
        place(direction, model, bench.device)

        def run(tile: int, direction: str = direction, sample: torch.Tensor = sample) -> torch.Tensor:
            with torch.no_grad():
                return getattr(vae_tiling, direction)(model, sample, [MEAN, 1 / STD], tile).cpu()

        with exact_arithmetic():
            exact, limit = run(0), EXACT_TILES
            _tiled(bench, f"{direction}, exact", run, exact, sides, limit)
        whole = run(0)
        noise = float((whole - exact).abs().max())
        bench.note(f"{direction}, noise of the default", noise)
        _tiled(bench, f"{direction}, default", run, whole, sides, limit + NOISE * noise)
        place(direction, model, "cpu")


def _tiled(
    bench: Bench,
    what: str,
    run: Callable[[int], torch.Tensor],
    whole: torch.Tensor,
    sides: Sequence[int],
    limit: float,
) -> None:
    found = {}
    for side in sides:
        tiled = run(side)
        difference = float((tiled - whole).abs().max())
        found[f"tiles of {side}"] = difference
        bench.expect(
            difference <= limit, f"{what}: tiles of {side} differ by {difference:.1e}, more than {limit:.1e}"
        )
        if what == "decode, exact":
            steps = int((to_uint8(tiled).int() - to_uint8(whole).int()).abs().max())
            bench.expect(steps <= 1, f"{what}: tiles of {side} are {steps} of 256 steps apart")
    bench.note(what, found)
    bench.expect(bool(whole.isfinite().all() and whole.std() > 0.01), f"{what}: the whole is no picture")


def chunks(bench: Bench) -> None:
    """The flow in chunks must equal the whole's: in fp32 within 1e-5 of the largest value, in bf16 within noise."""
    bench.needs(4, 4)
    task = "t2v-tiny" if bench.rehearse else "t2v-1.3B"
    shape, sizes = (REHEARSED_LATENT, REHEARSED_CHUNKS) if bench.rehearse else (LATENT, CHUNKS)
    narrow = full_width.build(task, torch.bfloat16)
    wide = copy.deepcopy(narrow).float().to(bench.device)  # the same values
    wide.compute_dtype = torch.float32
    narrow.to(bench.device)

    def run(model: WanModel, dtype: torch.dtype, chunk: int, heads: int | None = None) -> torch.Tensor:
        with contextlib.ExitStack() as stack:
            stack.callback(apply_chunking(model, chunk))
            if heads:
                stack.callback(apply_activation_offload(model, bench.device, chunk, heads))
            stack.enter_context(torch.no_grad())
            return model(**full_width.inputs_on(bench.device, shape, dtype))[0].cpu()

    in_fp32, in_bf16 = partial(run, wide, torch.float32), partial(run, narrow, torch.bfloat16)
    with exact_arithmetic():
        exact = in_fp32(0)
        _chunked(bench, "fp32, exact", in_fp32, exact, sizes, EXACT_CHUNKS)
        exact_bf16 = in_bf16(0)
        noise = _difference(exact_bf16, exact)
        _chunked(bench, "bf16, exact", in_bf16, exact_bf16, sizes, NOISE * noise)
    bench.note("noise of bf16", noise)
    _chunked(bench, "fp32, default", in_fp32, in_fp32(0), sizes, EXACT_CHUNKS)
    _chunked(bench, "bf16, default", in_bf16, in_bf16(0), sizes, NOISE * noise)


def _chunked(
    bench: Bench,
    what: str,
    run: Callable[..., torch.Tensor],
    whole: torch.Tensor,
    sizes: Sequence[int],
    limit: float,
) -> None:
    found = {}
    for chunk, heads in itertools.product(sizes, (None, *full_width.HEADS)):
        name = f"chunks of {chunk}" + (f", {heads} heads a visit" if heads else "")
        difference = found[name] = _difference(run(chunk, heads), whole)
        bench.expect(difference <= limit, f"{what}: {name} differ by {difference:.1e}, more than {limit:.1e}")
    bench.note(what, found)
    bench.expect(bool(whole.isfinite().all() and whole.std() > 0), f"{what}: the whole is no flow")


def _difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())
