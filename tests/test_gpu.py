"""On a CUDA device: every check of the verdict passes, and a pipeline leaves nothing behind.

A check runs in a process of its own, so that no other's memory, workspaces or limits come into what it measures.
"""

import copy
import gc
import os

import pytest
import torch

import wan
from benchmarks.verdict import bounded_runs
from benchmarks.verdict.checks import CHECKS
from leanwan.options import LOW_VRAM
from wan import random_models
from wan.configs import WAN_CONFIGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LIMIT = 1800  # seconds, of a check
GENERATE = {"size": (128, 96), "frame_num": 9, "sampling_steps": 2, "seed": 0}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_check(check, tmp_path):
    result = bounded_runs.run(check, LIMIT, tmp_path, tree=os.environ.get("WAN_UPSTREAM"))
    if result.status == "skipped":
        pytest.skip(result.faults[0])
    assert result.status == "pass", "\n".join([*result.faults, *result.log])


@pytest.fixture
def config():
    config = copy.copy(WAN_CONFIGS["t2v-tiny"])  # its own copy() gives a plain dict
    config.param_dtype = config.t5_dtype = torch.bfloat16
    return config


def test_placement_changes_no_bit_in_bf16(config):
    def video(**memory):
        pipeline = wan.WanT2V(config, random_models.checkpoint("t2v-tiny"), **memory)
        return [pipeline.generate("a red ball", **GENERATE) for _ in range(2)]

    plain = video()
    assert torch.equal(*plain)
    for memory in (
        {"vae_cpu": True},
        {"t5_stream": True},
        {"dit_stream": 0.0},
        {"dit_stream": 0.0001, "stream_buffers": 3},
    ):
        assert all(torch.equal(result, plain[0]) for result in video(**memory)), memory


def test_nothing_stays_on_the_device(config):
    torch._C._cuda_clearCublasWorkspaces()  # which count as tensors
    before = torch.cuda.memory_allocated()
    pipeline = wan.WanT2V(config, random_models.checkpoint("t2v-tiny"), **LOW_VRAM)
    pipeline.generate("a red ball", **GENERATE)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() == before
