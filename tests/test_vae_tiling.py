"""Tiles of the VAE: the same numbers as whole frames, in the memory that was predicted."""

import copy
import gc
import importlib.util
import logging
import os
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from benchmarks.vae_tiles import as_diffusers, randomized, theirs
from leanwan.accelerator import exact_arithmetic
from leanwan.budget import CONTEXT
from leanwan.errors import InputError
from leanwan.methods import layer_methods
from leanwan.vae import geometry, passes
from leanwan.vae import operations as vae_operations
from leanwan.vae import tiles as vae_tiling
from leanwan.vae.requests import (
    decode_bytes,
    decode_peak_bytes,
    encode_bytes,
    encode_peak_bytes,
    surely_reserved,
)
from leanwan.vae.tiles import apply_tiling, check_tile
from virtual_gpu import VirtualGPU
from virtual_gpu.backend import DeviceModule
from wan.modules.vae import LATENT_MEAN, LATENT_STD, VAE
from wan.utils.video import EightBitFrames, to_uint8

SCALE = [torch.tensor(LATENT_MEAN), 1 / torch.tensor(LATENT_STD)]
FRAMES = (1, 5, 9, 13)
GIB = 2**30


DIM = 8  # at 4, norms over 4 channels make rounding alone differ from fp64 by 1.4e-5
MODEL = randomized(VAE(DIM))


def vae(model=MODEL):
    return SimpleNamespace(model=model, scale=SCALE)


def noise(*shape):
    """Numbers in [-1, 1], as different from frame to frame as can be."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) * 2 - 1


def assert_same_video(tiled, whole):
    assert tiled.shape == whole.shape and tiled.dtype == whole.dtype == torch.float32
    per_frame = (tiled - whole).abs().amax(dim=(0, 2, 3))
    assert per_frame.max() <= 1e-5
    steps = (to_uint8(tiled).int() - to_uint8(whole).int()).abs()
    assert steps.max() <= 1
    assert (steps == 0).float().mean() >= 0.999


@pytest.mark.parametrize("tile", [0, 64])
def test_frames_in_8_bits_are_those_of_the_video(tile):
    z, stored = noise(16, 3, 11, 9), EightBitFrames()
    (video,) = vae_tiling.decode_each(vae(), [z], tile)
    (frames,) = vae_tiling.decode_each(vae(), [z], tile, stored=stored)
    assert frames.dtype == torch.uint8 and stored.finite
    assert torch.equal(frames, to_uint8(video))


# The same numbers

tiles = st.sampled_from(range(64, 145, 16))
cells, pixels = st.integers(8, 18), st.integers(64, 150)


@settings(max_examples=10, deadline=None)
@given(frames=st.integers(1, 3), height=cells, width=cells, tile=tiles)
def test_decoding_in_tiles(frames, height, width, tile):
    z = noise(16, frames, height, width)
    whole = passes.decode(MODEL, z, SCALE)
    assert whole.shape == (3, passes.decoded_frames(frames), 8 * height, 8 * width)
    assert (whole.abs() < 1).float().mean() > 0.5
    assert_same_video(vae_tiling.decode(MODEL, z, SCALE, tile), whole)


@settings(max_examples=10, deadline=None)
@given(frames=st.integers(1, 10), height=pixels, width=pixels, tile=tiles)
def test_encoding_in_tiles(frames, height, width, tile):
    """Any number of frames and pixels: what the strides do not divide is left out at the end of each axis."""
    video = noise(3, frames, height, width)
    whole = passes.encode(MODEL, video, SCALE)
    assert whole.shape == (16, passes.encoded_frames(frames), height // 8, width // 8)
    tiled = vae_tiling.encode(MODEL, video, SCALE, tile)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().max() <= 1e-5


def test_a_tile_as_large_as_the_frame_is_no_tile():
    z = noise(16, 2, 12, 8)
    whole = passes.decode(MODEL, z, SCALE)
    video = noise(3, 5, 96, 64)
    latents = passes.encode(MODEL, video, SCALE)
    for tile in (0, 96, 272, "auto"):
        assert torch.equal(vae_tiling.decode(MODEL, z, SCALE, tile), whole)
        assert torch.equal(vae_tiling.encode(MODEL, video, SCALE, tile), latents)


def test_frames_beyond_the_last_four_are_left_out():
    video = noise(3, 8, 64, 96)
    latents = vae_tiling.encode(MODEL, video, SCALE, 64)
    assert torch.equal(latents, vae_tiling.encode(MODEL, video[:, :5], SCALE, 64))


def test_every_frame_sees_its_past_and_no_future():
    """What a latent frame decodes to depends on it and on those before it, in their order."""
    z = noise(16, 4, 8, 12)
    video = vae_tiling.decode(MODEL, z, SCALE, 64)
    for t in range(1, 4):
        first = 4 * t - 3
        changed = z.clone()
        changed[:, t] = -changed[:, t]
        difference = (vae_tiling.decode(MODEL, changed, SCALE, 64) - video).abs().amax(dim=(0, 2, 3))
        assert difference[:first].max() == 0 and difference[first:].min() > 0.01
    swapped = vae_tiling.decode(MODEL, z[:, [0, 2, 1, 3]], SCALE, 64)
    assert (swapped - video).abs().amax(dim=(0, 2, 3))[1:].min() > 0.01


def test_samples_one_at_a_time():
    tiled = vae()
    apply_tiling(tiled, 64)
    batch = noise(2, 16, 2, 8, 12)
    videos = tiled.decode(batch)
    others = tiled.decode([batch[1], noise(16, 1, 12, 8)])
    assert [v.shape for v in videos] == [(3, 5, 64, 96)] * 2
    assert torch.equal(others[0], videos[1]) and others[1].shape == (3, 1, 96, 64)
    for video, z in zip(videos, batch):
        assert_same_video(video, passes.decode(MODEL, z, SCALE))
    for latents, video in zip(tiled.encode(videos), videos):
        assert (latents - passes.encode(MODEL, video, SCALE)).abs().max() <= 1e-5


def test_autocast_around_it_changes_nothing():
    tiled, z = vae(), noise(16, 2, 8, 12)
    apply_tiling(tiled, 64)
    (expected,) = tiled.decode([z])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiled.decode([z])[0], expected)
        assert tiled.encode([expected])[0].dtype == torch.float32


def tf32(monkeypatch, summed_in):
    """Makes convolutions round what they multiply to TF32's 10 bits, as cuDNN does by default, then sum in a type."""

    def rounded(x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32).to(summed_in)

    def convolution(x, weight, bias, *args, **kwargs):
        return exact(rounded(x), rounded(weight), bias.to(summed_in), *args, **kwargs).float()

    exact = torch.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d", convolution)


