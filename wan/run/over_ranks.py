"""Runs over several processes, called ranks: torchrun starts the same command line in each.

The first rank runs the requests, the others follow it. The others print nothing: the first reports what ends them.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from leanwan.accelerator import configure_allocator, is_out_of_memory
from leanwan.budget import Budget, hold_to_free
from leanwan.errors import InputError

from ..distributed.ranks import Ranks
from ..planning.plan import Plan
from ..planning.planner import LESS
from .interrupts import SIGNALS
from .plan_request import budget_on
from .request import LEAST_FRACTION, Request

LOST = 1  # exit code of a rank that follows and fails

log = logging.getLogger(__name__)


def over_ranks(
    arguments: Sequence[str] | None, lead: Callable[[Ranks], int], follow: Callable[[Ranks], None]
) -> int:
    """Runs `lead` on the first rank and `follow` on the others.

    Args:
        arguments: of the command line; None for sys.argv.
        lead, follow: called with the ranks; `lead` returns the exit code.

    Returns:
        The exit code. Errors are raised on the first rank only.
    """
    if Ranks().leads:
        with Ranks() as ranks:
            _check_alike(ranks, arguments)
            return lead(ranks)
    logging.disable(logging.CRITICAL)
    try:
        with Ranks() as ranks:
            for number in SIGNALS:  # the first rank decides when to stop; if it is gone, all end
                signal.signal(number, signal.SIG_IGN)
            _check_alike(ranks, arguments)
            follow(ranks)
        return 0
    except Exception:
        return LOST


def check_sizes(request: Request, ranks: Ranks | None) -> None:
    """Raises InputError for multi-GPU options that do not fit the number of processes, or contradict other options."""
    size = ranks.size if ranks else 1
    asked = request.ulysses_size * request.ring_size
    if asked not in (1, size):
        started = f"{size} ranks" if ranks else "one process"
        raise InputError(
            f"{asked} ranks are asked for, {started} started: give torchrun --nproc_per_node {asked}",
            ("ulysses_size", "ring_size"),
        )
    for name in ("dit_fsdp", "t5_fsdp"):
        if getattr(request, name) and not ranks:
            raise InputError("shares weights between ranks: start them with torchrun", name)
    memory = request.memory
    for name, other, given in (
        ("dit_fsdp", "dit_stream", memory.dit_stream is not None),
        ("t5_fsdp", "t5_stream", memory.t5_stream),
        ("t5_fsdp", "t5_cpu", memory.t5_cpu),
        ("dit_fsdp", "compile", request.compile),
    ):
        if getattr(request, name) and given:
            raise InputError("choose one", (name, other))


def check_weights(ranks: Ranks, found: dict[str, Any]) -> None:
    """Raises InputError, on all ranks, unless all found the same digests. found: digest by name of each weight file."""
    first, *others = ranks.gather(found)
    for rank, other in enumerate(others, 1):
        names = [name for name in first.keys() | other.keys() if first.get(name) != other.get(name)]
        if names:
            problem = f"rank {rank} has another {min(names)} than rank 0: give all the same checkpoint"
            raise InputError(problem, "ckpt_dir")


def less_room(request: Request, plan: Plan | None, error: Exception) -> dict[str, float]:
    """The changes to a request before it resumes: a smaller vram_fraction if a rank ran out of memory, else none."""
    if plan is None or not (is_out_of_memory(error) or getattr(error, "out_of_memory", False)):
        return {}
    part = min(1.0, LESS * plan.peak_bytes / plan.room) if plan.room else 1.0
    fraction = max(LEAST_FRACTION, round(request.vram_fraction * part, 3))
    if fraction >= request.vram_fraction:
        return {}
    log.warning(
        f"Memory ran out; what goes on from the last step is planned with --vram_fraction {fraction:g}"
    )
    return {"vram_fraction": fraction}


def least_budget(request: Request, device: torch.device, ranks: Ranks) -> Budget:
    """The smallest budget that any rank has for a request; called on all ranks.

    The ranks connect before they measure, so that the memory of their connections does not count as free.
    """
    configure_allocator(device)
    hold_to_free(device)
    ranks.connect()
    budgets = ranks.gather(budget_on(request, device))
    return replace(budgets[0], free=min(one.free for one in budgets), total=min(one.total for one in budgets))


def activation_ram(request: Request, ranks: Ranks) -> float:
    """Bytes of RAM that a pass's activations may take: the shares of this machine's ranks fit half of what is free."""
    return psutil.virtual_memory().available / 2 * min(1.0, sharing(request, ranks) / ranks.local_size)


def sharing(request: Request, ranks: Ranks) -> int:
    """How many ranks share the tokens of a pass."""
    return ranks.size // len(ranks.teams(1 if request.sample_guide_scale == 1 else 2))


def _check_alike(ranks: Ranks, arguments: Sequence[str] | None) -> None:
    """Raises InputError, on all ranks, unless each was given the same arguments and has the same code."""
    mine = {
        "other arguments": list(sys.argv[1:] if arguments is None else arguments),
        "another version of this program": _code(),
        "another PyTorch": str(torch.__version__),
    }
    first, *others = ranks.gather(mine)
    for rank, other in enumerate(others, 1):
        for what, value in first.items():
            if other[what] != value:
                raise InputError(f"rank {rank} has {what} than rank 0: start all alike")


def _code() -> str:
    """Digest of this package's sources."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()
