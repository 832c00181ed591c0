"""A clock that goes back: what changed last is still what the page shows."""

import os
import shutil
import time
from pathlib import Path

import pytest

from wan.web import queue as web_queue
from wan.web import views
from wan.web.jobs import Rules
from wan.web.service import Service

TOY = {"task": "t2i-tiny", "prompt": "a red ball", "sample_steps": 2}
DAY = 86400


class Worker:
    """Stands for the worker's process."""

    def __init__(self, module, arguments, on_message, on_exit):
        self.say = on_message
        self.send = self.finish = lambda *args: None
        Worker.last = self


class Clock:
    """One that is put back a day at each job."""

    def __init__(self, monkeypatch):
        self.days = 0
        for name, unit in (("time", 1), ("time_ns", 10**9)):
            real = getattr(time, name)
            monkeypatch.setattr(time, name, lambda real=real, unit=unit: real() - self.days * DAY * unit)
        monkeypatch.setattr(web_queue, "new_id", lambda: f"{10**6 - self.days:08}-x")


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(web_queue, "Child", Worker)
    monkeypatch.setattr(views, "_FRESH", 0)
    return Clock(monkeypatch)


def made(service, clock, seed):
    """A job from its start to its end, with its result."""
    clock.days += 1
    job = service.queue.add(TOY | {"base_seed": seed, "prompt": f"ball {seed}"})
    Worker.last.say({"event": "Planned", "job": job.id, "line": "", "stages": {}, "room": seed * 2**30})
    Worker.last.say({"memory": {"ram": 1, "reserved": 1, "allocated": 1}, "job": job.id})
    clock.days += 1
    path = Path(job.request["save_file"])
    shutil.copy(Path(__file__).parents[1] / "examples" / "toy_image.png", path)
    os.utime(path, (time.time(), time.time()))
    Worker.last.say({"ended": job.id, "how": "done", "path": str(path)})
    return job


def test_what_changed_is_sent(clock, tmp_path):
    service = Service(Rules(tmp_path))
    shown = views.Views(service)
    try:
        known = shown.since("0")["version"]
        assert shown.since(known)["parts"] == {}
        for seed in range(1, 5):
            clock.days += 1
            service.queue.add(TOY | {"base_seed": seed})
            told = shown.since(known)
            assert set(told["parts"]) & {"queue", "now"}, "stale"
            known = told["version"]
            assert shown.since(known)["parts"] == {}
        later = views.Views(service)  # another server's: the tab has a version of the first
        assert set(later.since(known)["parts"]) == set(views.PARTS)
        for strange in ("", "0", "-", "x-1", known + "0", known.replace("-", "-x"), "9" * 5000, f"{known}-1"):
            assert later.since(strange)["version"]
        own = later.since("")["version"]
        assert later.since(own + "0" * 5000)["parts"] == {} == later.since(own)["parts"]
    finally:
        service.close()


def test_the_last_is_the_newest(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(views, "SHOWN_RESULTS", 2)
    service = Service(Rules(tmp_path))
    shown = views.Views(service)
    try:
        for seed in range(1, 6):
            job = made(service, clock, seed)
            parts = shown.since("")["parts"]
            assert f"{job.id}.png" in parts["now"] and f"limit {seed}.00 GiB" in parts["memory"]
            assert parts["gallery"].index(f"{job.id}.png") < 200
            assert service.queue.jobs()[0].id == job.id
        names = [job.id for job in service.queue.jobs()]
    finally:
        service.close()
    again = Service(Rules(tmp_path))
    try:
        assert [job.id for job in again.queue.jobs()] == names
        assert again.queue.add(TOY).number > again.queue.get(names[0]).turn
    finally:
        again.close()


def test_the_oldest_are_forgotten(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(web_queue, "ENDED_KEPT", 2)
    service = Service(Rules(tmp_path))
    try:
        jobs = [made(service, clock, seed).id for seed in range(4)]
        assert [job.id for job in service.queue.jobs()] == [jobs[3], jobs[2]]
    finally:
        service.close()


def test_the_last_seed_is_the_last_jobs(clock, tmp_path):
    pytest.importorskip("gradio", reason="the page's extra is not installed")
    from wan.web.page import Page

    service = Service(Rules(tmp_path))
    try:
        page = Page(service)
        for seed in (11, 12, 13):
            clock.days += 1
            service.queue.add(TOY | {"base_seed": seed})
            assert page._last_seed() == str(seed)
    finally:
        service.close()


def test_a_replaced_result_has_its_own_poster(clock, tmp_path):
    service = Service(Rules(tmp_path))
    examples = Path(__file__).parents[1] / "examples"
    try:
        posters = []
        for name in ("toy_first.png", "toy_last.png"):
            shutil.copy(examples / name, tmp_path / "new")
            os.utime(tmp_path / "new", (10**9, 10**9))
            os.replace(tmp_path / "new", tmp_path / "same.png")
            posters.append(service.gallery.poster("same.png"))
        assert posters[0] != posters[1]
    finally:
        service.close()