@pytest.mark.parametrize("direction", ("decode", "encode"))
def test_with_tf32_tiles_differ_by_its_noise(direction, monkeypatch):
    """Where sums differ in their last bits, the next rounding to 10 bits makes them differ in the tenth.

    Sums in fp64 stand for another kernel's order. So the bound of 1e-5 holds with TF32 off, and 5e-3 with it.
    """
    sample = noise(16, 2, 12, 12) if direction == "decode" else noise(3, 5, 96, 96)
    exact = getattr(passes, direction)(MODEL, sample, SCALE)
    tf32(monkeypatch, torch.float32)
    whole = getattr(passes, direction)(MODEL, sample, SCALE)
    tf32(monkeypatch, torch.float64)
    tiled = getattr(vae_tiling, direction)(MODEL, sample, SCALE, 64)
    difference = (tiled - whole).abs().max()
    assert 1e-5 < difference <= min(5e-3, (whole - exact).abs().max())
    if direction == "decode":
        assert (to_uint8(tiled).int() - to_uint8(whole).int()).abs().max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    model = randomized(VAE(32)).cuda()
    z, video = noise(16, 3, 30, 40), noise(3, 9, 240, 320)
    with exact_arithmetic():
        assert_same_video(vae_tiling.decode(model, z, SCALE, 64), passes.decode(model, z, SCALE))
        whole = passes.encode(model, video, SCALE)
        assert (vae_tiling.encode(model, video, SCALE, 64) - whole).abs().max() <= 1e-5


# The margins are what the layers reach, and no margin is spare


def large_part(direction):
    """The operations that run by tiles, and the pixels of their input for one of their output."""
    if direction == "decode":
        return vae_operations.decoder_passes(MODEL).large, MODEL.decoder.conv1.out_channels, 1 / 8
    return vae_operations.encoder_passes(MODEL).large, 3, 8


@pytest.mark.parametrize("direction", ("decode", "encode"))
def test_margins_are_what_the_layers_reach(direction):
    """A NaN spreads to whatever depends on it: not from outside the margins, but from their outermost pixels."""
    operations, channels, scale = large_part(direction)
    length = int(256 * scale) if direction == "encode" else 32
    low, high = (96, 160) if direction == "decode" else (12, 20)
    (first, last), *_ = geometry.needed_intervals(operations, low, high, length)
    assert 0 < first < low * scale and high * scale < last < length

    def spoiled(pixels):
        frame = torch.zeros(1, channels, 16, length)
        frame[..., pixels] = torch.nan
        out = []
        passes.run(operations, frame, vae_operations.TemporalCache(), out.append)
        return out[0][..., low:high].isnan().any()

    everything = torch.arange(length)
    assert not spoiled((everything < first) | (everything >= last))
    assert spoiled(everything == first) and spoiled(everything == last - 1)


