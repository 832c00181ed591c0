"""Weights shared out over ranks: each keeps a part of every layer group, and all give theirs when the group computes.

FSDP2 (Zhao et al., PyTorch FSDP, 2023) cuts and gathers; when, is decided here, in the order of the groups' visits: the
next group is gathered while one computes, which is freed before that takes its place. So a rank holds its part and
two whole groups, however often a group's modules are called during its visit; wan/planning/predict/shards.py counts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class ShardedGroups:
    """Layer groups whose weights are shared out from now on; attached, modules find theirs when they are called.

    Ranks must call the groups in the same order. Used where a Streamer is.

    Args:
        groups: disjoint modules in the order of their visits, which is taken to repeat without end; their weights
            anywhere. One after the other is brought to the device and cut.
        device: of this rank.
        size: of all ranks.
    """

    def __init__(self, groups: Sequence[nn.Module], device: torch.device, size: int):
        mesh = init_device_mesh(device.type, (size,))
        self._groups = []
        for group in groups:
            if any(True for _ in group.parameters()):
                group.requires_grad_(False)
                self._groups.append(fully_shard(_Group(group), mesh=mesh))
        self._undo = ExitStack()
        self._current: nn.Module | None = None
        self._coming: Any = None  # the gathering of the group after it

    def attach(self) -> None:
        """Makes calls of the groups' modules find whole weights."""
        for n, group in enumerate(self._groups):
            visit = partial(self._visit, n)
            for owner in group.modules():
                if any(True for _ in owner.parameters(recurse=False)):
                    self._undo.callback(owner.register_forward_pre_hook(visit).remove)

    def detach(self) -> None:
        """Undoes it: each rank holds its part alone."""
        self._undo.close()
        for waiting in (None, self._coming):  # the one that computed makes room before another is whole
            if waiting:
                waiting.wait()
            for group in self._groups:
                group.reshard()
        self._current = self._coming = None

    def _visit(self, n: int, *_: Any) -> None:
        group = self._groups[n]
        if group is self._current:
            return
        if self._current:
            self._current.reshard()
        if self._coming:
            self._coming.wait()
        self._current = group
        group.unshard()
        self._coming = self._groups[(n + 1) % len(self._groups)].unshard(async_op=True)


class _Group(nn.Module):
    """What FSDP takes for a module; it is never called itself."""

    def __init__(self, group: nn.Module):
        super().__init__()
        self.group = group

    def forward(self) -> None:
        raise NotImplementedError
