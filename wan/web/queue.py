"""The queue of jobs: kept in files, run in order, one at a time, by a worker process.

To pause a job, the queue tells the worker, which stops after the current step with the run's state on the disk. To
cancel one, the queue kills the worker at once. When this process ends, in whatever way, the worker stops as for a
pause, and the next queue over the same folder resumes the job that was running.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from leanwan.errors import InputError

from ..run.outputs import check_outputs, check_room
from ..run.request import Request
from .child import Child, Message
from .job_files import JobFiles
from .jobs import (
    CANCELLED,
    DONE,
    FAILED,
    PAUSED,
    PAUSING,
    QUEUED,
    RUNNING,
    Job,
    Rules,
    check_files,
    new_id,
    without_weights,
)
from .run_progress import Progress

log = logging.getLogger(__name__)

WORKER = f"{__package__}.worker"
IDLE_SECONDS = 300  # without work, until the worker is ended and its models are dropped
AGAIN_SECONDS = 5  # until a write or a start that failed for lack of room is tried again
ENDED_KEPT = 200  # finished, failed and cancelled jobs whose files stay
_OVER = (DONE, FAILED, CANCELLED)


class WrongStatus(Exception):
    """The status of a job does not allow what is asked of it."""


class Queue:
    """The jobs of a folder. Any thread may call.

    A full disk does not stop the queue: jobs go on in memory, the next one waits until there is room, and then all
    files are written.

    Attributes:
        progress: of each job that has run since the start, by id.
        latest: the id of the job that was started last.
        device: what the worker reports of its device; None until then.

    Args:
        rules: for settings; the jobs are in `rules.folder`.

    Raises InputError: another server uses the folder.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        self.device: dict[str, Any] | None = None
        self.progress: dict[str, Progress] = {}
        self.latest: str | None = None
        self._ledger = JobFiles(rules.folder / ".wan" / "jobs")
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._turn = 0  # counts the changes of all jobs, since clocks may go back
        self._owner = FileLock(rules.folder / ".wan" / "server.lock")
        try:
            self._owner.acquire(timeout=0)
        except Timeout:
            raise InputError("another server uses it, give each its own", "out", rules.folder) from None
        self._child: Child | None = None
        self._idle: threading.Timer | None = None
        self._again: threading.Timer | None = None
        self._waits_for: str | None = None
        self._closed = False
        self._load()
        with self._lock:
            with contextlib.suppress(OSError):  # tried again when there is a job
                self._start_child()  # it reports the device
            self._advance()

    # Reading

    def jobs(self) -> list[Job]:
        """All jobs: the running one, then the waiting ones in order, then the ended ones, newest first."""
        with self._lock:
            waiting = sorted((job for job in self._jobs.values() if job.status not in _OVER), key=_order)
            over = sorted((job for job in self._jobs.values() if job.status in _OVER), key=_recency)
            return waiting + over

    def get(self, name: str) -> Job:
        """A job. Raises KeyError."""
        with self._lock:
            return self._jobs[name]

    @property
    def trouble(self) -> str | None:
        """Why the queue waits or its files are not written, in a line; None if all is well."""
        return self._waits_for or self._ledger.trouble

    # Changing

    def add(self, settings: dict[str, Any]) -> Job:
        """A new job at the end. Raises InputError for settings that cannot work, OSError if its file has no room."""
        name = new_id()
        request = self.rules.request(settings, name)
        check_files(request)
        check_outputs(request)
        return self.add_request(name, request)

    def add_request(self, name: str, request: Request) -> Job:
        """A new job of a checked request. Raises OSError if its file has no room."""
        with self._lock:
            values = json.loads(json.dumps(request.to_json()))  # as read back from the file
            self._turn += 1
            job = Job(name, values, place=self._last_place() + 1, created=time.time(), number=self._turn)
            self._ledger.add(job)
            self._jobs[name] = job
            self._advance()
            return job

    def cancel(self, name: str) -> Job:
        """Ends a job for good, at once; only its entry in the list stays."""
        with self._lock:
            job = self._expect(name, QUEUED, RUNNING, PAUSING, PAUSED)
            ran = job.status in (RUNNING, PAUSING)
            self._set(job, CANCELLED, ended=time.time())
            if ran:
                child, self._child = self._child, None
                child.kill()  # when it has ended, the job's files are deleted
                self._advance()
            else:
                self._remove_files(job)
            return job

    def pause(self, name: str) -> Job:
        """Stops a job after its current step, until it is resumed."""
        with self._lock:
            job = self._expect(name, QUEUED, RUNNING)
            if job.status == QUEUED:
                self._set(job, PAUSED)
            else:
                self._set(job, PAUSING)
                self._child.send({"pause": name})
            return job

    def resume(self, name: str) -> Job:
        """Queues a paused or failed job again, in its place; it continues from its state if it has one."""
        with self._lock:
            job = self._expect(name, PAUSED, FAILED)
            self._set(job, QUEUED, error=None, ended=None)
            self._advance()
            return job

    def move(self, name: str, by: int) -> Job:
        """Moves a waiting job `by` places later in the queue, or earlier if negative."""
        with self._lock:
            job = self._expect(name, QUEUED, PAUSED)
            line = [job for job in self.jobs() if job.status in (QUEUED, PAUSED)]
            here = line.index(job)
            there = max(0, min(len(line) - 1, here + by))
            places = [job.place for job in line]
            line.insert(there, line.pop(here))
            for place, moved in zip(places, line):
                if moved.place != place:
                    moved.place = place
                    self._ledger.keep(moved)
            self._try_again()
            return job

    def remove(self, name: str) -> None:
        """Removes an ended job from the list; its result stays."""
        with self._lock:
            self._expect(name, *_OVER)
            self._forget(name)

    def close(self, seconds: float | None = None) -> None:
        """Stops the running job after its step, with its state on the disk, for the next queue to resume.

        Args:
            seconds: how long to wait for that before the worker is killed; None for as long as it takes.
        """
        with self._lock:
            self._closed = True
            child = self._child
            for timer in filter(None, (self._idle, self._again)):
                timer.cancel()
        if child:
            child.finish(seconds)
        with self._lock:
            self._ledger.catch_up()
        self._owner.release()

    # Running

    def _load(self) -> None:
        for job in self._ledger.read():
            self._jobs[job.id] = job
            self._turn = max(self._turn, job.number, job.turn)
        for job in self.jobs():
            if job.status == RUNNING:
                self._set(job, QUEUED)
            elif job.status == PAUSING:
                self._set(job, PAUSED)
            elif job.status == CANCELLED:  # the worker may not have ended before this process did
                self._remove_files(job)

    def _start_child(self) -> None:
        lock = str(self.rules.folder / ".wan" / "worker.lock")
        arguments = ["--lock", lock] + (["--device", self.rules.device] if self.rules.device else [])
        child: Child

        def heard(message: Message) -> None:
            with self._lock:
                if child is self._child:
                    self._take(message)

        def ended(code: int) -> None:
            with self._lock:
                for job in self._jobs.values():
                    if job.status == CANCELLED:
                        self._remove_files(job)
                if child is self._child:
                    self._child = None
                    self._after(code)

        child = Child(WORKER, arguments, heard, ended)
        self._child = child

    def _advance(self) -> None:
        """Starts the next job if none runs; a start that fails is tried again later."""
        waited_for, self._waits_for = self._waits_for, None
        if self._closed or self._running():
            return
        job = next((job for job in self.jobs() if job.status == QUEUED), None)
        if job is None:
            self._idle = self._idle or _timer(IDLE_SECONDS, self._give_up_models)
            return
        if self._idle:
            self._idle.cancel()
            self._idle = None
        try:
            check_room(without_weights(job.request))
            if self._child is None:
                self._start_child()
        except (InputError, OSError) as error:
            self._waits_for = f"the queue waits: {error}"
            if self._waits_for != waited_for:
                log.warning(self._waits_for)
        else:
            self._start(job)
        self._try_again()

    def _start(self, job: Job) -> None:
        """Has the worker run a job, unless the job's file cannot be written."""
        started, notes = job.started, job.notes
        self._set(job, RUNNING, started=time.time(), notes=[])
        if self._ledger.trouble:
            self._set(job, QUEUED, started=started, notes=notes)
            return
        self.progress[job.id], self.latest = Progress(), job.id
        self._child.send({"run": job.id, "request": job.request})

    def _try_again(self) -> None:
        """Sets a timer that tries failed writes and starts again, if there are any."""
        if self.trouble and not self._again and not self._closed:
            self._again = _timer(AGAIN_SECONDS, self._catch_up)

    def _catch_up(self) -> None:
        with self._lock:
            self._again = None
            self._ledger.catch_up()
            self._advance()
            self._try_again()

    def _take(self, message: Message) -> None:
        """Handles a message of the worker."""
        if "ready" in message:
            self.device = message["ready"]
            return
        job = self._jobs.get(message.get("ended") or message.get("job"))
        if job is None or job.status == CANCELLED:
            return
        progress = self.progress[job.id]
        if "event" in message:
            progress.take(message)
        elif "memory" in message:
            progress.series.add(progress.stage or "load", message["memory"])
        elif "note" in message:
            job.notes = [*job.notes, message["note"]][-20:]
        elif message["how"] == "done":
            self._set(job, DONE, result=message["path"], ended=time.time())
            self._remove_files(job)
        elif message["how"] == "paused":
            # The job was paused, or the server ends: then the job is queued for the next start.
            self._set(job, PAUSED if job.status == PAUSING else QUEUED)
        else:
            self._set(job, FAILED, error=message["error"], ended=time.time())
        self._advance()

    def _after(self, code: int) -> None:
        """Handles an end of the worker that nobody asked for: its job has failed."""
        for job in self._jobs.values():
            if job.status in (RUNNING, PAUSING) and not self._closed:
                reason = f"signal {-code}" if code < 0 else f"code {code}"
                error = f"the process that ran it ended by itself ({reason}); is there enough RAM?"
                self._set(job, FAILED, error=error, ended=time.time())
        self._advance()

    def _give_up_models(self) -> None:
        with self._lock:
            if self._child is None or self._running() or self._closed:
                return
            child, self._child = self._child, None
        child.finish()

    def _running(self) -> bool:
        return any(job.status in (RUNNING, PAUSING) for job in self._jobs.values())

    def _expect(self, name: str, *statuses: str) -> Job:
        job = self.get(name)
        if job.status not in statuses:
            raise WrongStatus(f"{name} is {job.status}")
        return job

    def _set(self, job: Job, status: str, **values: Any) -> None:
        self._turn += 1
        job.status, job.turn = status, self._turn
        for key, value in values.items():
            setattr(job, key, value)
        self._ledger.keep(job)
        over = sorted((job for job in self._jobs.values() if job.status in _OVER), key=_recency)
        for old in over[ENDED_KEPT:]:
            self._forget(old.id)
        self._try_again()

    def _forget(self, name: str) -> None:
        self._remove_files(self._jobs.pop(name))
        self.progress.pop(name, None)
        self._ledger.forget(name)
        self._try_again()

    def _remove_files(self, job: Job) -> None:
        """Deletes a job's states and previews."""
        states = glob.glob(f"{glob.escape(job.request['save_file'])}.*.state")
        previews = self.rules.folder / ".wan" / "previews"
        stem = Path(job.request["save_file"]).name
        for path in (*map(Path, states), *previews.glob(f"{glob.escape(stem)}.*")):
            with contextlib.suppress(OSError):
                path.unlink()

    def _last_place(self) -> float:
        return max((job.place for job in self._jobs.values()), default=0.0)


def _order(job: Job) -> tuple[bool, float]:
    return job.status not in (RUNNING, PAUSING), job.place


def _recency(job: Job) -> tuple[int, float]:
    return -job.turn, -(job.ended or 0)


def _timer(seconds: float, do: Callable[[], None]) -> threading.Timer:
    """Calls `do` after `seconds`, in a daemon thread."""
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()
    return timer
