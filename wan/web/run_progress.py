"""How far the running job is, from the events of the worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .child import Message
from .memory_samples import Series


@dataclass
class Progress:
    """How far the running job is.

    Attributes:
        stages: seconds of each stage that is done, by name.
        stage: the current stage.
        doing: the current stage, or other work such as loading.
        done, total, seconds_left: of the steps of `doing`.
        end: when the run will be done, seconds since 1970.
        preview: (path, step) of the last preview.
        plan: the memory plan in a line; None if nothing was planned.
        series: the samples of the run's memory.
    """

    stages: dict[str, float] = field(default_factory=dict)
    stage: str | None = None
    doing: str | None = None
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    end: float | None = None
    preview: tuple[str, int] | None = None
    plan: str | None = None
    series: Series = field(default_factory=Series)

    def take(self, message: Message) -> None:
        """Updates the progress by the message of an event."""
        kind = message["event"]
        if kind == "StageStarted":
            self.stage = self.doing = message["name"]
            self.done = self.total = 0
            self.seconds_left = None
        elif kind == "Step":
            self.doing, self.done, self.total = message["stage"], message["done"], message["total"]
            self.seconds_left = message["seconds_left"]
        elif kind == "StageDone":
            self.stages[message["name"]] = message["seconds"]
            self.stage = None
        elif kind == "Expected":
            self.end = message["end"]
        elif kind == "Previewed":
            self.preview = message["path"], message["step"]
        elif kind == "Planned":
            self.plan = message["line"]
            self.series.plan, self.series.room = message["stages"], message["room"]

    def to_json(self) -> dict[str, Any]:
        names = ("stages", "stage", "doing", "done", "total", "seconds_left", "end", "plan")
        values = {name: getattr(self, name) for name in names}
        last = self.series.points[-1][2] if self.series.points else {}
        return values | {"preview_step": self.preview and self.preview[1], "memory": dict(last)}
