"""Toy runs on PyTorch's own CUDA code: the CPU's values, waits that are left out, and out of memory anywhere."""

import os

import pytest

from wan.configs.tiny import TINY_CONFIGS

EVERYTHING = bool(os.environ.get("WAN_EVERY_KILL"))
# Nothing that is read afterwards depends on the waits at the end of an owner's life: they keep memory from its next.
AT_THE_END = {"_free", "__exit__"}


@pytest.mark.parametrize("task", TINY_CONFIGS if EVERYTHING else ["t2v-tiny"])
def test_every_memory_option_gives_the_cpu_s_values(stand_in, task):
    found = stand_in([], "toys.py", task)
    assert len(found) == 14
    assert {name: difference for name, difference in found.items() if difference} == {}


def test_a_wait_that_is_left_out_shows(stand_in):
    """Every one that what is computed depends on, with either copies or kernels late."""
    late = [stand_in(["--late", late], "waits.py") for late in ("copies", "kernels")]
    assert late[0].keys() == late[1].keys()
    shown = {place for found in late for place, differs in found.items() if differs}
    hidden = {place.split()[1] for place in late[0].keys() - shown}
    assert hidden <= AT_THE_END
    for file in ("streaming", "activation_offload"):
        assert any(place.startswith(file) for place in shown)


def test_out_of_memory_at_any_operator(stand_in):
    tries = 50 if EVERYTHING else 8
    found = stand_in([], "out_of_memory.py", str(tries))
    assert found["operators"] > 500
    assert found["different"] == found["unnoticed"] == []
    assert found["bytes left"] <= 0


def test_a_component_that_does_not_come_or_go_shows(stand_in):
    found = stand_in([], "residency.py")
    assert found.pop("none") == ""
    assert len(found) == 4 and all(found.values()), found
