"""Full-size runs counted on the virtual GPU: what each task needs, and how the command tells it.

Three shortcuts keep this short, and one test shows that they change no live count: of the DiT's blocks, which need the
same memory, the first few run, on the first few chunks of tokens; of the VAE's tiles, the largest.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shortcuts import few_blocks, largest_tile

from benchmarks import memory
from benchmarks.memory import GIB, Run, count
from leanwan.options import LOW_VRAM, MemoryOptions
from upstream_driver.watch import requested_bytes
from wan.configs import SIZE_CONFIGS

STAGES = ["text", "image", "encode", "denoise", "decode"]


@pytest.fixture
def shortcuts():
    with few_blocks(), largest_tile():
        yield


def run_of(task, size, frame_num=81, **options):
    return Run(task, SIZE_CONFIGS[size], frame_num, memory=MemoryOptions(**options))


def test_shortcuts_change_no_live_count(request):
    run, capacity = run_of("vace-1.3B", "832*480", frame_num=9, **LOW_VRAM), 2 * GIB
    whole = count(run, capacity)
    request.getfixturevalue("shortcuts")
    short = count(run, capacity)
    assert dataclasses.replace(short, reserved=whole.reserved) == whole
    for (
        stage,
        reserved,
    ) in short.reserved.items():  # which gaps the allocator finds depends on all that was before
        assert reserved == pytest.approx(whole.reserved[stage], rel=0.02)
    assert list(whole.stages) == ["text", "encode", "denoise", "decode"]


@pytest.mark.parametrize(
    ("task", "size", "live", "capacity"),
    [
        ("t2v-1.3B", "832*480", 0.6, 0.7),
        ("t2v-14B", "832*480", 0.9, 1.0),
        ("t2v-14B", "1280*720", 1.0, 1.1),
        ("i2v-14B", "1280*720", 1.0, 1.1),
        ("flf2v-14B", "1280*720", 1.0, 1.1),
        ("vace-1.3B", "832*480", 0.6, 0.7),
        ("vace-14B", "1280*720", 1.2, 1.3),
    ],
)
def test_low_vram(shortcuts, task, size, live, capacity):
    """GiB: in tensors, and of a card with expandable segments on which it goes through."""
    report = count(run_of(task, size, **LOW_VRAM), int(capacity * GIB))
    assert report.out_of_memory is None
    assert report.peak_bytes == max(report.stages.values()) <= live * GIB
    expected = {"i2v": STAGES, "flf2v": STAGES, "vace": [stage for stage in STAGES if stage != "image"]}
    assert list(report.stages) == expected.get(task.split("-")[0], ["text", "denoise", "decode"])


def test_what_grows_with_the_video(shortcuts):
    """At most 1.5 KiB per token with --low_vram, of a stage that computes on them all."""
    peaks = [
        count(run_of("t2v-14B", "1280*720", frames, **LOW_VRAM)).stages["denoise"] for frames in (81, 121)
    ]
    tokens = 10 * 45 * 80
    assert (peaks[1] - peaks[0]) / tokens <= 1.5 * 2**10


skip_calls = memory._skip_calls


@pytest.mark.parametrize("size", ["832*480", "1280*720"])
@pytest.mark.parametrize(("tile", "limit"), [(272, 1.6), (128, 0.9)])
def test_vae_tiles(shortcuts, monkeypatch, size, tile, limit):
    monkeypatch.setattr(memory, "_skip_calls", lambda model, calls: skip_calls(model, 2 * memory.STEPS))
    report = count(run_of("flf2v-14B", size, vae_cpu=True, vae_tile=tile))
    assert 0 < report.stages["encode"] <= limit * GIB
    assert 0 < report.stages["decode"] <= limit * GIB


CARD = int(11.49 * GIB)
FLAGS = [{}, {"vae_cpu": True}, {"t5_cpu": True}, {"vae_cpu": True, "t5_cpu": True}]


def test_the_small_model_on_a_card_of_11_49_gib(shortcuts):
    reports = [count(run_of("t2v-1.3B", "832*480", **flags), CARD) for flags in FLAGS]
    assert all(report.out_of_memory is None for report in reports)
    none, vae_cpu, t5_cpu, both = (report.peak_bytes for report in reports)
    assert both < min(vae_cpu, t5_cpu) and max(vae_cpu, t5_cpu) < none
    assert all(report.peak_bytes == max(report.stages.values()) for report in reports)


@pytest.mark.skipif("WAN_UPSTREAM" not in os.environ, reason="WAN_UPSTREAM names no checkout of upstream")
def test_upstream_on_a_card_of_11_49_gib():
    run, tree = run_of("t2v-1.3B", "832*480"), os.environ["WAN_UPSTREAM"]
    report = memory.count_upstream(run, tree, CARD)
    assert report.out_of_memory == {"stage": "text", "requested": 80 * 2**20}
    report = memory.count_upstream(run_of("t2v-1.3B", "832*480", t5_cpu=True), tree, CARD)
    assert report.out_of_memory is None and list(report.stages) == ["text", "denoise", "decode"]


def test_out_of_memory_names_stage_and_bytes(shortcuts):
    run = run_of("t2v-1.3B", "832*480", vae_cpu=True)
    report = count(run, GIB)
    embedding = 256384 * 4096 * 2  # the text encoder's largest tensor, its first
    assert report.out_of_memory == {"stage": "text", "requested": embedding}
    assert list(report.stages) == ["text"] and report.peak_bytes <= GIB
    streamed = dataclasses.replace(run, memory=MemoryOptions(vae_cpu=True, t5_stream=True))
    report = count(streamed, GIB)
    assert report.out_of_memory["stage"] == "denoise" and list(report.stages) == ["text", "denoise"]
    report = count(run_of("t2v-1.3B", "832*480"), GIB // 4)
    assert report.out_of_memory["stage"] == "load" and report.stages == {}


def test_bytes_that_cuda_asked_for():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 MiB. GPU 0 has ...")
    assert requested_bytes(error) == 80 * 2**20


# The command


def command(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr.strip().splitlines()[-1:]


def test_json():
    code, out, _ = command(
        "--task", "i2v-tiny", "--size", "128*96", "--frame_num", "9", "--json", "--vae_cpu"
    )
    assert code == 0
    report = json.loads(out)
    assert list(report) == ["peak_bytes", "stages", "reserved", "out_of_memory", "least_capacity"]
    assert list(report["reserved"]) == STAGES and report["least_capacity"] is None
    assert all(report["reserved"][stage] >= peak for stage, peak in report["stages"].items())
    assert list(report["stages"]) == STAGES and report["out_of_memory"] is None
    assert report["peak_bytes"] == max(report["stages"].values()) > 0


def test_table(capsys):
    tiny = ["--task", "t2v-tiny", "--size", "128*96", "--frame_num", "9"]
    assert memory.main(tiny) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["stage", "text", "denoise", "decode", "peak"]
    assert lines[2].split()[-1] == "reserved" and all(len(line.split()) == 3 for line in lines[3:-1])
    assert memory.main([*tiny, "--least_capacity"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "least"
    assert memory.main([*tiny, "--capacity", "0.005"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Out of memory in stage text, where ")


TINY = ["--task", "i2v-tiny", "--size", "128*96", "--frame_num", "9", "--vae_cpu", "--vae_tile", "64"]


@pytest.mark.parametrize("expandable", [True, False])
def test_the_least_capacity_is_enough_and_less_is_not(capsys, expandable):
    command = [*TINY, "--json", "--expandable_segments", str(expandable)]
    assert memory.main([*command, "--least_capacity"]) == 0
    report = json.loads(capsys.readouterr().out)
    least = report["least_capacity"]
    assert report["peak_bytes"] <= least <= max(report["reserved"].values())
    for capacity, enough in ((least, True), (least - 2 * 2**20, False)):
        assert memory.main([*command, "--capacity", str(capacity / GIB)]) == 0
        limited = json.loads(capsys.readouterr().out)
        assert (limited["out_of_memory"] is None) is enough
        assert max(limited["reserved"].values()) <= capacity


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--size", "1280*728"], "--size 1280*728"),
        (["--capacity", "0"], "--capacity"),
        (["--vae_tile", "50"], "--vae_tile 50"),
        (["--frame_num", "80"], "--frame_num 80"),
        (["--compare"], "--compare"),
        (["--tree", "nowhere"], "--tree nowhere"),
    ],
)
def test_bad_input(arguments, named, capsys):
    assert memory.main(arguments) == 2
    out, err = capsys.readouterr()
    assert named in err and err.count("\n") == 1 and not out
