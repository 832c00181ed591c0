"""The stand-in driver itself: what PyTorch sees, what is late, and what the command refuses."""

import subprocess
import sys

import pytest

from stand_in_driver import build
from stand_in_driver.__main__ import main, parse_arguments


@pytest.mark.parametrize("late, unseen", [("copies", [False, True]), ("kernels", [True, False])])
def test_what_pytorch_sees(stand_in, late, unseen):
    found = stand_in(["--capacity", "2", "--capability", "9.0", "--late", late], "driver.py")
    assert found["capability"] == [9, 0] and found["grows"]
    assert found["memory"] == {"total": 2 * 2**30, "told": True, "taken": True}
    assert found["with waits"] == [True, True]
    assert found["without"] == unseen
    assert set(found["values"].values()) == {True}, found["values"]


def test_without_values(stand_in):
    found = stand_in(["--capacity", "2", "--capability", "9.0", "--no_values"], "driver.py")
    assert found["memory"] == {"total": 2 * 2**30, "told": True, "taken": True}


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--capacity", "0", "python"], "--capacity: 0"),
        (["--capacity", "much", "python"], "--capacity"),
        (["--capability", "86", "python"], "--capability: 86"),
        (["--late", "never", "python"], "--late"),
        ([], "give the command"),
    ],
)
def test_bad_flags(flags, told, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(flags)
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_a_pytorch_without_cuda_is_told(monkeypatch, capsys):
    def unavailable():
        raise build.UnavailableError("no CUDA is here")

    monkeypatch.setattr(build, "cuda_build", unavailable)
    assert main(["python", "-c", "print()"]) == 2
    assert capsys.readouterr().err == "stand_in_driver: no CUDA is here\n"


def test_what_is_imported_before_torch_is_known():
    """The command itself needs no torch: it must not load one without the driver."""
    code = "import sys, stand_in_driver.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
