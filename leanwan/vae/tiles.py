"""The VAE in tiles that give the picture of the whole frame.

Of all layers only the attention in `middle` sees the whole frame; the norms work on each position for itself,
and what remains are convolutions with small kernels. So the layers at the resolution of the latents run on
whole frames, where these are small, and those at larger resolutions run on one tile after another, each with
the margin of its neighbours' pixels that its convolutions reach: nothing is blended, and no pixel knows
whether there were tiles.

A tile goes through all frames before the next one starts, with a temporal cache of its own, and is written
straight to its place in a video on the CPU.

Tiles differ from whole frames, and one choice of tiles from another, by the order of sums alone, which a convolution
may choose by the size of its input: by at most 1e-5 on [-1, 1] where products are fp32's. By default cuDNN rounds what
it multiplies to TF32, also in the published code; a last bit that differs then may round differently, and tiles differ
by as much as TF32 itself differs from fp32, up to 5e-3. In both cases no 8-bit value is off by more than 1.
"""

import contextlib
import functools
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn

from ..accelerator import is_out_of_memory, release_memory
from ..budget import Budget
from ..errors import InputError
from ..methods import Undo, layer_methods
from . import passes
from .geometry import pixel_size, tiles
from .operations import Operation, decoder_passes, encoder_passes
from .passes import FrameWriter, frames_of, run_pass
from .requests import decode_bytes, encode_bytes, surely_reserved

SMALLEST_TILE, TILE_STEP = 64, 16  # pixels

OnFrame = Callable[[int, int], None]  # called after each frame of a tile with: frames done, frames in all
Index = tuple[Any, ...]

log = logging.getLogger(__name__)


class Share(Protocol):
    """One process's share of the tiles, where several get the same calls. If one runs out of memory, all end."""

    def agreed(self, tile: int) -> int:
        """The tile size that all processes take, given this one's."""

    def mine(self, number: int) -> bool:
        """Whether this process computes the tile of a pass with that number."""

    def complete(self, target: torch.Tensor, places: Sequence[Index]) -> None:
        """Fills in the tiles of a pass that others computed; places: index of each tile in the target, in order."""


def check_tile(value: int | str) -> int | str:
    """Returns `value` if it is a tile size: "auto", 0 (whole frames) or a multiple of 16 pixels, at least 64.

    Raises InputError.
    """
    if value == "auto" or value == 0:
        return value
    if not isinstance(value, int) or value < SMALLEST_TILE or value % TILE_STEP:
        raise InputError(
            f"give auto, 0 for whole frames, or a multiple of {TILE_STEP} pixels from {SMALLEST_TILE} on, such as 272",
            "vae_tile",
            value,
        )
    return value


def vae_modules(vae: Any, field: str) -> nn.Module:
    """The module tree of a VAE: what it has as `model`, or the VAE itself if it is a bare tree.

    field: the option that needs them, for the error.

    Raises InputError, naming what is missing, unless the VAE has the parts of Wan2.1's.
    """
    model = getattr(vae, "model", vae)
    parts = ("encoder", "conv1", "conv2", "decoder")
    missing = [part for part in parts if not isinstance(getattr(model, part, None), nn.Module)]
    if missing or not isinstance(model, nn.Module) or next(model.parameters(), None) is None:
        raise InputError(
            f"{type(model).__name__} is not Wan2.1's VAE, it has no {', '.join(missing) or 'parameters'}; "
            "give what Wan2.1's code makes of its VAE checkpoint",
            field,
        )
    return model


def check_layers(vae: Any) -> None:
    """Raises InputError, naming what is missing or unknown, unless a VAE can be run by tiles."""
    model, field = vae_modules(vae, "vae_tile"), "vae_tile"
    try:
        decoder_passes(model), encoder_passes(model)
    except AttributeError as error:
        raise InputError(f"{type(error.obj).__name__} of the VAE has no {error.name}", field) from error
    except TypeError as error:
        raise InputError(str(error), field) from error
    except (ValueError, StopIteration) as error:
        raise InputError("the VAE has no layer that changes the size", field) from error
    scale = getattr(vae, "scale", None)
    if vae is not model and not (isinstance(scale, Sequence) and len(scale) == 2):
        raise InputError("the VAE has no scale, which is [mean, 1 / std] of the latent channels", field)


