"""LoRA files, merged into a model's weights while these are loaded (Hu et al., LoRA, 2021)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors
import torch

from leanwan.errors import InputError, listed, shown

from ..utils.outside import parse_json
from .lora_keys import Change, is_change, match_changes, reasons
from .reading import read_numbers

log = logging.getLogger(__name__)


def parse_lora(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH to (file, strength); the strength is 1 unless given. A drive, "C:", is part of the file.

    Raises InputError for a strength that is not a finite number.
    """
    file, colon, tail = text.rpartition(":")
    number = _number(tail)
    if not colon or "/" in tail or "\\" in tail or (number is None and len(file) == 1):
        return text, 1.0
    if number is None or not file:
        raise InputError("give FILE, or FILE:STRENGTH with a number such as 0.8", "lora", text)
    return file, number


def lora_identity(loras: Sequence[tuple[str | Path, float]]) -> str:
    """A text that tells apart what LoRA files do to a model, by contents, strengths and order. Empty without files.

    Raises InputError for a missing or damaged file.
    """
    return " + ".join(f"{_LoraFile(path).digest} * {float(strength)}" for path, strength in loras)


class Loras:
    """LoRA files that fit a model, to be merged into its weights in their order.

    Attributes:
        identity: see lora_identity.

    Args:
        loras: (path of a safetensors file, strength); a strength may be negative.
        shapes: of the model's parameters, by name.
        skip_unknown: whether to go on, with a warning, without the tensors that do not fit the model.

    Raises:
        InputError: a missing, damaged or empty file, one that is no LoRA or that fits nothing of the model; tensors
            that do not fit, all of which are named.
    """

    def __init__(
        self,
        loras: Sequence[tuple[str | Path, float]],
        shapes: Mapping[str, Sequence[int]],
        skip_unknown: bool = False,
    ):
        self._loras = list(loras)
        self._changes: dict[str, list[tuple[_LoraFile, float, Change]]] = defaultdict(list)
        for path, strength in self._loras:
            if not isinstance(strength, (int, float)) or not abs(strength) < math.inf:
                raise InputError(f"strength {strength!r} is not a number", "lora", path)
            file = _LoraFile(path)
            changes = file.changes(shapes, skip_unknown)
            file.check_finite([key for change in changes for key in change.keys])
            for change in changes:
                factor = strength * file.scale(change)
                if not abs(factor) <= torch.finfo(torch.float32).max:
                    raise InputError(f"strength times alpha / rank is {factor}", "lora", path)
                self._changes[change.parameter].append((file, factor, change))

    @cached_property
    def identity(self) -> str:
        return lora_identity(self._loras)

    def merge(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The parameter `name` with all changes: fp32, or the tensor itself where there are none.

        One after the other, each is tensor + factor * (up @ down), or tensor + factor * difference, in fp32.
        """
        for file, factor, change in self._changes.get(name, ()):
            first, *second = (file.read(key) for key in change.keys)
            delta = first.flatten(1) @ second[0].flatten(1) if second else first
            tensor = delta.mul_(factor).view(tensor.shape).add_(tensor)
        return tensor


class _LoraFile:
    """A safetensors file of changes.

    The constructor and the methods raise InputError for a file that is missing, damaged, empty or no LoRA.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not os.path.isfile(path):
            raise InputError("no such file", "lora", path)
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
                self._settings = self._peft_settings(file.metadata() or {})
        except (safetensors.SafetensorError, OSError, ValueError, AttributeError) as error:
            if _is_pickle(self.path):
                raise InputError(
                    "is a pickle file, which may run code; give a .safetensors file", "lora", path
                ) from error
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"cannot be read, download it again ({reason})", "lora", path) from error
        if not self.shapes:
            raise InputError("is empty, give another file", "lora", path)
        unsupported = [
            name for name in ("use_dora", "use_rslora", "alpha_pattern") if self._settings.get(name)
        ]
        if unsupported:
            raise InputError(f"uses PEFT's {unsupported[0]}, which is not supported", "lora", path)
        if not any(map(is_change, self.shapes)):
            example = next(iter(self.shapes))
            raise InputError(
                f"is not a LoRA: it holds no changes, but tensors such as {example}", "lora", path
            )

    @property
    def digest(self) -> str:
        """Digest of the file's contents and of PEFT's settings."""
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        with open(self.path, "rb") as file:
            while piece := file.read(2**24):
                digest.update(piece)
        return digest.hexdigest()[:16]

    def read(self, key: str) -> torch.Tensor:
        """A tensor in fp32, a copy."""
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                return read_numbers(file, key).to(torch.float32, copy=True)
        except InputError as error:
            raise InputError(error.problem, "lora", self.path) from error

    def check_finite(self, keys: Sequence[str]) -> None:
        """Raises InputError for tensors, which it names, with values that are infinite or not numbers."""
        wrong = [key for key in keys if not torch.isfinite(self.read(key)).all()]
        if wrong:
            raise InputError(
                f"has values in it that are infinite or not numbers, download it again: {listed(wrong)}",
                "lora",
                self.path,
            )

    def changes(self, shapes: Mapping[str, Sequence[int]], skip_unknown: bool) -> list[Change]:
        """The file's changes to a model whose parameters have these shapes; see Loras."""
        changes, unknown = match_changes(self.shapes, shapes)
        if unknown:
            problem = (
                f"{len(unknown)} of its {len(self.shapes)} tensors do not fit the model: {reasons(unknown)}"
            )
            if not changes:
                raise InputError(f"is for another model, {problem}", "lora", self.path)
            if not skip_unknown:
                raise InputError(f"{problem}; go on without them by --lora_skip_unknown", "lora", self.path)
            log.warning(f"LoRA {self.path}: left out, {problem}")
        return changes

    def scale(self, change: Change) -> float:
        """What a change is multiplied with at strength 1: alpha / rank of its pair, 1 without an alpha."""
        if change.rank is None:
            return 1.0
        alpha = self.read(change.alpha).item() if change.alpha else self._settings.get("lora_alpha")
        if alpha is None:
            return 1.0
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
            raise InputError(f"its lora_alpha is {shown(alpha)}, not a number", "lora", self.path)
        return alpha / change.rank

    def _peft_settings(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        """PEFT's LoraConfig, which diffusers writes into the file and PEFT beside it."""
        beside = self.path.with_name("adapter_config.json")
        if "lora_adapter_metadata" in metadata:
            settings = parse_json(metadata["lora_adapter_metadata"])
        elif self.path.name == "adapter_model.safetensors" and beside.is_file():
            settings = parse_json(beside.read_text(encoding="utf-8"))
        else:
            settings = {}
        return {name.removeprefix("transformer."): value for name, value in settings.items()}


def _is_pickle(path: Path) -> bool:
    """Whether a file starts as torch.save's do, those of old versions too."""
    with open(path, "rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _number(text: str) -> float | None:
    """A finite number, or None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
