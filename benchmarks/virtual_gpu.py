"""A GPU made of CPU memory, for tests and for counting memory where no GPU is at hand.

    with VirtualGPU(capacity=8 * 2**30) as gpu:
        module.to("vgpu")
        module(torch.randn(2, 3, device="vgpu"))
    print(gpu.peak)

A tensor on the device is a wrapper that reports device ``vgpu:0`` and holds a CPU tensor. Every operator runs on
the held tensors and its results are wrapped again, so values are those of the CPU, bit for bit. Each distinct
storage is counted once, rounded up to 512 bytes as CUDA's caching allocator rounds, from the moment it appears
until the last tensor on it is gone.

What is counted is what operators return. Memory that a CUDA kernel allocates for itself (workspaces, casts inside a
copy) is not. Operators that PyTorch composes from others are counted step by step. Scaled dot product attention
counts as a fused kernel for 16-bit types and with its score matrix for float32 and float64.

It rests on PyTorch's Python backend for the PrivateUse1 dispatch key, which is experimental: it is made for tests and
benchmarks, not for the package. Importing this file registers the device type; there is nothing else to set up.
"""

import contextlib
import threading
import weakref

import torch
import torch.nn.functional as F
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["DEVICE", "VirtualGPU", "VirtualTensor"]

aten = torch.ops.aten
ROUNDING = 512  # bytes; the granularity of CUDA's caching allocator


