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

MEETING = timedelta(minutes=10)  # longest wait for all ranks to connect, or to give their shards of a group
PATIENCE = timedelta(minutes=60)  # longest wait for one rank's own work; the end of a rank is noticed at once
_DONE = "done"
_ENDED = "wan/ended"  # key in the store: why the first rank that failed ended


class RankLost(ConnectionError):
    """Another rank has failed or is gone; this one cannot go on.

    Attributes:
        out_of_memory: whether that rank lacked memory on its device.
    """

    def __init__(self, message: str, out_of_memory: bool = False):
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Team:
    """Ranks that share a pass; see sequence.py for what they need of each other.

    Attributes:
        number: index of the team, and of the prompt that it computes where teams share prompts.
        rank, size: of this process among its ranks.
        device: where it computes.
        sent: bytes that this process has sent to the others.
    """

    def __init__(self, ranks: Ranks, members: Sequence[int], number: int = 0, group: Any = None):
        self.number, self.first = number, members[0]
        self.rank, self.size, self.device = ranks.rank - members[0], len(members), ranks.device
        self.sent = 0
        self._ranks, self._group = ranks, group

    def exchange(
        self, parts: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]
    ) -> list[torch.Tensor]:
        """Sends one part to each rank; returns the parts that the ranks sent here, of these shapes and of one type."""
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
    """All ranks of a run, seen from one of them; a context manager that connects them, and disconnects them at the end.

    The first rank leads: it tells the others what to do next.

    Attributes:
        rank, size: of this process among all.
        local_rank, local_size: of this process among those of its machine.
        device: where this process computes; set by `use`.
        sent: bytes that this process has sent, beside those that its teams count.

    Args:
        place: rank, size and address, for ranks of one machine; default: from torchrun's environment variables.

    Raises InputError if torchrun's variables are missing, RankLost if not all ranks connect.
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
        self._broken = False  # whether the ranks are out of step with each other
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
            # The others wait for the lead as long as it works alone.
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
        """Tells the others that the run is over, or the error; closes the connections, which ends their waiting."""
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
        """Sets the device, and returns it: the GPU whose index is this rank's number on its machine, or the CPU.

        Args:
            name: kind of device, as choose_device takes it; None for the accelerator that is there.

        Raises InputError for a name with an index, and for more ranks on a machine than GPUs.
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
        """Opens all connections between devices, so that the device memory that they take is taken from now on."""
        one = self.wired(torch.zeros(1, device=self.device))
        with self.answering():
            dist.broadcast(one, src=0)
        for branches in self._groups:
            team = self.team(branches)
            team.exchange([one] * team.size, [(1,)] * team.size)

    def team(self, branches: int) -> Team:
        """This rank's team; branches: number of passes that teams compute at the same time, if they can, 1 or 2."""
        teams = self._groups.get(branches, self._groups[1])
        (found,) = (
            Team(self, members, number, group)
            for number, (members, group) in enumerate(teams)
            if self.rank in members
        )
        return found

    def teams(self, branches: int) -> list[int]:
        """The first rank of each team; branches: as `team`'s."""
        return [members[0] for members, _ in self._groups.get(branches, self._groups[1])]

    # What is sent

    def tell(self, name: str, *args: Any) -> None:
        """Makes the others call their handler of that name with these arguments; tensors arrive on the CPU."""
        self.share((name, args))

    def listen(self) -> tuple[str, tuple[Any, ...]]:
        """Waits for what the lead tells next; returns a handler's name and arguments."""
        return self.share(None)

    @contextlib.contextmanager
    def step(self, name: str, *args: Any) -> Iterator[None]:
        """On the lead: tells the others, and runs its own share inside. An error inside ends all: the others wait."""
        try:
            self.tell(name, *args)
            yield
        except BaseException as error:
            self.leave(error)
            raise

    @contextlib.contextmanager
    def session(self, name: str, *args: Any) -> Iterator[None]:
        """On the lead: tells the others, whose handler calls `serve`; that ends when the body ends or fails."""
        self.tell(name, *args)
        try:
            yield
        except BaseException:
            with contextlib.suppress(RankLost, InputError):  # errors of ranks that have ended too
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
        """Returns the lead's value on every rank; it must be picklable. Tensors in it are sent raw, from CPU to CPU."""
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
        """Copies a contiguous tensor of the rank `source` into this one, on all ranks."""
        wired = self.wired(tensor)
        with self.answering():
            dist.broadcast(wired.view(-1).view(torch.uint8), src=source, group=self._everyone)
        if wired is not tensor:
            tensor.copy_(wired)
        self.sent += tensor.nbytes if self.rank == source else 0

    def bring(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Returns the tensor of the rank `source` on the lead, whose own has the same shape; on others their own."""
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
        """The tensor, contiguous, on a device that processes can send from."""
        return (tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu()).contiguous()

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, on every rank."""
        found = [None] * self.size
        with self.answering():
            dist.all_gather_object(found, value, group=self._everyone)
        return found

    # How they end

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, an error of communication becomes RankLost, or the InputError that another rank met."""
        if self._broken:
            raise RankLost("the other ranks have ended")
        try:
            yield
        except BaseException as error:  # signals too: they interrupt what the others take part in
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
        """Why another rank ended, if that rank left word."""
        with contextlib.suppress(RuntimeError):
            if self._store.check([_ENDED]):
                found = json.loads(self._store.get(_ENDED))
                return None if found["rank"] == self.rank else found
        return None

    def _note(self, error: BaseException) -> None:
        """Leaves word of why this rank ends, unless another rank has done so."""
        told = " ".join(str(error).split()) or type(error).__name__
        bad_input = isinstance(error, InputError)
        message = {"rank": self.rank, "bad_input": bad_input, "message": f"rank {self.rank}: {told}"}
        message["out_of_memory"] = is_out_of_memory(error)
        with contextlib.suppress(RuntimeError):
            if not self._store.check([_ENDED]):
                self._store.set(_ENDED, json.dumps(message))


class _Packer(pickle.Pickler):
    """Leaves tensors out of the pickle, and lists them, contiguous and on the CPU."""

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
    """An error of torch in one short line; torch's messages have several lines and name places in its sources."""
    return " ".join(str(error).split()).rpartition("] ")[2][:160]
