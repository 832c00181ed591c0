"""Random runs on the virtual GPU against what was predicted for them.

Full models have three layers each, which the others repeat, and their own widths; toys are whole. Videos are short. Of
the VAE's tiles one of each shape runs. WAN_RANDOM_PLANS is the number of cases.
"""

import contextlib
import functools
import logging
import os
from unittest import mock

from hypothesis import HealthCheck, Phase, given, settings, strategies
from shortcuts import one_tile_of_each_shape

import wan.run.planning
from benchmarks import memory
from benchmarks.memory import Run, count
from benchmarks.random_weights import dit_config
from wan.memory.options import MemoryOptions
from wan.memory.plan import GIB
from wan.memory.predict.ledger import SMALL_PAGE
from wan.memory.predict.stages import SPARE
from wan.memory.predict.work import meta_model
from wan.memory.rates import usual
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import VAE
from wan.run import Request
from wan.run.planning import planner_of
from wan.run.request import PLANNED
from wan.tasks import TASKS

CASES = int(os.environ.get("WAN_RANDOM_PLANS", 12))
LAYERS = 3
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
    """As wan.run.planning's, with few layers where the task's DiT is no toy."""
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
        mock.patch.object(wan.run.planning, "_models", shallow),
        mock.patch.object(wan.run.planning, "_pictures", lambda case: [case.pixels] * len(case.facts.inputs)),
    ):
        for name, value in layers.items():
            setattr(config, name, value)
        try:
            yield
        finally:
            for name in layers:
                delattr(config, name)


def every_pass():
    """No pass is skipped: where later ones find room depends on what earlier ones left."""
    return mock.patch.object(memory, "_skip_calls", lambda model, calls: None)


@contextlib.contextmanager
def out_of_memory_told():
    """A list of what is told inside of memory that ran out: the VAE goes on with smaller tiles by itself."""
    lines, log = [], logging.getLogger("wan.memory.vae_tiling")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    try:
        yield lines
    finally:
        log.removeHandler(handler)


def faults_of_a_case(one_of, between):
    """What does not hold of a random case: lines of text.

    Args:
        one_of: draws from a list.
        between: draws a number from a range.
    """
    task, given_options, expandable = one_of([*TASKS]), dict(one_of(GIVEN)), one_of([True, True, False])
    facts = TASKS[task]
    frames = 1 if facts.still else one_of([facts.least_frames, 5, 5, 5, 5, 5, 9, 9, 13, 17])
    mode = given_options.pop("memory_mode", "hybrid")
    with few_layers(task):
        case = Request(
            task=task,
            size=one_of(facts.sizes),
            frame_num=frames,
            sample_steps=memory.STEPS,
            ckpt_dir=None if facts.toy else "Wan-AI/any",
            src_ref_images="examples/vace_ref_1.png" if task.startswith("vace") else None,
            memory=MemoryOptions(**given_options),
            planned=tuple(name for name in PLANNED if name not in given_options),
            memory_mode=mode,
        )
        planner = planner_of(case, usual(24 * GIB), ram=64 * GIB, expandable=expandable)
        floor = planner.of(planner.leanest_options()).peak_bytes
        plan = planner.plan(floor * between(1, 4))
        assert plan.fits
        run = Run(task, case.pixels, frames, plan.options, None if facts.toy else LAYERS)
        with every_pass(), one_tile_of_each_shape(), out_of_memory_told() as smaller_tiles:
            report = count(run, plan.peak_bytes, expandable_segments=expandable)
    told = task, case.size, frames, plan.options, "expandable" if expandable else "fixed"
    faults = [] if report.out_of_memory is None else [(report.out_of_memory, *told)]
    faults += [(line, *told) for line in smaller_tiles]
    for name, predicted in plan.stages.items() if not faults else ():
        live, reserved = report.stages[name], report.reserved[name]
        if not live <= predicted.bytes <= 1.01 * live:
            faults.append((name, "live", predicted.bytes, live, *told))
        if not reserved <= predicted.reserved <= max(1.05 * reserved, reserved + SMALL_PAGE) + SPARE:
            faults.append((name, "reserved", predicted.reserved, reserved, *told))
    return [" ".join(map(str, fault)) for fault in faults]


@settings(
    max_examples=CASES,
    deadline=None,
    derandomize="WAN_RANDOM_PLANS" not in os.environ,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=strategies.data())
def test_random_cases_fit_what_is_predicted(data):
    """On a device of the predicted size the run goes through, and little less is needed."""
    faults = faults_of_a_case(
        lambda values: data.draw(strategies.sampled_from(values)),
        lambda low, high: data.draw(strategies.floats(low, high)),
    )
    assert not faults, faults
