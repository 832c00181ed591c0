"""Ours and upstream's own code, side by side: needs a checkout of upstream at BASE, named by WAN_UPSTREAM."""

import os

import pytest
import torch
from goldens import PROMPTS, picture, vace_source

import wan
from upstream_driver import driver
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.tasks import TASKS

UPSTREAM = os.environ.get("WAN_UPSTREAM")
PIPELINES = {"t2v": wan.WanT2V, "i2v": wan.WanI2V, "flf2v": wan.WanFLF2V, "vace": wan.WanVace}
GIB = 2**30

pytestmark = pytest.mark.skipif(not UPSTREAM, reason="WAN_UPSTREAM names no checkout of upstream")


def difference(result, expected):
    assert result.shape == expected.shape
    return ((result - expected).abs().max() / expected.abs().max()).item()


def task_call(task):
    """Arguments of generate(); the negative prompt is the config's."""
    call = {"input_prompt": PROMPTS[1], "frame_num": 5, "sampling_steps": 3, "seed": 5}
    if task in ("t2v", "vace"):
        call["size"] = (96, 128)
    else:
        call["max_area"] = 128 * 96
    return call


@pytest.mark.parametrize("task", PIPELINES)
def test_generate(task, tmp_path, measured):
    checkpoint = random_models.checkpoint(f"{task}-tiny")
    ours = PIPELINES[task](WAN_CONFIGS[f"{task}-tiny"], checkpoint, device=torch.device("cpu"))
    mine, other, inputs = task_call(task), task_call(task), None
    pictures = {"i2v": {"img": (200, 90)}, "flf2v": {"first_frame": (61, 83), "last_frame": (200, 90)}}
    for key, size in pictures.get(task, {}).items():
        mine[key] = picture(key, *size)
        other[key] = str(tmp_path / f"{key}.png")
        mine[key].save(other[key])
    if task == "vace":
        inputs = vace_source("video, mask and references", 5, 96, 128)
        mine["input_frames"], mine["input_masks"] = [inputs["frames"]], [inputs["mask"]]
        mine["input_ref_images"] = [[inputs["ref_0"], inputs["ref_1"]]]
    latents = []
    video = ours.generate(**mine, on_latents=latents.append)
    theirs = driver.run(UPSTREAM, task, checkpoint, call=other, inputs=inputs)
    measured(difference(latents[0], theirs.latents), 1e-4, "latents")
    measured(difference(video, theirs.video), 1e-4, "video")


def test_virtual_gpu_computes_what_the_cpu_does(measured):
    """The CPU's kernels round otherwise where a weight's memory, mapped from its file, is aligned otherwise."""
    checkpoint = random_models.checkpoint("t2v-tiny")
    on_cpu = driver.run(UPSTREAM, "t2v", checkpoint, call=task_call("t2v"))
    on_gpu = driver.run(UPSTREAM, "t2v", checkpoint, call=task_call("t2v"), device="vgpu")
    measured(difference(on_gpu.latents, on_cpu.latents), 1e-5)
    measured(difference(on_gpu.video, on_cpu.video), 1e-5)
    assert on_cpu.report == {}
    stages = on_gpu.report["stages"]
    assert list(stages) == ["load", "text", "denoise", "decode"]
    assert on_gpu.report["peak_bytes"] == max(stages.values()) == stages["text"]
    assert on_gpu.report["out_of_memory"] is None


def test_out_of_memory_names_its_stage():
    call = task_call("t2v")
    checkpoint = random_models.checkpoint("t2v-tiny")
    peak = driver.run(UPSTREAM, "t2v", checkpoint, call=call, device="vgpu").report["peak_bytes"]
    for capacity, stage in ((peak - 1, "text"), (2**20, "load")):
        result = driver.run(UPSTREAM, "t2v", checkpoint, call=call, device="vgpu", capacity=capacity)
        assert result.video is None
        assert result.report["out_of_memory"]["stage"] == stage
        assert result.report["out_of_memory"]["requested"] > 0
        assert result.report["peak_bytes"] <= capacity


def count(task, config, call, **options):
    """Peak GiB of each stage of unpatched upstream at full size."""
    call = {"frame_num": 81, "sampling_steps": 2} | call
    report = driver.run(
        UPSTREAM, task, config=config, call=call, device="vgpu", dtype="bfloat16", meta=True, **options
    ).report
    return {stage: peak / GIB for stage, peak in report["stages"].items()}, report["out_of_memory"]


def test_full_size_count_agrees_with_upstreams_published_figures():
    """69 GB for the 14B model at 720p; 8.19 GB, in units of 1e9 bytes, for the 1.3B model with T5 on the CPU."""
    stages, _ = count("t2v", "t2v-14B", {"size": [1280, 720]})
    assert stages["denoise"] == pytest.approx(69, abs=0.5)
    assert stages["decode"] == pytest.approx(16.8, abs=0.3)
    stages, _ = count("t2v", "t2v-1.3B", {"size": [832, 480]}, init={"t5_cpu": True})
    assert max(stages.values()) * GIB / 1e9 == pytest.approx(8.19, abs=0.25)


def test_full_size_runs_out_of_memory_where_users_do():
    """T2V-1.3B on a card of 11.49 GiB, offloading."""
    _, out_of_memory = count("t2v", "t2v-1.3B", {"size": [832, 480]}, capacity=int(11.49 * GIB))
    assert out_of_memory["stage"] == "text"


def test_configs_say_what_upstreams_say():
    """Values that reach a run; compared in a process of upstream's."""
    keys = ("sample_neg_prompt", "sample_fps", "num_train_timesteps", "text_len", "vae_stride", "patch_size")
    files = ("t5_checkpoint", "t5_tokenizer", "vae_checkpoint", "clip_checkpoint", "clip_tokenizer")
    sizes = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "window_size", "qk_norm", "eps")
    types = ("t5_dtype", "param_dtype", "clip_dtype")
    theirs = driver.read_configs(UPSTREAM)
    assert theirs.keys() == {task for task in WAN_CONFIGS if not TASKS[task].toy}
    for task, config in theirs.items():
        ours = WAN_CONFIGS[task]
        for key in (*keys, *files, *sizes, *types):
            if key in config:
                value = ours[key]
                value = list(value) if isinstance(value, tuple) else value
                assert (str(value) if key in types else value) == config[key], (task, key)