def apply_tiling(
    vae: Any,
    tile: int | str = "auto",
    capacity: int | None = None,
    on_frame: OnFrame | None = None,
    share: Share | None = None,
) -> Undo:
    """Gives a VAE tiled `encode` and `decode` of the same signatures: a list or batch in, a list out.

    Of a bare tree they are called with a batch and the scale, and return a batch.

    They compute on the device where the weights are when they are called, without autocast, one sample at a
    time. Videos come back on the CPU, latents on the device.

    Args:
        vae: has `model`, the module tree, and `scale`, [mean, 1 / std] of the latent channels; or is the bare tree.
        tile: see `check_tile`. With "auto" each call takes the fewest tiles that fit, see `fitting_tile`.
        capacity: bytes of the device that this process may take, CUDA's own among them, for "auto"; None for the
            whole device.
        on_frame: called as an encoding or decoding goes on; when memory runs out, smaller tiles begin at 0 again.
        share: this process's share, where several work on it; default: all tiles.

    Returns:
        Function that puts the VAE's own `encode` and `decode` back.

    Raises:
        InputError: not a tile size, or not a VAE made of the layers of Wan2.1's.
        RuntimeError: tiled already, or its methods are replaced already by something that tiles would undo.
    """
    check_tile(tile)
    check_layers(vae)
    settings = {"tile": tile, "capacity": capacity, "on_frame": on_frame, "share": share}

    def tiled(each: Callable[..., list[torch.Tensor]]) -> Callable[[Callable], Callable]:
        def of_batch(batch: Iterable[torch.Tensor], scale: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.stack(each(SimpleNamespace(model=vae, scale=scale), batch, **settings))

        return lambda _: of_batch if isinstance(vae, nn.Module) else functools.partial(each, vae, **settings)

    return layer_methods(
        vae, "vae_tile", innermost=True, encode=tiled(encode_each), decode=tiled(decode_each)
    )


@torch.no_grad()
def encode_each(
    vae: Any,
    videos: Iterable[torch.Tensor],
    tile: int | str,
    capacity: int | None = None,
    on_frame: OnFrame | None = None,
    share: Share | None = None,
) -> list[torch.Tensor]:
    """Encodes each video where the encoder's weights are now, without autocast; see `encode`."""
    with _no_autocast(vae.model.conv1.weight.device.type):
        return [encode(vae.model, video, vae.scale, tile, capacity, on_frame, share) for video in videos]


@torch.no_grad()
def decode_each(
    vae: Any,
    zs: Iterable[torch.Tensor],
    tile: int | str,
    capacity: int | None = None,
    on_frame: OnFrame | None = None,
    share: Share | None = None,
    stored: passes.Stored | None = None,
) -> list[torch.Tensor]:
    """Decodes each latent where the decoder's weights are now, without autocast; see `decode`."""
    with _no_autocast(vae.model.conv2.weight.device.type):
        return [decode(vae.model, z, vae.scale, tile, capacity, on_frame, stored, share) for z in zs]


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def decode(
    model: nn.Module,
    z: torch.Tensor,
    scale: Sequence[torch.Tensor],
    tile: int | str = 0,
    capacity: int | None = None,
    on_frame: OnFrame | None = None,
    stored: passes.Stored | None = None,
    share: Share | None = None,
) -> torch.Tensor:
    """As leanwan.vae.passes.decode, by tiles.

    When the device runs out of memory over the tiles, goes on with tiles of half the size.

    Args:
        model, z, scale, stored: as there.
        tile, capacity, on_frame, share: see `apply_tiling`.
    """
    if tile == "auto":
        _, frames, height, width = z.shape
        shape = (passes.decoded_frames(frames), 8 * height, 8 * width)
        tile = _tile_for_device(decode_bytes, model, shape, model.conv2.weight.device, capacity)
        tile = share.agreed(tile) if share else tile
    large_pass = functools.partial(by_tiles, int(tile), on_frame=on_frame, share=share)
    return passes.decode(model, z, scale, large_pass, stored)


def encode(
    model: nn.Module,
    video: torch.Tensor,
    scale: Sequence[torch.Tensor],
    tile: int | str = 0,
    capacity: int | None = None,
    on_frame: OnFrame | None = None,
    share: Share | None = None,
) -> torch.Tensor:
    """As leanwan.vae.passes.encode, by tiles.

    When the device runs out of memory over the tiles, goes on with tiles of half the size.

    Args:
        model, video, scale: as there.
        tile, capacity, on_frame, share: see `apply_tiling`.
    """
    if tile == "auto":
        tile = _tile_for_device(encode_bytes, model, video.shape[1:], model.conv1.weight.device, capacity)
        tile = share.agreed(tile) if share else tile
    large_pass = functools.partial(by_tiles, int(tile), on_frame=on_frame, share=share)
    return passes.encode(model, video, scale, large_pass)


def by_tiles(
    tile: int,
    operations: Sequence[Operation],
    source: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor,
    on_frame: OnFrame | None = None,
    share: Share | None = None,
) -> None:
    """As leanwan.vae.passes.on_whole_frames in tiles of at most `tile` pixels, smaller ones if memory runs out."""
    longest = max(pixel_size(source.shape[2:], target.shape[2:]))
    tile = min(tile or longest, longest)
    while True:
        try:
            parts = list(tiles(operations, source.shape[2:], target.shape[2:], tile))
            shared = share if len(parts) > 1 else None
            mine = [part for n, part in enumerate(parts) if shared is None or shared.mine(n)]
            for number, part in enumerate(mine):
                # The allocator's free blocks have the sizes of other tiles and would be in the way of this one.
                release_memory(weight.device)
                frames = frames_of(source[part.source], weight)
                if on_frame:
                    frames = _told(frames, on_frame, number * source.size(1), len(mine) * source.size(1))
                run_pass(operations, frames, FrameWriter(target[part.target]), part.crops)
            break
        except RuntimeError as error:
            smaller = tile // 2 // TILE_STEP * TILE_STEP
            if share or smaller < SMALLEST_TILE or not is_out_of_memory(error):
                raise
        gc.collect()  # outside the except clause, which keeps the failed pass alive
        log.warning("VAE: out of memory with tiles of %d pixels, going on with %d", tile, smaller)
        tile = smaller
        release_memory(weight.device)
    release_memory(weight.device)  # whichever tile was the last, later stages find no blocks of its sizes
    if shared:
        shared.complete(target, [part.target for part in parts])


def _told(frames: Iterable[torch.Tensor], on_frame: OnFrame, done: int, total: int) -> Iterator[torch.Tensor]:
    for frame in frames:
        yield frame
        del frame  # else it would wait here for the next one
        done += 1
        on_frame(done, total)


def fitting_tile(
    bytes_needed: Callable[..., int], model: nn.Module, shape: Sequence[int], capacity: float
) -> int:
    """The tile size with the fewest tiles that fit, 0 for whole frames; the smallest size if none does.

    Args:
        bytes_needed: `decode_bytes` or `encode_bytes` of leanwan.vae.requests.
        model: the VAE's modules.
        shape: (frames, height, width) of the video.
        capacity: bytes that the allocator may take from the device beside what is there already.
    """
    largest = (max(shape[1:]) - 1) // TILE_STEP * TILE_STEP
    for tile in (0, *range(largest, SMALLEST_TILE - 1, -TILE_STEP)):
        if surely_reserved(bytes_needed(model, *shape, tile)) <= capacity:
            return tile
    return SMALLEST_TILE


def _tile_for_device(
    bytes_needed: Callable[..., int],
    model: nn.Module,
    shape: Sequence[int],
    device: torch.device,
    capacity: int | None,
) -> int:
    """`fitting_tile` on a device where the weights are now; 0 on the CPU.

    What counts is the capacity given or the size of the device, less what CUDA takes and what this process holds: not
    what other programs happen to leave free, so that the same run takes the same tiles.
    """
    if device.type == "cpu":
        return 0
    accelerator = torch.get_device_module(device)
    if capacity is None:
        _, capacity = accelerator.mem_get_info(device)
    room = Budget(capacity).room - accelerator.memory_allocated(device)
    tile = fitting_tile(bytes_needed, model, shape, room)
    size = f"tiles of {tile} pixels" if tile else "whole frames"
    log.info("VAE: %s, for %.2f GiB on %s", size, capacity / 2**30, device)
    return tile
