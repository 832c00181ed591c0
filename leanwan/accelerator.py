"""The device that computes: choosing it, making it ready, and telling when its memory is full.

Nothing here needs an accelerator to be imported. Devices are reached through `torch.get_device_module`.
"""

import contextlib
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .errors import InputError

CHOICES = "cpu, cuda, cuda:N, xpu, xpu:N or mps"
INSTALL = (
    "install the build of PyTorch for your GPU, https://pytorch.org/get-started/locally gives the command"
)
NO_FP64 = "it has no 64-bit floats, in which the rotary embedding is computed"
NO_PAGE_LOCKED = (
    "no more RAM can be page-locked, the card has room; end other programs that use it, or raise its limit"
)
LIBRARY_BYTES = 256 * 2**20  # what CUDA's libraries may still load outside PyTorch's allocator; an estimate
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
EXACT_WORKSPACE = ":4096:8"  # buffers of so many KiB, and how many

_BUILT = {
    "cuda": torch.backends.cuda.is_built,  # ROCm's builds, too
    "xpu": lambda: torch.xpu._is_compiled(),
    "mps": torch.backends.mps.is_built,
}
_AUTOMATIC = ("cuda", "xpu")

# Messages other than torch.OutOfMemoryError's that report a lack of device memory. cuDNN is unable to find an engine
# when none got its workspace, and has an internal error when its kernels cannot be loaded; cuBLAS is not initialised
# when there is no room for its handle; Level Zero calls memory "resources".
_OUT_OF_MEMORY = re.compile(
    r"out of memory"
    r"|unable to find an engine"
    r"|CUDNN_STATUS_(ALLOC_FAILED|INTERNAL_ERROR(_DEVICE_ALLOCATION_FAILED)?)\b"
    r"|(CU|HIP)BLAS(LT)?_STATUS_ALLOC_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `?cublas(Lt)?Create"
    r"|(UR|ZE)_RESULT_ERROR_OUT_OF_(DEVICE_MEMORY|RESOURCES)",
    re.IGNORECASE,
)


