"""Whole runs of the four pipelines against upstream's on the same toy checkpoints."""

import copy

import pytest
import torch
from goldens import BF16_CASES, GENERATE_CASES, TOLERANCE, Goldens, picture, vace_source

import wan
from wan import random_models
from wan.configs import WAN_CONFIGS

PIPELINES = {"t2v": wan.WanT2V, "i2v": wan.WanI2V, "flf2v": wan.WanFLF2V, "vace": wan.WanVace}
CASES = [
    (task, precision, case)
    for task, cases in GENERATE_CASES.items()
    for precision in TOLERANCE
    for case in cases
    if precision == "fp32" or case in BF16_CASES
]


@pytest.mark.parametrize("task", PIPELINES)
def test_recordings_are_of_these_toy_checkpoints(task):
    metadata = Goldens(f"generate-{task}").metadata
    assert metadata["toy_version"] == str(random_models.VERSION), "run tests/record_goldens.py"


@pytest.fixture(scope="module")
def pipelines():
    """Builds a pipeline on first use; keeps the last, since cases come grouped."""
    built = {}

    def get(task, precision):
        if (task, precision) not in built:
            built.clear()
            config = copy.deepcopy(WAN_CONFIGS[f"{task}-tiny"])
            if precision == "bf16":
                config.param_dtype = config.t5_dtype = torch.bfloat16
            checkpoint = random_models.checkpoint(f"{task}-tiny")
            built[task, precision] = PIPELINES[task](config, checkpoint, device=torch.device("cpu"))
        return built[task, precision]

    return get


def arguments(task, case):
    """The recorded call with its images and sources made."""
    call = dict(GENERATE_CASES[task][case])
    for key in ("img", "first_frame", "last_frame"):
        if key in call:
            call[key] = picture(*call[key])
    if task == "vace":
        source = vace_source(call.pop("source"), call["frame_num"], *call["size"])
        call["input_frames"], call["input_masks"] = [source.pop("frames")], [source.pop("mask")]
        call["input_ref_images"] = [list(source.values()) or None]
    return call


@pytest.mark.parametrize("task, precision, case", CASES, ids=lambda value: value)
def test_generate(task, precision, case, pipelines, measured):
    latents = []
    call = arguments(task, case)
    video = pipelines(task, precision).generate(**call, on_latents=latents.append)
    goldens = Goldens(f"generate-{task}")
    assert video.shape[1] == call["frame_num"]
    measured(goldens.difference(f"{precision}, {case}, latents", latents[0]), TOLERANCE[precision], "latents")
    measured(goldens.difference(f"{precision}, {case}, video", video), TOLERANCE[precision], "video")
