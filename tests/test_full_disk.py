"""The page's queue while nothing can be written: it goes on, says so, and is whole again when there is room."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from wan.web import queue as web_queue
from wan.web import worker as web_worker
from wan.web.child import Child
from wan.web.jobs import Rules, read_job
from wan.web.queue import Queue, WrongStatus

ROOT = Path(__file__).parents[1]
TOY = {"task": "t2v-tiny", "base_seed": 7, "prompt": "a red ball", "frame_num": 5, "sample_steps": 2}


class Disk:
    """Counts the queue's writes; from a number on, once or for good, they find no room until it is freed."""

    def __init__(self, monkeypatch):
        self.writes, self.refused, self.full_at, self.once = 0, 0, None, False
        for name in ("write_text", "unlink"):
            monkeypatch.setattr(Path, name, self._wrapped(getattr(Path, name)))

    def _wrapped(self, function):
        def wrapped(path, *args, **kwargs):
            if path.parent.name == "jobs" and path.suffix == ".json" and (path.exists() or args):
                self._count(path)
            return function(path, *args, **kwargs)

        return wrapped

    def _count(self, path):
        self.writes += 1
        if self.full_at is not None and self.writes >= self.full_at:
            self.full_at = None if self.once else self.full_at
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def free(self):
        self.full_at = None


class Worker:
    """Stands for the worker's process."""

    made: list["Worker"] = []

    def __init__(self, module, arguments, on_message, on_exit):
        self.say, self.on_exit = on_message, on_exit
        Worker.made.append(self)

    def send(self, message):
        pass

    def kill(self):
        self.on_exit(-9)

    def finish(self, seconds=None):
        pass


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@contextlib.contextmanager
def opened(folder):
    (folder / "uploads").mkdir(parents=True)
    Worker.made = []
    queue = Queue(Rules(folder))
    try:
        yield queue
    finally:
        queue.close()


def running(queue):
    return next((job.id for job in queue.jobs() if job.status in ("running", "pausing")), None)


def added(queue, disk):
    while True:
        try:
            return queue.add(TOY).id
        except OSError as error:  # the client is told, and nothing is half there
            assert "jobs cannot be kept in" in str(error) and "No space left on device" in str(error)
            disk.free()


def lived_through(queue, disk):
    """Every kind of change of a queue, whatever is refused meanwhile; then there is room, and all is done."""
    first, second, third, fourth = (added(queue, disk) for _ in range(4))
    for ask in (queue.pause, lambda name: queue.move(name, -1), queue.resume):
        ask(third)
    queue.cancel(second)

    def say(**message):
        name = running(queue)
        if name:
            Worker.made[-1].say({"job": name} | {key: value or name for key, value in message.items()})

    say(note="a warning")
    say(ended=None, how="done", path="x.mp4")
    with contextlib.suppress(WrongStatus, KeyError):
        queue.pause(running(queue))
    say(ended=None, how="paused")
    if running(queue):
        Worker.made[-1].on_exit(-11)
    say(ended=None, how="failed", error="a line")
    for job in queue.jobs():
        if job.status in ("paused", "failed"):
            queue.resume(job.id)
    queue.remove(second)
    behind = disk.full_at is not None and disk.refused
    assert not behind or "No space left on device" in queue.trouble
    disk.free()
    until(lambda: not queue.trouble)
    while any(job.status != "done" for job in queue.jobs()):
        until(lambda: running(queue))
        say(ended=None, how="done", path="x.mp4")
    assert {job.id for job in queue.jobs()} == {first, third, fourth}


def test_no_write_ends_the_queue(tmp_path, monkeypatch):
    monkeypatch.setattr(web_queue, "Child", Worker)
    monkeypatch.setattr(web_queue, "AGAIN_SECONDS", 0.01)
    disk = Disk(monkeypatch)
    with opened(tmp_path / "whole") as queue:
        lived_through(queue, disk)
    every = disk.writes
    assert every > 20 and not disk.refused
    for once in (True, False):
        for number in range(1, every + 1):
            disk.writes, disk.refused, disk.full_at, disk.once = 0, 0, number, once
            with opened(tmp_path / f"{number}{once}") as queue:
                lived_through(queue, disk)
                assert disk.refused or number > every - 5
                kept = {path.stem: read_job(path) for path in queue._ledger._folder.glob("*.json")}
                assert kept == {job.id: job for job in queue.jobs()}
    print(f"{every} writes, refused once and for good")


