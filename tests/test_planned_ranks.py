"""What a rank of several takes, counted on the virtual GPU, against what is planned for it."""

import os
import random
from functools import partial
from unittest import mock

import pytest
from ranks_alone import alone
from shortcuts import one_tile_of_each_shape
from test_random_plans import GIVEN, LAYERS, few_layers

from benchmarks import memory, random_weights
from benchmarks.memory import Run
from leanwan.options import MemoryOptions
from virtual_gpu import VirtualGPU
from wan import cli
from wan.planning.plan import GIB
from wan.planning.rates import usual
from wan.run import Request
from wan.run.plan_request import planner_of
from wan.run.request import PLANNED
from wan.tasks import TASKS

FLAGS = ("dit_fsdp", "t5_fsdp")
SHARED = dict.fromkeys(FLAGS, True)
MANY = int(os.environ.get("WAN_RANKS_PLANNED", "0"))


def request_of(task, **settings):
    toy = TASKS[task].toy
    references = "examples/vace_ref_1.png" if task.startswith("vace") else None
    checkpoint = None if toy else "Wan-AI/any"
    return Request(
        task=task, ckpt_dir=checkpoint, sample_steps=memory.STEPS, src_ref_images=references, **settings
    )


def counted(case, size, expandable):
    """The memory.Report of the first of so many ranks; weights are nobody's, full models have few layers."""
    pipeline_class, flags = case.facts.pipeline_class, {flag: getattr(case, flag) for flag in FLAGS}
    layers = None if case.facts.toy else LAYERS
    run = Run(case.task, case.pixels, case.frame_num, case.memory, layers, every_pass=True)
    with (
        VirtualGPU(None, True, expandable_segments=expandable) as gpu,
        random_weights.weights_from(random_weights.untouched),
        alone(size, gpu.device) as ranks,
        one_tile_of_each_shape(),
        mock.patch.object(type(run.facts), "pipeline_class", property(lambda _: made)),
    ):
        made = partial(pipeline_class, ranks=ranks, **flags)
        return memory.report_on(run, gpu.device)


def faults_of(case, size, expandable=True):
    """Stages that take more than is planned."""
    with few_layers(case.task):
        stages = planner_of(case, usual(24 * GIB), expandable=expandable, ranks=size).of(case.memory).stages
        report = counted(case, size, expandable)
    assert report.out_of_memory is None and set(stages) == set(report.stages)
    return [
        (name, live, stage.bytes, reserved, stage.reserved)
        for name, stage in stages.items()
        for live, reserved in [(report.stages[name], report.reserved[name])]
        if live > stage.bytes or reserved > stage.reserved
    ]


@pytest.mark.parametrize(
    ("task", "size", "flags", "options"),
    [
        ("t2v-tiny", 2, SHARED, {}),
        ("vace-tiny", 3, SHARED, {"dit_chunk": 64, "activation_offload": True}),
        ("t2v-tiny", 4, {}, {"dit_chunk": 64}),
    ],
)
def test_never_more_than_planned(task, size, flags, options):
    case = request_of(task, frame_num=9, memory=MemoryOptions(**options), **flags)
    assert not faults_of(case, size)


@pytest.mark.skipif(not MANY, reason="WAN_RANKS_PLANNED is the number of random cases")
def test_random_cases():
    one_of, faults = random.Random(0).choice, []
    for _ in range(MANY):
        task = one_of([name for name in TASKS if "720" not in name])
        facts, given = (
            TASKS[task],
            {name: value for name, value in one_of(GIVEN).items() if name != "memory_mode"},
        )
        flags = {flag: True for flag in FLAGS if one_of([True, True, False])}
        if "dit_fsdp" in flags:
            given.pop("dit_stream", None)
        if "t5_fsdp" in flags:
            given.pop("t5_cpu", None)
        frames = 1 if facts.still else one_of([facts.least_frames, 5, 9, 9, 17])
        case = request_of(
            task, size=one_of(facts.sizes), frame_num=frames, memory=MemoryOptions(**given), **flags
        )
        size, expandable = one_of([2, 3, 4, 8]), one_of([True, True, False])
        found = faults_of(case, size, expandable)
        if found:
            faults.append((task, case.size, frames, given, flags, size, expandable, found))
            print(faults[-1], flush=True)
    assert not faults


def test_planned_by_the_command_line(capsys):
    """Before any rank is started; the more ranks, the less a card needs."""
    line = ["--task", "t2i-14B", "--size", "832*480", "--plan", "--vram_limit", "16"]
    assert cli.main([*line, "--dit_fsdp", "--t5_fsdp", "--ulysses_size", "4"]) == 0
    assert "fits" in capsys.readouterr().out
    case = request_of("t2v-14B", size="832*480", frame_num=17, planned=PLANNED, **SHARED)
    least = []
    for size in (2, 4, 8):
        planner = planner_of(case, usual(GIB), ranks=size)
        lean = planner.of(planner.leanest_options())
        assert lean.options.dit_stream is None and not lean.options.t5_stream
        least.append(lean.peak_bytes)
    assert least == sorted(least, reverse=True) and least[0] > 1.5 * least[2]
