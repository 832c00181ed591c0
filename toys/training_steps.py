"""Steps of a training that can be interrupted: a file keeps its state, from which it continues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from wan.utils.files import replacing

KEEP_EVERY = 100


def steps(count: int, kept: Path, parts: Mapping[str, Any]) -> Iterator[int]:
    """Yields the numbers of the steps to take: all, or those after the state in the file `kept`, which it loads.

    parts: objects with state_dict() and load_state_dict(); a step must depend on these and on its number alone.
    """
    done = 0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        done = state["done"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in range(done, count):
        yield step
        if (step + 1) % KEEP_EVERY == 0:
            with replacing(kept) as unfinished:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save(state | {"done": step + 1}, unfinished)


def set_rates(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Sets the learning rates of optimizers to a share of their initial ones."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])


def share_of_rate(step: int, count: int) -> float:
    """The learning rate as a share of the highest: rising over 50 steps, from the middle on falling to a fiftieth."""
    return min(1, (step + 1) / 50, 0.02 + 2 * (1 - step / count))
