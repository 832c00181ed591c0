"""The arithmetic of a memory limit; devices are played by stand-ins."""

import math
from types import SimpleNamespace

import pytest
import torch

from leanwan.budget import CONTEXT, Budget, hold_to

GIB = 2**30
LIBRARIES = 0.25 * GIB


@pytest.fixture
def device(monkeypatch):
    """A device of 8 GiB: 3 are free, 1 is this process's own; `held` is what its allocator is held to."""
    memory = SimpleNamespace(
        mem_get_info=lambda _: (3 * GIB, 8 * GIB),
        memory_reserved=lambda _: GIB,
        set_per_process_memory_fraction=lambda fraction, _: setattr(memory, "held", fraction * 8 * GIB),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda _: memory)
    return memory


@pytest.mark.parametrize(
    ("kind", "context", "room"), [("cuda", CONTEXT, 4 * GIB - LIBRARIES), ("mtia", 0, 4 * GIB)]
)
def test_what_is_free_on_a_device(device, kind, context, room):
    budget = Budget.on(torch.device(kind, 0))
    assert (budget.context, budget.room) == (context, room)
    assert budget.steady == 0.75 * (8 * GIB - context)
    limited = Budget.on(torch.device(kind, 0), 2 * GIB, 0.5)
    assert limited.room == limited.steady == (2 * GIB - context) / 2
    above = Budget.on(
        torch.device(kind, 0), 7 * GIB
    )  # others hold more of the card than the limit leaves them
    assert (above.room, above.steady) == (room, 7 * GIB - context)


def test_a_limit_alone_is_of_a_card_that_nobody_else_uses():
    budget = Budget(4 * GIB, 0.5)
    assert budget.room == budget.steady == (4 * GIB - CONTEXT) / 2
    assert math.isclose(budget.limit_for(budget.room), 4 * GIB)


@pytest.mark.parametrize("budget", [Budget(CONTEXT - 1), Budget(None, free=LIBRARIES - 1, total=CONTEXT - 1)])
def test_there_is_never_less_than_nothing(budget):
    assert budget.room == budget.steady == 0


@pytest.mark.parametrize(("asked", "held"), [(2 * GIB, 2 * GIB), (9 * GIB, 8 * GIB)])
def test_an_allocator_is_held_to_bytes(device, asked, held):
    assert hold_to("cuda:0", asked) and device.held == held
    del device.set_per_process_memory_fraction
    assert not hold_to("cuda:0", 1)
