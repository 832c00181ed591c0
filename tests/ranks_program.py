"""Several runs, one after the other, in each of some processes that are ranks: python ranks_program.py CASES [FAULT].

CASES is a file of JSON: a list of objects, fields of a Request, its memory options under "memory", and "dtype" for
another compute type. FAULT is "RANK:NUMBER:WHAT": what befalls a rank when it is to compute flows for that time.

With WAN_VIRTUAL a process has a virtual GPU of so many bytes, 0 for no limit; cases are for that, and planned.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from leanwan.errors import InputError
from leanwan.options import MemoryOptions
from virtual_gpu import VirtualGPU
from wan.cli import _complain
from wan.distributed.together import SharedPasses
from wan.run import Runner
from wan.run.interrupts import Interrupts
from wan.run.over_ranks import over_ranks
from wan.run.request import PLANNED, Request
from wan.run.state import resumed_request


def request_of(case):
    case = dict(case)
    dtype, memory = case.pop("dtype", "float32"), case.pop("memory", {})
    if "WAN_VIRTUAL" in os.environ:
        case |= {"device": "vgpu"} | ({} if "resume" in case else {"planned": PLANNED})
    if "resume" in case:
        request = resumed_request(case.pop("resume"), case, memory)
    else:
        request = Request(**case, memory=MemoryOptions(**memory))
    request.facts.config.param_dtype = getattr(torch, dtype)
    return request


def prepare_fault(fault):
    rank, number, what = fault.split(":")
    if os.environ["RANK"] != rank:
        return
    shared_passes, calls = SharedPasses._share, 0

    @contextlib.contextmanager
    def faulty(self, *args):
        def flows(*args):
            nonlocal calls
            calls += 1
            if calls == int(number):
                if what == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if what == "hang":
                    time.sleep(600)
                if what == "disk":  # it takes no file of this size any more
                    import resource

                    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
                if what == "input":
                    raise InputError("no such thing")
                if what == "memory":
                    raise torch.OutOfMemoryError("none left")
            return share(*args)

        with shared_passes(self, *args) as share:
            yield flows

    SharedPasses._share = faulty


def check_share(runner, size):
    """Of the weights of the layer groups a rank keeps its part."""
    runner._pipeline._dit.leave()
    model = runner._pipeline.model
    parameters = [p for group in model.layer_groups() for p in group.parameters()]
    kept = sum(p.to_local().nbytes for p in parameters)
    rows = sum(p.nbytes // p.size(0) for p in parameters)  # what parts of unequal size are apart, at most
    assert kept <= sum(p.nbytes for p in parameters) / size + rows, "weights are not shared out"


def main(cases, fault=None):
    if fault:
        prepare_fault(fault)
    cases = json.loads(Path(cases).read_text())
    types = {case["save_file"]: case.get("dtype", "float32") for case in cases if "save_file" in case}
    pipeline_for = Runner._pipeline_for

    def of_type(self, request):  # also on ranks that follow, who are told the request alone
        request.facts.config.param_dtype = getattr(torch, types.get(request.save_file, "float32"))
        return pipeline_for(self, request)

    Runner._pipeline_for = of_type
    virtual = os.environ.get("WAN_VIRTUAL")
    gpu = contextlib.nullcontext() if virtual is None else VirtualGPU(int(virtual) or None)

    def lead(ranks):
        with Interrupts() as interrupts:
            runner = Runner(None, interrupts, ranks)
            for case in cases:
                runner.run(request_of(case))
                if case.get("dit_fsdp"):
                    check_share(runner, ranks.size)
        return 0

    try:
        with gpu:
            return over_ranks(
                [os.environ.get("WAN_OTHER", "")],
                lead,
                lambda ranks: Runner(ranks=ranks).follow(ranks),
            )
    except InputError as error:
        return _complain(error, 2)
    except OSError as error:
        return _complain(error, 1)
    except KeyboardInterrupt as error:
        return _complain(error, 130)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
