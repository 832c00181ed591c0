"""One rank of several, without the others: it sends to nobody, and gets zeros. For counting bytes on a virtual GPU."""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from virtual_gpu import tensor as virtual
from wan.distributed.ranks import Ranks


class Alone(Ranks):
    """The first of so many ranks."""

    def __init__(self, size, device):
        super().__init__((0, size, ""))
        self.device = device
        all_, half = list(range(size)), size // 2
        teams = {1: [all_]} | ({2: [all_[:half], all_[half:]]} if size % 2 == 0 else {})
        self._groups = {n: [(team, dist.new_group(team)) for team in of] for n, of in teams.items()}

    def wired(self, tensor):
        return tensor.contiguous()

    def share(self, value):
        return value

    def spread(self, tensor, source):
        pass

    def bring(self, tensor, source):
        return tensor.clone() if source else tensor

    def gather(self, value):
        return [value] * self.size


@contextlib.contextmanager
def alone(size, device):
    """The rank; inside, collectives of torch.distributed do nothing, and FSDP's storages are the virtual GPU's."""

    def alloc(tensor):
        if not tensor.allocation.nbytes:
            tensor.allocation.resize(tensor.nbytes)

    def free(tensor):
        tensor.allocation.resize(0)

    def copy_in(parts, whole, sizes, numel, rank):  # the result is a view, which the operator does not tell
        return whole.narrow(0, numel * rank, numel), whole

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        with (
            mock.patch.object(_fsdp_param, "alloc_storage", alloc),
            mock.patch.object(_fsdp_param, "free_storage", free),
            mock.patch.dict(virtual._SPECIAL, {torch.ops.fsdp.all_gather_copy_in.default: copy_in}),
        ):
            yield Alone(size, device)
    finally:
        dist.destroy_process_group()
