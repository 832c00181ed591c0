"""Finished results, with the settings that their files hold."""

from __future__ import annotations

import io
import json
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from leanwan.errors import InputError

from ..run.settings import read_settings
from ..utils.video import VideoFile, open_image

SUFFIXES = (".mp4", ".png")
POSTER = 480  # pixels of its longer side
LATEST = 2.0**37  # seconds since 1970, in the year 6325: later ones have no date on some systems
_Key = tuple[str, int, int, int, int]  # name, and the facts that tell two files of one name apart


@dataclass(frozen=True)
class FinishedFile:
    """A finished file.

    Attributes:
        name: in the folder.
        made: seconds since 1970.
        settings: as wan.run.settings reads them; empty if the file holds none.
    """

    name: str
    made: float
    settings: dict[str, Any]

    @property
    def is_video(self) -> bool:
        return self.name.endswith(".mp4")


class Gallery:
    """The results in a folder, which may hold other files, too. Any thread may call."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.Lock()
        self._posters: dict[_Key, bytes] = {}
        self._read: dict[
            _Key, tuple[int, FinishedFile]
        ] = {}  # with the number of the listing that first found the file
        self._looks = 0

    def results(self) -> list[FinishedFile]:
        """All results, newest first: by the listing that first found them, then by their times."""
        found: dict[_Key, tuple[int, FinishedFile]] = {}
        with self._lock:
            for path in self._folder.iterdir():
                facts = _facts(path)
                if facts is None:
                    continue
                key = (path.name, facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_size)
                made = min(max(0.0, facts.st_mtime), LATEST)
                found[key] = self._read.get(key) or (
                    self._looks,
                    FinishedFile(path.name, made, _settings(path)),
                )
            self._looks += 1
            self._read = found
            self._posters = {key: poster for key, poster in self._posters.items() if key in found}
        there = sorted(found.values(), key=lambda found: (-found[0], -found[1].made, found[1].name))
        return [result for _, result in there]

    def get(self, name: str) -> FinishedFile:
        """A result by its file name. Raises KeyError for any other text, such as a path."""
        return {result.name: result for result in self.results()}[name]

    def path(self, name: str) -> Path:
        """The path of a result. Raises KeyError."""
        return self._folder / self.get(name).name

    def poster(self, name: str) -> bytes:
        """The first frame of a video, or a picture, small, as a JPEG. Raises KeyError, or InputError."""
        path = self.path(name)
        with self._lock:
            key = next((key for key in self._read if key[0] == name), None)
            if key in self._posters:
                return self._posters[key]
        made = _poster(path)
        with self._lock:
            if key in self._read:
                self._posters[key] = made
        return made

    def delete(self, name: str) -> None:
        """Deletes a result. Raises KeyError, or OSError."""
        self.path(name).unlink()


def _facts(path: Path) -> os.stat_result | None:
    """The stat of a file that may be a result; None for anything else in the folder."""
    if path.suffix not in SUFFIXES or path.name.startswith("."):
        return None
    try:
        path.name.encode()  # names go out as UTF-8
        facts = path.lstat()
    except (OSError, UnicodeEncodeError):
        return None
    return facts if stat.S_ISREG(facts.st_mode) else None


def _settings(path: Path) -> dict[str, Any]:
    """The settings in a result; {} if there are none, or none that JSON can hold: paths in them may be any bytes."""
    try:
        settings = read_settings(path)
        json.dumps(settings, ensure_ascii=False).encode()
        return settings
    except (InputError, UnicodeEncodeError):
        return {}


def _poster(path: Path) -> bytes:
    try:
        if path.suffix == ".mp4":
            picture = Image.fromarray(next(VideoFile(path).frames([0])))
        else:
            picture = open_image(path, "image")
        picture.thumbnail((POSTER, POSTER))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=85)
    except InputError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise InputError("cannot be shown", "result", path.name) from error
    return file.getvalue()
