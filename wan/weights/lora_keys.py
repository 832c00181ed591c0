"""The keys of LoRA files: which parameter of a model each changes, and how.

A file holds pairs of narrow matrices, whose product is a change, and full differences. Several programs write such
files, with spellings of their own for layers and kinds; one file keeps to one spelling of layers.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from leanwan.errors import SHOWN_NAMES, listed

Shapes = Mapping[str, Sequence[int]]

# The parts of a key before the layer's name, and after it.
_PREFIX = r"(?:(?:base_model|model|diffusion_model|transformer|pipe|dit)\.)*(?:lora_unet__?)?"
_ADAPTER = r"(?:\.[^.]+)?"  # PEFT's name of the adapter, such as "default"
_KINDS = {
    "down": rf"lora[._](?:A|down)(?:{_ADAPTER}\.weight)?",
    "up": rf"lora[._](?:B|up)(?:{_ADAPTER}\.weight)?",
    "up_bias": rf"lora[._](?:B|up){_ADAPTER}\.bias",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "diff_m": "diff_m",
}
_KEYS = {kind: re.compile(rf"{_PREFIX}(?P<layer>.+?)\.{suffix}") for kind, suffix in _KINDS.items()}


@dataclass(frozen=True)
class Change:
    """What a file adds to a parameter: a product of matrices, or a difference.

    Attributes:
        keys: keys in the file of the matrices up and down, or of the difference.
        rank: rank of the pair that the change belongs to; None if it belongs to no pair.
        alpha: key of the pair's alpha, which is divided by the rank, or None.
    """

    parameter: str
    keys: tuple[str, ...]
    rank: int | None = None
    alpha: str | None = None


def is_change(key: str) -> bool:
    """Whether a key looks like part of a change, of whatever model."""
    return _parsed(key) is not None


def match_changes(found: Shapes, shapes: Shapes) -> tuple[list[Change], dict[str, str]]:
    """The changes in a file, and for each key that is part of none the reason.

    Args:
        found: shapes of the tensors in the file, by key.
        shapes: of the model's parameters, by name.
    """
    attempts = []
    for spellings in _spellings(shapes):
        attempts.append(_match(found, shapes, spellings))
        if not attempts[-1][1]:
            break
    return min(attempts, key=lambda attempt: len(attempt[1]))


def reasons(unknown: Mapping[str, str]) -> str:
    """The reasons why keys do not fit, each with its keys; keys that differ only in their block's number are listed as
    one. Of many reasons, keys and numbers only the first few are listed."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for key, reason in unknown.items():
        block = re.search(r"blocks[._]([0-9]{1,4})(?![0-9])", key)
        pattern = f"{key[: block.start(1)]}N{key[block.end(1) :]}" if block else key
        groups[reason][pattern] += [int(block[1])] if block else []
    told = [
        f"{reason}: {listed([pattern + _ranges(blocks) for pattern, blocks in patterns.items()])}"
        for reason, patterns in groups.items()
    ]
    more = len(told) - SHOWN_NAMES
    return "; ".join(told[:SHOWN_NAMES]) + (f"; and {more} more reasons" if more > 0 else "")


def _ranges(blocks: Sequence[int]) -> str:
    """Numbers of blocks as " (N = 0-3, 7)", or nothing if there are none."""
    runs: list[list[int]] = []
    for number in sorted(blocks):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f" (N = {listed(texts)})" if texts else ""


def _parsed(key: str) -> tuple[str, str] | None:
    """(layer as the key spells it, kind of change), or None for a key of no known kind."""
    for kind, pattern in _KEYS.items():
        if match := pattern.fullmatch(key):
            return match["layer"], kind
    return None


def _spellings(shapes: Shapes) -> Iterator[dict[str, str]]:
    """Yields, for each way to spell a model's layers, the names of layers and parameters by their spellings."""
    yield _with_underscores({name: name for name in shapes})
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    yield _with_underscores(convert_wan_transformer_to_diffusers({name: name for name in shapes}))


def _with_underscores(names: Mapping[str, str]) -> dict[str, str]:
    """Spellings of parameters and of the layers that own them, with dots or underscores between the parts."""
    owners = {spelling.rpartition(".")[0]: name.rpartition(".")[0] for spelling, name in names.items()}
    dotted = {**owners, **names}
    return {spelling.replace(".", "_"): name for spelling, name in dotted.items()} | dotted


def _match(
    found: Shapes, shapes: Shapes, spellings: Mapping[str, str]
) -> tuple[list[Change], dict[str, str]]:
    """As match_changes, with one way to spell the layers."""
    layers: dict[str, dict[str, str]] = defaultdict(dict)
    changes: list[Change] = []
    unknown: dict[str, str] = {}
    for key in found:
        spelled, kind = _parsed(key) or (None, None)
        layer = spellings.get(spelled)
        if kind is None:
            unknown[key] = "no change of a known kind"
        elif layer is None:
            unknown[key] = "no such layer"
        elif kind in layers[layer]:
            unknown[key] = "a second one for its layer"
        else:
            layers[layer][kind] = key
    for layer, keys in layers.items():
        fitting, misfits = _match_layer(layer, keys, found, shapes)
        changes += fitting
        unknown |= misfits
    return changes, unknown


def _match_layer(
    layer: str, keys: Mapping[str, str], found: Shapes, shapes: Shapes
) -> tuple[list[Change], dict[str, str]]:
    """As match_changes, for one layer; keys: the layer's keys by kind."""
    changes: list[Change] = []
    unknown: dict[str, str] = {}
    weight = f"{layer}.weight"
    parameters = {
        "diff": weight if weight in shapes else layer,
        "diff_b": f"{layer}.bias",
        "diff_m": f"{layer}.modulation",
    }
    differences = [Change(parameters[kind], (key,)) for kind, key in keys.items() if kind in parameters]
    if pair := {kind: key for kind, key in keys.items() if kind not in parameters}:
        if problem := _pair_problem({kind: found[key] for kind, key in pair.items()}, shapes.get(weight)):
            unknown |= dict.fromkeys(pair.values(), problem)
        else:
            rank, alpha = found[pair["down"]][0], pair.get("alpha")
            changes.append(Change(weight, (pair["up"], pair["down"]), rank, alpha))
            if "up_bias" in pair:
                differences.append(Change(f"{layer}.bias", (pair["up_bias"],), rank, alpha))
    for change in differences:
        [key] = change.keys
        expected = shapes.get(change.parameter)
        if expected is None:
            unknown[key] = "no such parameter"
        elif tuple(found[key]) != tuple(expected):
            unknown[key] = f"{tuple(found[key])} instead of {tuple(expected)}"
        else:
            changes.append(change)
    return changes, unknown


def _pair_problem(found: Shapes, weight: Sequence[int] | None) -> str | None:
    """Why matrices of these shapes, by kind, do not make a change of a weight; None if they do."""
    if "up" not in found or "down" not in found:
        return "without its other half"
    if weight is None or len(weight) < 2:
        return "no such weight"
    up, down = found["up"], found["down"]
    fits = (
        min(len(up), len(down)) >= 2
        and down[0] > 0
        and (up[0], math.prod(up[1:])) == (weight[0], down[0])
        and math.prod(down[1:]) == math.prod(weight[1:])
    )
    if not fits:
        return f"{up} times {down} instead of {tuple(weight)}"
    if math.prod(found.get("alpha", ())) != 1:
        return "an alpha that is not one number"
    return None
