"""Whether what a run writes has a place, before any work is done; and where the result goes in the end."""

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
    """Sweeps the folder of the result.

    Raises InputError for a file that cannot be written, would be lost, or is read by the same run.
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
    """Has the result written where it goes: to save_file, or beside it if another run has put its own there meanwhile.

    If that folder takes no more it goes to another one, which is told.

    Args:
        request: whose result it is.
        write: writes it to a path, over what is there or not; raises FileExistsError then.

    Returns:
        Where it is.

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
    """Writes a result into a folder, under its own name or the next that is free."""
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
    """Whether an output has its place free, or may take it: by --overwrite, or since it is this very run's.

    A run that was stopped between saving and forgetting its state finds its own result.
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
    """Raises InputError for a disk on which the run's files, or those of them that are known, find no room."""
    width, height = request.pixels
    pixels = width * height * request.frame_num
    latent = 4 * 16 * (request.frame_num // 4 + 1) * (height // 8) * (width // 8)
    # Of a state most is the latent, three of the solver's and what comes of inputs; two while one replaces the other.
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