class Allocation:
    """The bytes of one storage on the device; given back when the last tensor that shares it is gone."""

    __slots__ = ("__weakref__", "gpu", "nbytes", "storage")

    def __init__(self, gpu, storage):
        self.gpu = gpu
        self.storage = storage  # keeps the address, by which the ledger knows it, taken
        self.nbytes = 0
        self.resize(storage.nbytes())

    def resize(self, requested):
        rounded = -(-requested // ROUNDING) * ROUNDING
        self.gpu._reserve(rounded - self.nbytes, requested)
        self.nbytes = rounded

    def __del__(self):
        self.gpu._release(self.nbytes)


class VirtualTensor(torch.Tensor):
    """A tensor on the virtual device. `held` is the CPU tensor with its values, `allocation` counts its storage."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, gpu):
        allocation = gpu._allocation_of(held)
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            storage_size=allocation.storage.nbytes() or 2**62,  # an empty one may grow later, as out=
        )
        wrapper.held = held
        wrapper.allocation = allocation
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents=None):
        return f"VirtualTensor({self.held}, device='{DEVICE}')"

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"a tensor on {DEVICE} has no numpy array: call .cpu() first")
        return self.detach().cpu().numpy()

    def tolist(self):
        return self.cpu().tolist()


class VirtualGPU:
    """Makes device ``vgpu:0`` usable inside its `with` block, in every thread.

    capacity: bytes, or None for no limit. An allocation beyond it raises torch.OutOfMemoryError, whose attribute
        `requested` is the bytes asked for.
    live, peak: bytes allocated now, and at most since the start or the last reset_peak().

    A tensor that outlives the block stays usable and goes on counting in the ledger of the GPU that made it.
    """

    def __init__(self, capacity=None):
        self.capacity = capacity
        self.live = self.peak = 0
        self._allocations = weakref.WeakValueDictionary()  # by address of the held storage
        self._lock = threading.RLock()
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        _active.append(self)
        self._patches.enter_context(_host_side())
        return self

    def __exit__(self, *exception):
        self._patches.close()
        _active.remove(self)

    def reset_peak(self):
        self.peak = self.live

    def _allocation_of(self, held):
        storage = held.untyped_storage()
        with self._lock:
            allocation = self._allocations.get(storage._cdata)
            if allocation is None:
                allocation = self._allocations[storage._cdata] = Allocation(self, storage)
        return allocation

    def _reserve(self, nbytes, requested):
        with self._lock:
            if self.capacity is not None and self.live + nbytes > self.capacity:
                error = torch.OutOfMemoryError(
                    f"{DEVICE} is out of memory: {requested} bytes requested with {self.live} of {self.capacity} in use"
                )
                error.requested = requested
                raise error
            self.live += nbytes
            self.peak = max(self.peak, self.live)

    def _release(self, nbytes):
        with self._lock:
            self.live -= nbytes


_active = []  # the GPUs whose blocks are open, innermost last


def _current():
    if not _active:
        raise RuntimeError(f"no virtual GPU is there: use {DEVICE} inside `with VirtualGPU():`")
    return _active[-1]


# Operators -----------------------------------------------------------------------------------------------------------


class _Operator:
    """What the dispatcher must know of an operator, read once from its schema."""

    def __init__(self, func):
        self.composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
        self.special = _SPECIAL.get(func)
        self.writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        self.takes_host_tensors = func in _TAKES_HOST_TENSORS


_operators = {}


def _dispatch(func, args, kwargs):
    operator = _operators.get(func)
    if operator is None:
        operator = _operators[func] = _Operator(func)
    if operator.special is not None:
        return operator.special(*args, **kwargs)
    if operator.composite:  # arrives whole in inference mode only
        out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
    virtual, host = [], []
    held_args = [_held(a, virtual, host) for a in args]
    held_kwargs = {name: _held(a, virtual, host) for name, a in kwargs.items()}
    if host and not operator.takes_host_tensors:
        raise RuntimeError(f"{func}: its tensors must be on one device, found {DEVICE} and {host[0].device}")
    on_device = True
    if kwargs.get("device") is not None:
        on_device = kwargs["device"].type == DEVICE.type
        held_kwargs["device"] = "cpu"
    out = func(*held_args, **held_kwargs)
    return _wrap(out, virtual, operator.writes) if on_device else out


def _held(value, virtual, host):
    """`value` with every virtual tensor replaced by the one it holds; tensors seen are added to the two lists."""
    if isinstance(value, VirtualTensor):
        virtual.append(value)
        return value.held
    if isinstance(value, torch.Tensor):
        if value.dim():  # a single number may come from the host, as on CUDA
            host.append(value)
    elif isinstance(value, (list, tuple)):
        return [_held(v, virtual, host) for v in value]
    return value


def _wrap(out, virtual, writes):
    if isinstance(out, torch.Tensor):
        if writes:
            for known in virtual:
                if known.held is out:
                    _follow(known)
                    return known
        return VirtualTensor(out, virtual[0].allocation.gpu)
    if isinstance(out, (list, tuple)):
        return type(out)(_wrap(o, virtual, writes) for o in out)
    return out


def _follow(tensor):
    """Give the wrapper the geometry that an in-place operator gave the tensor it holds."""
    held = tensor.held
    if tensor.shape != held.shape or tensor.stride() != held.stride():
        tensor.allocation.resize(held.untyped_storage().nbytes())
        with torch._C._DisableTorchDispatch():
            tensor.as_strided_(held.shape, held.stride(), held.storage_offset())


def _copy_(destination, source, non_blocking=False):
    to_device, from_device = isinstance(destination, VirtualTensor), isinstance(source, VirtualTensor)
    (destination.held if to_device else destination).copy_(source.held if from_device else source)
    return destination


def _to_copy(source, *, device=None, non_blocking=False, pin_memory=None, **options):
    out = aten._to_copy.default(source.held, **options)
    if device is None or device.type == DEVICE.type:
        return VirtualTensor(out, source.allocation.gpu)
    return out.to(device)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    tensors = [query, key, value, attn_mask]
    if any(t is not None and not isinstance(t, VirtualTensor) for t in tensors):
        raise RuntimeError(f"scaled_dot_product_attention: its tensors must all be on {DEVICE}")
    q, k, v, mask = (None if t is None else t.held for t in tensors)
    gpu = query.allocation.gpu
    out = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    out = VirtualTensor(out, gpu)
    if q.dtype in (torch.float32, torch.float64):
        scores = q.shape[:-1].numel() * k.shape[-2] * q.element_size()
        gpu._reserve(scores, scores)
        gpu._release(scores)
    return out


_SPECIAL = {
    aten.copy_.default: _copy_,
    aten._to_copy.default: _to_copy,
    aten.scaled_dot_product_attention.default: _attention,
}
_TAKES_HOST_TENSORS = {  # indices may be on the host
    aten.index.Tensor,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


# The device type -----------------------------------------------------------------------------------------------------


class _DeviceModule:
    """What torch.get_device_module("vgpu") gives: the functions of torch.cuda that device-generic code uses."""

    @staticmethod
    def is_available():
        return bool(_active)

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def set_device(device):
        pass

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def synchronize(device=None):
        pass

    @staticmethod
    def empty_cache():
        pass

    @staticmethod
    def memory_allocated(device=None):
        return _current().live

    @staticmethod
    def max_memory_allocated(device=None):
        return _current().peak

    memory_reserved = memory_allocated
    max_memory_reserved = max_memory_allocated

    @staticmethod
    def reset_peak_memory_stats(device=None):
        _current().reset_peak()

    @staticmethod
    def mem_get_info(device=None):
        """Free and total bytes; without a capacity the total is 2**63 - 1."""
        gpu = _current()
        capacity = 2**63 - 1 if gpu.capacity is None else gpu.capacity
        return capacity - gpu.live, capacity


_setup_privateuseone_for_python_backend("vgpu", backend_module=_DeviceModule)
DEVICE = torch.device("vgpu:0")
_library = torch.library.Library(
    "aten", "IMPL"
)  # factories reach the device here, everything else as a wrapper


def _kernel(name, *keys):
    def register(function):
        for key in keys:
            _library.impl(name, function, key)
        return function

    return register


@_kernel("empty_strided", "PrivateUse1")
def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return VirtualTensor(torch.empty_strided(size, stride, dtype=dtype), _current())


@_kernel("empty.memory_format", "PrivateUse1")
def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return VirtualTensor(
        torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format), _current()
    )


@_kernel("_copy_from", "PrivateUse1")
def _copy_from(source, destination, non_blocking=False):
    return _copy_(destination, source, non_blocking)


_kernel("scaled_dot_product_attention", "AutogradPrivateUse1")(_attention)


@contextlib.contextmanager
def _host_side():
    """What must change on the host while a virtual GPU is there, so that parameters move in place as on CUDA."""
    swap_was, data_was = torch.__future__.get_swap_module_params_on_conversion(), torch.Tensor.data
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.Tensor.data = property(_get_data, _set_data)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap_was)
        torch.Tensor.data = data_was


_plain_data = torch.Tensor.data


def _get_data(tensor):
    return _plain_data.__get__(tensor)


def _set_data(tensor, value):
    if not (isinstance(tensor, VirtualTensor) or isinstance(value, VirtualTensor)):
        _plain_data.__set__(tensor, value)
        return
    value = value.detach()
    if isinstance(tensor, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
    torch.utils.swap_tensors(tensor, value)