def test_the_client_is_told(tmp_path, monkeypatch):
    pytest.importorskip("fastapi", reason="the page's extra is not installed")
    from starlette.testclient import TestClient

    from wan.web import views
    from wan.web.api import build_app
    from wan.web.service import Service

    monkeypatch.setattr(web_queue, "Child", Worker)
    monkeypatch.setattr(web_queue, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(views, "_FRESH", 0)
    disk = Disk(monkeypatch)
    service = Service(Rules(tmp_path))
    client = TestClient(build_app(service), raise_server_exceptions=False)
    try:
        name = client.post("/jobs", json=TOY).json()["id"]
        disk.full_at = 0
        refused = client.post("/jobs", json=TOY)
        assert refused.status_code == 507 and "make room there" in refused.json()["error"]
        assert client.post(f"/jobs/{name}/pause").json()["status"] == "pausing"
        told = client.get("/jobs").json()
        assert len(told["jobs"]) == 1 and "No space left on device" in told["trouble"]
        assert "No space left on device" in client.get("/live").json()["parts"]["queue"]
        disk.free()
        until(lambda: client.get("/jobs").json()["trouble"] is None)
        assert "No space" not in client.get("/live").json()["parts"]["queue"]
    finally:
        service.close()


def test_a_job_waits_for_the_room_that_it_needs(tmp_path, monkeypatch):
    from leanwan.errors import InputError

    monkeypatch.setattr(web_queue, "Child", Worker)
    monkeypatch.setattr(web_queue, "AGAIN_SECONDS", 0.01)
    with opened(tmp_path / "out") as queue:
        first, second = queue.add(TOY), queue.add(TOY)

        def no_room(request):
            raise InputError("the disk has only 1 MB left", "save_file", request.save_file)

        with monkeypatch.context() as full:
            full.setattr(web_queue, "check_room", no_room)
            Worker.made[-1].say({"ended": first.id, "how": "done", "path": "x.mp4"})
            assert queue.get(second.id).status == "queued" and "only 1 MB left" in queue.trouble
        until(lambda: queue.get(second.id).status == "running")
        assert not queue.trouble


def test_no_process_can_be_started(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(web_queue, "AGAIN_SECONDS", 0.01)
    monkeypatch.setattr(web_queue, "Child", refuse)
    with opened(tmp_path / "out") as queue:
        job = queue.add(TOY)
        assert queue.get(job.id).status == "queued" and "the queue waits" in queue.trouble
        monkeypatch.setattr(web_queue, "Child", Worker)
        until(lambda: queue.get(job.id).status == "running")


def test_whoever_listens_hears_the_next_message(tmp_path, monkeypatch):
    (tmp_path / "talker.py").write_text("for n in range(3): print('{\"n\": %d}' % n)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heard, over = [], threading.Event()

    def hear(message):
        heard.append(message["n"])
        raise OSError(errno.ENOSPC, "no room")

    Child("talker", [], hear, lambda code: over.set())
    assert over.wait(60) and heard == [0, 1, 2]


def test_a_worker_waits_for_its_lock(monkeypatch):
    class Lock:
        is_locked, tries = False, 0

        def __init__(self, path):
            pass

        def acquire(self):
            self.tries += 1
            if self.tries < 3:
                raise OSError(errno.ENOSPC, "no room")
            self.is_locked = True

        def release(self):
            told.append("released")

    class Teller:
        closing = False

        def tell(self, **message):
            told.append(message["ready"]["error"])

    told: list[str] = []
    monkeypatch.setattr(web_worker, "FileLock", Lock)
    monkeypatch.setattr(web_worker, "AGAIN_SECONDS", 0)
    with web_worker._alone("lock", Teller()):
        assert len(told) == 2 and "no room" in told[0]
    assert told[-1] == "released"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_log_ends_no_run(tmp_path):
    """Really: all that the worker logs, progress bars and tracebacks too, finds no room."""
    (tmp_path / "uploads").mkdir()
    (tmp_path / ".wan").mkdir()
    whole = Rules(tmp_path).request(TOY, "made").to_json()
    command = [sys.executable, "-m", "wan.web.worker", "--lock", str(tmp_path / "lock")]
    ended = {}
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=full, text=True
        ) as child,
    ):
        for name, request in (("bad", whole | {"memory": 7}), ("good", whole)):
            child.stdin.write(json.dumps({"run": name, "request": request}) + "\n")
        child.stdin.flush()
        for line in child.stdout:
            message = json.loads(line)
            if "ended" in message:
                ended[message["ended"]] = message["how"]
            if message.get("ended") == "good":
                break
        child.stdin.close()
    assert ended == {"bad": "failed", "good": "done"} and Path(whole["save_file"]).is_file()
