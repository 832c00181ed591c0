"""Tensors of the virtual GPU: what they hold, and how operators run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .hardware import DEVICE_TYPE, Allocation, Hardware
from .streams import Stream

aten = torch.ops.aten
KNOWN = 4096  # elements; on a GPU that holds meta tensors, those up to this size can keep their values


class VirtualTensor(torch.Tensor):
    """A tensor on the virtual device. `held` is the CPU or meta tensor in it, `allocation` counts its storage."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    held: torch.Tensor
    allocation: Allocation

    @staticmethod
    def __new__(
        cls, held: torch.Tensor, gpu: Hardware, allocation: Allocation | None = None
    ) -> VirtualTensor:
        allocation = allocation or gpu._allocation_of(held)
        shape, strides = held.shape, held.stride()
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=strides,
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=gpu.device,
            storage_size=allocation.storage.nbytes() or 2**62,  # an empty one may grow later, as out=
        )
        wrapper.held = held
        wrapper.allocation = allocation
        wrapper.signature = shape, strides, held.dtype
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"VirtualTensor({self.held}, device='{self.device}')"

    def numpy(self, *, force: bool = False) -> np.ndarray:
        if not force:
            raise TypeError(f"a tensor on {self.device} has no numpy array: call .cpu() first")
        return self.detach().cpu().numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        twin = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, self.requires_grad)
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"a tensor on {self.device} cannot be pickled: call .cpu() first")

    def record_stream(self, stream: Stream) -> None:
        self.allocation.streams += (stream,)
        self.allocation.gpu.timeline.note("record_stream", stream=stream, allocation=self.allocation.number)

    @property
    def span(self) -> tuple[int, int]:
        """The first byte of its storage that it covers and the one after the last."""
        held = self.held
        begin = held.storage_offset() * held.itemsize
        if held.is_contiguous():
            return begin, begin + held.nbytes
        last = sum((n - 1) * stride for n, stride in zip(held.shape, held.stride()))
        return begin, begin + (last + 1) * held.itemsize

    @property
    def known(self) -> bool:
        """Whether the held values are real: always so unless the GPU holds meta tensors."""
        return self.allocation.former is None and not self.held.is_meta and self.held.numel() <= KNOWN

    def forget(self) -> None:
        """Hold a meta tensor from now on, and so does every tensor that shares the storage."""
        allocation = self.allocation
        if allocation.former is None and not self.held.is_meta:
            allocation.former = allocation.storage
            allocation.storage = torch.UntypedStorage(allocation.former.nbytes(), device="meta")
            allocation.gpu._know(allocation.storage, allocation)
        if not self.held.is_meta:
            empty = torch.empty(0, dtype=self.held.dtype, device="meta")
            geometry = self.held.storage_offset(), self.held.shape, self.held.stride()
            self.held = empty.set_(allocation.storage, *geometry)


