"""Many requests in one go, an output for each: finished ones are skipped, interrupted ones continue."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanwan.errors import InputError, listed
from leanwan.flags import is_option
from leanwan.options import MemoryOptions

from ..utils.outside import parse_json
from .request import Request, tell_examples
from .settings import read_settings, settings

if TYPE_CHECKING:
    from .runner import Runner

log = logging.getLogger(__name__)

_FIELDS = [field.name for field in fields(Request) if is_option(field)]


@dataclass(frozen=True)
class Entry:
    """One request of a batch.

    Attributes:
        name: the entry's name in messages.
        request: what to make.
        open: settings that may differ from one run of the entry to the next, such as a random seed.
    """

    name: str
    request: Request
    open: frozenset[str] = frozenset()

    def made_by(self, found: Mapping[str, Any]) -> bool:
        """Whether the settings `found` in a file are the entry's, except for the open ones."""
        mine = settings(self.request)
        names = (set(mine) | set(found)) - self.open
        return all(mine.get(name) == found.get(name) for name in names)


def read_entries(path: str | os.PathLike, given: Mapping[str, Any], memory: Mapping[str, Any]) -> list[Entry]:
    """The requests that a file lists.

    Args:
        path: a text with a prompt in each line; or JSON lines, each an object with any fields of a Request. Empty
            lines are ignored.
        given, memory: fields of the Request and of its memory options for all lines. A result's name is save_file or,
            without it, the list's name, with the line's number.

    Raises:
        InputError: the file cannot be read, or a line cannot work; then the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path that no file can have
        not_text = isinstance(error, UnicodeDecodeError)
        reason = "it is not UTF-8 text" if not_text else getattr(error, "strerror", error)
        raise InputError(f"cannot be read: {reason}", "prompts", path) from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise InputError("has no line with a prompt in it", "prompts", path)
    as_json = path.suffix.lower() in (".jsonl", ".json")
    entries: list[Entry] = []
    for number, line in numbered:
        try:
            own = _object(line) if as_json else {"prompt": line}
            values = {"save_file": _numbered(path, given, number), **given, **own}
            if "save_file" not in own:
                values["save_file"] = _numbered(path, given, number)
            request = Request(**values, memory=MemoryOptions(**memory))
            if request.resume or request.decode_latents:
                raise InputError("belongs to one run, leave it out", ("resume", "decode_latents"))
        except (InputError, TypeError) as error:
            raise InputError(f"line {number}: {error}", "prompts", path) from error
        tell_examples(request, values, f"Line {number}: ")
        unset = {"base_seed"} if int(values.get("base_seed", -1)) < 0 else set()
        if request.use_prompt_extend:
            unset.add("prompt")
        entries.append(Entry(f"line {number}", request, frozenset(unset)))
    _check_names(path, entries)
    return entries


def run_entries(entries: Sequence[Entry], runner: Runner) -> int:
    """Runs the entries that are not done yet: encodes all their prompts, then makes one result after the other.

    A failed entry is logged and does not stop the others.

    Returns:
        How many failed.
    """
    failed: list[str] = []
    left = [entry for entry in entries if not is_done(entry)]
    requests = {entry.name: begun(entry) or entry.request for entry in left}
    for step in (runner.encode_ahead, runner.run):
        for name, request in requests.items():
            if name not in failed:
                try:
                    step(request)
                except Exception as error:
                    expected = isinstance(error, (InputError, OSError))
                    log.error(f"{name}: {' '.join(str(error).split())}", exc_info=None if expected else error)
                    failed.append(name)
    told = f", {len(failed)} failed: {', '.join(failed)}" if failed else ""
    log.info(f"{len(left) - len(failed)} made, {len(entries) - len(left)} were there{told}")
    return len(failed)


def is_done(entry: Entry) -> bool:
    """Whether the entry's result exists and was made with the entry's settings."""
    path = entry.request.save_file
    if entry.request.overwrite or not os.path.isfile(path):
        return False
    try:
        return entry.made_by(read_settings(path, "save_file"))
    except InputError:
        return False


def begun(entry: Entry) -> Request | None:
    """The request that continues from the entry's newest state file; None if there is none."""
    from .state import read_state

    paths = glob.glob(f"{glob.escape(entry.request.save_file)}.*.state")
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        try:
            request = read_state(path, memory=entry.request.memory, ckpt_dir=entry.request.ckpt_dir).request
        except InputError as error:
            log.warning(str(error))
            continue
        if entry.made_by(settings(request)):
            log.info(f"{entry.name} goes on from {path}")
            return request
    return None


def _object(line: str) -> dict[str, Any]:
    try:
        values = parse_json(line)
    except ValueError as error:
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError("not a JSON object")
    unknown = [name for name in values if name not in _FIELDS]
    if unknown:
        raise InputError(f"no such setting: {listed(unknown)}")
    return values


def _numbered(path: Path, given: Mapping[str, Any], number: int) -> str:
    """The path of the result of line `number`."""
    from ..tasks import TASKS

    still = given.get("task") in TASKS and TASKS[given["task"]].still
    base = Path(given.get("save_file") or path.with_suffix(".png" if still else ".mp4").name)
    if not base.name:
        raise InputError("is a directory; add a file name", "save_file", base)
    return str(base.with_name(f"{base.stem}_{number:03}{base.suffix}"))


def _check_names(path: Path, entries: Sequence[Entry]) -> None:
    taken: dict[str, Entry] = {}
    for entry in entries:
        other = taken.setdefault(os.path.realpath(entry.request.save_file), entry)
        if other is not entry:
            raise InputError(
                f"{other.name} and {entry.name} have one save_file, give each its own", "prompts", path
            )
