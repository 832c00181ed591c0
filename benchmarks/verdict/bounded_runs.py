"""Runs a check in a process of its own, within a limit of time, and reads what it found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from .checks import Check
from .report import FAIL, INCOMPLETE, Result

ROOT = Path(__file__).resolve().parents[2]
LOG_LINES = 15  # the end of a failing check's output, in the report
STOPPED = {
    -getattr(signal, name) for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
}


def run(
    check: Check, limit: float, folder: Path, *, rehearse: bool = False, tree: str | None = None
) -> Result:
    """The Result of a check that may take `limit` seconds.

    The check itself reports whether it passed, failed or was skipped. A process that ends without that report fails;
    one that runs out of time or is killed from outside is incomplete, with what it measured until then.

    Args:
        folder: where the whole output is kept, as NAME.log.
        rehearse, tree: see Bench.

    Raises:
        KeyboardInterrupt: after the process is gone; its attribute `result` is the incomplete Result.
    """
    stem = check.name.replace(" ", "-")
    log, told = folder / f"{stem}.log", folder / f"{stem}.jsonl"
    job = {
        "function": check.function,
        "arguments": check.arguments,
        "rehearse": rehearse,
        "tree": tree,
        "told": str(told),
    }
    command = [sys.executable, "-m", "benchmarks.verdict.child_process", json.dumps(job)]
    told.unlink(missing_ok=True)
    start, code, interrupted = time.monotonic(), None, None
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONIOENCODING": "utf-8", "PYTHONFAULTHANDLER": "1"},
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            pass
        except KeyboardInterrupt as error:
            interrupted = error
        finally:
            _end(process)
    result = Result(check.name, seconds=round(time.monotonic() - start, 1), limit=round(limit, 1))
    _read(told, result)
    if interrupted:
        result.status, reason = INCOMPLETE, "interrupted"
    elif code is None:
        result.status, reason = INCOMPLETE, f"not done after {limit:.0f} s"
    elif code in STOPPED:
        result.status, reason = INCOMPLETE, f"killed by signal {-code}, for lack of memory perhaps"
    elif code or result.status not in ("pass", "fail", "skipped"):
        result.status, reason = FAIL, f"the process ended with exit code {code}"
    else:
        reason = None
    if reason:
        result.faults.append(reason)
    if result.status in (FAIL, INCOMPLETE):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        result.log = [line for line in lines if line.strip()][-LOG_LINES:]
    told.unlink(missing_ok=True)
    if interrupted:
        vars(interrupted)["result"] = result
        raise interrupted
    return result


def _end(process: subprocess.Popen) -> None:
    """Ends the process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    if process.poll() is None:
        process.kill()
    process.wait()


def _read(told: Path, result: Result) -> None:
    """Adds to `result` what the check has reported; a last line that was cut short is ignored."""
    if not told.is_file():
        return
    for line in told.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            finding = json.loads(line)
            if "number" in finding:
                result.numbers[finding["number"]] = finding["value"]
            elif "fault" in finding:
                result.faults.append(finding["fault"])
            else:
                result.status = finding["status"]
                result.faults += [finding["reason"]] if "reason" in finding else []
