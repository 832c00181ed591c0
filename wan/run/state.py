"""The state of a run in one file: how far it has come, and all that it needs to continue to the same bits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors
import torch

from leanwan.errors import InputError
from leanwan.options import MemoryOptions

from .. import __version__
from ..pipeline import Conditioning
from ..utils.files import replacing
from ..utils.outside import MISREAD, parse_json
from ..weights.writing import write_tensors
from .request import ON_ONE_GPU, Request

log = logging.getLogger(__name__)

FORMAT = "wan-state-1"


@dataclass(frozen=True)
class State:
    """How far a run has come.

    Attributes:
        request: with the extended prompt, if it was extended. The result goes to its save_file.
        weights: digest of each weight file when the run started, by its name in the checkpoint.
        conditioning: the output of encoding; None before encoding, and when denoising is done.
        latent: after the last step; None before denoising.
        solver: its state after the same step.
        finished: whether `latent` is the finished one, without the frames of reference images.
    """

    request: Request
    weights: Mapping[str, str] = field(default_factory=dict)
    conditioning: Conditioning | None = None
    latent: torch.Tensor | None = None
    solver: Mapping[str, Any] | None = None
    finished: bool = False

    @property
    def stage(self) -> str:
        """The next stage: text, denoise or decode."""
        if self.finished:
            return "decode"
        return "text" if self.conditioning is None else "denoise"


def write_state(path: str | os.PathLike, state: State) -> None:
    """Writes a state as a safetensors file, whole or not at all; it is on the disk when this returns.

    The result's path is stored relative to the file's folder, so that both can be moved together.

    Raises OSError: no room, or no right to write.
    """
    path = Path(path).absolute()
    tensors: dict[str, torch.Tensor] = {}
    request = state.request.to_json()
    values = {
        "version": __version__,
        "torch": str(torch.__version__),
        "request": request | {"save_file": _relative(request["save_file"], path.parent)},
        "weights": dict(state.weights),
        "conditioning": _pack(vars(state.conditioning), tensors) if state.conditioning else None,
        "latent": _pack(state.latent, tensors),
        "solver": _pack(dict(state.solver), tensors) if state.solver else None,
        "finished": state.finished,
    }
    text = json.dumps(values)
    metadata = {"format": FORMAT, "state": text, "checksum": _checksum(text, tensors)}
    with replacing(path) as temporary:
        try:
            write_tensors(temporary, tensors, metadata)
        except OSError as error:
            raise OSError(f"{path} cannot be written ({_one_line(error)})") from error


def read_state(path: str | os.PathLike, field: str = "resume", **overrides: Any) -> State:
    """Reads a state; its tensors are on the CPU.

    Args:
        field: the field that errors name.
        overrides: values for fields of the request, in place of the stored ones.

    Raises:
        InputError: the file is missing, damaged, or written by another version of this program.
    """
    with _understood(path, field):
        values, tensors = _read(Path(path), field)
        if values["torch"] != str(torch.__version__):
            log.warning(
                f"{path} was written under PyTorch {values['torch']}: the rest may be rounded otherwise"
            )
        conditioning, solver = values["conditioning"], values["solver"]
        return State(
            request=_request(values, Path(path), overrides),
            weights=dict(values["weights"]),
            conditioning=Conditioning(**_unpack(conditioning, tensors)) if conditioning else None,
            latent=_unpack(values["latent"], tensors),
            solver=dict(_unpack(solver, tensors)) if solver else None,
            finished=values["finished"],
        )


def resumed_request(
    path: str | os.PathLike, overrides: Mapping[str, Any], memory: Mapping[str, Any]
) -> Request:
    """The request that continues a run from its state.

    Args:
        path: of the state file.
        overrides, memory: values for fields of the request and for memory options, in place of the stored ones.

    Raises:
        InputError: as read_state, and as Request.
    """
    with _understood(path, "resume"):
        values, _ = _read(Path(path), "resume")
        stored = MemoryOptions(**values["request"]["memory"] | dict(memory))
        planned = [name for name in values["request"]["planned"] if name not in memory]
        return _request(values, Path(path), {"planned": planned} | dict(overrides) | {"memory": stored})


@contextlib.contextmanager
def _understood(path: str | os.PathLike, field: str) -> Iterator[None]:
    """Inside, errors of reading malformed values of a state become an InputError."""
    try:
        yield
    except InputError:
        raise
    except MISREAD as error:
        raise InputError(f"not a state of this program ({_one_line(error)})", field, path) from error


def _request(values: Mapping[str, Any], path: Path, overrides: Mapping[str, Any]) -> Request:
    """The request stored in the state file `path`, with `overrides` in place of stored fields."""
    stored = dict(values["request"]) | ON_ONE_GPU  # the run may have started on several
    save_file = os.path.normpath(path.absolute().parent / stored["save_file"])
    memory = MemoryOptions(**stored["memory"])
    places = {"memory": memory, "save_file": save_file, "resume": str(path.absolute())}
    return Request(**stored | places | dict(overrides))


def _read(path: Path, field: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The values and tensors of a state file. Raises InputError unless it is whole and of this version."""
    if not os.path.isfile(path):
        raise InputError("no such file", field, path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            known = metadata.get("format") == FORMAT
            # Copies: Windows does not replace a file that is mapped, and the next state replaces this one.
            tensors = {name: file.get_tensor(name).clone() for name in list(file.keys())} if known else {}  # noqa: SIM118
        if not known:
            raise InputError("not a state that this program wrote", field, path)
        text = metadata["state"]
        if metadata["checksum"] != _checksum(text, tensors):
            raise InputError("damaged: its checksum is another", field, path)
        values = parse_json(text)
    except InputError:
        raise
    except (OSError, safetensors.SafetensorError, RuntimeError, *MISREAD) as error:
        raise InputError(f"damaged or not a state ({_one_line(error)})", field, path) from error
    if values["version"] != __version__:
        raise InputError(
            f"was written by version {values['version']}, this is {__version__}; go on with that version",
            field,
            path,
        )
    request = values["request"]
    if set(request) != _names(Request) or set(request["memory"]) != _names(MemoryOptions):
        raise InputError(
            "was made by another version of this program, which has other settings; go on with that version",
            field,
            path,
        )
    return values, tensors


def _names(options: type) -> set[str]:
    return {item.name for item in fields(options)}


def _relative(target: str, folder: Path) -> str:
    try:
        return os.path.relpath(target, folder)
    except ValueError:  # on another drive
        return target


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The value as JSON; each tensor in it is put into `tensors` and replaced by its name there."""
    if isinstance(value, torch.Tensor):
        name = f"tensor {len(tensors):03}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {name: _pack(item, tensors) for name, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_pack(item, tensors) for item in value]
    return value


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {name: _unpack(item, tensors) for name, item in value["dict"].items()}
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:160]
