"""The process of one check, which bounded_runs.py starts."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from leanwan.accelerator import initialise
from virtual_gpu import DEVICE, UnsupportedError, VirtualGPU

from .checks import GIB, Bench, SkippedError

REHEARSED_GIB = 4  # of the virtual GPU


def perform(job: dict[str, Any]) -> None:
    """Runs the check that a job names, in this process; reports its findings and, at the end, its status.

    job: a dict: function, arguments, rehearse, tree, told; see Check and Bench.
    """
    told = Path(job["told"])
    with contextlib.ExitStack() as stack:
        if job["rehearse"]:
            torch.set_num_threads(1)
            device = DEVICE
        else:
            device = torch.device("cuda:0")
        bench = Bench(device, job["rehearse"], job["tree"], told)
        module, _, name = job["function"].partition(":")
        try:
            function = getattr(import_module(module), name)
            if job["rehearse"]:
                stack.enter_context(VirtualGPU(capacity=REHEARSED_GIB * GIB))
            initialise(device)
            function(bench, **job["arguments"])
            stack.close()  # here the virtual GPU raises RaceError if there was a race
        except (SkippedError, UnsupportedError) as reason:
            bench.tell({"status": "skipped", "reason": str(reason)})
            return
        except Exception as error:
            traceback.print_exc()
            bench.expect(False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    bench.tell({"status": "fail" if bench.faults else "pass"})


if __name__ == "__main__":
    perform(json.loads(sys.argv[1]))
