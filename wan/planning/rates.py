"""How fast a machine computes and copies: measured once in a few seconds and remembered, or taken from a table."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..modules.attention import flash_attention
from ..utils.files import replacing
from ..utils.outside import parse_json
from .predict.card import Card

GIGA, TERA = 1e9, 1e12
TRIALS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rates:
    """How much a machine does in a second.

    Attributes:
        products: operations of bf16 products of matrices.
        attention: of attention in bf16.
        convolutions: of convolutions in fp32, as PyTorch computes them by default.
        memory: bytes that the device reads from its own memory.
        pinned, pageable: bytes copied between the device and RAM, page-locked RAM or not.
        host: operations of bf16 products on the CPU.
        disk: bytes read from the disk.
        source: "measured", or the kind of card that the nominal values are for.
    """

    products: float
    attention: float
    convolutions: float
    memory: float
    pinned: float
    pageable: float
    host: float = 0.3 * TERA
    disk: float = 1.5 * GIGA
    source: str = "measured"


def _nominal(products: float, convolutions: float, memory: float, pinned: float, source: str) -> Rates:
    """Rates from trillions of operations and GB per second; attention reaches 0.7 of products, pageable copies a third
    of pinned ones."""
    convolutions *= TERA
    rates = (
        products * TERA,
        0.7 * products * TERA,
        convolutions,
        memory * GIGA,
        pinned * GIGA,
        pinned / 3 * GIGA,
    )
    return Rates(*rates, source=source)


# By compute capability: what typical cards sustain, some 60 to 70% of their data sheets. Modelled, not measured.
NOMINAL = {
    (7, 0): _nominal(10, 8, 600, 11, "a card of compute capability 7.0"),  # bf16 is emulated before 8.0
    (7, 5): _nominal(6, 5, 300, 11, "a card of compute capability 7.5"),
    (8, 0): _nominal(200, 60, 1400, 22, "a card of compute capability 8.0"),
    (8, 6): _nominal(35, 15, 350, 11, "a card of compute capability 8.6"),
    (8, 9): _nominal(110, 45, 800, 22, "a card of compute capability 8.9"),
    (9, 0): _nominal(550, 200, 2800, 45, "a card of compute capability 9.0"),
    (12, 0): _nominal(140, 60, 1400, 45, "a card of compute capability 12.0"),
}
GIB = 2**30


def nominal(capability: tuple[int, int]) -> Rates:
    """Built-in rates of the newest known capability that is no newer than this one, else of the oldest."""
    known = [one for one in NOMINAL if one <= tuple(capability)]
    return NOMINAL[max(known, default=min(NOMINAL))]


def usual_capability(card_bytes: float) -> tuple[int, int]:
    """Compute capability of a usual card with that much memory: 8.6 up to 14 GiB, 8.9 up to 40 GiB, then 9.0."""
    return (8, 6) if card_bytes <= 14 * GIB else (8, 9) if card_bytes <= 40 * GIB else (9, 0)


def usual(card_bytes: float) -> Rates:
    """Built-in rates of a usual card with that much memory."""
    return NOMINAL[usual_capability(card_bytes)]


def rates_of(device: torch.device, cache: Path, card: Card, choice: str = "auto") -> Rates:
    """The rates of a CUDA device: measured in a few seconds the first time, then read from the file `cache`.

    A device that cannot be measured gets the built-in rates of its capability.

    Args:
        card: the device; its attention kernel and exactness are part of the file's keys, so others are measured anew.
        choice: value of --attention that chose the card's kernel.
    """
    properties = torch.cuda.get_device_properties(device)
    key = (
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, PyTorch {torch.__version__}, "
        f"attention: {card.kernel}{', exact' * card.exact}"
    )
    known = _read(cache)
    if key in known:
        return known[key]
    try:
        rates = measure(device, nominal((properties.major, properties.minor)), choice)
    except RuntimeError as error:
        log.warning(f"The card's rates could not be measured: {' '.join(str(error).split())[:160]}")
        return nominal((properties.major, properties.minor))
    finally:
        torch.cuda.empty_cache()
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as temporary:
            temporary.write_text(
                json.dumps({name: asdict(one) for name, one in (known | {key: rates}).items()})
            )
    except OSError as error:
        log.warning(f"The card's rates could not be kept: {error}")
    return rates


def measure(
    device: torch.device, others: Rates, choice: str = "auto", side: int = 4096, copied: int = 64 << 20
) -> Rates:
    """Measures rates in some seconds, within half a GiB; those that take longer (CPU, disk) are taken from `others`.

    Attention is measured with the models' function, by the kernel that it takes on the device.
    """
    ran = torch.get_device_module(device)

    def seconds(work: Callable[[], Any]) -> float:
        work()
        times = []
        for _ in range(TRIALS):
            ran.synchronize()
            start = time.perf_counter()
            work()
            ran.synchronize()
            times.append(time.perf_counter() - start)
        return max(min(times), 1e-9)

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    with torch.no_grad():
        a = zeros(side, side)
        products = 2 * side**3 / seconds(lambda: a @ a)
        q, k = zeros(1, side, 12, 128), zeros(1, 4 * side, 12, 128)
        attended = seconds(lambda: flash_attention(q, k, k, choice=choice))
        picture, kernel = (
            zeros(1, 96, 256, 256, dtype=torch.float32),
            zeros(96, 96, 3, 3, dtype=torch.float32),
        )
        convolved = seconds(lambda: F.conv2d(picture, kernel, padding=1))
        there = torch.empty(copied, dtype=torch.uint8, device=device)
        here = torch.ones(copied, dtype=torch.uint8)
        pageable = copied / seconds(lambda: there.copy_(here))
        locked = here.pin_memory()
        pinned = copied / seconds(lambda: there.copy_(locked, non_blocking=True))
        memory = 2 * copied / seconds(lambda: there.copy_(there.clone())) * 2
    return replace(
        others,
        products=products,
        attention=4 * 12 * side * 4 * side * 128 / attended,
        convolutions=2 * 9 * 96 * 96 * 256**2 / convolved,
        memory=memory,
        pinned=pinned,
        pageable=pageable,
        source="measured",
    )


def _read(cache: Path) -> dict[str, Rates]:
    try:
        return {name: Rates(**values) for name, values in parse_json(cache.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
