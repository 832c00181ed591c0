"""The processes of a run: how they meet, what they send each other, and how all end when one does."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from leanwan.accelerator import choose_device, is_out_of_memory
from leanwan.errors import InputError

MEETING = timedelta(minutes=10)  # until all ranks are there, and all give their part of a layer group
PATIENCE = timedelta(minutes=60)  # for what one rank does alone; a rank that ends is noticed at once
_DONE = "done"
_ENDED = "wan/ended"  # in the store: why the first of the ranks ended that failed


class RankLost(ConnectionError):
    """Another rank has failed or is gone; this one cannot go on.

    Attributes:
        out_of_memory: whether it was for lack of memory on its device.
    """

    def __init__(self, message: str, out_of_memory: bool = False):
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Team:
    """Ranks that share a pass; see sequence.py for what they need of each other.

    Attributes:
        number: of the team; the first computes what is asked for first.
        rank, size: of this process among its ranks.
        device: where it computes.
        sent: bytes that it has sent to the others.
    """

    def __init__(self, ranks: Ranks, members: Sequence[int], number: int = 0, group: Any = None):
        self.number, self.first = number, members[0]
        self.rank, self.size, self.device = ranks.rank - members[0], len(members), ranks.device
        self.sent = 0
        self._ranks, self._group = ranks, group

    def exchange(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """Gives each rank a part, and returns what each has for this one, of these shapes; all are of one type."""
        if self.size == 1:
            return list(parts)
        sends = [part.numel() * part.itemsize for part in parts]
        receives = [math.prod(shape) * parts[0].itemsize for shape in shapes]
        self.sent += sum(sends) - sends[self.rank]
        outgoing = self._ranks.wired(torch.cat([part.reshape(-1) for part in parts]).view(torch.uint8))
        incoming = outgoing.new_empty(sum(receives))
        with self._ranks.answering():
            dist.all_to_all_single(incoming, outgoing, receives, sends, group=self._group)
        dtype, incoming = parts[0].dtype, incoming.to(parts[0].device)
        return [part.view(dtype).view(shape) for part, shape in zip(incoming.split(receives), shapes)]


class Ranks:
    """All of them, seen from one; a context manager, which meets the others and in the end lets them go.

    The first leads: it tells the others what all do next.

    Attributes:
        rank, size: of this process among all.
        local_rank, local_size: of this process among those of its machine.
        device: where it computes; settled by `use`.
        sent: bytes that this rank has sent, beside those of its teams.

    Args:
        place: rank, size and address of those of one machine; default: what torchrun's variables say.

    Raises InputError for variables of torchrun's that are missing, RankLost if not all ranks come.
    """

    def __init__(self, place: tuple[int, int, str] | None = None) -> None:
        if place:
            self.rank, self.size, self._address = place
            self.local_rank, self.local_size = self.rank, self.size
        else:
            try:
                self.rank, self.size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
                self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
                self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
            except (KeyError, ValueError) as error:
                raise InputError("several ranks: start them with torchrun") from error
            self._address = "env://"
        self.device = torch.device("cpu")
        self.sent = 0
        self._broken = False  # whether the ranks have lost step with each other
        self._left = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> Ranks:
        backend = "cpu:gloo,cuda:nccl" if dist.is_nccl_available() and torch.cuda.is_available() else "gloo"
        try:
            dist.init_process_group(backend, self._address, MEETING, self.size, self.rank)
            self._store = dist.distributed_c10d._get_default_store()
            half = self.size // 2
            groups = [list(range(half)), list(range(half, self.size))] if self.size % 2 == 0 else []
            made = [dist.new_group(group, timeout=PATIENCE) for group in groups]
            # Waits for the lead are as long as what it does alone.
            everyone = dist.new_group(list(range(self.size)), timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise RankLost(f"the ranks did not meet ({_sentence(error)})") from error
        self._everyone = everyone
        self._groups = {1: [(list(range(self.size)), everyone)]}
        if groups:
            self._groups[2] = list(zip(groups, made))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: object) -> None:
        self.leave(error)

    def leave(self, error: BaseException | None = None) -> None:
        """Lets the others go, told why if there is an error; closes the connections, which ends their waiting."""
        if self._left:
            return
        self._left = True
        if error is not None and not isinstance(error, RankLost):
            self._note(error)
        elif error is None and self.leads and not self._broken:
            self.tell(_DONE)
        self._broken = True
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    def use(self, name: str | None) -> torch.device:
        """Computes from now on on the GPU that has this rank's number on its machine, which is returned; or the CPU.

        Args:
            name: of the kind, as choose_device takes it; None for the accelerator that is there.

        Raises InputError for a name that stands for one GPU, and for more ranks than GPUs.
        """
        device = choose_device(name)
        if device.type != "cpu":
            if name is not None and ":" in name:
                raise InputError(
                    "names one GPU, each rank takes its own; leave out the number", "device", name
                )
            count = torch.get_device_module(device).device_count()
            if self.local_size > count:
                problem = f"{self.local_size} ranks on a machine with {count} of them, start one for each"
                raise InputError(problem, "device", device.type)
            device = torch.device(device.type, self.local_rank)
            torch.get_device_module(device).set_device(device)
        self.device = device
        return device

    def connect(self) -> None:
        """Opens all connections between devices, so that what they take there is taken."""
        one = self.wired(torch.zeros(1, device=self.device))
        with self.answering():
            dist.broadcast(one, src=0)
        for branches in self._groups:
            team = self.team(branches)
            team.exchange([one] * team.size, [(1,)] * team.size)

    def team(self, branches: int) -> Team:
        """The ranks that this one shares a pass with, where there are so many passes to be shared: 1 or 2."""
        teams = self._groups.get(branches, self._groups[1])
        (found,) = (
            Team(self, members, number, group)
            for number, (members, group) in enumerate(teams)
            if self.rank in members
        )
        return found

    def teams(self, branches: int) -> list[int]:
        """The first rank of each team."""
        return [members[0] for members, _ in self._groups.get(branches, self._groups[1])]

    # What is sent

    def tell(self, name: str, *args: Any) -> None:
        """Has the others do what they have under that name, with these arguments; tensors arrive on the CPU."""
        self.share((name, args))

    def listen(self) -> tuple[str, tuple[Any, ...]]:
        """What the lead tells next: a name and arguments."""
        return self.share(None)

    @contextlib.contextmanager
    def step(self, name: str, *args: Any) -> Iterator[None]:
        """On the lead: `tell`, and inside its own share of it. An error there ends all: the others would wait."""
        try:
            self.tell(name, *args)
            yield
        except BaseException as error:
            self.leave(error)
            raise

    @contextlib.contextmanager
    def session(self, name: str, *args: Any) -> Iterator[None]:
        """On the lead: `tell` what the others answer with `serve`, which ends when the body does, however."""
        self.tell(name, *args)
        try:
            yield
        except BaseException:
            with contextlib.suppress(RankLost, InputError):  # of those that end as well
                self.tell(_DONE)
            raise
        if not self._broken:
            self.tell(_DONE)

    def serve(self, handlers: Mapping[str, Callable[..., Any]]) -> None:
        """On the others: does what the lead tells, until its session is over."""
        while True:
            name, args = self.listen()
            if name == _DONE:
                return
            handlers[name](*args)

    def share(self, value: Any) -> Any:
        """The lead's value, on every rank: whatever can be pickled. Tensors are sent as they are, from CPU to CPU."""
        file = io.BytesIO()
        tensors: list[torch.Tensor] = []
        if self.leads:
            _Packer(file, tensors).dump(value)
        header: list[Any] = [file.getvalue(), [(tensor.shape, tensor.dtype) for tensor in tensors]]
        with self.answering():
            dist.broadcast_object_list(header, src=0, group=self._everyone, device=torch.device("cpu"))
            if not self.leads:
                tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in header[1]]
            for tensor in tensors:
                if tensor.numel():
                    dist.broadcast(tensor.view(-1).view(torch.uint8), src=0, group=self._everyone)
                    self.sent += tensor.nbytes if self.leads else 0
        return value if self.leads else _Unpacker(io.BytesIO(header[0]), tensors).load()

    def spread(self, tensor: torch.Tensor, source: int) -> None:
        """Fills a contiguous tensor, on all ranks, with that of the rank `source`."""
        wired = self.wired(tensor)
        with self.answering():
            dist.broadcast(wired.view(-1).view(torch.uint8), src=source, group=self._everyone)
        if wired is not tensor:
            tensor.copy_(wired)
        self.sent += tensor.nbytes if self.rank == source else 0

    def bring(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """On the lead the tensor of the rank `source`, of the shape of its own; on the others their own."""
        with self.answering():
            if self.rank == source and not self.leads:
                self.sent += tensor.nbytes
                dist.send(self.wired(tensor), 0, group=self._everyone)
            elif self.leads and source:
                arriving = torch.empty_like(self.wired(tensor))
                dist.recv(arriving, source, group=self._everyone)
                return arriving.to(tensor.device)
        return tensor

    def wired(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where the processes can send it from."""
        return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).contiguous()

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, on every rank."""
        found = [None] * self.size
        with self.answering():
            dist.all_gather_object(found, value, group=self._everyone)
        return found

    # How they end

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, what goes wrong with the others is RankLost, or the InputError that one of them met."""
        if self._broken:
            raise RankLost("the other ranks have ended")
        try:
            yield
        except BaseException as error:  # a signal, too: the others are in the midst of it
            self._broken = True
            if not isinstance(error, RuntimeError):
                raise
            reason = self.reason() if self.leads else None
            if reason is None:
                raise RankLost(f"a rank was lost ({_sentence(error)})") from error
            if reason["bad_input"]:
                raise InputError(reason["message"]) from error
            raise RankLost(reason["message"], reason["out_of_memory"]) from error

    def reason(self) -> dict[str, Any] | None:
        """Why another rank ended, if it could say so."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_ENDED]):
                found = json.loads(self._store.get(_ENDED))
                return None if found["rank"] == self.rank else found
        return None

    def _note(self, error: BaseException) -> None:
        """Leaves word of why this rank ends, unless another was first."""
        told = " ".join(str(error).split()) or type(error).__name__
        bad_input = isinstance(error, InputError)
        message = {"rank": self.rank, "bad_input": bad_input, "message": f"rank {self.rank}: {told}"}
        message["out_of_memory"] = is_out_of_memory(error)
        with contextlib.suppress(RuntimeError):
            if not self._store.check([_ENDED]):
                self._store.set(_ENDED, json.dumps(message))


class _Packer(pickle.Pickler):
    """Leaves tensors out, and lists them, contiguous and on the CPU."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]):
        super().__init__(file)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self._tensors.append(value.detach().cpu().contiguous())
        return len(self._tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]):
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> torch.Tensor:
        return self._tensors[number]


def _sentence(error: BaseException) -> str:
    """An error of torch in few words, which run over lines and name places in its sources."""
    return " ".join(str(error).split()).rpartition("] ")[2][:160]
