"""The files that a run writes: checked before any work is done, and the result's place chosen when it is saved."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from leanwan.errors import InputError

from ..utils.files import check_target, other_folders, sweep
from ..utils.video import check_writable
from .keeper import state_path
from .request import PATHS, Request
from .settings import read_settings, settings

log = logging.getLogger(__name__)


def check_outputs(request: Request) -> None:
    """Checks the files that a run will write, makes the preview's folder, and sweeps it and the result's.

    Raises InputError for a file that cannot be written, exists and may not be replaced, or is read by the same run.
    """
    check_writable(request.save_file, image=request.facts.still)
    check_target(state_path(request.save_file), "save_file")
    sweep(Path(request.save_file).absolute().parent)
    if request.save_latents:
        check_target(request.save_latents, "save_latents")
    outputs = {
        name: getattr(request, name) for name in ("save_file", "save_latents") if getattr(request, name)
    }
    used = {name: getattr(request, name) for name in PATHS if getattr(request, name)}
    for name, path in outputs.items():
        for other, other_path in used.items():
            if name != other and os.path.realpath(path) == os.path.realpath(other_path):
                raise InputError("are the same file, give two", (name, other), path)
        if not _may_replace(request, name):
            raise InputError("exists; choose another name, or replace it with --overwrite", name, path)
    check_room(request)
    if request.preview:
        _make_folder(request.preview, "preview")


def save_result(request: Request, write: Callable[[Path, bool], None]) -> Path:
    """Writes the result to save_file, or to the next free name beside it if another run has written there meanwhile.

    If that folder takes no more, the result goes to another one, with a warning.

    Args:
        request: the run's request.
        write: called with (path, over); writes the result. If `over` is false and the path exists, it raises
            FileExistsError.

    Returns:
        The path of the result.

    Raises OSError: no folder takes it.
    """
    own = Path(request.save_file)
    for folder in (own.parent, *other_folders(own.absolute().parent)):
        there = folder == own.parent and os.path.exists(own)
        over = request.overwrite or (there and _may_replace(request, "save_file"))
        try:
            path = _save_in(folder, own, over, write)
        except OSError as error:
            log.warning(f"The result could not be saved in {folder.absolute()}: {error}")
            full = error
            continue
        if path != own:
            log.warning(f"The result is in {path}")
        return path
    raise full


def _save_in(folder: Path, own: Path, over: bool, write: Callable[[Path, bool], None]) -> Path:
    """Writes a result into a folder, under its own name or the next free one: NAME_2, NAME_3 and so on."""
    for name in _names(own):
        path = folder / name
        if over or not path.exists():
            with contextlib.suppress(FileExistsError):
                write(path, over)
                return path
    raise AssertionError("names do not end")


def _names(path: Path) -> Iterator[str]:
    yield path.name
    for number in itertools.count(2):
        yield f"{path.stem}_{number}{path.suffix}"


def _may_replace(request: Request, name: str) -> bool:
    """Whether an output's path is free, or may be overwritten: with --overwrite, or since this very run wrote it.

    A run that was stopped between saving its result and deleting its state finds that result when it is resumed.
    """
    path = getattr(request, name)
    if not os.path.exists(path) or request.overwrite:
        return True
    if not request.resume or name != "save_file":
        return request.resume is not None
    try:
        return read_settings(path) == settings(request)
    except InputError:
        return False


def check_room(request: Request) -> None:
    """Raises InputError if the disk has no room for the run's files, as far as their sizes are known."""
    width, height = request.pixels
    pixels = width * height * request.frame_num
    latent = 4 * 16 * (request.frame_num // 4 + 1) * (height // 8) * (width // 8)
    # A state takes about 8 latents: its own, three of the solver's, encoded inputs. While replaced it exists twice.
    needed = {"save_file": 2 * 8 * latent + pixels // 4, "save_latents": latent}
    for name, least in needed.items():
        path = getattr(request, name)
        if not path:
            continue
        room = shutil.disk_usage(Path(path).absolute().parent).free
        if room < least:
            raise InputError(
                f"the disk has only {room >> 20} MB left, the run needs about {(least >> 20) + 1}; "
                "make room or choose another place",
                name,
                path,
            )


def _make_folder(path: str, field: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
        sweep(path)
    except OSError as error:
        raise InputError(
            f"cannot be made a folder ({error.strerror}), choose another place", field, path
        ) from error
