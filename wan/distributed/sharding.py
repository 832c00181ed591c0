"""Sharded weights: each rank keeps a part of every layer group, and all ranks' parts are gathered when it computes.

FSDP2 (Zhao et al., PyTorch FSDP, 2023) cuts and gathers; this module decides when, in the order of the groups' visits:
while one group computes the next is gathered, and the former is freed before the latter takes its place. So a rank
holds its part and two whole groups, however often a group's modules are called during its visit;
wan/planning/predict/shards.py counts that memory.
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
    """Shards the weights of layer groups; while attached, modules find their whole weights when they are called.

    All ranks must call the groups in the same order. Takes the place of a Streamer.

    Args:
        groups: disjoint modules in the order of their visits, which is taken to repeat without end; their weights
            anywhere. Each group in turn is brought to the device and cut.
        device: of this rank.
        size: number of ranks.
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
        self._coming: Any = None  # the gathering of the next group, under way

    def attach(self) -> None:
        """Makes calls of the groups' modules find whole weights."""
        for n, group in enumerate(self._groups):
            visit = partial(self._visit, n)
            for owner in group.modules():
                if any(True for _ in owner.parameters(recurse=False)):
                    self._undo.callback(owner.register_forward_pre_hook(visit).remove)

    def detach(self) -> None:
        """Undoes attach(): each rank holds only its part."""
        self._undo.close()
        for waiting in (None, self._coming):  # frees the current group before the next one becomes whole
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
    """The module that FSDP shards; it is never called itself."""

    def __init__(self, group: nn.Module):
        super().__init__()
        self.group = group

    def forward(self) -> None:
        raise NotImplementedError
