"""Predicted memory against counted, plans, and runs that are planned."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import wan.run.plan_request
from benchmarks.memory import Run, count
from leanwan.errors import InputError
from leanwan.options import LOW_VRAM, MemoryOptions
from leanwan.record.ledger import Ledger
from virtual_gpu import VirtualGPU
from virtual_gpu.allocator import CachingAllocator
from wan import cli
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.planning.plan import GIB
from wan.planning.predict.blocks import Shape, Way, forward_pass
from wan.planning.predict.stages_predicted import SPARE
from wan.planning.predict.work import meta_model
from wan.planning.rates import NOMINAL, nominal, usual
from wan.run import Request, Runner
from wan.run.over_ranks import less_room
from wan.run.plan_request import budget_on, plan, planner_of, report
from wan.run.request import PLANNED
from wan.run.settings import read_plan
from wan.tasks import TASKS
from wan.utils.video import VideoFile

REPLANNED = ["t2v", "vace"]
if "WAN_WIDE_SWEEP" in os.environ:
    REPLANNED += ["i2v", "flf2v", "t2i"]


@pytest.mark.parametrize("expandable", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_ledger_reserves_as_the_allocator(expandable, seed):
    """Which the virtual GPU has, and which is written independently."""
    rng, ledger, allocator, held = random.Random(seed), Ledger(), CachingAllocator(None, expandable), []
    for _ in range(300):
        choice = rng.random()
        if choice < 0.02:
            ledger.release()
            allocator.empty_cache()
        elif held and choice < 0.47:
            number, block = held.pop(rng.randrange(len(held)))
            ledger.drop(number)
            allocator.free(block)
        else:
            size = int(2 ** rng.uniform(5, 26))
            held.append((ledger.take(size), allocator.alloc(size)))
        assert ledger.live == allocator.allocated
    assert ledger.peak == allocator.peak_allocated
    assert ledger.reserved(expandable) == allocator.peak_reserved


@pytest.mark.parametrize("chunk", [0, 128])
def test_what_the_head_makes_is_there_until_it_is_joined(chunk):
    """Of all chunks: in a narrow model more than the blocks take; in others it decides where the flow lies."""
    sizes = {"dim": 12, "ffn_dim": 12, "num_heads": 1, "num_layers": 1, "text_dim": 16, "text_len": 8}
    model, shape = meta_model(lambda: WanModel(**sizes), torch.bfloat16), (16, 2, 64, 64)
    predicted = forward_pass(model, Shape(shape), Way(chunk=chunk), itemsize=2, samples=1)
    with VirtualGPU(meta=True) as gpu, torch.no_grad():
        model.to(gpu.device).compute_dtype = torch.bfloat16
        x, t, context = (torch.zeros(*size, device=gpu.device) for size in (shape, (1,), (8, 16)))
        gpu.reset_peak()
        before = gpu.live
        flow = model([x], t, [context], 2048, chunk=chunk)
        assert gpu.peak - before == predicted.peak
        assert gpu.live - before == predicted.live == flow[0].nbytes


@pytest.mark.parametrize("chunk", [0, 128])
def test_the_hints_are_there_until_the_pass_is_over(chunk):
    """As above: in a narrow model the head needs most."""
    sizes = {"dim": 12, "ffn_dim": 12, "num_heads": 1, "num_layers": 1, "text_dim": 16, "text_len": 8}
    model, shape = meta_model(lambda: VaceWanModel([0], 16, **sizes), torch.bfloat16), (16, 2, 64, 64)
    predicted = forward_pass(model, Shape(shape, source=16), Way(chunk=chunk), itemsize=2, samples=1)
    with VirtualGPU(meta=True) as gpu, torch.no_grad():
        model.to(gpu.device).compute_dtype = torch.bfloat16
        x, t, context = (torch.zeros(*size, device=gpu.device) for size in (shape, (1,), (8, 16)))
        source = torch.zeros(shape, device="meta")
        gpu.reset_peak()
        before = gpu.live
        flow = model([x], t, [source], [context], 2048, chunk=chunk)
        assert gpu.peak - before == predicted.peak
        assert gpu.live - before == predicted.live == flow[0].nbytes


def request_of(task="t2v-14B", size="832*480", **settings):
    return Request(task=task, size=size, ckpt_dir="Wan-AI/any", **settings)


def compared(case, **run):
    """{stage: (predicted Stage, counted live, counted reserved)} of a run on the virtual GPU, fewer layers."""
    stages = planner_of(case, usual(24 * GIB)).of(case.memory).stages
    counted = count(Run(case.task, case.pixels, case.frame_num, case.memory, **run))
    return {name: (stage, counted.stages[name], counted.reserved[name]) for name, stage in stages.items()}


def as_large_as_the_video(monkeypatch):
    """The input pictures, as benchmarks.memory has them."""
    monkeypatch.setattr(
        wan.run.plan_request, "_pictures", lambda case: [case.pixels] * len(case.facts.inputs)
    )


@pytest.mark.parametrize(
    ("task", "memory"),
    [
        ("t2v-tiny", MemoryOptions(vae_tile=0)),
        ("flf2v-tiny", MemoryOptions(**LOW_VRAM | {"dit_chunk": 64, "vae_tile": 64})),
        ("vace-tiny", MemoryOptions(dit_stream=0.0, dit_chunk=64, guidance_together=True, vae_tile=64)),
    ],
)
def test_predicted_is_what_is_counted(task, memory, monkeypatch):
    as_large_as_the_video(monkeypatch)
    case = Request(task=task, frame_num=9, sample_steps=3, memory=memory, src_ref_images=references(task))
    for name, (stage, live, reserved) in compared(case).items():
        assert live <= stage.bytes <= 1.01 * live, name
        assert reserved <= stage.reserved <= 1.05 * reserved + SPARE, name


def references(task):
    return None if not task.startswith("vace") else "examples/vace_ref_1.png"


def toy(**settings):
    given = {"frame_num": 9, "sample_steps": 4} | settings
    return Request(task="t2v-tiny", device="vgpu", base_seed=3, prompt="a ball", **given)


# Plans


@pytest.fixture(scope="module")
def planner():
    return planner_of(request_of(frame_num=17), usual(8 * GIB), ram=64 * GIB)


def test_more_memory_never_makes_a_slower_plan(planner):
    plans = [planner.plan(GIB * room) for room in (0.9, 1.2, 2, 4, 8, 16, 48)]
    assert all(one.fits for one in plans)
    seconds = [one.seconds for one in plans]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    assert plans[-1].options.dit_stream is None and plans[-1].options.vae_tile == 0


def test_what_rounds_does_not_depend_on_other_programs(planner):
    """As long as they leave what is steady."""

    def cuts(one):
        return one.options.vae_tile, one.options.dit_chunk

    steady = 4.5 * GIB
    plans = [planner.plan(room * GIB, steady) for room in (4.5, 5, 6)]
    assert all(one.fits and cuts(one) == cuts(planner.plan(steady)) for one in plans)
    assert plans[-1].options.dit_stream > plans[0].options.dit_stream, "the rest of the room is used"
    assert cuts(planner.plan(6 * GIB)) != cuts(plans[-1])
    assert planner.plan(2 * GIB, steady) == planner.plan(2 * GIB)


def test_the_floor_is_the_least_that_fits(planner):
    least = planner.least()
    assert planner.plan(least).fits and not planner.plan(least - 1).fits


def test_the_leaner_plan_takes_less(planner):
    one = planner.plan(4 * GIB)
    leaner = planner.leaner(one)
    assert leaner.fits and leaner.peak_bytes <= 0.9 * one.peak_bytes
    assert planner.leaner(dataclasses.replace(one, stages=planner.plan(0).stages)) is None


def test_options_that_are_given_are_kept():
    memory = MemoryOptions(dit_chunk=1024, vae_tile=128)
    planned = tuple(name for name in PLANNED if name not in ("dit_chunk", "vae_tile"))
    chosen = plan(request_of(frame_num=5, memory=memory, planned=planned), vram=24 * GIB, ram=64 * GIB)
    assert (chosen.options.dit_chunk, chosen.options.vae_tile) == (1024, 128)


def test_modes():
    gpu = plan(request_of(frame_num=5, memory_mode="gpu_only", vram_limit=80.0), ram=64 * GIB)
    assert gpu.options.dit_stream is None and not gpu.options.activation_offload
    cpu = plan(request_of(frame_num=5, memory_mode="cpu_only", vram_limit=80.0), ram=64 * GIB)
    assert cpu.options.dit_stream == 0 and cpu.options.activation_offload and cpu.options.t5_stream


@pytest.mark.parametrize(
    ("speed", "needed"),
    [
        ({"compile": True}, {"dit_stream": None, "dit_chunk": 0, "activation_offload": False}),
        ({"attention": "sage"}, {"dit_chunk": 0, "activation_offload": False}),
    ],
)
def test_what_other_kernels_cannot_do_is_not_planned(speed, needed):
    planned = plan(request_of(frame_num=5, planned=PLANNED, **speed), vram=2 * GIB, ram=64 * GIB).options
    assert needed.items() <= vars(planned).items()


def test_attention_takes_its_time():
    """Its operations grow with the square of the tokens, all others with their number."""
    seconds = [
        planner_of(request_of(frame_num=frames), usual(80 * GIB))
        .of(MemoryOptions(vae_tile=0))
        .stages["denoise"]
        .seconds
        for frames in (41, 81)
    ]
    assert seconds[1] > 2.2 * seconds[0]


def test_nominal_rates():
    assert nominal((8, 7)) == NOMINAL[8, 6] and nominal((6, 1)) == NOMINAL[7, 0]
    assert usual(4 * GIB) == NOMINAL[8, 6] and usual(80 * GIB) == NOMINAL[9, 0]


def test_report_has_what_programs_read():
    chosen, told = report(request_of(frame_num=5, vram_limit=6.0), ram=64 * GIB)
    assert json.loads(json.dumps(told)) == told
    assert {"options", "stages", "peak_bytes", "fits", "ram_bytes"} <= set(told) and told["fits"]
    assert set(told["stages"]["denoise"]) == {"bytes", "reserved", "seconds"}
    assert told["longest_frame_num"] >= 5 and told["least_bytes"] is None
    assert chosen.peak_bytes == max(stage["reserved"] for stage in told["stages"].values())


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_what_would_do_does(fraction):
    request = request_of("t2i-14B", frame_num=1, vram_limit=0.6, vram_fraction=fraction)
    chosen, told = report(request, ram=64 * GIB)
    assert not chosen.fits
    enough = replace(request, vram_limit=told["least_bytes"] / GIB + 1e-6)
    assert report(enough, ram=64 * GIB)[0].fits


# The command line


def test_plan_of_the_command_line(capsys):
    command = ["--task", "t2i-14B", "--size", "832*480", "--plan", "--vram_limit"]
    assert cli.main([*command, "8"]) == 0
    assert "modelled" in capsys.readouterr().out
    assert cli.main([*command, "0.6", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["fits"] and told["least_bytes"] > 0.6 * GIB


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--vram_limit", "much"], "--vram_limit"),
        (["--vram_limit", "-1", "--plan"], "--vram_limit -1"),
        (["--vram_limit", "nan", "--plan"], "--vram_limit nan"),
        (["--vram_fraction", "0.4"], "--vram_fraction 0.4"),
        (["--memory_mode", "fast"], "--memory_mode"),
        (["--memory_mode", "gpu_only", "--t5_stream", "--plan", "--vram_limit", "8"], "--memory_mode"),
        (["--json"], "--json"),
        (["--vram_limit", "4", "--device", "cpu"], "--vram_limit 4"),
    ],
)
def test_bad_input(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--task", "t2v-tiny", *arguments]) == 2
    out, err = capsys.readouterr()
    assert named in err and err.count("\n") == 1 and not os.listdir()


def test_limits_of_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with VirtualGPU(GIB):
        with pytest.raises(InputError, match="the card has 1.00 GiB"):
            Runner().run(toy(vram_limit=2.0, planned=PLANNED))
        with pytest.raises(InputError, match="needs 0.1"):
            Runner().run(toy(vram_limit=0.01, planned=PLANNED))
    assert not os.listdir()


@pytest.mark.parametrize("free", [0, 0.1, 0.2, 0.26])
@pytest.mark.parametrize("settings", [{}, {"vram_fraction": 0.5}])
def test_a_card_that_others_have_filled(free, settings, monkeypatch):
    """Less is free than CUDA's libraries take: there is no room, not less than none."""
    device = torch.device("cuda", 0)
    card = SimpleNamespace(mem_get_info=lambda _: (int(free * GIB), 8 * GIB), memory_reserved=lambda _: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda _: card)
    request = toy(**settings)
    budget = budget_on(request, device)
    room, steady = budget.room, budget.steady
    assert 0 <= room < 0.011 * GIB < steady
    planner = planner_of(request, usual(8 * GIB), ram=GIB)
    chosen = planner.plan(room, steady)
    assert not chosen.fits and "of -" not in chosen.line()
    assert less_room(request, chosen, torch.OutOfMemoryError()) in ({}, {"vram_fraction": 0.5})