RESIDUAL, CONVOLUTION, RESAMPLING = "residual blocks", "convolutions", "resamplings"


def kind(operation):
    if isinstance(operation, vae_operations.Residual):
        return RESIDUAL
    return RESAMPLING if isinstance(operation, vae_operations.Resize) else CONVOLUTION


@pytest.mark.parametrize(
    "direction, narrowed, side",
    [
        *product(("decode", "encode"), (RESIDUAL,), (0, 1)),
        *product(("decode",), (CONVOLUTION,), (0, 1)),
        *product(("decode", "encode"), (RESAMPLING,), (1,)),
    ],
)
def test_a_margin_one_pixel_narrower_shows(direction, narrowed, side, monkeypatch):
    function = getattr(vae_tiling, direction)
    sample = noise(16, 1, 16, 16) if direction == "decode" else noise(3, 1, 128, 128)
    whole = function(MODEL, sample, SCALE)
    right = geometry.input_interval

    def wrong(operation, low, high):
        interval = list(right(operation, low, high))
        if kind(operation) == narrowed and interval != [low, high]:
            interval[side] += (1, -1)[side]
        return tuple(interval)

    monkeypatch.setattr(geometry, "input_interval", wrong)
    assert (function(MODEL, sample, SCALE, 64) - whole).abs().max() > 1e-3


# Memory


def on_device(part, model):
    for name in {"decode": ("decoder", "conv2"), "encode": ("encoder", "conv1")}[part]:
        getattr(model, name).to("vgpu")
    return model


