"""On a CUDA device: placement changes no bit, and the virtual GPU counts what the allocator counts."""

import pytest
import torch

import wan
from benchmarks.memory import Run, count, measure
from wan import tiny
from wan.configs import WAN_CONFIGS
from wan.memory.options import LOW_VRAM, MemoryOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GENERATE = {"size": (128, 96), "frame_num": 9, "sampling_steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def config():
    config = WAN_CONFIGS["t2v-tiny"].copy()
    config.param_dtype = config.t5_dtype = torch.bfloat16
    return config


@pytest.fixture(scope="module")
def plain(config):
    return wan.WanT2V(config, tiny.checkpoint("t2v-tiny")).generate("a red ball", **GENERATE)


@pytest.mark.parametrize(
    "memory",
    [
        {"vae_cpu": True},
        {"t5_stream": True},
        {"dit_stream": 0.0},
        {"dit_stream": 0.0001, "stream_buffers": 3},
    ],
    ids=str,
)
def test_placement_changes_no_bit(config, plain, memory):
    pipeline = wan.WanT2V(config, tiny.checkpoint("t2v-tiny"), **memory)
    for _ in range(2):
        assert torch.equal(pipeline.generate("a red ball", **GENERATE), plain)


def test_nothing_stays_on_the_device(config):
    before = torch.cuda.memory_allocated()
    pipeline = wan.WanT2V(config, tiny.checkpoint("t2v-tiny"), **LOW_VRAM)
    pipeline.generate("a red ball", **GENERATE)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("memory", [{"vae_cpu": True}, LOW_VRAM], ids=["vae_cpu", "low_vram"])
def test_the_virtual_gpu_counts_within_five_percent(memory):
    run = Run("t2v-1.3B", (832, 480), memory=MemoryOptions(**memory))
    measured, counted = measure(run), count(run)
    for stage, peak in measured.stages.items():
        assert counted.stages[stage] == pytest.approx(peak, rel=0.05), stage


def test_low_vram_fits_what_it_counts():
    run = Run("t2v-1.3B", (832, 480), memory=MemoryOptions(**LOW_VRAM))
    assert measure(run, capacity=int(1.6 * 2**30)).out_of_memory is None
