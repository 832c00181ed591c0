"""A job: a request, its status and the file that keeps it; and requests made from settings that are not trusted."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from leanwan.errors import InputError
from leanwan.flags import is_option
from leanwan.options import MemoryOptions

from ..run.request import ANY_CHECKPOINT, GPUS, KEEPING, PLANNED, PROMPT_EXTENSION, Request
from ..run.settings import checked, memory_options
from ..tasks import DEFAULT_TASK, EXAMPLES, TASKS
from ..utils.files import replacing
from ..utils.video import VideoFile, open_image
from ..weights.lora import lora_identity, parse_lora

# The statuses of a job.
QUEUED, RUNNING, PAUSING, PAUSED = "queued", "running", "pausing", "paused"
DONE, FAILED, CANCELLED = "done", "failed", "cancelled"
STATUSES = (QUEUED, RUNNING, PAUSING, PAUSED, DONE, FAILED, CANCELLED)

_OWN = ("save_file", "device")  # the server decides these
_APART = (KEEPING, PROMPT_EXTENSION, GPUS)
_REQUEST = {
    item.name
    for item in fields(Request)
    if is_option(item) and item.metadata["group"] not in _APART and item.name not in _OWN
}
_MEMORY = {item.name: item for item in fields(MemoryOptions) if item.name != "offload_folder"}
PICTURES = ("image", "first_frame", "last_frame")
VIDEOS = ("src_video", "src_mask")
MANY_PICTURES = "src_ref_images"
UPLOADS = "uploads"  # folder, in the output folder
_PICTURE = {
    **{".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"},
    **{".gif": "image/gif", ".bmp": "image/bmp", ".tif": "image/tiff", ".tiff": "image/tiff"},
}
_VIDEO = {
    **{".mp4": "video/mp4", ".mov": "video/quicktime", ".webm": "video/webm"},
    **{".mkv": "video/x-matroska", ".avi": "video/x-msvideo"},
}
_LORA = {".safetensors": "application/octet-stream"}
# The fields that are files, each with the suffixes that an upload keeps and the content types to serve them as. An
# upload with another suffix gets the first.
FILES = {
    **dict.fromkeys(PICTURES, _PICTURE),
    **dict.fromkeys(VIDEOS, _VIDEO),
    MANY_PICTURES: _PICTURE,
    "lora": _LORA,
}
TYPES = _PICTURE | _VIDEO | _LORA
MOST_PIXELS = 8192 * 8192  # of an upload; more cost seconds and gigabytes, in a file of a few kilobytes


@dataclass
class Job:
    """A request in the queue.

    Attributes:
        id: unique; ids sort by time.
        request: as Request.to_json gives it.
        status: one of STATUSES.
        place: jobs run in ascending order of their places.
        number, turn: the queue's count of changes when the job came, and at its last change: clocks may go back.
        created, started, ended: seconds since 1970, for display; `started` is that of the last start.
        result: path of the finished file.
        error: why the job failed, in a line.
        notes: warnings of the run.
    """

    id: str
    request: dict[str, Any]
    status: str = QUEUED
    place: float = 0.0
    number: int = 0
    turn: int = 0
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    result: str | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Writes the job's file, whole or not at all."""
        with replacing(folder / f"{self.id}.json") as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1), "utf-8")


def read_job(path: Path) -> Job:
    """A job from its file. Raises ValueError, TypeError or OSError for one that is damaged."""
    try:
        job = Job(**json.loads(path.read_text("utf-8")))
        checked(job.request)
        without_weights(job.request)
        counts = (job.place, job.number, job.turn, job.created, job.started or 0, job.ended or 0)
        texts = (job.id, job.request["save_file"], job.result or "", job.error or "", *job.notes)
        fits = all(isinstance(count, (int, float)) and math.isfinite(count) for count in counts)
        fits = fits and all(isinstance(text, str) for text in texts)
        json.dumps(asdict(job), ensure_ascii=False, allow_nan=False).encode()  # as it is sent
    except (LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"of another shape ({type(error).__name__})") from error
    if not fits or job.id != path.stem or job.status not in STATUSES:
        raise ValueError("something is of the wrong kind")
    return job


def new_id() -> str:
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def request_from(values: Mapping[str, Any]) -> Request:
    """The Request from the values of Request.to_json."""
    return Request(**dict(values) | {"memory": memory_options(values["memory"])})


def without_weights(values: Mapping[str, Any]) -> Request:
    """As request_from, but without LoRAs and checkpoint, whose files need not exist."""
    return request_from(dict(values) | {"lora": (), "ckpt_dir": ANY_CHECKPOINT})


