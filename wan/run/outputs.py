"""Whether what a run writes has a place, before any work is done."""

from __future__ import annotations

import os
from pathlib import Path

from ..utils.errors import InputError
from ..utils.files import check_target, sweep
from ..utils.video import check_writable
from .keeper import state_path
from .request import PATHS, Request
from .settings import read_settings, settings


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
        if (
            Path(path).exists()
            and not request.overwrite
            and not (request.resume and _is_its_own(request, name))
        ):
            raise InputError("exists; choose another name, or replace it with --overwrite", name, path)


def _is_its_own(request: Request, name: str) -> bool:
    """Whether what is there is what the run makes: it was stopped between saving and forgetting its state."""
    if name != "save_file":
        return True
    try:
        return read_settings(request.save_file) == settings(request)
    except InputError:
        return False