def test_a_plan_for_a_full_card_says_who_has_the_rest(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    with VirtualGPU(GIB // 1000), contextlib.suppress(torch.OutOfMemoryError):
        Runner().run(toy(planned=PLANNED))
    (line,) = [message for message in caplog.messages if "fits" in message]
    assert "the 0.00 GiB that are free" in line and "other programs" in line and "leanest" in line


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({}, None),
        ({"vram_limit": 2.0}, 2 * GIB),
        ({"vram_limit": 2.0, "vram_fraction": 0.5}, GIB),
        ({"vram_fraction": 0.75}, 3 * GIB),
    ],
)
@pytest.mark.parametrize("memory", [LOW_VRAM, {"vae_cpu": True}])
def test_limits_hold_beside_memory_flags(memory, settings, held, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with VirtualGPU(4 * GIB) as gpu:
        Runner().run(toy(memory=MemoryOptions(**memory), **settings))
        assert gpu.allocator.limit == held


# Runs


def run(name, capacity=None, **settings):
    with VirtualGPU(capacity, expandable_segments=False) as gpu:
        Runner().run(toy(save_file=name, **settings))
    return gpu


def frames_of(name):
    return np.stack(list(VideoFile(name).frames())).astype(int)


def test_the_same_picture_whatever_the_room(tmp_path, monkeypatch):
    """And the room is enough. Tiles and chunks move no 8-bit value by more than the codec makes of one."""
    monkeypatch.chdir(tmp_path)
    run("whole.mp4")
    least = planner_of(toy(planned=PLANNED), usual(GIB), expandable=False).least()
    gpu = run("lean.mp4", least, planned=PLANNED)
    assert gpu.peak_reserved <= least
    assert read_plan("lean.mp4")["t5_stream"]  # the text encoder is the largest part of a toy
    difference = np.abs(frames_of("lean.mp4") - frames_of("whole.mp4"))
    assert difference.mean() < 0.1


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The videos that runs save from here on, in 8 bits, of stills in [-1, 1]; files go to a folder of their own."""
    monkeypatch.chdir(tmp_path)
    videos, save = [], wan.run.runner.save
    monkeypatch.setattr(
        wan.run.runner, "save", lambda video, *rest: videos.append(video.clone()) or save(video, *rest)
    )
    return videos


@pytest.mark.parametrize("kind", REPLANNED)
def test_another_plan_when_memory_runs_out(kind, made, monkeypatch, caplog):
    """The picture is that of a run which nothing happened to; no step is computed twice."""
    caplog.set_level("WARNING")
    facts, name = TASKS[f"{kind}-tiny"], "{}.png" if kind == "t2i" else "{}.mp4"
    case = Request(
        task=f"{kind}-tiny",
        device="vgpu",
        frame_num=max(facts.least_frames, 1 if facts.still else 5),
        sample_steps=3,
        base_seed=3,
        planned=PLANNED,
    )

    def run(file):
        with VirtualGPU(expandable_segments=False):
            Runner().run(dataclasses.replace(case, save_file=name.format(file)))

    run("whole")
    steps, after_step = [], wan.run.keeper.Keeper.after_step

    def counted(keeper, latent, solver):
        after_step(keeper, latent, solver)
        steps.append(solver.done)
        if steps == [1, 2]:
            raise torch.OutOfMemoryError("out of memory, as asked for")

    monkeypatch.setattr(wan.run.keeper.Keeper, "after_step", counted)
    run("again")
    assert steps == [1, 2, 3] and "going on from the last step" in caplog.text
    assert torch.equal(*made)
    assert sorted(os.listdir()) == [name.format("again"), name.format("whole")]


def every_plan(planner):
    """All that can be chosen, each with its options."""
    for setting in planner._settings():
        groups = [planner._ways(stages, setting) for stages in planner._groups]
        for ways in itertools.product(*groups):
            changes = {name: value for _, way in ways for name, value in way.items()}
            yield sum(seconds for seconds, _ in ways), dataclasses.replace(setting, **changes)


def test_the_plan_is_the_fastest_that_fits():
    """Of all, each looked at."""
    request = toy(planned=PLANNED)
    planner = planner_of(request, usual(GIB), ram=GIB)
    plans = [(seconds, planner.of(options)) for seconds, options in every_plan(planner)]
    assert len(plans) > 30
    least, reserved = planner.least(), planner.predictor.reserved

    def alone(plan):
        return max(reserved(name, plan.options) for name in plan.stages)

    for room in (least, 1.05 * least, 1.2 * least, 2 * least):
        chosen = planner.plan(room)
        fitting = [seconds for seconds, plan in plans if plan.peak_bytes <= room and alone(plan) <= room]
        assert chosen.fits and chosen.seconds == pytest.approx(min(fitting), rel=1e-9)
    alone = planner.predictor
    assert all(
        alone.reserved(name, plan.options) <= plan.stages[name].reserved
        for _, plan in plans
        for name in plan.stages
    )


def test_the_same_picture_of_every_plan(made):
    """From the floor to all that helps: to the bit where only the place of things differs."""
    case = toy(planned=PLANNED, sample_steps=2, frame_num=5)
    planner = planner_of(case, usual(GIB), expandable=False)
    plans, room = [], math.inf
    while (plan := planner.plan(room)).fits:
        plans.append(plan)
        room = plan.peak_bytes - 1
    assert len(plans) > 2
    first: dict = {}
    for n, plan in enumerate(plans):
        with VirtualGPU(plan.peak_bytes, expandable_segments=False) as gpu:
            settings = {"memory": plan.options, "planned": ()}
            Runner().run(dataclasses.replace(case, save_file=f"{n}.mp4", **settings))
        assert gpu.peak_reserved <= plan.peak_bytes
        cuts = plan.options.vae_tile, plan.options.dit_chunk
        assert torch.equal(first.setdefault(cuts, made[-1]), made[-1])
        assert (made[-1].int() - made[0].int()).abs().max() <= 1