def counted(direction, frames, height, width, tile, dim=DIM, model=None, capacity=None):
    """Peak bytes of one direction on a virtual GPU that holds its half of the VAE."""
    with torch.device("meta"):
        model = (model or VAE)(dim).requires_grad_(False)
    with VirtualGPU(capacity=capacity, meta=True) as gpu:
        on_device(direction, model)
        run = getattr(vae_tiling, direction)
        if direction == "decode":
            run(
                model,
                torch.zeros(16, passes.encoded_frames(frames), height // 8, width // 8),
                SCALE,
                tile,
            )
        else:
            run(model, torch.zeros(1, 1, 1, 1).expand(3, frames, height, width), SCALE, tile)
        return gpu.peak


def predicted(direction, frames, height, width, tile, dim=DIM):
    with torch.device("meta"):
        model = VAE(dim)
    function = {"decode": decode_peak_bytes, "encode": encode_peak_bytes}[direction]
    return function(model, frames, height, width, tile)


@settings(max_examples=15, deadline=None)
@given(
    direction=st.sampled_from(("decode", "encode")),
    frames=st.sampled_from((*FRAMES, 17)),
    height=cells.map(lambda count: 8 * count),
    width=cells.map(lambda count: 8 * count),
    tile=st.one_of(st.just(0), tiles),
)
def test_prediction(direction, frames, height, width, tile):
    count = counted(direction, frames, height, width, tile)
    assert count <= predicted(direction, frames, height, width, tile) <= 1.15 * count


whole_grid = geometry.grid


@pytest.fixture
def largest_tile_only(monkeypatch):
    """Full-size counts need only the tile that takes the most memory: its neighbours come after it."""

    def middle(height, width, tile):
        tiles = whole_grid(height, width, tile)
        columns = len({column for _, column in tiles})
        return [tiles[len(tiles) // columns // 2 * columns + columns // 2]]

    monkeypatch.setattr(geometry, "grid", middle)


SIZES = ((480, 832), (720, 1280))


@pytest.mark.parametrize("direction", ("decode", "encode"))
@pytest.mark.parametrize("size", SIZES)
def test_full_size(direction, size, largest_tile_only):
    for tile, limit in ((272, 1.6), (128, 0.9)):
        count = counted(direction, 81, *size, tile, dim=96)
        assert count <= limit * GIB
        assert count <= predicted(direction, 81, *size, tile, dim=96) <= 1.1 * count


@pytest.mark.parametrize("direction", ("decode", "encode"))
@pytest.mark.parametrize("capacity", (1.5, 3, 16))
def test_auto_takes_the_fewest_tiles_that_fit(direction, capacity, largest_tile_only, caplog, monkeypatch):
    caplog.set_level(logging.INFO, vae_tiling.log.name)
    capacity = int(capacity * GIB)
    shape = (13, 720, 1280)
    device = capacity - CONTEXT  # which the virtual GPU does not count
    monkeypatch.setattr(DeviceModule, "mem_get_info", lambda _: (0, capacity))
    peak = counted(direction, *shape, "auto", dim=96, capacity=device)
    (chosen,) = caplog.messages  # and no tile was found too large
    tile = 0 if "whole frames" in chosen else int(chosen.split()[3])
    assert (tile == 0) == (capacity == 16 * GIB)
    assert peak <= device

    with torch.device("meta"):
        model = VAE(96)
    needed = partial({"decode": decode_bytes, "encode": encode_bytes}[direction], model, *shape)
    weights = predicted(direction, *shape, 64, dim=96) - needed(64)

    def fits(tile):
        return surely_reserved(needed(tile)) <= device - weights

    assert fits(tile)
    if tile:
        count = len(whole_grid(720, 1280, tile))
        assert not fits(next(t for t in range(tile, 1281, 16) if len(whole_grid(720, 1280, t)) < count))


def test_other_programs_do_not_change_the_tiles(monkeypatch):
    z = noise(16, 1, 16, 16)
    asked = []

    def choose(needed, model, shape, room):
        asked.append((shape, room))
        return 64

    monkeypatch.setattr(vae_tiling, "fitting_tile", choose)
    with VirtualGPU(capacity=2 * GIB) as gpu:
        model = on_device("decode", randomized(VAE(DIM)))
        for capacity, others in ((None, 0), (None, GIB), (GIB, 0)):
            monkeypatch.setattr(
                DeviceModule, "mem_get_info", lambda _, taken=others: (2 * GIB - taken, 2 * GIB)
            )
            vae_tiling.decode(model, z, SCALE, "auto", capacity)
        room = 2 * GIB - gpu.live - CONTEXT
    assert asked == [((1, 128, 128), room), ((1, 128, 128), room), ((1, 128, 128), room - GIB)]


def test_out_of_memory_halves_the_tile(caplog):
    z = noise(16, 3, 16, 16)
    expected = passes.decode(MODEL, z, SCALE)
    needed = {tile: predicted("decode", 9, 128, 128, tile) for tile in (0, 64)}
    assert needed[64] < 0.8 * needed[0]
    with VirtualGPU(capacity=(needed[0] + needed[64]) // 2) as gpu:
        model = on_device("decode", randomized(VAE(DIM)))
        weights = gpu.live
        video = vae_tiling.decode(model, z, SCALE, 0)
        assert gpu.live == weights
        video_again = vae_tiling.decode(model, z, SCALE, "auto")
    assert caplog.messages == ["VAE: out of memory with tiles of 128 pixels, going on with 64"]
    assert_same_video(video, expected)
    assert torch.equal(video_again, video)


@pytest.mark.parametrize("direction", ("decode", "encode"))
def test_no_tile_is_small_enough(direction, caplog):
    sample = noise(16, 3, 32, 32) if direction == "decode" else noise(3, 9, 256, 256)
    with VirtualGPU(capacity=predicted(direction, 9, 256, 256, 64) * 3 // 4) as gpu:
        model = on_device(direction, randomized(VAE(DIM)))
        weights = gpu.live
        with pytest.raises(torch.OutOfMemoryError) as error:
            getattr(vae_tiling, direction)(model, sample, SCALE, 128)
        assert error.value.requested > 0
        del error
        gc.collect()
        assert gpu.live == weights
    assert caplog.messages in ([], ["VAE: out of memory with tiles of 128 pixels, going on with 64"])


# Undone, in any order


class Coder:
    model, scale = MODEL, SCALE

    def encode(self, videos):
        return "its own encode"

    def decode(self, zs):
        return "its own decode"


def test_undone():
    coder, z = Coder(), noise(16, 1, 8, 8)
    undo = apply_tiling(coder, 64)
    assert coder.decode([z])[0].shape == (3, 1, 64, 64)
    with pytest.raises(RuntimeError, match="vae_tile is applied already"):
        apply_tiling(coder, 64)
    for _ in range(2):
        undo()
        assert vars(coder) == {} and coder.decode([z]) == "its own decode"
    apply_tiling(coder, 64)
    undo()  # of the first time, it is over
    assert coder.encode([noise(3, 1, 64, 64)])[0].shape == (16, 1, 8, 8)


@pytest.mark.parametrize("first_on, first_off", list(product(("tiles", "visits"), repeat=2)))
def test_layers_go_on_and_off_in_any_order(first_on, first_off):
    coder, z, log = Coder(), noise(16, 1, 8, 8), []

    def visiting(function):
        def visit(*args):
            log.append("visit")
            return function(*args)

        return visit

    apply = {
        "tiles": lambda: apply_tiling(coder, 64),
        "visits": lambda: layer_methods(coder, "vae_cpu", decode=visiting),
    }
    order = sorted(apply, key=lambda option: option != first_on)
    undo = {option: apply[option]() for option in order}
    assert torch.is_tensor(coder.decode([z])[0]) and log == ["visit"]
    undo.pop(first_off)()
    assert torch.is_tensor(coder.decode([z])[0]) == (first_off == "visits")
    assert len(log) == (2 if first_off == "tiles" else 1)
    undo.popitem()[1]()
    assert vars(coder) == {}


def test_tiles_inside_something_unknown():
    """Tiles would take the place of a method that someone else has replaced: refused, and nothing is changed."""
    coder = Coder()
    coder.decode = mine = coder.decode
    with pytest.raises(RuntimeError, match="^vae_tile: decode is replaced already"):
        apply_tiling(coder, 64)
    assert vars(coder) == {"decode": mine}


# Bad input, other trees


@pytest.mark.parametrize("part", ("downsamples", "middle", "head"))
def test_a_layer_that_is_not_known_is_refused(part):
    model = copy.deepcopy(MODEL)
    setattr(model.encoder, part, nn.Sequential(*getattr(model.encoder, part), nn.GroupNorm(1, 1)))
    with pytest.raises(TypeError, match="GroupNorm"):
        vae_tiling.encode(model, noise(3, 1, 64, 64), SCALE)


@pytest.mark.parametrize("value", [1, 16, 48, 100, 271, -64, -1, 64.0, "272", "always", None])
def test_bad_tiles(value):
    with pytest.raises(InputError, match=r"^vae_tile\b.*multiple of 16 pixels from 64 on.*$"):
        check_tile(value)
    with pytest.raises(InputError):
        apply_tiling(vae(), value)


@pytest.mark.parametrize("value", ["auto", 0, 64, 272, 4096])
def test_good_tiles(value):
    assert check_tile(value) == value


@pytest.mark.parametrize("frames", (1, 5, 9))
def test_another_implementation_agrees(frames):
    """diffusers' VAE, on whole frames, with the same weights: the order of frames is no matter of opinion."""
    model = randomized(VAE(8))
    other = as_diffusers(model, 8)
    video = noise(3, frames, 64, 96)
    latents = vae_tiling.encode(model, video, SCALE, 64)
    assert (theirs(other, 0, "encode", video) - latents).abs().max() <= 1e-5
    assert_same_video(vae_tiling.decode(model, latents, SCALE, 64), theirs(other, 0, "decode", latents))


@pytest.fixture(scope="module")
def upstream():
    """Upstream's VAE module; it imports nothing else of its package."""
    tree = os.environ.get("WAN_UPSTREAM")
    if not tree:
        pytest.skip("set WAN_UPSTREAM to a checkout of Wan-Video/Wan2.1")
    spec = importlib.util.spec_from_file_location("upstream_vae", Path(tree) / "wan/modules/vae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def upstream_model(upstream, dim):
    return upstream.WanVAE_(dim=dim, z_dim=16, temperal_downsample=[False, True, True])


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_upstream_in_tiles_equals_upstream(upstream):
    whole, tiled = (upstream.WanVAE.__new__(upstream.WanVAE) for _ in range(2))
    dim = 16  # at 8, rounding alone makes each of the two differ from fp64 by up to 6.8e-6 on some processors
    for coder in (whole, tiled):
        coder.model = randomized(upstream_model(upstream, dim))
        coder.scale, coder.dtype = SCALE, torch.float32
    for tile, frames in ((0, 5), (64, 1), (64, 9), (96, 5)):
        undo = apply_tiling(tiled, tile)
        video = noise(3, frames, 112, 144)
        (latents,) = whole.encode([video])
        assert (tiled.encode([video])[0] - latents).abs().max() <= 1e-5
        assert_same_video(tiled.decode([latents])[0], whole.decode([latents])[0])
        undo()
        assert torch.equal(tiled.encode([video])[0], latents)


@pytest.mark.parametrize("direction", ("decode", "encode"))
def test_upstream_needs_what_is_predicted(direction, upstream):
    def build(dim):
        return upstream_model(upstream, dim)

    for tile in (0, 64):
        count = counted(direction, 13, 144, 208, tile, model=build)
        assert count <= predicted(direction, 13, 144, 208, tile) <= 1.1 * count
