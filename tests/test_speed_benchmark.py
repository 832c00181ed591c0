"""The speed command on a CPU: every variant runs, and has its row; bad input is one line."""

import os
from dataclasses import replace

import pytest
import torch

from benchmarks import speed
from benchmarks.speed import Row, table
from virtual_gpu import DEVICE, VirtualGPU

VARIANTS = [
    "resident",
    "streamed",
    "streamed, chunks of 64",
    "streamed, chunks of 64, activations in RAM",
    "the same, guidance together",
]


def rows_of(text):
    """The cells of a markdown table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("upstream", [False, True], ids=["ours", "upstream"])
def test_every_variant_has_its_times(capfd, upstream):
    arguments, names = ["--device", "cpu", "--rounds", "1"], VARIANTS
    if upstream:
        if not os.environ.get("WAN_UPSTREAM"):
            pytest.skip("needs WAN_UPSTREAM, upstream's checkout")
        arguments, names = (
            [*arguments, "--tree", os.environ["WAN_UPSTREAM"]],
            [*VARIANTS, "upstream, resident"],
        )
    assert speed.main(arguments) == 0
    output = capfd.readouterr().out
    assert "streaming does nothing" in output
    rows = rows_of(output)
    assert [row[0] for row in rows] == names
    first = float(rows[0][1])
    for _, seconds, ratio, peak, rate in rows:
        assert float(seconds) > 0
        assert float(ratio) == pytest.approx(float(seconds) / first, abs=0.006, rel=1e-3)
        assert (peak, rate) == ("", "")  # of a device


def test_fewer_layers_take_less():
    with VirtualGPU():
        whole, *_ = speed.measure(speed.CASES[speed.TOY], torch.device("vgpu:0"), rounds=1)
        case = replace(speed.CASES[speed.TOY], layers=1)
        resident, streamed, *_ = speed.measure(case, torch.device("vgpu:0"), rounds=1)
    assert resident.peak_bytes < whole.peak_bytes
    assert streamed.streamed_bytes > 0


def test_a_step_is_two_passes_and_ratios_are_to_resident():
    resident = Row("resident", [2.0, 9.0, 1.0], peak_bytes=2**31)
    streamed = Row("streamed", [2.5], peak_bytes=2**30, streamed_bytes=5 * 10**9)
    assert rows_of(table([resident, streamed])) == [
        ["resident", "4", "1.00", "2.00", ""],
        ["streamed", "5", "1.25", "1.00", "2.0"],
    ]


def test_what_does_not_fit_says_so():
    rows = rows_of(table([Row("resident", out_of_memory=True), Row("streamed", [1.0])]))
    assert [row[1:3] for row in rows] == [["does not fit", ""], ["2", ""]]


def test_a_variant_without_room_does_not_end_the_run(monkeypatch):
    calls = []

    def without_room():
        calls.append(1)

    variants = [(Row("resident"), without_room), (Row("streamed"), lambda: (1.0, 7))]
    monkeypatch.setattr(speed, "_variants", lambda case, device: variants)
    resident, streamed = speed.measure(speed.CASES[speed.TOY], torch.device("cpu"), rounds=2)
    assert resident.out_of_memory and len(calls) == 1
    assert (streamed.passes, streamed.peak_bytes) == ([1.0, 1.0], 7)


def test_on_a_device_weights_are_resident_or_streamed_and_leave():
    case, device = speed.CASES[speed.TOY], DEVICE
    with VirtualGPU() as gpu:
        rows = resident, streamed, chunked, _, together = speed.measure(case, device, rounds=1)
        assert resident.peak_bytes > streamed.peak_bytes >= chunked.peak_bytes
        assert [row.streamed_bytes // streamed.streamed_bytes for row in rows] == [0, 1, 1, 1, 0]
        assert together.streamed_bytes == streamed.streamed_bytes // 2
        assert gpu.live == 0
    case = replace(case, layers=40)  # 8 MiB of them beside prompts and what a pass needs
    with VirtualGPU(44 << 20):
        resident, streamed, *_ = speed.measure(case, device, rounds=1)
        assert resident.out_of_memory and not streamed.out_of_memory


@pytest.mark.parametrize(
    "arguments",
    [["--rounds", "0"], ["--layers", "0"], ["--tree", "no/such/folder"]],
    ids=lambda arguments: arguments[0],
)
def test_bad_input_is_one_line(capsys, arguments):
    assert speed.main(["--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and arguments[0] in error
