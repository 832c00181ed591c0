"""Ranks of one machine that a program starts by itself, instead of being started by torchrun."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import socket
from collections.abc import Callable

from .ranks import Ranks


def start(size: int, follow: Callable[[Ranks], None], device: str | None = None) -> Ranks:
    """Starts the other processes and makes this one the first of `size` ranks; the others end with it.

    Args:
        follow: called in each of the other processes, which import its module.
        device: as --device takes it.

    Raises RankLost if not all processes connect.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    for rank in range(1, size):
        context.Process(target=_other, args=((rank, size, address), follow, device), daemon=True).start()
    ranks = Ranks((0, size, address))
    ranks.__enter__()
    atexit.register(ranks.leave)
    ranks.use(device)
    return ranks


def _other(place: tuple[int, int, str], follow: Callable[[Ranks], None], device: str | None) -> None:
    logging.disable(logging.CRITICAL)
    try:
        with Ranks(place) as ranks:
            ranks.use(device)
            follow(ranks)
    except Exception:
        raise SystemExit(1) from None