class _Operator:
    """The facts about an operator that the dispatcher needs, read once from its schema.

    composite: PyTorch composes the operator from others. needs_values: the host reads values of its arguments, or the
    shape of its result depends on them. written: index and name of the arguments that it writes. keeps_geometry: it
    writes and returns its first argument, and leaves that one's shape and strides.
    """

    def __init__(self, func: Any):
        tags, arguments = set(func.tags), list(enumerate(func._schema.arguments))
        implicit = "CompositeImplicitAutograd"
        self.name = func.name()
        self.special = _SPECIAL.get(func)
        self.composite = torch._C._dispatch_has_kernel_for_dispatch_key(self.name, implicit)
        self.takes_host_tensors = func in _TAKES_HOST_TENSORS
        self.needs_values = func is aten._linalg_check_errors.default or bool(
            tags & {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        )
        self.written = [(i, a.name) for i, a in arguments if a.alias_info and a.alias_info.is_write]
        aliases = any(a.alias_info for _, a in arguments) or func is aten._unsafe_view.default
        self.is_view = aliases and not self.written
        returns_it = [bool(r.alias_info) for r in func._schema.returns] == [True]
        in_place = returns_it and [i for i, _ in self.written] == [0]
        self.keeps_geometry = in_place and torch.Tag.inplace_view not in tags

    def writes(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[VirtualTensor]:
        """The tensors that a call with these arguments writes."""
        found: list[VirtualTensor] = []
        for i, name in self.written:
            _collect((args[i] if i < len(args) else kwargs.get(name),), found, [])
        return found


_operators: dict[Any, _Operator] = {}


def _dispatch(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    operator = _operators.get(func)
    if operator is None:
        operator = _operators[func] = _Operator(func)
    if operator.special is not None:
        return operator.special(*args, **kwargs)
    if operator.composite:  # arrives whole in inference mode only
        out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    if operator.is_view and type(args[0]) is VirtualTensor:
        base = args[0]
        return _wrap_views(func(_held(base), *args[1:], **kwargs), base.allocation)
    return _run(operator, func, args, kwargs)


def _run(operator: _Operator, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    virtual: list[VirtualTensor] = []
    host: list[torch.Tensor] = []
    _collect(args, virtual, host)
    if kwargs:
        _collect(kwargs.values(), virtual, host)
    if host and not operator.takes_host_tensors:
        raise RuntimeError(
            f"{operator.name}: its tensors must be on one device, found {virtual[0].device} and {host[0].device}"
        )
    gpu = virtual[0].allocation.gpu
    reads, writes = virtual, []
    if operator.written:
        writes = operator.writes(args, kwargs)
        reads = [v for v in virtual if not any(v is w for w in writes)]
    gpu.submit(operator.name, reads, writes)
    if operator.needs_values and not (operator.takes_host_tensors and _by_numbers(virtual)):
        _read_back(gpu, operator.name)
    on_device = kwargs.get("device") is None or kwargs["device"].type == DEVICE_TYPE
    if gpu.meta:
        out = _meta_result(operator, func, args, kwargs, virtual, writes, on_device)
    else:
        out = func(*_held(args), **_held_kwargs(kwargs, "cpu"))
    return _wrap(out, virtual, writes) if on_device else out


def _meta_result(
    operator: _Operator,
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    virtual: Sequence[VirtualTensor],
    writes: Sequence[VirtualTensor],
    on_device: bool,
) -> Any:
    """The result's geometry as a meta tensor, or the result itself if all values are known and it is small."""
    known = all(v.known for v in virtual)
    if not (known and (writes or operator.needs_values)):
        for tensor in writes:
            tensor.forget()
        out = _geometry(operator, func, args, kwargs, writes, on_device)
        outputs = out if isinstance(out, (list, tuple)) else [out]
        if not known or any(isinstance(o, torch.Tensor) and o.numel() > KNOWN for o in outputs):
            return out
    return func(*_held(args), **_held_kwargs(kwargs, "cpu"))


def _geometry(
    operator: _Operator,
    func: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    writes: Sequence[VirtualTensor],
    on_device: bool,
) -> Any:
    """The meta tensors that an operator returns. Meta kernels are slow, so their results are remembered."""
    key = _signature((func, args, *kwargs.items()))
    known = _geometries.get(key)
    if known is None:
        out = func(*_held(args, meta=True), **_held_kwargs(kwargs, "meta" if on_device else "cpu", meta=True))
        outputs = out if isinstance(out, tuple) else (out,)
        fresh = not writes and all(isinstance(o, torch.Tensor) and o.is_meta for o in outputs)
        if fresh or operator.keeps_geometry:
            _geometries[key] = isinstance(out, tuple), [(o.shape, o.stride(), o.dtype) for o in outputs]
        return out
    if operator.keeps_geometry:
        return writes[0].held
    several, geometries = known
    made = tuple(torch.empty_strided(*o[:2], dtype=o[2], device="meta") for o in geometries)
    return made if several else made[0]


# of operators that return new tensors, by the signature of the call
_geometries: dict[Any, tuple[bool, list]] = {}


def _signature(value: Any) -> Any:
    kind = type(value)
    if kind is VirtualTensor:
        return value.signature
    if kind is list or kind is tuple:
        return tuple([_signature(v) for v in value])
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return kind, value  # 1, 1.0 and True are equal but promote differently


def _collect(values: Iterable[Any], virtual: list[VirtualTensor], host: list[torch.Tensor]) -> None:
    """Add the tensors on the device, and those on the host that an operator on the device may not take, to lists."""
    for value in values:
        kind = type(value)
        if kind is VirtualTensor:
            virtual.append(value)
        elif kind is list or kind is tuple:
            _collect(value, virtual, host)
        elif (
            isinstance(value, torch.Tensor) and value.dim()
        ):  # a single number may come from the host, as on CUDA
            host.append(value)


def _held(value: Any, meta: bool = False) -> Any:
    """`value` with the held tensor in place of every tensor on the device; as meta tensors if so asked."""
    if isinstance(value, VirtualTensor):
        if value.allocation.former is not None:
            value.forget()
        return value.held.to("meta") if meta else value.held
    if isinstance(value, (list, tuple)):
        return [_held(v, meta) for v in value]
    if meta and isinstance(value, torch.Tensor):
        return value.to("meta")
    return value


def _held_kwargs(kwargs: dict[str, Any], device: str, meta: bool = False) -> dict[str, Any]:
    if not kwargs:
        return kwargs
    held = {name: _held(value, meta) for name, value in kwargs.items()}
    if held.get("device") is not None:
        held["device"] = device
    return held


def _wrap(out: Any, virtual: Sequence[VirtualTensor], writes: Sequence[VirtualTensor]) -> Any:
    if isinstance(out, torch.Tensor):
        for known in writes:
            if known.held is out:
                _follow(known)
                return known
        return VirtualTensor(out, virtual[0].allocation.gpu)
    if isinstance(out, (list, tuple)):
        return type(out)(_wrap(o, virtual, writes) for o in out)
    return out


def _wrap_views(out: Any, allocation: Allocation) -> Any:
    if isinstance(out, torch.Tensor):
        return VirtualTensor(out, allocation.gpu, allocation)
    return [_wrap_views(o, allocation) for o in out]


def _follow(tensor: VirtualTensor) -> None:
    """Give the wrapper the geometry that an in-place operator gave the tensor it holds."""
    held = tensor.held
    if tensor.shape != held.shape or tensor.stride() != held.stride():
        tensor.allocation.resize(held.untyped_storage().nbytes())
        tensor.signature = held.shape, held.stride(), held.dtype
        with torch._C._DisableTorchDispatch():
            tensor.as_strided_(held.shape, held.stride(), held.storage_offset())


def copy_(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if not isinstance(destination, VirtualTensor):
        return _copy_out(destination, source, non_blocking)
    gpu = destination.allocation.gpu
    from_device = isinstance(source, VirtualTensor)
    gpu.submit("copy_", [source] if from_device else (), [destination])
    pinned = not from_device and not source.is_meta and gpu.is_pinned(source)
    if pinned:
        gpu.timeline.touch_host("copy_in", source, writes=False)
    if not gpu.meta or (destination.known and (source.known if from_device else not source.is_meta)):
        _held(destination).copy_(_held(source))
    else:
        destination.forget()
    if not from_device:
        gpu.timeline.note("copy_in", nbytes=destination.nbytes, allocation=destination.allocation.number)
        if not non_blocking:
            gpu.timeline.current.synchronize()
        elif pinned:
            gpu.timeline.reads_host("copy_in", source)
    return destination


def _copy_out(
    destination: torch.Tensor, source: VirtualTensor, non_blocking: bool = False, pinned: bool = False
) -> torch.Tensor:
    """Copy to the host; asynchronously if non_blocking and the destination is pinned."""
    gpu = source.allocation.gpu
    gpu.submit("copy_", [source])
    gpu.timeline.note("copy_out", nbytes=source.nbytes, allocation=source.allocation.number)
    if not destination.is_meta and gpu.is_pinned(destination):
        gpu.timeline.touch_host("copy_out", destination, writes=True)
    late = non_blocking and (pinned or gpu.is_pinned(destination))
    if not late:
        gpu.timeline.current.synchronize()
    if destination.is_meta or (gpu.meta and not source.known):
        return destination
    if late:
        gpu.timeline.writes_host("copy_out", destination, _held(source).clone())
    else:
        destination.copy_(_held(source))
    return destination


def _to_copy(
    source: VirtualTensor,
    *,
    device: torch.device | None = None,
    non_blocking: bool = False,
    pin_memory: Any = None,
    **options: Any,
) -> torch.Tensor:
    func = aten._to_copy.default
    if device is None or device.type == DEVICE_TYPE:
        return _run(_TO_COPY, func, (source,), options)
    geometry = func(
        torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta"), **options
    )
    if device.type == "meta":
        return geometry
    return _copy_out(_host_zeros(geometry), source, non_blocking, pinned=True)


def _host_zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros on the host with the geometry of a meta tensor, which take no memory until they are touched."""
    flat = torch.from_numpy(np.zeros(like.untyped_storage().nbytes(), np.uint8)).view(like.dtype)
    return flat.as_strided(like.shape, like.stride())


def _by_numbers(virtual: Sequence[VirtualTensor]) -> bool:
    """Whether the indices, all tensors but the first, are numbers; of a mask the host must count the true values."""
    return not any(index.dtype in (torch.bool, torch.uint8) for index in virtual[1:])


def _read_back(gpu: Hardware, name: str) -> None:
    """The host waits for values that an operator tells it: a number, a length, whether all went well."""
    gpu.timeline.note("copy_out", name)
    gpu.timeline.current.synchronize()


def _item(source: VirtualTensor) -> Any:
    gpu = source.allocation.gpu
    gpu.submit("item", [source])
    _read_back(gpu, "item")
    if gpu.meta and not source.known:
        return torch.zeros((), dtype=source.dtype).item()
    return _held(source).item()


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    tensors = [t for t in (query, key, value, attn_mask) if t is not None]
    if not all(isinstance(t, VirtualTensor) for t in tensors):
        raise RuntimeError(f"scaled_dot_product_attention: its tensors must all be on {DEVICE_TYPE}")
    gpu = query.allocation.gpu
    gpu.submit("scaled_dot_product_attention", tensors)
    fused = query.dtype in (torch.float16, torch.bfloat16)
    if gpu.meta:
        out = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device="meta")
        if fused:  # such kernels keep the query's layout
            q = query.held.to("meta")
            out = torch.empty_like(q) if out.shape == q.shape else out.mT.contiguous().mT
    else:
        q, k, v, mask = _held((query, key, value, attn_mask))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    out = VirtualTensor(out, gpu)
    if not fused:
        scores = query.shape[:-1].numel() * key.shape[-2] * query.element_size()
        gpu._give_back(gpu._allocate(scores, gpu.timeline.current))
    return out


_SPECIAL: dict[Any, Callable] = {
    aten.copy_.default: copy_,
    aten._to_copy.default: _to_copy,
    aten._local_scalar_dense.default: _item,
    aten.scaled_dot_product_attention.default: attention,
}
_TAKES_HOST_TENSORS = {  # indices may be on the host
    aten.index.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
_TO_COPY = _Operator(aten._to_copy.default)
