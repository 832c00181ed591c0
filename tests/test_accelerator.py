"""The device is chosen, made ready and asked about its memory; those that are not here are played by stand-ins."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from leanwan import accelerator
from leanwan.accelerator import (
    choose_device,
    configure_allocator,
    exact_arithmetic,
    initialise,
    is_out_of_memory,
    require_accelerator,
)
from leanwan.budget import hold_to_free, workspace_bytes
from leanwan.errors import InputError
from virtual_gpu import VirtualGPU

CPU = torch.device("cpu")


@pytest.fixture
def cards(monkeypatch):
    """Plays a build for the kinds that it is called with, whose devices are the given backend."""

    def play(*kinds, **backend):
        backend = SimpleNamespace(**{"is_available": lambda: True, "device_count": lambda: 2} | backend)
        monkeypatch.setattr(
            accelerator, "_BUILT", {k: lambda k=k: k in kinds for k in ("cuda", "xpu", "mps")}
        )
        monkeypatch.setattr(torch, "get_device_module", lambda _: backend)

    return play


def fails(text):
    def init():
        raise RuntimeError(text)

    return init


def test_the_cpu_is_chosen_where_nothing_else_is(cards):
    cards()
    assert choose_device() == choose_device("cpu") == CPU


def test_the_accelerator_that_is_there_is_chosen(cards):
    cards("cuda")
    assert choose_device() == choose_device("cuda") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)


def test_the_virtual_gpu_is_chosen_by_name_alone():
    with VirtualGPU():
        assert choose_device("vgpu") == torch.device("vgpu", 0)
        assert choose_device().type != "vgpu"


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by "
    "downloading\nand installing a new version"
)


@pytest.mark.parametrize(
    "name, kinds, backend, message",
    [
        ("card", ["cuda"], {}, "no such device, give cpu, cuda"),
        ("cuda:x", ["cuda"], {}, "no such device, give cpu, cuda"),
        ("cuda:2", ["cuda"], {}, "there is no such device, the last is cuda:1"),
        ("cuda", [], {}, r"PyTorch \S+ is built without it; install the build .* https://pytorch.org"),
        ("xpu:0", ["cuda"], {}, r"PyTorch \S+ is built without it; install the build"),
        ("cuda", ["cuda"], {"is_available": lambda: False, "init": fails(OLD_DRIVER)}, r"The NVIDIA .* 12020\); upda"),
        ("cuda", ["cuda"], {"is_available": lambda: False, "init": fails("No CUDA GPUs are available")}, "No CUDA GPU"),
        ("mps", ["mps"], {}, "it has no 64-bit floats, .*; give another device, or cpu"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_be_used_is_refused_in_one_line(cards, name, kinds, backend, message):
    cards(*kinds, **backend)
    with pytest.raises(InputError, match=f"^device {name}: {message}") as error:
        choose_device(name)
    assert "\n" not in str(error.value)


def test_an_intel_gpu_without_fp64_is_not_used(cards, monkeypatch):
    cards("xpu")
    for has_fp64 in (False, True):
        monkeypatch.setattr(
            torch.xpu, "get_device_properties", lambda _, has=has_fp64: SimpleNamespace(has_fp64=has)
        )
        assert choose_device() == (torch.device("xpu", 0) if has_fp64 else CPU)


@pytest.mark.parametrize(
    "kinds, backend, reason",
    [
        ([], {}, "built for the CPU alone; install the build"),
        (["cuda"], {"is_available": lambda: False, "init": fails("Found no NVIDIA driver.")}, "cuda: Found no NVIDIA"),
        (["mps"], {}, "mps: it has no 64-bit floats"),
    ],
)  # fmt: skip
def test_a_real_task_wants_an_accelerator_or_a_word(cards, kinds, backend, reason):
    cards(*kinds, **backend)
    with pytest.raises(InputError, match=rf"^device: no accelerator .*{reason}.*give cpu") as error:
        require_accelerator(choose_device(), None)
    assert "\n" not in str(error.value)
    require_accelerator(choose_device("cpu"), "cpu")
    require_accelerator(torch.device("cuda", 0), None)


def test_a_device_is_initialised_before_its_statistics_are_read(cards):
    calls = []
    cards("cuda", init=lambda: calls.append("init"))
    initialise("cuda:0")
    initialise("cpu")
    assert calls == ["init"]
    cards("cuda", init=fails(OLD_DRIVER))
    with pytest.raises(InputError, match="^device cuda:0: The NVIDIA driver"):
        initialise("cuda:0")
    cards("mps")  # has nothing to initialise
    with pytest.raises(InputError, match="^device mps: it has no 64-bit floats"):
        initialise("mps")


MESSAGES = {
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.1 GiB is": True,
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call": True,
    "CUDA driver error: out of memory": True,
    "HIP out of memory. Tried to allocate 1.00 GiB": True,
    "XPU out of memory. Tried to allocate 3.00 GiB": True,
    "MPS backend out of memory (MPS allocated: 15.72 GiB, other allocations: 2.41 MiB)": True,
    "GET was unable to find an engine to execute this computation": True,
    "FIND was unable to find an engine to execute this computation after trying 12 plans.": True,
    "Unable to find an engine to execute this computation": True,
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED": True,
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR": True,
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED": True,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`": True,
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`": True,
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`": True,
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)": True,
    "level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)": True,
    "UR backend failed. UR backend returns:6 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)": False,
    "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes": False,
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to": False,
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED": False,
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_BAD_LAUNCH_PARAM": False,
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.": False,
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED": False,
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`": False,
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle)`": False,
    "CUDA error: device-side assert triggered": False,
    "CUDA error: an illegal memory access was encountered": False,
    "CUDA error: no kernel image is available for execution on the device": False,
    "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0": False,
}


@pytest.mark.parametrize("text, expected", MESSAGES.items())
def test_lack_of_memory_is_told_from_other_errors(text, expected):
    assert is_out_of_memory(RuntimeError(text)) is expected


def test_lack_of_memory_by_type():
    assert is_out_of_memory(torch.OutOfMemoryError("")) and not is_out_of_memory(MemoryError("out of memory"))
    assert not is_out_of_memory(OSError("out of memory")) and not is_out_of_memory(RuntimeError())
    with VirtualGPU(capacity=1000), pytest.raises(RuntimeError) as error:
        torch.empty(2000, dtype=torch.uint8, device="vgpu")
    assert is_out_of_memory(error.value)


GIB = 2**30


@pytest.mark.parametrize("system, held", [("Windows", 2.75), ("WSL", 2.75), ("Linux", None)])
def test_a_process_is_held_to_what_is_free_where_drivers_spill(cards, monkeypatch, system, held):
    fractions = []
    cards(
        "cuda",
        set_per_process_memory_fraction=lambda fraction, _: fractions.append(fraction),
        mem_get_info=lambda _: (2 * GIB, 4 * GIB),
        memory_reserved=lambda _: GIB,  # its own, to be kept
    )
    monkeypatch.setattr(sys, "platform", "win32" if system == "Windows" else "linux")
    release = "6.6.87.2-microsoft-standard-WSL2" if system == "WSL" else "6.1.0-31-amd64"
    monkeypatch.setattr(accelerator.platform, "release", lambda: release)
    assert hold_to_free("cuda:0") == (held and held * GIB)
    assert fractions == ([held / 4] if held else [])
    assert hold_to_free("cpu") is None


def test_a_device_that_cannot_be_held_is_not(cards, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    cards("xpu")
    assert hold_to_free("xpu:0") is None


@pytest.fixture
def allocator(monkeypatch):
    """The settings that the allocator is given, on a Linux machine with CUDA where nobody set a variable."""
    settings = []

    def snapshot():
        return {"allocator_settings": {"expandable_segments": settings[-1:] == ["expandable_segments:True"]}}

    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", snapshot)
    monkeypatch.setattr(accelerator.platform, "release", lambda: "6.1.0-31-amd64")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    for name in accelerator.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return settings


def test_segments_grow_where_they_can(allocator):
    assert configure_allocator("cuda:0") and allocator == ["expandable_segments:True"]


@pytest.mark.parametrize("error", ["operation not supported", "out of memory"])
def test_segments_that_fail_are_given_up(allocator, monkeypatch, error):
    monkeypatch.setattr(torch, "empty", lambda *_, device: fails(f"CUDA driver error: {error}")())
    assert not configure_allocator("cuda:0")
    assert allocator == ["expandable_segments:True", "expandable_segments:False"]


@pytest.mark.parametrize("case", ["cpu", "xpu", "windows", "wsl", "rocm", *accelerator.ALLOCATOR_VARIABLES])
def test_the_allocator_is_left_as_it_is_where_it_must_be(allocator, monkeypatch, case):
    if case == "windows":
        monkeypatch.setattr(sys, "platform", "win32")
    if case == "wsl":
        monkeypatch.setattr(accelerator.platform, "release", lambda: "6.6.87.2-microsoft-standard-WSL2")
    if case == "rocm":
        monkeypatch.setattr(torch.version, "hip", "6.2")
    if case in accelerator.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(case, "expandable_segments:False")
    assert not configure_allocator(case if case in ("cpu", "xpu") else "cuda:0")
    assert allocator == []


@pytest.mark.parametrize("variable", accelerator.ALLOCATOR_VARIABLES)
@pytest.mark.parametrize(
    ("backend", "grow"), [("native", True), ("native", False), ("cudaMallocAsync", True)]
)
def test_what_a_user_set_is_asked_for(allocator, monkeypatch, variable, backend, grow):
    """Not read from the variable; another allocator has no segments, whatever is set."""
    monkeypatch.setenv(variable, "max_split_size_mb:64")
    told = {"allocator_settings": {"expandable_segments": grow}}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: told)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: backend)
    assert configure_allocator("cuda:0") == (grow and backend == "native") and allocator == []


def test_segments_that_grow_are_left_so(allocator, monkeypatch):
    """A second plan in a full card tries nothing that could fail there."""
    assert configure_allocator("cuda:0")
    monkeypatch.setattr(torch, "empty", lambda *_, device: fails("out of memory")())
    assert configure_allocator("cuda:0") and allocator == ["expandable_segments:True"]


def test_torch_takes_the_allocator_setting():
    """In a process of its own, since it stays."""
    code = (
        "import torch; from leanwan.accelerator import configure_allocator\n"
        "torch.empty = lambda *_, device: None\n"
        "if not torch.backends.cuda.is_built(): torch.cuda.memory.get_allocator_backend = lambda: 'none'\n"
        "assert configure_allocator('cuda:0') == torch.backends.cuda.is_built()\n"
        "told = getattr(torch._C, '_accelerator_getAllocatorSettings', lambda: 'expandable_segments:True')()\n"
        "assert told == 'expandable_segments:True', told"
    )
    environment = {k: v for k, v in os.environ.items() if k not in accelerator.ALLOCATOR_VARIABLES}
    if not hasattr(torch._C, "_accelerator_setAllocatorSettings") and not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch has no allocator to set")
    if accelerator.in_wsl() or sys.platform != "linux" or torch.version.hip:
        pytest.skip("no such setting here")
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize(
    ("capability", "exact", "config", "expected"),
    [
        ((7, 5), False, None, 8519680),  # all as PyTorch 2.10 chose them, on its own code
        ((8, 6), False, None, 8519680),
        ((8, 9), False, None, 8519680),
        ((9, 0), False, None, 33554432),
        ((8, 6), True, None, 33554432),
        ((9, 0), True, None, 33554432),
        ((12, 0), False, None, 33554432),  # of newer ones
        ((8, 6), True, ":16:8", 131072),
        ((8, 6), False, ":4096:8", 33554432),
        ((8, 6), False, ":4096:2:16:8", 8519680),
        ((8, 6), False, " :64:1,:8:3", 90112),
        ((8, 6), False, ":0:0", 0),
        ((9, 0), False, ":16:8", 131072),
        ((9, 0), False, "x", 33554432),
        ((8, 6), False, "", 8519680),
        ((8, 6), False, ":4096", 8519680),
    ],
)
def test_workspaces_of_cublas(capability, exact, config, expected, monkeypatch):
    monkeypatch.delenv(accelerator.WORKSPACE_VARIABLE, raising=False)
    if config is not None:
        monkeypatch.setenv(accelerator.WORKSPACE_VARIABLE, config)
    assert workspace_bytes(capability, exact) == (expected, 2**20)


def test_exact_products_are_those_that_can_be(monkeypatch):
    """cuBLAS raises at products that must not split their sum."""
    chosen = ["cublas"]

    def prefer(name=None):
        if name is not None:
            chosen.append(name)
        return chosen[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", prefer)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    splits = hasattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction_split_k")
    with exact_arithmetic():
        assert chosen[-1] == ("cublaslt" if splits else "cublas")
    assert chosen == (["cublas", "cublaslt", "cublas"] if splits else ["cublas"])
    monkeypatch.setattr(torch.version, "cuda", None)
    with exact_arithmetic():
        assert chosen[-1] == "cublas"


def arithmetic():
    """Everything that exact_arithmetic changes."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    state = {
        "cudnn.allow_tf32": cudnn.allow_tf32,
        "cudnn.benchmark": cudnn.benchmark,
        "cudnn.deterministic": cudnn.deterministic,
        "matmul.allow_tf32": matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cuDNN attention": torch.backends.cuda.cudnn_sdp_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }
    for kind in ("bf16", "fp16"):
        for name in (
            f"allow_{kind}_reduced_precision_reduction",
            f"allow_{kind}_reduced_precision_reduction_split_k",
        ):
            state[name] = getattr(matmul, name, None)
    return state


@pytest.mark.parametrize("changed", [False, True])
def test_exact_arithmetic_is_set_and_restored(monkeypatch, changed):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if changed:  # by the user, to be found again
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = arithmetic()
    with exact_arithmetic():
        inside = arithmetic()
    assert arithmetic() == before != inside
    with pytest.raises(KeyError), exact_arithmetic():
        raise KeyError
    assert arithmetic() == before
    assert inside.pop("workspace") == (":16:8" if changed else ":4096:8")
    on = {"cudnn.deterministic", "deterministic", "warn only"}
    assert {name for name, value in inside.items() if value} == on


def test_exact_arithmetic_carries_a_model(recwarn):
    from wan import random_models
    from wan.modules.model import WanModel

    model = WanModel.from_pretrained(random_models.checkpoint("t2v-tiny"))
    torch.manual_seed(0)
    latent, text = torch.randn(16, 2, 8, 8), torch.randn(5, 4096)
    with torch.no_grad():
        expected = model([latent], torch.tensor([500]), [text], 32)[0]
        with exact_arithmetic():
            result = model([latent], torch.tensor([500]), [text], 32)[0]
    assert torch.equal(result, expected)
    assert not [w for w in recwarn if "deterministic" in str(w.message)]
