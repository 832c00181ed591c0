"""Finished results, and the settings that their own files know."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..run.settings import read_settings
from ..utils.errors import InputError
from ..utils.files import is_plain_file
from ..utils.video import VideoFile, open_image

SUFFIXES = (".mp4", ".png")
POSTER = 480  # pixels of its longer side


@dataclass(frozen=True)
class Result:
    """A finished file.

    Attributes:
        name: in the folder.
        made: seconds since 1970.
        settings: as wan.run.settings has them; empty if the file knows none.
    """

    name: str
    made: float
    settings: dict[str, Any]

    @property
    def is_video(self) -> bool:
        return self.name.endswith(".mp4")


class Gallery:
    """The results in a folder. Any thread may call."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._lock = threading.Lock()
        self._posters: dict[str, bytes] = {}  # by name
        self._read: dict[tuple[str, int, int], Result] = {}  # by name, time and size

    def results(self) -> list[Result]:
        """All results, newest first."""
        found: dict[tuple[str, int, int], Result] = {}
        with self._lock:
            for path in self._folder.iterdir():
                if path.suffix not in SUFFIXES or path.name.startswith(".") or not is_plain_file(path):
                    continue
                try:
                    facts = path.stat()
                except OSError:  # gone
                    continue
                key = (path.name, facts.st_mtime_ns, facts.st_size)
                found[key] = self._read.get(key) or Result(path.name, facts.st_mtime, _settings(path))
            self._read = found
            names = {result.name for result in found.values()}
            self._posters = {name: poster for name, poster in self._posters.items() if name in names}
        return sorted(found.values(), key=lambda result: (-result.made, result.name))

    def get(self, name: str) -> Result:
        """A result by its name. Raises KeyError for all else, such as a path."""
        return {result.name: result for result in self.results()}[name]

    def path(self, name: str) -> Path:
        """Where a result is. Raises KeyError."""
        return self._folder / self.get(name).name

    def poster(self, name: str) -> bytes:
        """The first frame of a video, or a picture, small, as a JPEG. Raises KeyError, or InputError."""
        path = self.path(name)
        with self._lock:
            if name not in self._posters:
                if path.suffix == ".mp4":
                    picture = Image.fromarray(next(VideoFile(path).frames([0])))
                else:
                    picture = open_image(path, "image")
                picture.thumbnail((POSTER, POSTER))
                file = io.BytesIO()
                picture.save(file, "JPEG", quality=85)
                self._posters[name] = file.getvalue()
            return self._posters[name]

    def delete(self, name: str) -> None:
        """Deletes a result. Raises KeyError, or OSError."""
        self.path(name).unlink()


def _settings(path: Path) -> dict[str, Any]:
    try:
        return read_settings(path)
    except InputError:
        return {}
