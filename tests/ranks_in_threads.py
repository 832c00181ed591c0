"""Ranks that are threads of one process, so that what they share out is tried without starting any.

One runs at a time, until it waits for the others: what they use need not be made for threads.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class Thread:
    """One of them, as a Team; all have a copy of what they share out. `sent` counts bytes as a Team does."""

    def __init__(self, rank, size, device, table, barrier, turn):
        self.rank, self.size, self.device = rank, size, device
        self.sent = 0
        self._table, self._barrier, self._turn = table, barrier, turn

    def exchange(self, parts, shapes):
        assert len(parts) == len(shapes) == self.size and len({part.dtype for part in parts}) == 1
        self.sent += sum(part.nbytes for i, part in enumerate(parts) if i != self.rank)
        self._table[self.rank] = [
            part.to("cpu", copy=True) if part.numel() else torch.empty(part.shape, dtype=part.dtype)
            for part in parts
        ]
        self._wait()
        found = [self._table[other][self.rank] for other in range(self.size)]
        self._wait()
        assert [part.shape for part in found] == [torch.Size(shape) for shape in shapes]
        return [part.to(self.device) for part in found]

    def _wait(self):
        self._turn.release()
        try:
            self._barrier.wait()
        finally:
            self._turn.acquire()


def on_ranks(size, work, device="cpu"):
    """What `work` returns for each rank's Team; if one fails, all do."""
    table, barrier, turn = {}, threading.Barrier(size, timeout=60), threading.Lock()

    def run(rank):
        try:
            with torch.no_grad(), turn:
                return work(Thread(rank, size, torch.device(device), table, barrier, turn))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        results = [pool.submit(run, rank) for rank in range(size)]
    errors = [result.exception() for result in results if result.exception()]
    broken = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in broken or errors:
        raise error
    return [result.result() for result in results]
