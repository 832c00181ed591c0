"""Predicts the device bytes and the seconds of each stage of a run under given memory options."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from leanwan.options import MemoryOptions
from leanwan.record.ledger import LARGE_PAGE, SMALL_PAGE, Device, Known, Ledger
from leanwan.vae.requests import decode_stage, encode_stage, surely_reserved, weight_sizes

from ...configs.encoders import IMAGE_TOKENS
from ..rates import Rates
from . import image_encoder, prompt_encoder
from .blocks import Way
from .buffers import streamer_buffers
from .card import NOT_CUDA, Card
from .denoise_stage import denoise_stage, not_shared, weights_of
from .ram_needed import Ram, ram_needed
from .seconds import decode_seconds, denoise_seconds, encode_seconds, image_seconds, text_seconds
from .shards import Shards, cut, shards_of
from .work import Work


class Stage(NamedTuple):
    """What a stage takes: peak device bytes of its live tensors and of the allocator, and modelled seconds."""

    bytes: int
    reserved: int
    seconds: float


# Added to reserved bytes. The recorded requests leave out blocks, chunks and tiles that repeat earlier ones; with them,
# tensors may lie elsewhere and take one more page of the large pool and two of the small one.
SPARE = LARGE_PAGE + 2 * SMALL_PAGE
# Added with sharded weights, as a share of the bytes reserved beside the shards. Gathered layer groups of many sizes
# come and go and leave gaps, which depend on the number of a rank's tokens.
GAPS = 0.125
_OF_VAE = ("encode", "decode")
STAGES = ("text", "image", "encode", "denoise", "decode")
Key = tuple[Any, ...]
# For each stage the options that decide what it takes, beside where the VAE is at home.
_DECIDES = {
    "text": ("t5_cpu", "t5_stream", "stream_buffers"),
    "image": ("t5_cpu", "t5_stream", "stream_buffers"),
    "encode": ("vae_tile",),
    "denoise": (
        "t5_cpu",
        "dit_stream",
        "stream_buffers",
        "dit_chunk",
        "activation_offload",
        "guidance_together",
    ),
    "decode": ("vae_tile",),
}
# Further options that decide it if models stay on the device: they decide what earlier stages left there.
_STAYS = ("t5_cpu", "t5_stream", "stream_buffers", "dit_stream")


class Predictor:
    """Predicts what the stages of a run take.

    Args:
        work: the run.
        rates: of the machine.
        expandable: whether the allocator's segments can grow.
        card: the card that computes.

    Attributes:
        names: of the run's stages, in order.
    """

    def __init__(self, work: Work, rates: Rates, expandable: bool = True, card: Card = NOT_CUDA):
        self.work, self.rates, self.expandable, self.card = work, rates, expandable, card
        there = {"image": work.image is not None, "encode": bool(work.encoded)}
        self.names = [name for name in STAGES if there.get(name, True)]
        self._parts: dict[Key, Ledger] = {}
        self._known: Known = {}
        self._live: dict[Key, int] = {}
        self._reserved: dict[Key, int] = {}
        self._seconds: dict[Key, float] = {}

    def stages(self, options: MemoryOptions) -> dict[str, Stage]:
        """What stages take one after the other: the tensors that one leaves may lie in the way of the next one's."""
        ledger, device, found = Ledger(), Device(self.expandable, self._known), {}
        self._home(ledger, options)
        for name in self.names:
            ledger.play(self._part(name, options))
            device.serve(ledger)
            found[name] = Stage(ledger.peak, self._spared(device.most), self.seconds(name, options))
            ledger.restart()
            device.restart()
        return found

    def live(self, name: str, options: MemoryOptions) -> int:
        """Peak bytes of live tensors in a stage; takes less time to predict than reserved bytes."""
        key = _key(name, options)
        if key not in self._live:
            self._live[key] = self._alone(name, options, 1).peak
        return self._live[key]

    def surely_fits(self, name: str, options: MemoryOptions, room: float) -> bool:
        """Whether a stage alone surely fits: for the VAE's stages by an upper bound, which takes less time."""
        live = self.live(name, options)
        if name in _OF_VAE:
            return surely_reserved(live) <= room
        return live <= room and self.reserved(name, options) <= room

    def fits(self, name: str, options: MemoryOptions, room: float) -> bool:
        """Whether a stage alone fits `room` bytes."""
        if self.surely_fits(name, options, room):
            return True
        if name in _OF_VAE and self._reserved_by(name, replace(options, vae_tile=0), 0) > room:
            return False  # the passes over whole frames alone do not fit
        return self.reserved(name, options) <= room

    def reserved(self, name: str, options: MemoryOptions) -> int:
        """Peak bytes that the allocator reserves for a stage alone; earlier stages' results are laid out in a row."""
        return self._reserved_by(name, options, 1)

    def dit_bytes(self, stream: float | None, buffers: int) -> int:
        """Bytes of the DiT's weights on the device if `stream` GiB of them stay, all for None; takes no time."""
        work = self.work
        return weights_of(work.dit, work.shape, Way(stream, buffers, ranks=work.dit_ranks), work.dtype).live

    def seconds(self, name: str, options: MemoryOptions) -> float:
        """Modelled seconds of a stage."""
        key = (
            name,
            options.vae_cpu and name.endswith("code"),
            *(getattr(options, one) for one in _DECIDES[name]),
        )
        if key not in self._seconds:
            self._seconds[key] = getattr(self, f"_{name}_seconds")(options)
        return self._seconds[key]

    def ram(self, options: MemoryOptions) -> Ram:
        """RAM that the run takes beside what mapped files share with the system's cache."""
        work = self.work
        return ram_needed(
            work.dit,
            options,
            (work.frames, work.height, work.width),
            work.strides,
            work.dtype,
            work.stored,
            vae_dim=work.vae_dim,
            prompts=work.shape.passes,
            source_channels=work.sources,
        )

    def mapped(self, options: MemoryOptions) -> int:
        """Bytes of the weights that are mapped from their files: all but the converted ones in Ram.weights."""
        work = self.work
        table, groups, norm = prompt_encoder.weight_sizes(work.text, work.text_itemsize)
        total = table + sum(map(sum, groups)) + sum(norm) + sum(map(sum, weight_sizes(work.vae)))
        if work.image is not None:
            total += self._image_bytes()
        return total + sum(p.nbytes for p in work.dit.parameters()) - self.ram(options).weights

    # Requests

    def _spared(self, reserved: int) -> int:
        shards = [one for one in (self._text_shards, self._dit_shards) if one]
        gaps = GAPS * max(0, reserved - sum(one.nbytes for one in shards)) if shards else 0
        return int(reserved + gaps) + SPARE

    def _reserved_by(self, name: str, options: MemoryOptions, most_tiles: int) -> int:
        key = (most_tiles, *_key(name, options))
        if key not in self._reserved:
            reserved = self._alone(name, options, most_tiles).reserved(self.expandable, self._known)
            self._reserved[key] = self._spared(reserved)
        return self._reserved[key]

    def _alone(self, name: str, options: MemoryOptions, most_tiles: int) -> Ledger:
        ledger = Ledger()
        self._home(ledger, options)
        ledger.arrive(self._before(name, options))
        ledger.play(self._part(name, options, most_tiles))
        return ledger

    def _part(self, name: str, options: MemoryOptions, most_tiles: int | None = None) -> Ledger:
        """The requests of a stage itself; tensors that it leaves are not freed. For `most_tiles` see decode_stage."""
        few = (most_tiles,) if name in _OF_VAE else ()
        key = (*_key(name, options), *few)
        if key not in self._parts:
            self._parts[key] = Ledger()
            self._parts[key].arrive(self._workspaces(options).get(name, ()))
            getattr(self, f"_{name}")(self._parts[key], options, *few)
        return self._parts[key]

    def _home(self, ledger: Ledger, options: MemoryOptions) -> None:
        """Records what is on the device before the first stage: this rank's shards of the text encoder, if there are
        any; the VAE if it is at home there, with the mean, deviation and inverse deviation of the latents' channels;
        and this rank's shards of the DiT, which arrive only when it is called if models stay."""
        work = self.work
        if self._text_shards:
            ledger.play(cut(self._text_shards))
        if not options.vae_cpu:
            ledger.arrive([4 * work.vae.z_dim] * 3)
            ledger.arrive(itertools.chain(*weight_sizes(work.vae)))
        if self._dit_shards and options.offload_model:
            ledger.play(cut(self._dit_shards))

    @functools.cached_property
    def _text_shards(self) -> Shards | None:
        work = self.work
        rows = prompt_encoder.weight_rows(work.text, work.text_itemsize)
        return Shards(rows, work.text_ranks) if work.text_ranks > 1 else None

    @property
    def _dit_shards(self) -> Shards | None:
        work = self.work
        return shards_of(work.dit, work.dit_ranks) if work.dit_ranks > 1 else None

    def _before(self, name: str, options: MemoryOptions) -> Iterator[int]:
        """Bytes of the tensors that earlier stages have left when a stage starts."""
        work, shape = self.work, self.work.shape
        made = self._workspaces(options)
        for other in STAGES[: STAGES.index(name)]:
            yield from made.get(other, ())
        if not options.offload_model:
            for other in STAGES[: STAGES.index(name)]:
                yield from self._staying(other, options)
        if name == "text":
            return
        yield from [work.text_tokens * work.text["d_model"] * work.text_itemsize] * 2
        if name != "image" and work.image is not None:
            yield len(work.pictures) * IMAGE_TOKENS * work.image["hidden_size"] * work.image_itemsize
        if name in ("denoise", "decode") and shape.joined:
            yield 4 * shape.joined * math.prod(shape.latent[1:])
        if name == "decode":
            yield 4 * math.prod(shape.latent)

    def _workspaces(self, options: MemoryOptions) -> dict[str, list[int]]:
        """Bytes of the workspaces of cuBLAS and cublasLt, by the stage that makes them; they stay. Only the text
        encoder has products without bias, which are cuBLAS's; the VAE's convolutions and attention need none."""
        both = self.card.workspaces
        of_text = 0 if options.t5_cpu else 2 if self.card.exact else 1
        later = "image" if "image" in self.names else "denoise"
        return {
            name: [n for n in made if n] for name, made in (("text", both[:of_text]), (later, both[of_text:]))
        }

    def _staying(self, name: str, options: MemoryOptions) -> Iterator[int]:
        """Bytes of the weights that a stage leaves on the device if models stay."""
        work = self.work
        if name == "text" and not options.t5_cpu:
            table, groups, norm = prompt_encoder.weight_sizes(work.text, work.text_itemsize)
            yield from norm
            if self._text_shards:
                yield from self._text_shards.between
            elif options.t5_stream:
                yield from streamer_buffers(groups, options.stream_buffers)
            else:
                yield from [table, *(size for group in groups for size in group)]
        elif name == "image" and work.image is not None:
            before, groups = image_encoder.weight_sizes(work.image, work.image_itemsize)
            yield from before
            if options.t5_stream:
                yield from streamer_buffers(groups, options.stream_buffers)
            else:
                yield from (size for group in groups for size in group)
        elif name == "denoise" and self._dit_shards:
            yield from itertools.chain(*self._dit_shards.parts)
            yield from not_shared(work.dit)
            yield from self._dit_shards.between
        elif name == "denoise" and options.dit_stream is None:
            yield from (p.nbytes for p in work.dit.parameters())

    def _text(self, ledger: Ledger, options: MemoryOptions) -> None:
        work, prompts = self.work, 2
        if options.t5_cpu:
            ledger.arrive([work.text_tokens * work.text["d_model"] * work.text_itemsize] * prompts)
            return
        sizes = work.text_tokens, work.text_itemsize, prompts
        stays, shards = not options.offload_model, self._text_shards
        prompt_encoder.text_stage(ledger, work.text, *sizes, *_streamed(options), stays=stays, shards=shards)

    def _image(self, ledger: Ledger, options: MemoryOptions) -> None:
        work, stays = self.work, not options.offload_model
        image_encoder.image_stage(
            ledger,
            work.image,
            work.pictures,
            work.image_itemsize,
            *_streamed(options),
            stays=stays,
            card=self.card,
        )

    def _encode(self, ledger: Ledger, options: MemoryOptions, most_tiles: int | None = None) -> None:
        work, shape = self.work, self.work.shape
        sizes = work.height, work.width, _tile(options), options.vae_cpu
        frame = 4 * math.prod(shape.latent[2:])  # of one channel

        def encoded(frames: Iterable[int]) -> list[int]:
            before = set(ledger.held)
            for n in frames:
                encode_stage(ledger, work.vae, n, *sizes, most_tiles)
            return [tensor for tensor in ledger.held if tensor not in before]

        if not shape.source:  # the latents are joined with a mask
            latents = encoded(work.encoded)
            mask = ledger.take(frame * shape.latent[1] * (shape.joined - work.vae.z_dim))
            ledger.become(frame * shape.latent[1] * shape.joined, mask, *latents)
            return
        # VACE: latents of what is kept of a video and of what is made join along the channels; references, each joined
        # with zeros, go before them along the frames; then the mask joins along the channels.
        wide, references = 2 * frame * work.vae.z_dim, len(work.encoded) - 2
        latents, length = encoded(work.encoded[:2]), shape.latent[1] - references
        coded = ledger.take(wide * length)
        latents += encoded(work.encoded[2:])
        for n in range(references):
            beside = ledger.become(wide, ledger.take(wide // 2))
            coded = ledger.become(wide * (length + n + 1), coded, beside)
        ledger.drop(*latents)
        mask = ledger.take(frame * shape.latent[1] * (shape.source - 2 * work.vae.z_dim))
        ledger.drop(ledger.take(frame * shape.latent[1] * shape.source), mask, coded)

    def _denoise(self, ledger: Ledger, options: MemoryOptions) -> None:
        work, stays = self.work, not options.offload_model
        way = replace(way_of(options), ranks=work.dit_ranks, exchanges=work.ranks > 1, card=self.card)
        if self._dit_shards and stays:
            ledger.play(cut(self._dit_shards))
        denoise_stage(ledger, work.dit, work.shape, way, work.dtype, stays)

    def _decode(self, ledger: Ledger, options: MemoryOptions, most_tiles: int | None = None) -> None:
        work = self.work
        sizes = work.frames, work.height, work.width, _tile(options)
        decode_stage(ledger, work.vae, *sizes, options.vae_cpu, most_tiles)

    # Seconds

    def _text_seconds(self, options: MemoryOptions) -> float:
        work, streamed, on_cpu = self.work, options.t5_stream, options.t5_cpu
        return text_seconds(work.text, work.text_tokens, work.text_itemsize, 2, self.rates, streamed, on_cpu)

    def _image_seconds(self, options: MemoryOptions) -> float:
        work = self.work
        return image_seconds(self._image_bytes(), work.image_itemsize, len(work.pictures), self.rates)

    def _encode_seconds(self, options: MemoryOptions) -> float:
        work, visit = self.work, self._visit_seconds(options)
        sides, tile = (work.height, work.width), _tile(options)
        return sum(
            visit + encode_seconds(work.vae, frames, *sides, tile, self.rates) for frames in work.encoded
        )

    def _denoise_seconds(self, options: MemoryOptions) -> float:
        work = self.work
        return denoise_seconds(work.dit, work.shape, way_of(options), work.dtype.itemsize, self.rates)

    def _decode_seconds(self, options: MemoryOptions) -> float:
        work, visit = self.work, self._visit_seconds(options)
        return visit + decode_seconds(
            work.vae, work.frames, work.height, work.width, _tile(options), self.rates
        )

    def _visit_seconds(self, options: MemoryOptions) -> float:
        """Seconds to copy half of the VAE to the device; 0 if it is at home there."""
        half = sum(map(sum, weight_sizes(self.work.vae))) / 2
        return half / self.rates.pageable if options.vae_cpu else 0.0

    def _image_bytes(self) -> int:
        before, groups = image_encoder.weight_sizes(self.work.image, self.work.image_itemsize)
        return sum(before) + sum(map(sum, groups))


def _key(name: str, options: MemoryOptions) -> Key:
    decide = _DECIDES[name] if options.offload_model else _DECIDES[name] + _STAYS
    return (name, options.vae_cpu, options.offload_model, *(getattr(options, option) for option in decide))


def _streamed(options: MemoryOptions) -> tuple[bool, int]:
    return options.t5_stream, options.stream_buffers


def _tile(options: MemoryOptions) -> int:
    return 0 if options.vae_tile == "auto" else int(options.vae_tile)


def way_of(options: MemoryOptions) -> Way:
    """The options that concern the DiT."""
    return Way(
        options.dit_stream,
        options.stream_buffers,
        options.dit_chunk,
        options.activation_offload,
        options.guidance_together,
    )
