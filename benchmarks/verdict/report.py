"""The report: report.json for programs, report.md for people, both whole at any moment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from wan.utils.files import replacing

PASS, FAIL, SKIPPED, INCOMPLETE = "pass", "fail", "skipped", "incomplete"
NOT_RUN = "not run"


@dataclass
class Result:
    """The result of a check.

    Attributes:
        status: pass, fail, skipped, incomplete (out of time, killed), or not run.
        limit: seconds that it was given.
        numbers: what it measured, by name.
        faults: why it failed, was skipped or is incomplete.
        log: the last lines of its output, unless it passed.
    """

    name: str
    status: str = NOT_RUN
    seconds: float = 0.0
    limit: float = 0.0
    numbers: dict = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)


class Report:
    """The results of a verdict, written to files in `folder` after each check.

    Args:
        folder: must exist.
        names: of all checks, in order.
        about: texts and numbers for the head of the report, by name.
    """

    def __init__(self, folder: str | Path, names: Iterable[str], about: dict[str, Any]):
        self.folder = Path(folder)
        self.about = {"started": _now()} | about
        self.results = [Result(name) for name in names]
        self.write()

    @property
    def verdict(self) -> str:
        statuses = {result.status for result in self.results}
        if FAIL in statuses:
            return FAIL
        return INCOMPLETE if statuses & {INCOMPLETE, NOT_RUN} else PASS

    @property
    def exit_code(self) -> int:
        return {PASS: 0, FAIL: 1, INCOMPLETE: 2}[self.verdict]

    def add(self, result: Result) -> None:
        """Puts the result of a check in its place, and writes the report."""
        names = [known.name for known in self.results]
        self.results[names.index(result.name)] = result
        self.write()

    def write(self) -> None:
        document = {"verdict": self.verdict} | self.about | {"checks": [asdict(r) for r in self.results]}
        for name, text in (("report.json", json.dumps(document, indent=1)), ("report.md", self._markdown())):
            with replacing(self.folder / name) as temporary:
                Path(temporary).write_text(text + "\n", encoding="utf-8")

    def _markdown(self) -> str:
        lines = [f"# Verdict: {self.verdict}", ""]
        lines += [f"- {name}: {value}" for name, value in self.about.items()]
        lines += ["", "| check | result | seconds | numbers |", "|---|---|---:|---|"]
        for result in self.results:
            seconds = f"{result.seconds:.0f}" if result.seconds else ""
            numbers = _cell(_flat(result.numbers))
            lines.append(f"| {result.name} | {result.status} | {seconds} | {numbers} |")
        for result in self.results:
            if result.faults:
                lines += ["", f"## {result.name}: {result.status}", ""]
                lines += [f"- {' '.join(fault.split())}" for fault in result.faults]
            if result.log:
                lines += ["", "```", *(line.replace("```", "'''") for line in result.log), "```"]
        return "\n".join(lines)


def _flat(numbers: dict[str, Any]) -> str:
    """Names and values as text: "a 1, b 2; c: d 3, e 4"."""
    plain = [f"{name} {value}" for name, value in numbers.items() if not isinstance(value, dict)]
    nested = [f"{name}: {_flat(value)}" for name, value in numbers.items() if isinstance(value, dict)]
    return "; ".join([", ".join(plain)] * bool(plain) + nested)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
