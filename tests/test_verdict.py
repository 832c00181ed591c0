"""The verdict's command and its checks, rehearsed on the virtual GPU; and faults, each of which a check must name.

A check has a process of its own. Most tests call its function in this one, which saves the time of starting it.
"""

import importlib
import inspect
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import memory
from benchmarks.verdict import __main__ as verdict
from benchmarks.verdict import (
    bounded_runs,
    full_width,
    machine,
    regrouping,
    sizes,
    step_times,
    toys,
    upstream,
)
from benchmarks.verdict.checks import CHECKS, GIB, Bench, Check, SkippedError
from benchmarks.verdict.report import Report, Result
from leanwan import activations, streaming
from leanwan.accelerator import initialise
from leanwan.dit import forward
from leanwan.vae import geometry
from virtual_gpu import DEVICE, VirtualGPU

ROOT = Path(verdict.__file__).parents[2]


@pytest.fixture
def bench():
    with VirtualGPU(capacity=4 * GIB):
        initialise(DEVICE)
        yield Bench(DEVICE, rehearse=True)


@pytest.fixture
def here(monkeypatch):
    """Placement in few runs, its reference from this process."""

    def reference(bench, task, path):
        full_width.write_reference(bench, task, path)
        return load_file(path)["flow"]

    monkeypatch.setattr(full_width, "_reference", reference)
    monkeypatch.setattr(full_width, "BUFFERS", (2, 3))
    monkeypatch.setattr(full_width, "SHARES", (0, 0.5))
    monkeypatch.setattr(full_width, "LONGEST", 0.002)


@pytest.fixture
def forgetful(monkeypatch):
    """A streamer that leaves out the first copy to a buffer that was used before."""
    copy, left_out = streaming.Streamer._copy, []

    def forgets(streamer, group, slot, released):
        if slot in left_out or not getattr(slot, "used", False):
            slot.used = True
            return copy(streamer, group, slot, released)
        left_out.append(slot)
        return streamer._copy_stream.record_event()

    monkeypatch.setattr(streaming.Streamer, "_copy", forgets)


def test_functions_take_the_arguments_of_their_checks():
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        module, _, name = check.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind(None, **check.arguments)
        assert 0 < check.share <= 1


# The checks, and what they must notice