@dataclass(frozen=True)
class Rules:
    """What settings that are not trusted may ask for.

    Attributes:
        folder: holds all results, uploads and files of jobs.
        checkpoints: folders or hub names that may be used.
        device: on which everything computes; None for the accelerator of this machine.
        offload_folder: keeps converted weights; None to keep none.
    """

    folder: Path
    checkpoints: tuple[str, ...] = ()
    device: str | None = None
    offload_folder: str | None = None

    @property
    def readable(self) -> tuple[Path, Path]:
        """The folders whose files a job may name."""
        return self.folder / UPLOADS, EXAMPLES

    @property
    def gradio_folder(self) -> Path:
        """The folder in which Gradio keeps uploads and the files that it shows."""
        return self.folder / ".wan" / "gradio"

    def may_read(self, name: str) -> bool:
        """Whether a file exists and a job may name it."""
        try:
            return os.path.isfile(self._file(name, "image"))
        except InputError:
            return False

    def request(self, settings: Mapping[str, Any], name: str = "plan", planning: bool = False) -> Request:
        """The request that settings describe: fields of a Request and of its memory options, by their names.

        Args:
            settings: see above; a value of None counts as not given.
            name: of the result, without suffix.
            planning: whether the request is only planned, for which checkpoint, prompt and files may be missing.

        Raises InputError for settings that cannot work, that only the server may decide, or that are missing: no
        example takes their place here.
        """
        unknown = [key for key in settings if key not in _REQUEST and key not in _MEMORY]
        if unknown:
            raise InputError("no such setting, or not one that a job decides", tuple(unknown))
        given = {key: value for key, value in settings.items() if value is not None}
        values = {key: value for key, value in given.items() if key in _REQUEST}
        memory = {key: value for key, value in given.items() if key in _MEMORY}
        self._place_files(values)
        if planning:
            values["ckpt_dir"] = ANY_CHECKPOINT
        elif values.get("ckpt_dir") is not None and values["ckpt_dir"] not in self.checkpoints:
            raise InputError("not one that this server was started with", "ckpt_dir", values["ckpt_dir"])
        try:
            task = values.get("task", DEFAULT_TASK)
            needed = TASKS[task].needed if task in TASKS else ()
            missing = [key for key in needed if not str(values.get(key) or "").strip()]
            if planning:  # the planner takes a file that is no picture to be as large as the video
                values |= dict.fromkeys(missing, os.devnull)
            elif missing:
                them = "them" if len(missing) > 1 else "it"
                raise InputError(f"missing, {task} needs {them}", tuple(missing))
            values["memory"] = memory_options(memory, offload_folder=self.offload_folder)
            values["planned"] = tuple(option for option in PLANNED if option not in memory)
            request = Request(
                **values,
                device=self.device,
                preview=str(self.folder / ".wan" / "previews"),
            )
        except (TypeError, AttributeError) as error:
            raise InputError(f"something is of the wrong kind ({error})") from error
        suffix = "png" if request.facts.still else "mp4"
        return replace(request, save_file=str(self.folder / f"{name}.{suffix}"))

    def _place_files(self, values: dict[str, Any]) -> None:
        """Replaces names of files by paths. Raises InputError for one outside the readable folders."""
        for key in (*PICTURES, *VIDEOS):
            if values.get(key) is not None:
                values[key] = self._file(values[key], key)
        if values.get(MANY_PICTURES):
            if not isinstance(values[MANY_PICTURES], str):
                raise InputError("give the names of files, separated by commas", MANY_PICTURES)
            names = values[MANY_PICTURES].split(",")
            values[MANY_PICTURES] = ",".join(self._file(name, MANY_PICTURES) for name in names)
        if values.get("lora"):
            texts = values["lora"]
            if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
                raise InputError("give a list of FILE or FILE:STRENGTH", "lora")
            pairs = [parse_lora(text) for text in texts]
            values["lora"] = tuple(f"{self._file(file, 'lora')}:{strength}" for file, strength in pairs)

    def _file(self, name: Any, key: str) -> str:
        if not isinstance(name, str) or "\0" in name:
            raise InputError("give the name of a file", key)
        found = os.path.realpath(self.folder / name)
        if not any(Path(found).is_relative_to(os.path.realpath(root)) for root in self.readable):
            raise InputError("is outside of the uploads; upload it first", key, name)
        return found


def check_file(path: str | Path, key: str) -> None:
    """Raises InputError, naming the field, for a file that it cannot take."""
    if FILES[key] is _PICTURE:
        open_image(path, key, MOST_PIXELS)
    elif FILES[key] is _VIDEO:
        VideoFile(path, key, MOST_PIXELS)
    else:
        lora_identity([(path, 1.0)])


def check_files(request: Request) -> None:
    """Raises InputError for input files that cannot be read."""
    for key in (*PICTURES, *VIDEOS):
        if getattr(request, key) is not None:
            check_file(getattr(request, key), key)
    for path in request.references or ():
        check_file(path, MANY_PICTURES)
    for path, _ in request.loras:
        check_file(path, "lora")


def settings_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a job, from its request as Request.to_json gives it."""
    kept = {key: request[key] for key in sorted(_REQUEST) if request.get(key) not in (None, [], ())}
    planned = request.get("planned", ())
    defaults = vars(MemoryOptions())
    memory = request.get("memory", {})
    chosen = {key: memory[key] for key in _MEMORY if key in memory and key not in planned}
    return kept | {key: value for key, value in chosen.items() if value != defaults[key]}
