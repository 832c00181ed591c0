"""The search for the memory options that make a run fit, and finish soonest, by predicted bytes and modelled seconds.

What a stage takes does not depend on the others, but for what stays on the device between them: so where the VAE is
at home, and whether T5 and the DiT stream, is gone through; then for each stage the fastest way that fits is looked
for alone. The ways are a fixed list, whatever the room: more room leaves more of them, so never makes a slower plan.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from leanwan.options import LOW_VRAM, MemoryOptions

from .plan import GIB, Plan
from .predict.blocks import Way, tokens_of
from .predict.card import NOT_CUDA, Card
from .predict.ram_needed import activation_bytes
from .predict.seconds import denoise_seconds, group_bytes
from .predict.stages_predicted import Predictor
from .predict.work import Work
from .rates import Rates

CHUNKS = (0, 32768, 16384, 8192, 4096, 2048, 1024, 512)
TILES = (0, 640, 512, 416, 320, 272, 208, 160, 128, 96, 64)
LESS = 0.9  # of what a plan took whose memory ran out, for the next one
SHARES = 24  # parts of the DiT's weights in which the streamed ones may stay
MODES = ("gpu_only", "hybrid", "cpu_only")
Ways = list[tuple[float, dict[str, Any]]]  # seconds, and options to change, the fastest first


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
        card: that computes.
    """

    work: Work
    rates: Rates
    kept: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "hybrid"
    ram: float | None = None
    expandable: bool = True
    card: Card = NOT_CUDA

    @functools.cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.work, self.rates, self.expandable, self.card)

    def plan(self, room: float, steady: float | None = None) -> Plan:
        """The fastest plan that fits so many bytes; if none does, the leanest there is.

        Tiles and chunks round, if little. They are those of the plan for `steady` bytes, if there are as many: what a
        device has whatever other programs take, so that the picture does not depend on them.
        """
        if steady is not None and steady < room:
            sure = self._within(steady)
            if sure:
                cuts = {"vae_tile": sure.options.vae_tile, "dit_chunk": sure.options.dit_chunk}
                cut = replace(self, kept=cuts | dict(self.kept))
                cut.predictor = self.predictor
                return cut._within(room) or replace(sure, room=room)
        return self._within(room) or replace(self._leanest, room=room)

    def leaner(self, than: Plan) -> Plan | None:
        """The next plan that takes less by a tenth, or the leanest; None if there is none that takes less."""
        plan = self.plan(LESS * than.peak_bytes)
        return plan if plan.peak_bytes < than.peak_bytes else None

    def least(self) -> int:
        """Bytes below which nothing fits."""
        return self._leanest.peak_bytes

    def of(self, options: MemoryOptions, room: float = math.inf) -> Plan:
        """What given options need."""
        predictor = self.predictor
        stages = predictor.stages(options)
        ram, mapped = predictor.ram(options).peak, predictor.mapped(options)
        return Plan(options, stages, room, int(ram), mapped, self.rates.source)

    def leanest_options(self) -> MemoryOptions:
        """Those of which each saves most."""
        lean = LOW_VRAM | {"vae_tile": TILES[-1], "dit_chunk": CHUNKS[-1]}
        chosen = {name: self._choices(name, [value])[0] for name, value in lean.items()}
        chosen["t5_stream"] &= not self.kept.get("t5_cpu")
        if "activation_offload" not in self.kept:
            chosen["activation_offload"] &= self._holds(bool(self.kept.get("guidance_together")))
        return MemoryOptions(**{**self.kept, **chosen})

    @functools.cached_property
    def _leanest(self) -> Plan:
        """The plan below which nothing fits."""
        plan = self.of(self.leanest_options())
        while leaner := self._within(plan.peak_bytes - 1):
            plan = leaner
        return self._within(plan.peak_bytes) or plan

    # Looking for it

    def _within(self, room: float) -> Plan | None:
        """The fastest that fits."""
        best, fastest = None, math.inf
        for setting in self._settings():
            groups = [(stages, self._ways(stages, setting)) for stages in self._groups]
            fitting = [_Fitting(self.predictor, stages, ways, setting, room) for stages, ways in groups]
            for seconds, options in _cheapest_first(fitting, setting):
                if seconds >= fastest:
                    break
                plan = self.of(options, room)
                if plan.fits:
                    best, fastest = plan, seconds
                    break
        return best

    # What there is to choose from

    @functools.cached_property
    def _groups(self) -> list[list[str]]:
        """Stages for which ways are looked for together."""
        groups = [["text", "image"], ["denoise"], ["encode", "decode"]]
        return [[name for name in group if name in self.predictor.names] for group in groups]

    def _settings(self) -> list[MemoryOptions]:
        """Options in which all is chosen that more than one of those groups depends on."""
        streams = [False] if self.kept.get("t5_cpu") else self._choices("t5_stream", (False, True))
        found = itertools.product(
            self._choices("vae_cpu", (False, True)), streams, self._choices("dit_stream", (None, 0.0))
        )
        return [
            MemoryOptions(**{**self.kept, "vae_cpu": vae_cpu, "t5_stream": stream, "dit_stream": share})
            for vae_cpu, stream, share in found
        ]

    def _ways(self, stages: Sequence[str], setting: MemoryOptions) -> Ways:
        """What a group can choose."""
        if "denoise" in stages:
            return self._resident if setting.dit_stream is None else self._streamed
        tiles: list[Any] = [setting.vae_tile]
        if "decode" in stages:
            tiles = self._choices("vae_tile", TILES)
            largest = max(self.work.height, self.work.width)
            tiles = [tile for tile in tiles if tile == "auto" or tile < largest] or tiles[:1]
        ways = []
        for tile in tiles:
            options = replace(setting, vae_tile=tile)
            ways.append((sum(self.predictor.seconds(name, options) for name in stages), {"vae_tile": tile}))
        return sorted(ways, key=itemgetter(0))

    @functools.cached_property
    def _resident(self) -> Ways:
        return self._dit_ways([None])

    @functools.cached_property
    def _streamed(self) -> Ways:
        total = sum(group_bytes(self.work.dit))
        shares = (round(total * n / SHARES / GIB, 2) for n in range(SHARES - 1, -1, -1))
        return self._dit_ways(self._choices("dit_stream", dict.fromkeys(shares)))

    def _dit_ways(self, streams: Iterable[float | None]) -> Ways:
        work = self.work
        length = tokens_of(work.dit, work.shape)
        chunks = [chunk for chunk in self._choices("dit_chunk", CHUNKS) if not chunk or chunk < length] or [0]
        offloads = self._choices("activation_offload", (False, True))
        together = self._choices("guidance_together", (False, True)) if work.shape.passes > 1 else [False]
        given = {"dit_chunk", "activation_offload", "guidance_together"} & set(self.kept)
        ways = []
        for stream, chunk, offload, both in itertools.product(streams, chunks, offloads, together):
            if stream is None and both and not given:
                continue  # nothing is copied that could be copied once
            if offload and not chunk and length > CHUNKS[-1] and "dit_chunk" not in self.kept:
                continue  # slots of all tokens save nothing
            if offload and not self._holds(both):
                continue
            way = Way(stream, self.kept.get("stream_buffers", 2), chunk, offload, both)
            seconds = denoise_seconds(work.dit, work.shape, way, work.dtype.itemsize, self.rates)
            changes = {"dit_stream": stream, "dit_chunk": chunk}
            changes |= {"activation_offload": offload, "guidance_together": both}
            ways.append((seconds, changes))
        return sorted(ways, key=itemgetter(0))

    def _holds(self, together: bool) -> bool:
        """Whether the RAM holds activations."""
        work = self.work
        tokens, prompts = tokens_of(work.dit, work.shape), work.shape.passes
        nbytes = activation_bytes(work.dit, tokens, work.dtype.itemsize, together, prompts)
        return self.ram is None or nbytes <= self.ram

    def _choices(self, name: str, values: Iterable[Any]) -> list[Any]:
        """The values that an option may have: the one that is given, or what the mode leaves of these."""
        if name in self.kept:
            return [self.kept[name]]
        if self.mode == "gpu_only" and name in _GPU_ONLY:
            return [_GPU_ONLY[name]]
        if self.mode == "cpu_only" and name in LOW_VRAM and name not in ("vae_tile", "dit_chunk"):
            return [LOW_VRAM[name]]
        return list(values)