def choose_device(name: str | None = None) -> torch.device:
    """The device of that name, with its index; for None the first accelerator that can compute the model, or the CPU.

    Raises:
        InputError: no device of that name, or one that cannot compute the model.
    """
    if name is None:
        kinds = [
            kind for kind in _AUTOMATIC if why_missing(kind) is None and _has_fp64(torch.device(kind, 0))
        ]
        return torch.device(kinds[0], 0) if kinds else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _refused(name, f"no such device, give {CHOICES}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    reason = why_missing(device.type)
    if reason:
        raise _refused(name, reason)
    count, index = torch.get_device_module(device).device_count(), device.index or 0
    if index >= count:
        raise _refused(name, f"there is no such device, the last is {device.type}:{count - 1}")
    device = torch.device(device.type, index)
    if not _has_fp64(device):
        raise _refused(name, f"{NO_FP64}; give another device, or cpu")
    return device


def why_missing(kind: str) -> str | None:
    """Why there is no device of a kind such as "cuda"; None if there is one."""
    if kind in _BUILT and not _BUILT[kind]():
        return f"PyTorch {torch.__version__} is built without it; {INSTALL}"
    try:
        backend = torch.get_device_module(kind)
    except RuntimeError:
        return f"no such device, give {CHOICES}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they say what the error below says
        if backend.is_available():
            return None
        try:
            if hasattr(backend, "init"):
                backend.init()
        except (RuntimeError, AssertionError) as error:
            return _sentence(error) + ("; update it" if "driver" in str(error) else "")
    return "there is none"


def require_accelerator(device: torch.device, name: str | None) -> None:
    """Refuses to compute a full-size task on the CPU unless that was asked for.

    Args:
        device: what choose_device made of `name`.
        name: the user's choice; None if there was none.

    Raises:
        InputError
    """
    if device.type != "cpu" or name is not None:
        return
    kind = next((kind for kind, is_built in _BUILT.items() if is_built()), None)
    if kind is None:
        reason = f"PyTorch {torch.__version__} is built for the CPU alone; {INSTALL}"
    else:
        reason = f"{kind}: {why_missing(kind) or NO_FP64}"
    raise InputError(f"no accelerator to compute on ({reason}); give cpu for days on the CPU", "device")


def initialise(device: torch.device | str) -> None:
    """Makes a device ready, so that its memory statistics can be read before anything was computed.

    Raises:
        InputError: it cannot be initialised, with the driver's reason, or cannot compute the model.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return
    try:
        init = getattr(torch.get_device_module(device), "init", None)
        if init:
            init()
        able = _has_fp64(device)
    except (RuntimeError, AssertionError) as error:
        raise _refused(str(device), _sentence(error)) from error
    if not able:
        raise _refused(str(device), f"{NO_FP64}; give another device, or cpu")


def configure_allocator(device: torch.device | str) -> bool:
    """Turns on the allocator's expandable segments where CUDA can map memory, so that less of it is lost to gaps.

    To be called before the first allocation. If the user has set PyTorch's variable for the allocator, that decides.
    Windows and ROCm have no such segments; under WSL drivers announce them and then fail. Returns whether they are on.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return False
    if (
        _segments_grow()
        or torch.version.hip
        or sys.platform != "linux"
        or in_wsl()
        or any(name in os.environ for name in ALLOCATOR_VARIABLES)
    ):
        return _segments_grow()
    # The variables are read as PyTorch is loaded: too late for os.environ.
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    configure = configure or torch.cuda.memory._set_allocator_settings  # what older versions have
    configure("expandable_segments:True")
    try:
        torch.empty(1, device=device)
    except RuntimeError:  # some virtualised and embedded GPUs cannot map memory, whatever they call it
        configure("expandable_segments:False")
    return _segments_grow()


def release_memory(device: torch.device | str) -> None:
    """Returns the allocator's unused memory to the device, so that other users of it find it."""
    if torch.device(device).type != "cpu":
        torch.get_device_module(device).empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, not the host, lacks memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    told = isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
    return told and not lacks_page_locked(error)


def lacks_page_locked(error: BaseException) -> bool:
    """Whether an exception says that no more RAM can be page-locked.

    CUDA reports it with the error number of a lack of device memory. PyTorch's allocator reports the latter with an
    error of its own, and CUDA itself allocates little: if all cards in use have room, the error is about RAM.
    """
    if not isinstance(error, RuntimeError) or not re.search(r"(CUDA|HIP) error: out of memory", str(error)):
        return False
    used = [number for number in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(number)]
    return bool(used) and all(torch.cuda.mem_get_info(number)[0] >= LIBRARY_BYTES for number in used)


NUMBERS = (1, 2, 4, 8, 16)  # bytes of one number, of all types


def page_locked(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor [numel] in page-locked RAM, its values not set.

    PyTorch reads single numbers of results back through page-locked RAM. A block of each size that this needs is
    page-locked first; PyTorch's allocator keeps these blocks, so that the tensor never takes the last RAM for them.

    Raises RuntimeError if the system gives no more.
    """
    for nbytes in NUMBERS:
        torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    return torch.empty(numel, dtype=dtype, pin_memory=True)


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, results don't depend on kernels chosen for speed.

    fp32 stays fp32 in convolutions and products, algorithms are deterministic where such exist, none is chosen by
    timing, bf16 and fp16 products neither split their sum nor add in less than fp32 (cublasLt alone can do that: cuBLAS
    raises), and cuDNN's attention is off, whose use depends on the number of queries too. At the end all settings are
    as before.

    cuBLAS reads its workspace's size at its first use in a process: enter before that.
    """
    cudnn, matmul, filling = torch.backends.cudnn, torch.backends.cuda.matmul, torch.utils.deterministic
    settings: list[tuple[Any, str, Any]] = [
        (cudnn, "allow_tf32", False),
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
        (matmul, "allow_tf32", False),
        (filling, "fill_uninitialized_memory", False),  # of no use where all memory is written
    ]
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        splits = hasattr(matmul, f"{name}_split_k")  # from 2.10 on a pair: less precise sums, split sums
        settings.append((matmul, name, (False, False) if splits else False))
    before = []
    by_cublaslt = splits and torch.version.cuda
    products = torch.backends.cuda.preferred_blas_library()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE_VARIABLE)
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for owner, name, value in settings:
            old = getattr(owner, name)
            if isinstance(value, tuple):
                old = (old, getattr(owner, f"{name}_split_k"))
            setattr(owner, name, value)
            before.append((owner, name, old))
        if by_cublaslt:
            torch.backends.cuda.preferred_blas_library("cublaslt")
        os.environ.setdefault(WORKSPACE_VARIABLE, EXACT_WORKSPACE)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if workspace is None:
            os.environ.pop(WORKSPACE_VARIABLE, None)
        if by_cublaslt:
            torch.backends.cuda.preferred_blas_library(products)
        for owner, name, old in reversed(before):
            setattr(owner, name, old)


def spills_to_ram() -> bool:
    """Whether the system's GPU drivers move to RAM what does not fit, instead of failing: Windows, and WSL on it."""
    return sys.platform == "win32" or in_wsl()


def in_wsl() -> bool:
    return sys.platform == "linux" and "microsoft" in platform.release().lower()


def _segments_grow() -> bool:
    """Whether CUDA's allocator has expandable segments on, whoever set it."""
    if torch.cuda.memory.get_allocator_backend() != "native":
        return False
    return bool(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])


def _has_fp64(device: torch.device) -> bool:
    if device.type != "xpu":
        return device.type != "mps"
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def _refused(name: str, problem: str) -> InputError:
    return InputError(problem, "device", name)


def _sentence(error: BaseException) -> str:
    """The first sentence of an error of torch, whose messages run over lines."""
    text = " ".join(str(error).split())
    return re.split(r"\.(?:\s|$)|; ", text, maxsplit=1)[0][:200] or type(error).__name__
