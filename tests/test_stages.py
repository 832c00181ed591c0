"""Stages measure what the device's backend counts, after it was initialised."""

from types import SimpleNamespace

import pytest
import torch

import wan
from leanwan.accelerator import initialise
from leanwan.options import LOW_VRAM
from virtual_gpu import DEVICE, VirtualGPU
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.utils.events import MemorySample, Step
from wan.utils.stages import Stages


def ignore(event):
    pass


class Backend:
    """Counts as CUDA does: asked for statistics before init, it raises."""

    def __init__(self, device):
        self.device, self.ready, self.peak = device, False, 0

    def init(self):
        self.ready = True

    def _statistic(self, device):
        if not self.ready:
            raise RuntimeError(f"Invalid device argument {device.index}: did you call init?")
        return self.peak

    max_memory_allocated = max_memory_reserved = reset_peak_memory_stats = _statistic
    memory_allocated = memory_reserved = _statistic

    def synchronize(self, device):
        assert device == self.device


def test_what_the_backend_counts(monkeypatch):
    backend = Backend(torch.device("cuda", 0))
    monkeypatch.setattr(torch, "get_device_module", lambda _: backend)
    events = []
    stages = Stages("cuda:0", events.append)
    backend.init()
    with stages("text"):
        assert stages.current == "text"
        backend.peak = 3 * 2**30
        for _ in stages.steps("a", 1):
            pass
    assert stages.current is None
    (stage,) = stages.history
    assert (stage.name, stage.allocated, stage.reserved) == ("text", 3 * 2**30, 3 * 2**30)
    assert events[1:] == [Step("text", 1, 1), MemorySample("text", 3 * 2**30, 3 * 2**30), stage]


@pytest.mark.parametrize(
    "missing", ["reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"]
)
def test_a_backend_that_counts_less(monkeypatch, missing):
    functions = {
        "reset_peak_memory_stats": lambda _: None,
        "max_memory_allocated": lambda _: 1,
        "max_memory_reserved": lambda _: 2,
        "memory_allocated": lambda _: 1,
        "synchronize": lambda _: None,
    }
    del functions[missing]
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(**functions))
    events = []
    stages = Stages("xpu:0", events.append)
    with stages("text"):
        for _ in stages.steps("a", 1):
            pass
    (stage,) = stages.history
    assert stage.allocated == (None if missing == "max_memory_allocated" else 1)
    assert stage.reserved == (None if missing == "max_memory_reserved" else 2)
    samples = [event for event in events if isinstance(event, MemorySample)]
    assert samples == ([] if missing == "memory_allocated" else [MemorySample("text", 1, None)])


def test_a_stage_that_fails_is_measured():
    with VirtualGPU():
        initialise("vgpu:0")
        stages = Stages("vgpu:0", ignore)
        with pytest.raises(KeyError), stages("text"):
            torch.empty(1024, dtype=torch.uint8, device="vgpu")
            raise KeyError
    assert stages.current == "text" and stages.history[0].allocated == 1024


def test_a_cpu_counts_nothing():
    stages = Stages("cpu", ignore)
    with stages("text"):
        pass
    assert stages.history[0].allocated is None and stages.history[0].reserved is None


@pytest.mark.parametrize("memory", [{"vae_cpu": True}, LOW_VRAM], ids=["vae_cpu", "low_vram"])
def test_a_pipeline_initialises_its_device(monkeypatch, memory):
    """With every model at home on the CPU nothing else does."""
    backend = Backend(DEVICE)
    with VirtualGPU():
        virtual = torch.get_device_module("vgpu")
        for name in ("init", "reset_peak_memory_stats", "max_memory_allocated"):
            monkeypatch.setattr(virtual, name, getattr(backend, name), raising=False)
        pipeline = wan.WanT2V(
            WAN_CONFIGS["t2v-tiny"],
            random_models.checkpoint("t2v-tiny"),
            device=torch.device("vgpu:0"),
            **memory,
        )
        with pipeline.stages("text"):
            pass
