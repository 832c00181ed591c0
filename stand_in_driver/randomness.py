"""Random numbers of the stand-in's card: those that a CPU draws with the same seed.

A generator of CUDA's counts how far it has come, and PyTorch's own code moves that on. Its first numbers here are
those of a new CPU generator with its seed; later ones follow from seed and count, so a state that is set again gives
the same numbers again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

RANDOM = {
    "bernoulli", "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "native_dropout", "normal",
    "normal_", "rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "random_", "randperm", "uniform_",
}  # fmt: skip


def generator_on_cpu(generator: torch.Generator) -> torch.Generator:
    """A CPU generator for what one of CUDA's draws next."""
    return torch.Generator().manual_seed(_seed(generator))


def with_default_generator(func: Callable[..., Any]) -> Callable[..., Any]:
    """An operator that is given no generator, on the CPU with what the card's default one draws next."""
    seed = _seed(torch.cuda.default_generators[torch.cuda.current_device()])

    def seeded(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            return func(*args, **kwargs)

    return seeded


def _seed(generator: torch.Generator) -> int:
    state = bytes(generator.get_state().tolist())  # of CUDA: seed and count, eight bytes each
    seed, count = (int.from_bytes(part, "little") for part in (state[:8], state[8:16]))
    return (seed + 0x9E3779B97F4A7C15 * count) % 2**63
