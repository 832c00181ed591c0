"""The memory options that make a run fit, and finish soonest: chosen from predicted bytes and modelled seconds.

What a stage takes does not depend on the others, but for what stays on the device between them. So for each stage the
fastest way that fits is looked for, with the VAE at home on the device and with it on the CPU. The ways are a fixed
list, whatever the room: more room leaves more of them, and so never makes a slower plan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .options import LOW_VRAM, MemoryOptions
from .predict import image, text
from .predict.dit import Shape, Way, denoise_stage, tokens_of
from .predict.ledger import LARGE_PAGE, SMALL_PAGE, Ledger
from .predict.seconds import (
    decode_seconds,
    denoise_seconds,
    encode_seconds,
    group_bytes,
    image_seconds,
    text_seconds,
)
from .predict.vae import LATENT_FRAMES, decode_stage, encode_stage, weight_sizes
from .predict.weights import streamer_buffers
from .rates import Rates
from .streaming import spread

CHUNKS = (0, 32768, 16384, 8192, 4096, 2048, 1024, 512)
TILES = (0, 640, 512, 416, 320, 272, 208, 160, 128, 96, 64)
SHARES = 24  # parts of the DiT's weights in which the streamed ones may stay
MODES = ("gpu_only", "hybrid", "cpu_only")
WALKED = 24  # latent frames of a video that the VAE codes
GIB = 2**30


@dataclass(frozen=True)
class Work:
    """What is to be done, as models and shapes.

    Attributes:
        text, image: fields of the encoders' configs; image is None where none is used.
        text_tokens: that a prompt is padded to.
        text_itemsize, image_itemsize: bytes of a number in them.
        pictures: (width, height) of what CLIP encodes.
        dit, vae: modules, meta tensors too; the DiT's in the types that it is kept in.
        dtype: the DiT's compute type.
        shape: of denoising.
        frames, height, width: of the video.
        encoded: frames of each video that the VAE encodes.
        references: latent frames in front that are not decoded.
    """

    text: Mapping[str, Any]
    text_tokens: int
    text_itemsize: int
    image: Mapping[str, Any] | None
    image_itemsize: int
    pictures: Sequence[tuple[int, int]]
    dit: nn.Module
    vae: nn.Module
    dtype: torch.dtype
    shape: Shape
    frames: int
    height: int
    width: int
    encoded: Sequence[int] = ()
    references: int = 0


class Stage(NamedTuple):
    """What a stage needs: device bytes in tensors and as the allocator reserves them, and modelled seconds."""

    bytes: int
    reserved: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What was chosen.

    Attributes:
        options: the memory options.
        stages: by name, in order.
        room: bytes that the allocator may reserve.
        ram_bytes, disk_bytes: what the run holds in RAM, and maps from the disk.
        rates: what the seconds are modelled with.
    """

    options: MemoryOptions
    stages: Mapping[str, Stage]
    room: float
    ram_bytes: int = 0
    disk_bytes: int = 0
    rates: str = field(default="", compare=False)

    @property
    def peak_bytes(self) -> int:
        """Most that the allocator reserves."""
        return max(stage.reserved for stage in self.stages.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.room

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """JSON's values."""
        return {
            "options": asdict(self.options),
            "stages": {name: stage._asdict() for name, stage in self.stages.items()},
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "ram_bytes": self.ram_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "rates": self.rates,
        }

    def line(self) -> str:
        """What is told of it."""
        chosen = options_text(self.options) or "all on the device"
        return (
            f"{chosen}; {self.peak_bytes / GIB:.2f} GiB of {self.room / GIB:.2f}, {time_text(self.seconds)}"
        )


def options_text(options: MemoryOptions) -> str:
    """The options that differ from the defaults, as flags."""
    words = []
    for item in fields(options):
        value = getattr(options, item.name)
        if value == item.default or item.name == "vae_tile" and value == 0:
            continue
        if value is True:
            words.append(f"--{item.name}")
        else:
            words.append(f"--{item.name} {value:g}" if isinstance(value, float) else f"--{item.name} {value}")
    return " ".join(words)


def time_text(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass
class Planner:
    """Plans of one piece of work.

    Args:
        work: what is to be done.
        rates: of the machine.
        kept: memory options that are given.
        mode: "gpu_only": weights and activations stay on the device while a model works; "cpu_only": all that can be
            is in RAM; "hybrid": whatever is fastest.
        ram: bytes that activations in RAM may take; None for no limit.
        expandable: whether the allocator's segments can grow.
    """

    work: Work
    rates: Rates
    kept: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "hybrid"
    ram: float | None = None
    expandable: bool = True
    _stages: dict[Any, Stage] = field(default_factory=dict)
    _live: dict[Any, int] = field(default_factory=dict)

    def plan(self, room: float, steady: float | None = None) -> Plan:
        """The fastest plan that fits so many bytes; if none does, the leanest there is.

        Tiles and chunks round, if little. They are those of the plan for `steady` bytes, if there are as many: what a
        device has whatever other programs take, so that the picture does not depend on them.
        """
        if steady is not None and steady < room:
            sure = self.plan(steady)
            if sure.fits:
                cuts = {"vae_tile": sure.options.vae_tile, "dit_chunk": sure.options.dit_chunk}
                return replace(self, kept=cuts | dict(self.kept))._within(room)
        plan = self._within(room)
        return plan if plan.fits else replace(self._leanest, room=room)

    @functools.cached_property
    def _leanest(self) -> Plan:
        """The plan below which nothing fits: live bytes find a lean one, reserved ones those that are leaner."""
        plan = self._within(0)
        while True:
            leaner = self._within(plan.peak_bytes - 1)
            if not leaner.fits:
                return plan
            plan = leaner

    def _within(self, room: float) -> Plan:
        """The fastest that fits, or a lean one."""
        plans = [self._with_vae(at_home, room) for at_home in self._choices("vae_cpu", (False, True))]
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            return min(fitting, key=lambda plan: plan.seconds)
        return min(plans, key=lambda plan: plan.peak_bytes)

    def leaner(self, than: Plan) -> Plan | None:
        """The next plan that takes less by a tenth, or the leanest; None if there is none that takes less."""
        plan = self.plan(0.9 * than.peak_bytes)
        return plan if plan.peak_bytes < than.peak_bytes else None

    def least(self) -> int:
        """Bytes below which nothing fits."""
        return self._leanest.peak_bytes

    def of(self, options: MemoryOptions, room: float = math.inf) -> Plan:
        """What given options need."""
        return self._plan(options, room)

    # Looking for it

    def _choices(self, name: str, values: Iterable[Any]) -> list[Any]:
        """The values that an option may have: the one that is given, or what the mode leaves of these."""
        if name in self.kept:
            return [self.kept[name]]
        if self.mode == "gpu_only" and name in _GPU_ONLY:
            return [_GPU_ONLY[name]]
        if self.mode == "cpu_only" and name in LOW_VRAM and name not in ("vae_tile", "dit_chunk"):
            return [LOW_VRAM[name]]
        return list(values)

    def _with_vae(self, vae_cpu: bool, room: float) -> Plan:
        options = MemoryOptions(**{**self.kept, "vae_cpu": vae_cpu})
        if "t5_cpu" not in self.kept or not self.kept["t5_cpu"]:
            streams = self._choices("t5_stream", (False, True))
            options = self._best(
                options, ({"t5_stream": stream} for stream in streams), ("text", "image"), room
            )
        tiles = self._choices("vae_tile", TILES)
        largest = max(self.work.height, self.work.width)
        tiles = [tile for tile in tiles if tile == "auto" or tile < largest] or tiles[:1]
        options = self._best(options, ({"vae_tile": tile} for tile in tiles), ("encode", "decode"), room)
        options = self._best_dit(options, room)
        return self._plan(options, room)

    def _best(
        self, options: MemoryOptions, ways: Iterable[dict[str, Any]], stages: Sequence[str], room: float
    ) -> MemoryOptions:
        """The options with the fastest way of some stages that fits, else the leanest."""
        there = [name for name in stages if name in self.names]
        tried = [replace(options, **way) for way in ways]
        if not there:
            return tried[0]
        tried.sort(key=lambda one: sum(self._seconds(name, one) for name in there))
        return next((one for one in tried if self._fit(there, one, room)), None) or min(
            tried, key=lambda one: max(self.live(name, one) for name in there)
        )

    def _fit(self, stages: Iterable[str], options: MemoryOptions, room: float) -> bool:
        return all(
            self.live(name, options) <= room and self.stage(name, options).reserved <= room for name in stages
        )

    def _best_dit(self, options: MemoryOptions, room: float) -> MemoryOptions:
        """The same of denoising, whose ways are many."""
        ways = list(self._dit_ways(options))
        smallest = min(way.dit_chunk or math.inf for way in ways)
        lean = [way for way in ways if (way.dit_chunk or math.inf) == smallest]
        lean = [way for way in lean if not way.dit_stream or "dit_stream" in self.kept]
        leanest = min(lean, key=lambda one: self.live("denoise", one))
        if self.live("denoise", leanest) > room:
            return leanest
        ways.sort(key=self._denoise_seconds)
        for one in ways:
            if self._at_least(one) <= room and self._fit(["denoise"], one, room):
                return one
        return leanest

    def _at_least(self, options: MemoryOptions) -> float:
        """Bytes of denoising with a share of the weights, from those with none: a bound, found at once."""
        if not options.dit_stream:
            return 0
        sizes = group_bytes(self.work.dit)
        stays = spread(sizes, int(options.dit_stream * GIB))
        resident = sum(size for size, stay in zip(sizes, stays) if stay)
        # A cross attention's keys and values of the context take the place of half of its weights.
        resident = resident * 5 // 6 - options.stream_buffers * max(sizes)
        return self.live("denoise", replace(options, dit_stream=0.0)) + resident

    def _dit_ways(self, options: MemoryOptions) -> Iterator[MemoryOptions]:
        length = tokens_of(self.work.dit, self.work.shape)
        total = sum(group_bytes(self.work.dit))
        shares = [None, *(round(total * n / SHARES / GIB, 2) for n in range(SHARES - 1, -1, -1))]
        chunks = [chunk for chunk in self._choices("dit_chunk", CHUNKS) if not chunk or chunk < length] or [0]
        offloads = self._choices("activation_offload", (False, True))
        together = (
            self._choices("guidance_together", (False, True)) if self.work.shape.passes > 1 else [False]
        )
        for stream, chunk, offload, both in itertools.product(
            self._choices("dit_stream", shares), chunks, offloads, together
        ):
            given = {"dit_chunk", "activation_offload", "guidance_together"} & set(self.kept)
            if stream is None and both and not given:
                continue  # nothing is copied that could be copied once
            if offload and not chunk and length > CHUNKS[-1] and "dit_chunk" not in self.kept:
                continue  # slots of all tokens save nothing
            tried = replace(
                options,
                dit_stream=stream,
                dit_chunk=chunk,
                activation_offload=offload,
                guidance_together=both,
            )
            if offload and self.ram is not None and self._activation_ram(tried) > self.ram:
                continue
            yield tried

    # What stages need

    @functools.cached_property
    def names(self) -> list[str]:
        """The stages that there are."""
        there = {"image": self.work.image is not None, "encode": bool(self.work.encoded)}
        return [name for name in ("text", "image", "encode", "denoise", "decode") if there.get(name, True)]

    def _plan(self, options: MemoryOptions, room: float) -> Plan:
        stages = {name: self.stage(name, options) for name in self.names}
        weights = self._weights()
        mapped = weights["dit"] if options.offload_folder else 0
        ram = sum(weights.values()) - mapped + 3 * self.work.frames * self.work.height * self.work.width * 4
        if options.activation_offload:
            ram += self._activation_ram(options)
        return Plan(options, stages, room, int(ram), mapped, self.rates.source)

    def stage(self, name: str, options: MemoryOptions) -> Stage:
        """What a stage needs under some options."""
        key = (
            name,
            *(getattr(options, option) for option in _DECIDES[name]),
            options.vae_cpu,
            options.offload_model,
        )
        if key not in self._stages:
            ledger = self._ledger(name, options, WALKED)
            # What earlier stages left may lie in pages of its own, and keep them.
            pages = SMALL_PAGE + LARGE_PAGE if name != "text" else 0
            reserved = ledger.reserved(self.expandable) + pages
            self._stages[key] = Stage(ledger.peak, reserved, self._seconds(name, options))
        return self._stages[key]

    def live(self, name: str, options: MemoryOptions) -> int:
        """The bytes in tensors alone, which are found sooner."""
        key = self._key(name, options)
        if key not in self._live:
            self._live[key] = self._ledger(name, options, LATENT_FRAMES).peak
        return self._live[key]

    def _key(self, name: str, options: MemoryOptions) -> tuple[Any, ...]:
        decide = (*_DECIDES[name], "vae_cpu", "offload_model")
        return (name, *(getattr(options, option) for option in decide))

    def _ledger(self, name: str, options: MemoryOptions, walked: int) -> Ledger:
        """The requests of a stage; of coding videos, those of so many latent frames."""
        ledger = Ledger()
        for nbytes in self._before(name, options):
            ledger.take(nbytes)
        getattr(self, f"_{name}")(ledger, options, walked)
        return ledger

    def _before(self, name: str, options: MemoryOptions) -> Iterator[int]:
        """What is on the device when a stage starts."""
        work, shape = self.work, self.work.shape
        if not options.vae_cpu:
            yield from [
                4 * work.vae.z_dim
            ] * 3  # mean and deviation of the latents' channels, and its inverse
            yield from itertools.chain(*weight_sizes(work.vae))
        stays = [] if options.offload_model else ["text", "image", "denoise"]
        for other in stays[: max(0, ["text", "image", "denoise"].index(name)) if name in stays else 3]:
            yield from self._staying(other, options)
        if name == "text":
            return
        yield from [work.text_tokens * work.text["d_model"] * work.text_itemsize] * 2
        if name != "image" and work.image is not None:
            yield len(work.pictures) * 257 * work.image["hidden_size"] * work.image_itemsize
        if name == "denoise":
            yield 8 * shape.steps  # the solver's times
        if name in ("denoise", "decode") and shape.joined:
            yield 4 * shape.joined * math.prod(shape.latent[1:])
        if name == "decode":
            yield 4 * math.prod(shape.latent)

    def _staying(self, name: str, options: MemoryOptions) -> Iterator[int]:
        """Weights that a stage leaves on the device."""
        work = self.work
        if name == "text" and not options.t5_cpu:
            table, groups, norm = text.weight_sizes(work.text, work.text_itemsize)
            sizes = [size for group in groups for size in group]
            yield from norm
            if options.t5_stream:
                yield from streamer_buffers(groups, options.stream_buffers)
            else:
                yield from [table, *sizes]
        elif name == "image" and work.image is not None:
            before, groups = image.weight_sizes(work.image, work.image_itemsize)
            yield from before
            if options.t5_stream:
                yield from streamer_buffers(groups, options.stream_buffers)
            else:
                yield from (size for group in groups for size in group)
        elif name == "denoise" and options.dit_stream is None:
            yield from (p.nbytes for p in work.dit.parameters())

    def _text(self, ledger: Ledger, options: MemoryOptions, walked: int) -> None:
        work = self.work
        if options.t5_cpu:
            ledger.arrive([work.text_tokens * work.text["d_model"] * work.text_itemsize] * 2)
            return
        streamed, buffers = options.t5_stream, options.stream_buffers
        text.text_stage(ledger, work.text, work.text_tokens, work.text_itemsize, 2, streamed, buffers)

    def _image(self, ledger: Ledger, options: MemoryOptions, walked: int) -> None:
        work = self.work
        streamed, buffers = options.t5_stream, options.stream_buffers
        image.image_stage(ledger, work.image, work.pictures, work.image_itemsize, streamed, buffers)

    def _encode(self, ledger: Ledger, options: MemoryOptions, walked: int) -> None:
        work = self.work
        tile = 0 if options.vae_tile == "auto" else int(options.vae_tile)
        for frames in work.encoded:
            encode_stage(ledger, work.vae, frames, work.height, work.width, tile, options.vae_cpu, walked)

    def _denoise(self, ledger: Ledger, options: MemoryOptions, walked: int) -> None:
        denoise_stage(ledger, self.work.dit, self.work.shape, way_of(options), self.work.dtype)

    def _decode(self, ledger: Ledger, options: MemoryOptions, walked: int) -> None:
        work = self.work
        tile = 0 if options.vae_tile == "auto" else int(options.vae_tile)
        decode_stage(ledger, work.vae, work.frames, work.height, work.width, tile, options.vae_cpu, walked)

    # Seconds, RAM

    def _seconds(self, name: str, options: MemoryOptions) -> float:
        work, rates = self.work, self.rates
        tile = 0 if options.vae_tile == "auto" else int(options.vae_tile)
        if name == "denoise":
            return self._denoise_seconds(options)
        if name == "text":
            size = work.text_itemsize
            return text_seconds(
                work.text, work.text_tokens, size, 2, rates, options.t5_stream, options.t5_cpu
            )
        if name == "image":
            return image_seconds(self._weights()["image"], work.image_itemsize, len(work.pictures), rates)
        visits = sum(map(sum, weight_sizes(work.vae))) / 2 / rates.pageable if options.vae_cpu else 0.0
        if name == "decode":
            return visits + decode_seconds(work.vae, work.frames, work.height, work.width, tile, rates)
        sides = work.height, work.width
        return sum(visits + encode_seconds(work.vae, frames, *sides, tile, rates) for frames in work.encoded)

    def _denoise_seconds(self, options: MemoryOptions) -> float:
        way = way_of(options)
        return denoise_seconds(self.work.dit, self.work.shape, way, self.work.dtype.itemsize, self.rates)

    def _weights(self) -> dict[str, int]:
        """Bytes of each component's weights."""
        work = self.work
        table, groups, norm = text.weight_sizes(work.text, work.text_itemsize)
        weights = {"text": table + sum(map(sum, groups)) + sum(norm)}
        if work.image is not None:
            before, groups = image.weight_sizes(work.image, work.image_itemsize)
            weights["image"] = sum(before) + sum(map(sum, groups))
        weights["dit"] = sum(p.nbytes for p in work.dit.parameters())
        weights["vae"] = sum(map(sum, weight_sizes(work.vae)))
        return weights

    def _activation_ram(self, options: MemoryOptions) -> int:
        """Residual streams in fp32; queries, keys, values and attention's result in the compute type."""
        work = self.work
        streams = 2 if hasattr(work.dit, "vace_blocks") else 1
        streams *= 2 if options.guidance_together else 1
        token = work.dit.dim * (4 * streams + 4 * work.dtype.itemsize)
        return tokens_of(work.dit, work.shape) * token


_GPU_ONLY = {
    "t5_cpu": False,
    "t5_stream": False,
    "dit_stream": None,
    "activation_offload": False,
    "guidance_together": False,
}
# The options that decide what a stage needs, beside where the VAE is and whether models stay.
_DECIDES = {
    "text": ("t5_cpu", "t5_stream", "stream_buffers"),
    "image": ("t5_cpu", "t5_stream", "stream_buffers"),
    "encode": ("vae_tile", "t5_cpu", "t5_stream"),
    "denoise": (
        *("dit_stream", "stream_buffers", "dit_chunk", "activation_offload", "guidance_together"),
        *("t5_cpu", "t5_stream"),
    ),
    "decode": ("vae_tile", "dit_stream", "t5_cpu", "t5_stream"),
}


def way_of(options: MemoryOptions) -> Way:
    """The DiT's share of the options."""
    return Way(
        options.dit_stream,
        options.stream_buffers,
        options.dit_chunk,
        options.activation_offload,
        options.guidance_together,
    )


def meta_model(make: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """A model without weights, its parameters in the types that they are kept in."""
    with torch.device("meta"):
        model = make().requires_grad_(False)
    if dtype is not None:
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(model.storage_dtype(name, dtype))
    return model
