"""The program that does the work: requests come in as lines of JSON, what happens goes out as lines of JSON.

It is a process of its own, so that a run can be ended at once and a crash ends nothing else; it lives on between jobs,
so that models stay loaded. With --lock it runs requests, one at a time on the whole machine; without, it plans them.

Comes in:   {"run": ID, "request": {...}}    {"pause": ID}    {"plan": ID, "request": {...}}
Goes out:   {"ready": {...}}    {"event": KIND, "job": ID, ...}    {"memory": {...}, "job": ID}
            {"note": TEXT, "job": ID}    {"ended": ID, "how": "done" | "paused" | "failed", ...}    {"planned": ID, ...}
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from leanwan.accelerator import NO_PAGE_LOCKED, is_out_of_memory, lacks_page_locked
from leanwan.errors import InputError

from ..run import Runner
from ..run.batch import Entry, begun, is_done
from ..run.interrupts import Interrupted, Interrupts
from ..run.plan_request import report
from ..utils.events import Event
from ..utils.program import log_to
from ..utils.progress import ProgressBars
from .child import Message, read_messages, write_message
from .jobs import request_from
from .memory_samples import Sampler, device_facts

log = logging.getLogger(__name__)

AGAIN_SECONDS = 2  # until a lock whose file had no room is tried again


class Worker:
    """Carries out messages, one after the other.

    Args:
        out: the stream for outgoing messages.
        device: its name, None for the accelerator of this machine.
    """

    def __init__(self, out: IO[str], device: str | None):
        self._out, self._writing, self._device = out, threading.Lock(), device
        self._waiting: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._job: str | None = None
        self._pauses: set[str] = set()  # jobs to pause, whether running or still waiting
        self.closing = False
        self._interrupts = Interrupts()
        self._bars = ProgressBars()
        self._runner = Runner(self._tell, self._interrupts)

    def tell(self, **message: Any) -> None:
        with self._writing:
            write_message(self._out, message)

    def note(self, text: str) -> None:
        """Sends a warning of the running job."""
        if self._job:
            self.tell(note=text, job=self._job)

    def listen(self, stream: IO[str]) -> None:
        """Takes messages until the stream ends; then has the running job stop after its step, and `work` return."""
        for message in read_messages(stream):
            if "pause" in message:
                self._pauses.add(message["pause"])
                if message["pause"] == self._job:
                    self._interrupts.ask()
            else:
                self._waiting.put(message)
        self.closing = True
        self._interrupts.ask()
        self._waiting.put(None)

    def work(self) -> None:
        """Carries out the messages that `listen` took, until it has no more."""
        while (message := self._waiting.get()) is not None:
            if "run" in message:
                self._run(message["run"], message["request"])
            else:
                self._plan(message["plan"], message["request"])

    def _run(self, name: str, values: dict[str, Any]) -> None:
        self._job = name
        if name in self._pauses:
            self._interrupts.ask()
        try:
            with Sampler(self._device, lambda sample: self.tell(memory=sample, job=name)):
                path = self._made(Entry(name, request_from(values)))
            self.tell(ended=name, how="done", path=str(path))
        except Interrupted:
            self.tell(ended=name, how="paused")
        except Exception as error:
            known = is_out_of_memory(error) or lacks_page_locked(error)
            if not isinstance(error, (InputError, OSError)) and not known:
                log.exception(f"{name} failed")
            self.tell(ended=name, how="failed", error=told(error))
        finally:
            self._job = None
            self._pauses.discard(name)
            if not self.closing:
                self._interrupts.withdraw()

    def _made(self, entry: Entry) -> Path:
        """The path of the result, which is made, resumed from a state, or there already."""
        if is_done(entry):
            return Path(entry.request.save_file)
        self._interrupts.check()
        return self._runner.run(begun(entry) or entry.request)

    def _plan(self, name: str, values: dict[str, Any]) -> None:
        try:
            chosen, beside = report(request_from(values))
            self.tell(planned=name, plan=beside | {"room": chosen.room, "line": chosen.line()})
        except Exception as error:
            if not isinstance(error, InputError):
                log.exception("A plan failed")
            self.tell(planned=name, error=told(error))

    def _tell(self, event: Event) -> None:
        self._bars(event)
        values = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        for key, value in values.items():
            if isinstance(value, datetime):
                values[key] = value.timestamp()
            elif isinstance(value, Path):
                values[key] = str(value)
        self.tell(event=type(event).__name__, job=self._job, **values)


class _Notes(logging.Handler):
    """Sends warnings to the queue, which shows them with the job."""

    def __init__(self, worker: Worker):
        super().__init__(logging.WARNING)
        self._worker = worker

    def emit(self, record: logging.LogRecord) -> None:
        self._worker.note(" ".join(record.getMessage().split()))


def told(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, InputError):
        return error.told()
    if lacks_page_locked(error):
        return NO_PAGE_LOCKED
    line = " ".join(str(error).split())[:300]
    if is_out_of_memory(error):
        return f"out of memory ({line})"
    return line if isinstance(error, OSError) else f"{type(error).__name__}: {line}"


@contextlib.contextmanager
def _alone(path: str, worker: Worker) -> Iterator[None]:
    """Holds the lock inside. Waits while an earlier worker finishes its step, or while the disk has no room for it."""
    lock = FileLock(path)
    while not lock.is_locked and not worker.closing:
        try:
            lock.acquire()
        except OSError as error:
            worker.tell(ready={"error": told(error)})
            time.sleep(AGAIN_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _listen(worker: Worker, runs: bool) -> None:
    worker.listen(sys.stdin)
    if not runs:
        os._exit(0)  # nobody waits for a plan any more


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lock")
    parser.add_argument("--device")
    args = parser.parse_args()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # prints go to standard error, not among the messages
    worker = Worker(out, args.device)
    log_to(sys.stderr)
    logging.getLogger("wan").addHandler(_Notes(worker))
    threading.Thread(target=_listen, args=(worker, bool(args.lock)), daemon=True).start()
    if not args.lock:
        if hasattr(os, "nice"):
            os.nice(10)  # the run comes first
        worker.work()
        return
    with _alone(args.lock, worker):
        try:
            worker.tell(ready=device_facts(args.device))
        except InputError as error:
            worker.tell(ready={"error": error.told("--")})
        worker.work()


if __name__ == "__main__":
    main()