def test_machine(bench):
    machine.describe(bench)
    machine.rates(bench)
    assert not bench.faults
    assert bench.numbers["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert bench.numbers["page-locked"]["back"] > 0 and bench.numbers["TF32"]["TFLOPS"] > 0


def test_placement(bench, here):
    full_width.streamed(bench, "t2v-1.3B")
    assert bench.numbers == {"runs": 12, "different": 0} and not bench.faults


def test_placement_notices_a_copy_left_out(bench, here, forgetful):
    full_width.streamed(bench, "t2v-1.3B")
    (fault,) = bench.faults
    assert fault.startswith("not the bits of resident weights with: 2 buffers, 0% resident, no delay")


def test_activations(bench, here):
    full_width.offloaded(bench, "t2v-1.3B")
    assert bench.numbers == {"runs": 12, "different": 0} and not bench.faults


def test_activations_notice_a_visit_that_is_another(bench, here, monkeypatch):
    fetch, count = activations._Slot.fetch, itertools.count()

    def forgets(slot, place, copies):
        if isinstance(place, full_width._LatePlace) and next(count) == 20:
            copies = []
        fetch(slot, place, copies)

    monkeypatch.setattr(activations._Slot, "fetch", forgets)
    full_width.offloaded(bench, "t2v-1.3B")
    (fault,) = bench.faults
    assert fault == "not the bits of copies in order with: 1 heads, apart, late copies"


def test_tiles(bench):
    regrouping.tiles(bench)
    assert not bench.faults
    assert bench.numbers["decode, exact"]["tiles of 64"] <= 1e-5


def test_tiles_notice_a_narrow_margin(bench, monkeypatch):
    interval = geometry.input_interval

    def narrow(operation, low, high):
        first, last = interval(operation, low, high)
        return (first, last - 1) if operation.scale == 1 and operation.halo[1] > 0 else (first, last)

    monkeypatch.setattr(geometry, "input_interval", narrow)
    regrouping.tiles(bench)
    assert {fault.partition(": ")[0] for fault in bench.faults} == {
        "decode, exact",
        "decode, default",
        "encode, exact",
        "encode, default",
    }


def test_chunks(bench):
    regrouping.chunks(bench)
    assert not bench.faults
    assert list(bench.numbers["fp32, exact"]) == [
        f"chunks of {chunk}{visit}"
        for chunk in (64, 100)
        for visit in ("", ", 1 heads a visit", ", 4 heads a visit")
    ]
    assert 0 < bench.numbers["noise of bf16"] < 0.05


def test_chunks_notice_tokens_at_other_places(bench, monkeypatch):
    turn = forward.Rope.__call__

    def late(rope, x, span):
        return turn(rope, x, slice(span.start + 1, span.stop + 1) if span.start else span)

    monkeypatch.setattr(forward.Rope, "__call__", late)
    regrouping.chunks(bench)
    assert {"fp32, exact", "fp32, default"} <= {fault.partition(":")[0] for fault in bench.faults}


SIZE = {"task": "t2v-1.3B", "size": "832*480"}


def test_memory(bench):
    sizes.counted(bench, **SIZE)
    assert not bench.faults
    assert [name for name in bench.numbers if isinstance(bench.numbers[name], dict)] == [
        "text",
        "denoise",
        "decode",
    ]
    assert bench.numbers["denoise"]["deviation"] == 0
    assert bench.numbers["taken from the driver GiB"] > bench.numbers["text"]["live GiB"]


def test_memory_notices_a_wrong_count(bench, monkeypatch):
    count = memory.count

    def wrong(run):
        report = count(run)
        report.stages["text"] = round(report.stages["text"] * 1.04)
        report.stages["denoise"] = round(report.stages["denoise"] * 1.06)
        return report

    monkeypatch.setattr(memory, "count", wrong)
    sizes.counted(bench, **SIZE)
    (fault,) = bench.faults
    assert fault.startswith("denoise: ") and "-5.7%" in fault


def test_cap(bench):
    sizes.capped(bench, **SIZE)
    assert not bench.faults and bench.numbers["in a quarter of it"] == "out of memory"


def test_cap_notices_what_needs_more_than_was_counted(bench, monkeypatch):
    count = memory.count

    def half(run):
        report = count(run)
        for peaks in (report.stages, report.reserved):
            peaks.update({stage: peak // 2 for stage, peak in peaks.items()})
        report.peak_bytes //= 2
        return report

    monkeypatch.setattr(memory, "count", half)
    sizes.capped(bench, **SIZE)
    (fault,) = bench.faults
    assert fault.startswith("out of memory in ") and "'stage': 'text'" in fault


def test_cap_notices_that_it_does_not_hold(bench, monkeypatch):
    measure = sizes._measure
    monkeypatch.setattr(sizes, "_measure", lambda bench, run, capacity: measure(bench, run))
    sizes.capped(bench, **SIZE)
    (fault,) = bench.faults
    assert "a quarter of what it needs" in fault


def test_toys(bench):
    toys.compare(bench, "t2v-tiny")
    assert not bench.faults and bench.numbers == {"largest difference": 0, "the same frames": True}


def test_toys_notice_a_copy_left_out(bench, forgetful):
    toys.compare(bench, "t2v-tiny")
    (fault,) = bench.faults
    assert (
        "--low_vram" in fault
    )  # changes the video, or makes none of what was left in the buffer: no numbers


def test_steps(bench):
    step_times.compare(bench, "t2v-1.3B")
    assert not bench.faults
    in_ram = ["streamed, chunks of 64, activations in RAM", "the same, guidance together"]
    assert list(bench.numbers)[1:] == ["resident", "streamed", "streamed, chunks of 64", *in_ram]


def test_upstream(bench, monkeypatch):
    with pytest.raises(SkippedError, match="--tree"):
        upstream.compare(bench)
    bench.tree = os.environ.get("WAN_UPSTREAM")
    if not bench.tree:
        pytest.skip("needs WAN_UPSTREAM, upstream's checkout")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setattr(upstream, "PIPELINES", {"t2v": "WanT2V"})
    upstream.compare(bench)
    assert (
        not bench.faults and bench.numbers["t2v"]["their peak GiB"] > bench.numbers["t2v"]["our peak GiB"] > 0
    )


def test_what_a_machine_lacks_skips_the_check(bench):
    bench.rehearse = False
    with pytest.raises(SkippedError, match="needs 5 GiB of GPU memory, 4.0 are free"):
        bench.needs(5)
    with pytest.raises(SkippedError, match="of RAM"):
        bench.needs(1, 10**6)
    bench.needs(1, 0.1)


# The process of a check

FAKES = """
import os, signal, subprocess, sys, time
from benchmarks.verdict.checks import SkippedError

def passes(bench, text):
    bench.note("text", text)

def fails(bench):
    bench.expect(False, "one thing is wrong")
    bench.expect(True, "this is not")
    print("seen in the log")

def raises(bench):
    raise ValueError("no such number")

def skips(bench):
    raise SkippedError("no use")

def hangs(bench):
    bench.note("so far", 7)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    bench.note("child", child.pid)
    time.sleep(600)

def crashes(bench):
    print("the last words", flush=True)
    os._exit(3)

def is_killed(bench):
    os.kill(os.getpid(), signal.SIGKILL)

def faults(bench):
    import ctypes
    ctypes.string_at(0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(name, limit, **arguments): the Result of a function of FAKES as a check."""
    (tmp_path / "fakes.py").write_text(FAKES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(name, limit=120, **arguments):
        return bounded_runs.run(Check(name, f"fakes:{name}", 1, arguments), limit, tmp_path, rehearse=True)

    return run


def test_a_process_says_how_it_went(fake):
    result = fake("passes", text="word")
    assert (result.status, result.numbers, result.faults, result.log) == ("pass", {"text": "word"}, [], [])
    result = fake("fails")
    assert (result.status, result.faults) == ("fail", ["one thing is wrong"])
    assert result.log == ["seen in the log"]
    result = fake("raises")
    assert (result.status, result.faults) == ("fail", ["ValueError: no such number"])
    assert result.log[-1] == "ValueError: no such number"
    result = fake("skips")
    assert (result.status, result.faults) == ("skipped", ["no use"])


def test_out_of_time_is_incomplete_and_ends_all_its_processes(fake):
    result = fake("hangs", limit=20)
    assert result.status == "incomplete" and result.faults == ["not done after 20 s"]
    assert result.numbers["so far"] == 7
    gone = result.numbers["child"]
    assert not psutil.pid_exists(gone) or psutil.Process(gone).status() == psutil.STATUS_ZOMBIE


def test_a_process_that_ends_early(fake):
    result = fake("crashes")
    assert (result.status, result.faults) == ("fail", ["the process ended with exit code 3"])
    assert result.log == ["the last words"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_process_that_is_killed(fake):
    result = fake("is_killed")
    assert result.status == "incomplete" and "killed by signal 9" in result.faults[0]
    result = fake("faults")
    assert result.status == "fail" and "exit code -11" in result.faults[0]
    assert "Segmentation fault" in "".join(result.log)


# The report


def test_the_report_is_whole_at_any_moment(tmp_path):
    def written():
        assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
        return json.loads((tmp_path / "report.json").read_text())

    report = Report(tmp_path, ["first", "second", "third"], {"minutes": 1})
    assert written()["verdict"] == "incomplete" and report.exit_code == 2
    report.add(Result("second", "skipped", faults=["no use"]))
    assert [check["status"] for check in written()["checks"]] == ["not run", "skipped", "not run"]
    report.add(Result("first", "pass", 3.21, 60, {"plain": 1, "nested": {"GiB": 2.5, "of": "a|b"}}))
    assert written()["verdict"] == "incomplete"
    report.add(Result("third", "fail", 2, 60, faults=["it\nis wrong"], log=["one", "two"]))
    assert written()["verdict"] == "fail" and report.exit_code == 1
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# Verdict: fail\n")
    assert "| first | pass | 3 | plain 1; nested: GiB 2.5, of a\\|b |" in text
    assert "## third: fail\n\n- it is wrong\n\n```\none\ntwo\n```\n" in text
    report.add(Result("third", "pass"))
    assert written()["verdict"] == "pass" and report.exit_code == 0


# The command


def results(folder):
    checks = json.loads((folder / "report.json").read_text())["checks"]
    return {check["name"]: check["status"] for check in checks}


def test_rehearsal(tmp_path, capsys):
    assert verdict.main(["--rehearse", "--out", str(tmp_path), "--only", "placement 1.3B"]) == 0
    assert results(tmp_path) == {"placement 1.3B": "pass"}
    assert "[1/1] placement 1.3B ... pass" in capsys.readouterr().err
    numbers = json.loads((tmp_path / "report.json").read_text())["checks"][0]["numbers"]
    assert numbers == {"runs": 27, "different": 0}


def test_no_time_left_is_incomplete(tmp_path):
    assert verdict.main(["--rehearse", "--out", str(tmp_path), "--minutes", "0.01"]) == 2
    assert set(results(tmp_path).values()) == {"incomplete"}


def test_one_fault_is_the_verdict_and_the_rest_is_run(tmp_path, monkeypatch, capsys):
    outcomes = iter([Result("machine", "fail", faults=["odd"]), Result("rates", "pass")])
    limits = []

    def run(check, limit, folder, **options):
        limits.append(limit)
        return next(outcomes)

    monkeypatch.setattr(verdict, "run", run)
    arguments = ["--rehearse", "--out", str(tmp_path), "--only", "machine", "rates", "--minutes", "5"]
    assert verdict.main(arguments) == 1
    assert limits == [30, 30]  # a tenth of the time each
    assert results(tmp_path) == {"machine": "fail", "rates": "pass"}
    assert "machine ... fail, 0 s: odd" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_keeps_the_report(tmp_path):
    command = [sys.executable, "-m", "benchmarks.verdict", "--rehearse", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("*.log")):
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in error
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    statuses = results(tmp_path)
    assert list(statuses) == [check.name for check in CHECKS]
    assert statuses["machine"] == "incomplete" and statuses["rates"] == "not run"
    assert "interrupted" in (tmp_path / "report.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device(tmp_path, capsys):
    assert verdict.main(["--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no CUDA device" in error and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--minutes", "nan"], "--minutes"),
        (["--only", "nothing"], "--only nothing"),
        (["--tree", "nowhere"], "--tree nowhere"),
        (["--out", __file__], f"--out {__file__}"),
    ],
)
def test_bad_input_is_one_line(arguments, named, capsys):
    assert verdict.main(["--rehearse", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and named in error
