"""RAM that is page-locked: it is not all taken, and lack of it is not taken for the device's."""

import collections
import weakref

import pytest
import torch
from test_activation_offload import run as run_pass
from test_chunking import make_inputs, make_model
from test_streaming import network, run, sample

from leanwan import accelerator, streaming
from leanwan.accelerator import is_out_of_memory, lacks_page_locked
from leanwan.activations import apply_activation_offload
from leanwan.streaming import Streamer
from virtual_gpu import VirtualGPU
from wan import cli
from wan.run.runner import Runner
from wan.web.worker import told

DRIVERS_ERROR = (
    "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
)
NUMBERS = (torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex128)


@pytest.fixture
def limit(monkeypatch):
    """Sets a limit to page-locked memory, which is kept as PyTorch's allocator keeps it: by powers of two, whole, and
    never given back."""
    taken, free = 0, collections.Counter()
    plain, most = VirtualGPU.pin, None

    def pin(gpu, tensor):
        nonlocal taken
        size = 1 << (tensor.nbytes - 1).bit_length()
        if free[size]:
            free[size] -= 1
        elif taken + size > most:
            raise RuntimeError(DRIVERS_ERROR)
        else:
            taken += size
        weakref.finalize(tensor.untyped_storage(), free.update, [size])
        return plain(gpu, tensor)

    def set_limit(nbytes):
        nonlocal most
        most = nbytes

    monkeypatch.setattr(VirtualGPU, "pin", pin)
    return set_limit


def page_locked_numbers():
    """What PyTorch asks for to tell the host a number."""
    return [torch.empty(1, dtype=dtype, pin_memory=True) for dtype in NUMBERS]


@pytest.mark.parametrize("most", [31, 500, 1024, 1055, 2048, 3072, 3073, 4000])
def test_streaming_leaves_room_for_numbers(limit, most, monkeypatch):
    limit(most)
    monkeypatch.setattr(streaming, "STAGE_BYTES", 1000)
    monkeypatch.setattr(streaming, "PINNED_BYTES", 3000)
    layers = network()
    with VirtualGPU() as gpu, Streamer(layers, "vgpu"):
        assert torch.equal(run(layers, sample().to("vgpu")).cpu(), run(network(), sample()))
        assert (gpu.pinned > 0) == (most >= 1055)
        for _ in range(3):
            page_locked_numbers()


@pytest.mark.parametrize("most", [31, 2**14, 2**15, 2**16, 2**17 + 1])
def test_activations_leave_room_for_numbers(limit, most):
    limit(most)
    model, inputs = make_model("t2v"), make_inputs("t2v", 150)
    expected = model(**inputs)[0]
    with VirtualGPU() as gpu:
        model.to(gpu.device)
        undo = apply_activation_offload(model, gpu.device, 64, 2)
        assert torch.equal(run_pass(model, inputs, gpu, chunk=64)[0].cpu(), expected)
        page_locked_numbers()
        undo()


@pytest.fixture
def free(monkeypatch):
    """Sets what the second of two CUDA cards has free; the first is not used."""

    def set_free(nbytes):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: number * 2**20)
        monkeypatch.setattr(torch.cuda, "mem_get_info", {1: (nbytes, 2**33)}.get)

    return set_free


def test_the_drivers_error_is_of_ram_while_the_card_has_room(free):
    error = RuntimeError(DRIVERS_ERROR)
    assert is_out_of_memory(error) and not lacks_page_locked(error)  # without a card
    for nbytes, of_ram in [(0, False), (accelerator.LIBRARY_BYTES - 1, False), (2**30, True)]:
        free(nbytes)
        assert lacks_page_locked(error) is of_ram and is_out_of_memory(error) is not of_ram
    for other in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDNN_STATUS_ALLOC_FAILED")):
        assert is_out_of_memory(other) and not lacks_page_locked(other)
    assert not lacks_page_locked(OSError("CUDA error: out of memory"))


def test_it_is_told_as_ram(free, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError(DRIVERS_ERROR)

    monkeypatch.setattr(Runner, "run", fail)
    free(2**30)
    assert cli.main(["--task", "t2v-tiny", "--prompt", "a"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "page-locked" in line and "RAM" in line and "--low_vram" not in line
    assert "RAM" in told(RuntimeError(DRIVERS_ERROR))
    free(0)
    assert cli.main(["--task", "t2v-tiny", "--prompt", "a"]) == 1
    assert "--low_vram" in capsys.readouterr().err.splitlines()[-1]
