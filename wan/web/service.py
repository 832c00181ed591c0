"""What the parts of the page share: the folder, the queue, the planner, the gallery."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from leanwan.errors import InputError

from ..run.request import Request
from ..tasks import TASKS
from ..utils.files import replacing
from .child import Child, Message
from .gallery import Gallery
from .jobs import FILES, UPLOADS, Rules, check_file
from .queue import WORKER, Queue

GIB = 2**30
CARDS = (4, 6, 8, 12, 16, 24, 32, 48, 80)  # GiB
SHOWN_CARD = 8  # GiB of the card that is planned for where there is no accelerator
PLANS_KEPT = 500
_NO_PLANNING = ("prompt", "negative_prompt", "base_seed", "save_file", "preview")  # these change no plan


class LivePlanner:
    """Plans requests in a child process, since a plan may take seconds of computing. The newest request comes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._plans: dict[str, Future[Message]] = {}
        self._requests: dict[str, dict[str, Any]] = {}  # waiting, oldest first
        self._asked: str | None = None

    def plan(self, request: Request) -> Future[Message]:
        """The plan to come: {"plan": as wan.run.plan_request.report's} or {"error": LINE}. Plans are cached."""
        values = {key: value for key, value in request.to_json().items() if key not in _NO_PLANNING}
        key = json.dumps(values, sort_keys=True)
        with self._lock:
            if key not in self._plans:
                if len(self._plans) > PLANS_KEPT:
                    self._plans = {key: plan for key, plan in self._plans.items() if not plan.done()}
                self._plans[key] = Future()
            found = self._plans[key]
            if not found.done() and key != self._asked:
                self._requests.pop(key, None)
                self._requests[key] = request.to_json()
                self._ask()
            return found

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._child:
                self._child.kill()

    def _ask(self) -> None:
        if self._asked is None and self._requests:
            self._asked, request = self._requests.popitem()
            if self._child is None:
                self._child = Child(WORKER, [], self._take, self._after)
            self._child.send({"plan": self._asked, "request": request})

    def _take(self, message: Message) -> None:
        with self._lock:
            found = self._plans.get(self._asked)
            self._asked = None
            self._ask()
        if found and not found.done():
            found.set_result(message)

    def _after(self, code: int) -> None:
        with self._lock:
            self._child = None
            failed = self._plans.pop(self._asked, None) if self._asked else None
            self._asked = None
            self._ask()
        if failed and not failed.done():
            failed.set_result({"error": f"the planner ended by itself ({code})"})


class Service:
    """Everything behind the page.

    Args:
        rules: for jobs.
    """

    def __init__(self, rules: Rules):
        self.rules = rules
        try:
            (rules.folder / UPLOADS).mkdir(parents=True, exist_ok=True)
            self.queue = Queue(rules)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(
                f"cannot be used ({reason}); give another folder", "out", rules.folder
            ) from error
        self.planner = LivePlanner()
        self.gallery = Gallery(rules.folder)

    def close(self, seconds: float | None = None) -> None:
        """Ends all work, see Queue.close."""
        self.planner.close()
        self.queue.close(seconds)

    @cached_property
    def checkpoints(self) -> dict[str, str]:
        """The checkpoint of each task that has one: the first whose config.json fits, or cannot be read yet."""
        found: dict[str, str] = {}
        for name in self.rules.checkpoints:
            config = _config(name)
            for task, facts in TASKS.items():
                sizes = {key: value for key, value in facts.dit_config.items() if key != "eps"}
                fits = config is None or all(config.get(key) == value for key, value in sizes.items())
                if not facts.toy and fits:
                    found.setdefault(task, name)
        return found

    @property
    def tasks(self) -> list[str]:
        """All tasks, those that can be made here first."""
        return sorted(TASKS, key=lambda task: task not in self.checkpoints and not TASKS[task].toy)

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings with the checkpoint of their task, if they name none."""
        task = values.get("task")
        checkpoint = self.checkpoints.get(task) if isinstance(task, str) else None
        return {"ckpt_dir": checkpoint} | dict(values) if checkpoint else dict(values)

    def plan(self, values: Mapping[str, Any]) -> Future[Message]:
        """The plan of settings, which need no checkpoint: for their limit, for what the card has free or, without a
        card, for one of SHOWN_CARD GiB.

        Raises InputError for settings that cannot work.
        """
        settings = {key: value for key, value in values.items() if key != "ckpt_dir"}
        settings["vram_limit"] = self.planned_limit(settings.get("vram_limit"))
        return self.planner.plan(self.rules.request(settings, planning=True))

    def planned_limit(self, limit: Any) -> Any:
        """The GiB to plan for: the limit or, if it is auto, what the card has free, or SHOWN_CARD."""
        if limit not in (None, "auto"):
            return limit
        free = (self.queue.device or {}).get("free_bytes")
        return round(free / GIB, 1) if free else SHOWN_CARD

    @property
    def has_card(self) -> bool:
        """Whether there is an accelerator; false until the worker has reported."""
        return bool((self.queue.device or {}).get("name"))

    def upload(self, stream: BinaryIO, name: str, key: str) -> str:
        """Keeps an upload for a field, and returns its name in the folder, which depends on its contents alone.

        Raises InputError for a file that the field cannot take.
        """
        suffixes, given = list(FILES[key]), Path(name).suffix.lower()
        suffix = given if given in suffixes else suffixes[0]
        digest = hashlib.sha256()
        target = self.rules.folder / UPLOADS / f"new{suffix}"
        with replacing(target, keep=False) as temporary:
            with open(temporary, "wb") as file:
                while piece := stream.read(2**20):
                    digest.update(piece)
                    file.write(piece)
            try:
                check_file(temporary, key)
            except InputError as error:
                raise InputError(error.problem, key, Path(name).name) from error
            kept = f"{UPLOADS}/{digest.hexdigest()[:16]}{suffix}"
            os.replace(temporary, self.rules.folder / kept)
        return kept


def _config(checkpoint: str) -> dict[str, Any] | None:
    """The config.json of a checkpoint's folder; None if it cannot be read yet, as of a name on the hub."""
    try:
        found = json.loads((Path(checkpoint) / "config.json").read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return None
