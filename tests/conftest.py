"""One thread for each test process, one test at a time on the card, and a list of the measured differences."""

import gc
import os
import signal
import tempfile
from pathlib import Path

# Test processes, and the programs that they start, share the cores and sum in the same order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from filelock import FileLock

# A shell starts what it puts into the background deaf to Ctrl-C, and so would be the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def alone_on_the_card(request):
    """Tests marked gpu have it for themselves, whatever process they run in, and leave it as it was."""
    if request.node.get_closest_marker("gpu") is None or not torch.cuda.is_available():
        yield
        return
    with FileLock(Path(tempfile.gettempdir()) / "wan-gpu-tests.lock"):
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats()
        yield
        gc.collect()
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture
def measured(request):
    """Call it with a difference and its limit: it is listed at the end of the run, and must be within the limit."""

    def check(difference, limit, what=""):
        name = request.node.name + (f" {what}" if what else "")
        row = (request.node.path.name, name, float(difference), limit)
        request.node.user_properties.append(("measured", row))
        assert difference <= limit, f"{what or name}: differs by {difference:.2e}, more than {limit:.0e}"

    return check


def pytest_terminal_summary(terminalreporter):
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    properties = [entry for report in reports if report.when == "call" for entry in report.user_properties]
    differences = sorted(tuple(row) for name, row in properties if name == "measured")
    if not differences:
        return
    terminalreporter.section("largest relative differences")
    for file in dict.fromkeys(file for file, *_ in differences):
        rows = [row for row in differences if row[0] == file]
        for limit in sorted({row[3] for row in rows}):
            _, name, difference, _ = max((row for row in rows if row[3] == limit), key=lambda row: row[2])
            count = sum(row[3] == limit for row in rows)
            terminalreporter.write_line(
                f"{file}: {difference:.1e} of {limit:.0e} allowed, {count} compared ({name})"
            )
