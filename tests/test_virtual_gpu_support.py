"""A PyTorch that can have no virtual GPU: what needs one says so at once. And what only mentions one stays as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from virtual_gpu import LACK

ROOT = Path(__file__).parent.parent
OLD = """
import runpy, sys
from torch.utils import backend_registration
vars(backend_registration).pop("_setup_privateuseone_for_python_backend", None)
"""
RUN = OLD + "sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
REASON = "the virtual GPU needs PyTorch 2.10 or newer, this is "


def python(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_an_old_pytorch_is_named_and_not_touched():
    done = python(
        OLD + "import torch\n"
        "from virtual_gpu import DEVICE, UnsupportedError, VirtualGPU, register\n"
        "from upstream_driver import driver\n"
        "for needs in (VirtualGPU, register, lambda: driver.run('nowhere', 't2v', device='vgpu')):\n"
        "    try:\n"
        "        needs()\n"
        "    except UnsupportedError as error:\n"
        "        print(error)\n"
        "print(torch.accelerator.is_available() == torch.cuda.is_available(), DEVICE.index)\n"
    )
    *reasons, rest = done.stdout.splitlines()
    assert len(reasons) == 3 and all(reason.startswith(REASON) for reason in reasons), done.stderr
    assert rest == "True 0"


@pytest.mark.parametrize(
    "arguments",
    [
        ["benchmarks.verdict", "--rehearse", "--out"],
        ["benchmarks.memory", "--task", "t2v-tiny"],
        ["benchmarks.vae_tiles", "--count", "832*480"],
        ["benchmarks.other_trees", "."],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_command_says_what_it_needs(arguments, tmp_path):
    folder = [str(tmp_path / "verdict")] if arguments[-1] == "--out" else []
    done = python(RUN, *arguments, *folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if REASON in line]
    assert done.stderr.splitlines()[-1] == line and not done.stdout and not list(tmp_path.iterdir())
    if "vae" not in arguments[0] and "trees" not in arguments[0]:  # argparse tells the usage before
        assert done.stderr.count("\n") == 1


def test_tests_are_skipped():
    files = [f"tests/{name}.py" for name in ("test_virtual_gpu", "test_virtual_streams", "test_undo")]
    done = python(RUN, "pytest", "-n", "0", "-p", "no:cacheprovider", "-rs", *files)
    assert done.returncode == 0, done.stdout
    summary = done.stdout.splitlines()[-1]
    assert "skipped" in summary and "passed" not in summary and REASON in done.stdout


def test_a_check_of_a_card_that_needs_it_is_skipped(tmp_path):
    code = OLD + (
        "from benchmarks.verdict import child_process\n"
        "child_process.initialise = lambda device: None\n"
        "job = {'function': 'virtual_gpu:VirtualGPU', 'arguments': {}, 'tree': None, 'rehearse': False}\n"
        "child_process.perform(job | {'told': sys.argv[1]})\n"
    )
    done = python(code, str(tmp_path / "told"))
    told = json.loads((tmp_path / "told").read_text())
    assert told["status"] == "skipped" and told["reason"].startswith(REASON), done.stderr


@pytest.mark.skipif(bool(LACK), reason=LACK)
def test_the_process_of_a_card_has_no_virtual_gpu():
    """PyTorch would take it for the accelerator, and lock no more pages for CUDA."""
    done = python(
        "import torch\n"
        "from benchmarks import memory\n"
        "from benchmarks.verdict import child_process, full_width, sizes\n"
        "from upstream_driver import driver\n"
        "names = torch._C._get_privateuse1_backend_name\n"
        "run = memory.Run('t2v-tiny', (128, 96), 9)\n"
        "counted = sizes._count(child_process.Bench(torch.device('cuda:0')), run)\n"
        "print(names(), counted == memory.count(run), names())\n"
    )
    assert done.stdout.split() == ["privateuseone", "True", "vgpu"], done.stderr