class _Fitting:
    """The ways of some stages that fit on their own, in order, each looked at when it is asked for."""

    def __init__(
        self, predictor: Predictor, stages: Sequence[str], ways: Ways, setting: MemoryOptions, room: float
    ):
        self._predictor, self._stages, self._setting, self._room = predictor, stages, setting, room
        self._left = iter(ways)
        self._found: Ways = []

    def get(self, n: int) -> tuple[float, dict[str, Any]] | None:
        """The nth, with its seconds; None if there are fewer."""
        while len(self._found) <= n:
            way = next(self._left, None)
            if way is None:
                return None
            if self._fits(way[1]):
                self._found.append(way)
        return self._found[n]

    def _fits(self, way: Mapping[str, Any]) -> bool:
        predictor, room = self._predictor, self._room
        if (
            "dit_stream" in way
            and predictor.dit_bytes(way["dit_stream"], self._setting.stream_buffers) > room
        ):
            return False
        options = replace(self._setting, **way)
        # Live bytes are found sooner than reserved ones.
        if any(predictor.live(name, options) > room for name in self._stages):
            return False
        return all(predictor.fits(name, options, room) for name in self._stages)


def _cheapest_first(
    groups: Sequence[_Fitting], setting: MemoryOptions
) -> Iterator[tuple[float, MemoryOptions]]:
    """A way of each group together, in the order of their seconds."""
    queue: list[tuple[float, tuple[int, ...], list[dict[str, Any]]]] = []
    seen: set[tuple[int, ...]] = set()

    def add(places: tuple[int, ...]) -> None:
        ways = [group.get(n) for group, n in zip(groups, places)]
        if places not in seen and None not in ways:
            seen.add(places)
            heapq.heappush(queue, (sum(seconds for seconds, _ in ways), places, [way for _, way in ways]))

    add((0,) * len(groups))
    while queue:
        seconds, places, ways = heapq.heappop(queue)
        yield seconds, replace(setting, **{name: value for way in ways for name, value in way.items()})
        for i in range(len(groups)):
            add((*places[:i], places[i] + 1, *places[i + 1 :]))


_GPU_ONLY = {
    "t5_cpu": False,
    "t5_stream": False,
    "dit_stream": None,
    "activation_offload": False,
    "guidance_together": False,
}
