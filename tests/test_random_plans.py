"""Random runs on the virtual GPU against what was predicted for them.

Full models have three layers each, which the others repeat, and their own widths; toys are whole. Videos are short. Of
the VAE's tiles one of each shape runs. WAN_RANDOM_PLANS is the number of cases.
"""

import contextlib
import functools
import logging
import math
import os
from typing import NamedTuple
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies
from shortcuts import one_tile_of_each_shape

import wan.run.plan_request
from benchmarks.memory import Run, count
from benchmarks.random_weights import dit_config
from leanwan.options import MemoryOptions
from leanwan.record.ledger import SMALL_PAGE
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import VAE
from wan.planning.plan import GIB
from wan.planning.predict.stages_predicted import SPARE, Stage
from wan.planning.predict.work import meta_model
from wan.planning.rates import usual
from wan.run import Request
from wan.run.plan_request import planner_of
from wan.run.request import PLANNED
from wan.tasks import TASKS

CASES = int(os.environ.get("WAN_RANDOM_PLANS", 200))
PARTS = 20  # of which each draws as many
LAYERS = 3
FRAMES = [5] * 9 + [9, 9, 13, 17]  # beside the fewest that there are
GIVEN = [
    *({} for _ in range(6)),
    {"offload_model": False},
    {"t5_cpu": True},
    {"stream_buffers": 3},
    {"dit_stream": 0.1},
    {"dit_chunk": 640},
    {"vae_tile": 144},
    {"guidance_together": True, "dit_stream": 0.0},
    {"activation_offload": True, "dit_chunk": 1024},
    {"vae_cpu": True},
    {"memory_mode": "gpu_only"},
    {"memory_mode": "cpu_only"},
]


@functools.cache
def shallow(task):
    """As wan.run.plan_request's, with few layers where the task's DiT is no toy."""
    layers = None if TASKS[task].toy else LAYERS
    sizes = {k: v for k, v in dit_config(task, layers).items() if not k.startswith("_")}
    kind = VaceWanModel if "vace_layers" in sizes else WanModel
    config = TASKS[task].config
    dit = meta_model(lambda: kind(**sizes), config.param_dtype)
    return dit, meta_model(lambda: VAE(config.get("vae_dim", 96)))


@contextlib.contextmanager
def few_layers(task):
    """The encoders', and the DiT's that is planned for; and pictures as large as the video."""
    config = TASKS[task].config
    layers = {} if TASKS[task].toy else {"t5_config": {"num_layers": LAYERS}}
    if layers and "clip_checkpoint" in config:
        layers["clip_config"] = {"num_hidden_layers": LAYERS + 1}
    with (
        mock.patch.dict(config, layers),
        mock.patch.object(wan.run.plan_request, "_models", shallow),
        mock.patch.object(
            wan.run.plan_request, "_pictures", lambda case: [case.pixels] * len(case.facts.inputs)
        ),
    ):
        for name, value in layers.items():
            setattr(config, name, value)
        try:
            yield
        finally:
            for name in layers:
                delattr(config, name)


@contextlib.contextmanager
def out_of_memory_told():
    """A list of what is told inside of memory that ran out: the VAE goes on with smaller tiles by itself."""
    lines, log = [], logging.getLogger("leanwan.vae.tiles")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


class Compared(NamedTuple):
    """A random case, predicted and counted.

    case: all that was drawn, and the plan. trouble: what kept it from being counted. stages: of each its name, what was
    predicted, and the bytes counted, live and reserved.
    """

    case: str
    trouble: list[str]
    stages: list[tuple[str, Stage, int, int]]

    @property
    def faults(self):
        """What does not hold: lines of text."""
        found = [*self.trouble]
        for name, predicted, live, reserved in self.stages:
            if predicted.bytes != live:
                found.append(f"{name} live {predicted.bytes} {live}")
            if not reserved <= predicted.reserved <= max(1.05 * reserved, reserved + SMALL_PAGE) + SPARE:
                found.append(f"{name} reserved {predicted.reserved} {reserved}")
        return [f"{fault}: {self.case}" for fault in found]


def request_drawn(one_of):
    """A Request of anything; `one_of` draws from a list."""
    task, given_options = one_of([*TASKS]), dict(one_of(GIVEN))
    facts = TASKS[task]
    mode = given_options.pop("memory_mode", "hybrid")
    sizes = sorted(facts.sizes, key=lambda size: math.prod(map(int, size.split("*"))))
    small, large = sizes[:2], sizes[2:]
    return Request(
        task=task,
        size=one_of(small * 3 + large),
        frame_num=1 if facts.still else one_of([facts.least_frames] * 7 + FRAMES),
        sample_steps=one_of([1, 2, 3, 3]),
        sample_solver=one_of(["unipc", "unipc", "dpm++", "euler"]),
        sample_guide_scale=one_of([5.0, 5.0, 1.0]),
        ckpt_dir=None if facts.toy else "Wan-AI/any",
        src_ref_images="examples/vace_ref_1.png" if task.startswith("vace") else None,
        memory=MemoryOptions(**given_options),
        planned=tuple(name for name in PLANNED if name not in given_options),
        memory_mode=mode,
    )


def compared(one_of, between):
    """The Compared of a random case.

    Every pass is run: where later ones find room depends on what earlier ones left.

    Args:
        one_of: draws from a list.
        between: draws a number from a range.
    """
    case, expandable = request_drawn(one_of), one_of([True, True, False])
    with few_layers(case.task):
        planner = planner_of(case, usual(24 * GIB), ram=64 * GIB, expandable=expandable)
        floor = planner.of(planner.leanest_options()).peak_bytes
        plan = planner.plan(floor * between(1, 4))
        assert plan.fits
        layers = None if case.facts.toy else LAYERS
        sampling = case.sample_steps, case.sample_solver, case.sample_guide_scale
        run = Run(case.task, case.pixels, case.frame_num, plan.options, layers, *sampling, every_pass=True)
        with one_tile_of_each_shape(), out_of_memory_told() as trouble:
            report = count(run, plan.peak_bytes, expandable_segments=expandable)
    if report.out_of_memory is not None:
        trouble.append(f"out of memory {report.out_of_memory}")
    stages = [
        (name, one, report.stages[name], report.reserved[name]) for name, one in plan.stages.items()
    ] * (not trouble)
    return Compared(f"{run} {'expandable' if expandable else 'fixed'}", trouble, stages)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_cases_fit_what_is_predicted(part):
    """On a device of the predicted size the run goes through, and little less is needed."""

    @seed(part)
    @settings(
        max_examples=math.ceil(CASES / PARTS),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=strategies.data())
    def check(data):
        faults = compared(
            lambda values: data.draw(strategies.sampled_from(values)),
            lambda low, high: data.draw(strategies.floats(low, high)),
        ).faults
        assert not faults, faults

    check()
