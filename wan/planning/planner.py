"""Searches for the memory options with which a run fits and finishes soonest, by predicted bytes and modelled seconds.

Stages affect each other only by what stays on the device between them. So the planner tries every setting of the
options that several stages depend on (where the VAE is at home, whether T5 and the DiT stream), and under each setting
chooses the fastest way that fits for each group of stages alone. The list of ways does not depend on the room: in more
room more of them fit, so more room never gives a slower plan.
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
LESS = 0.9  # share of a plan's peak bytes that the next plan may take when memory ran out
SHARES = 24  # equal parts of a streamed DiT's weights, of which 0 to 23 may stay on the device
MODES = ("gpu_only", "hybrid", "cpu_only")
Ways = list[tuple[float, dict[str, Any]]]  # (seconds, options to change), the fastest first


@dataclass
class Planner:
    """Makes plans for one run.

    Args:
        work: the run.
        rates: of the machine.
        kept: memory options that the user gave, which plans keep.
        mode: "gpu_only": weights and activations stay on the device while a model works; "cpu_only": all that can be
            is in RAM; "hybrid": whatever is fastest.
        ram: bytes that activations in RAM may take; None for no limit.
        expandable: whether the allocator's segments can grow.
        card: the card that computes.
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
        """The fastest plan that fits `room` bytes; if none does, the leanest plan.

        Tiles and chunks change the rounding, if little. If `room` is more than `steady`, the bytes that the device has
        whatever other programs take, they are those of the plan for `steady`, so that the picture does not depend on
        other programs.
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
        """The fastest plan that takes a tenth less than another, or the leanest plan; None if neither takes less."""
        plan = self.plan(LESS * than.peak_bytes)
        return plan if plan.peak_bytes < than.peak_bytes else None

    def least(self) -> int:
        """Bytes below which no plan fits."""
        return self._leanest.peak_bytes

    def of(self, options: MemoryOptions, room: float = math.inf) -> Plan:
        """The plan with these options."""
        predictor = self.predictor
        stages = predictor.stages(options)
        ram, mapped = predictor.ram(options).peak, predictor.mapped(options)
        return Plan(options, stages, room, int(ram), mapped, self.rates.source)

    def leanest_options(self) -> MemoryOptions:
        """The options of which each saves the most memory, given ones kept."""
        lean = LOW_VRAM | {"vae_tile": TILES[-1], "dit_chunk": CHUNKS[-1]}
        chosen = {name: self._choices(name, [value])[0] for name, value in lean.items()}
        chosen["t5_stream"] &= not self.kept.get("t5_cpu")
        if "activation_offload" not in self.kept:
            chosen["activation_offload"] &= self._holds(bool(self.kept.get("guidance_together")))
        return MemoryOptions(**{**self.kept, **chosen})

    @functools.cached_property
    def _leanest(self) -> Plan:
        """The plan that takes the fewest bytes."""
        plan = self.of(self.leanest_options())
        while leaner := self._within(plan.peak_bytes - 1):
            plan = leaner
        return self._within(plan.peak_bytes) or plan

    # The search

    def _within(self, room: float) -> Plan | None:
        """The fastest plan that fits `room` bytes; None if none does."""
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

    # The choices

    @functools.cached_property
    def _groups(self) -> list[list[str]]:
        """Groups of the stages for which a way is chosen together."""
        groups = [["text", "image"], ["denoise"], ["encode", "decode"]]
        return [[name for name in group if name in self.predictor.names] for group in groups]

    def _settings(self) -> list[MemoryOptions]:
        """Every combination of the options that more than one of the groups depends on."""
        streams = [False] if self.kept.get("t5_cpu") else self._choices("t5_stream", (False, True))
        found = itertools.product(
            self._choices("vae_cpu", (False, True)), streams, self._choices("dit_stream", (None, 0.0))
        )
        return [
            MemoryOptions(**{**self.kept, "vae_cpu": vae_cpu, "t5_stream": stream, "dit_stream": share})
            for vae_cpu, stream, share in found
        ]

    def _ways(self, stages: Sequence[str], setting: MemoryOptions) -> Ways:
        """The ways that a group of stages can choose from."""
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
                continue  # together saves copies of streamed weights, and none stream
            if offload and not chunk and length > CHUNKS[-1] and "dit_chunk" not in self.kept:
                continue  # slots that hold all tokens save nothing
            if offload and not self._holds(both):
                continue
            way = Way(stream, self.kept.get("stream_buffers", 2), chunk, offload, both)
            seconds = denoise_seconds(work.dit, work.shape, way, work.dtype.itemsize, self.rates)
            changes = {"dit_stream": stream, "dit_chunk": chunk}
            changes |= {"activation_offload": offload, "guidance_together": both}
            ways.append((seconds, changes))
        return sorted(ways, key=itemgetter(0))

    def _holds(self, together: bool) -> bool:
        """Whether the activations fit the RAM that they may take."""
        work = self.work
        tokens, prompts = tokens_of(work.dit, work.shape), work.shape.passes
        nbytes = activation_bytes(work.dit, tokens, work.dtype.itemsize, together, prompts)
        return self.ram is None or nbytes <= self.ram

    def _choices(self, name: str, values: Iterable[Any]) -> list[Any]:
        """The values that an option may have: the given one, or those of `values` that the mode allows."""
        if name in self.kept:
            return [self.kept[name]]
        if self.mode == "gpu_only" and name in _GPU_ONLY:
            return [_GPU_ONLY[name]]
        if self.mode == "cpu_only" and name in LOW_VRAM and name not in ("vae_tile", "dit_chunk"):
            return [LOW_VRAM[name]]
        return list(values)


class _Fitting:
    """The ways under which each stage of a group fits alone, the fastest first; a way is tested when asked for."""

    def __init__(
        self, predictor: Predictor, stages: Sequence[str], ways: Ways, setting: MemoryOptions, room: float
    ):
        self._predictor, self._stages, self._setting, self._room = predictor, stages, setting, room
        self._left = iter(ways)
        self._found: Ways = []

    def get(self, n: int) -> tuple[float, dict[str, Any]] | None:
        """The nth fitting way, with its seconds; None if there are fewer."""
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
        # Live bytes take less time to predict than reserved ones.
        if any(predictor.live(name, options) > room for name in self._stages):
            return False
        return all(predictor.fits(name, options, room) for name in self._stages)


def _cheapest_first(
    groups: Sequence[_Fitting], setting: MemoryOptions
) -> Iterator[tuple[float, MemoryOptions]]:
    """Yields (seconds, options) for every combination of one way of each group, the fastest first."""
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
