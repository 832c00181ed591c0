"""Requests, the run and its events, where checkpoints are found, and the solver that a walk can go on with."""

import dataclasses
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from goldens import at_steps
from huggingface_hub.errors import LocalEntryNotFoundError

from leanwan.errors import InputError
from leanwan.options import MemoryOptions
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.configs.tiny import TINY_CONFIGS
from wan.run import Request, run
from wan.run.settings import read_settings
from wan.sampling import SOLVERS, Solver, denoise
from wan.tasks import TASKS
from wan.utils.events import Expected, Finished, MemorySample, StageDone, StageStarted, Step
from wan.utils.video import VideoFile
from wan.weights.hub import find_checkpoint

SIZES = [
    "120*96",
    "0*96",
    "128x96",
    "128*96*3",
    "-16*16",
    "16*8208",
    "128 *96",
    "\u0661\u0666*16",
    "999999*16",
]
FEW = {"frame_num": 5, "sample_steps": 2, "base_seed": 3}


def test_a_request_is_whole_and_frozen():
    request = Request(task="i2v-tiny", prompt="a red ball")
    assert request.size == "128*96" and request.pixels == (128, 96) and request.sample_steps == 10
    assert request.image.endswith("i2v_input.png") and request.save_file.endswith(".mp4")
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.size = "96*128"
    assert Request(**vars(request)) == request


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"frame_num": 8}, "frame_num 8: give 4n+1 frames"),
        ({"frame_num": 5.5}, "frame_num 5.5: give a whole number"),
        ({"sample_steps": True}, "sample_steps True: give a whole number"),
        ({"task": "t2v-tony"}, "task t2v-tony: choose one of t2v-14B"),
        ({"sample_guide_scale": float("nan")}, "sample_guide_scale nan: give 0 to 1000"),
        ({"base_seed": 2**70}, f"base_seed {2**70}: give a whole number of at most 64 bits"),
        *(({"size": size}, f"size {size}: give width*height in multiples of 16") for size in SIZES),
        ({"size": "64*64", "task": "i2v-tiny"}, "size 64*64: choose one of 96*128, 128*96"),
        ({"image": "a.png"}, "image: belongs to i2v tasks, leave it out for t2v-tiny"),
        ({"ckpt_dir": "no/such/folder"}, "ckpt_dir no/such/folder: no such directory"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_carry_the_fields_name(wrong, told):
    with pytest.raises(InputError) as error:
        Request(**{"task": "t2v-tiny"} | wrong)
    assert str(error.value).startswith(told)
    assert error.value.fields == (next(iter(wrong)),)
    assert error.value.told("--").startswith(f"--{told.split(':')[0]}")


def test_a_negative_prompt_takes_the_place_of_the_models_own(tmp_path):
    """And is told by the result."""

    def made(name, **settings):
        path = run(Request("t2v-tiny", save_file=str(tmp_path / name), **FEW, **settings))
        return np.stack(list(VideoFile(path).frames())), read_settings(path)

    plain, _ = made("plain.mp4")
    same, _ = made("same.mp4", negative_prompt=WAN_CONFIGS["t2v-tiny"].sample_neg_prompt)
    other, settings = made("other.mp4", negative_prompt="a green field")
    assert np.array_equal(plain, same) and not np.array_equal(plain, other)
    assert settings["negative_prompt"] == "a green field"


@pytest.mark.parametrize("task", ["t2v-tiny", "vace-tiny"])
def test_any_size_and_one_line_about_it(task, tmp_path, caplog):
    request = Request(task, "48*80", 9, save_file=str(tmp_path / "a.mp4"), sample_steps=1)
    file = VideoFile(run(request))
    assert (file.width, file.height, len(file)) == (48, 80, 9)
    told = [message for message in caplog.messages if "trained" in message]
    assert told == [f"{task} was trained at 96*128, 128*96, not at 48*80"]


@pytest.mark.parametrize("task", TINY_CONFIGS)
def test_events_tell_the_whole_run(task, tmp_path):
    events = []
    path = tmp_path / ("out.png" if TASKS[task].still else "out.mp4")
    few = FEW | ({"frame_num": 1} if TASKS[task].still else {})
    assert run(Request(task=task, save_file=str(path), **few), events.append) == path
    started = [event.name for event in events if isinstance(event, StageStarted)]
    assert started[0] == "text" and started[-3:] == ["denoise", "decode", "save"]
    assert [event.name for event in events if isinstance(event, StageDone)] == started
    steps = [event for event in events if isinstance(event, Step)]
    assert [step for step in steps if step.stage == "denoise"] == [
        Step("denoise", done, 2) for done in (1, 2)
    ]
    counted = set(started) - ({"save"} if TASKS[task].still else set())
    for stage in counted:
        last = [step for step in steps if step.stage == stage][-1]
        assert last.done == last.total and last.seconds_left in (0, None)
    assert any(isinstance(event, Expected) for event in events)
    assert events[-1] == Finished(path) and path.is_file()
    assert not any(isinstance(event, MemorySample) for event in events)  # a CPU has no memory of its own


def test_a_listener_that_raises_stops_the_run(tmp_path):
    def cancel(event):
        if isinstance(event, Step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Request(task="t2v-tiny", save_file=str(tmp_path / "a.mp4"), **FEW), cancel)
    assert not (tmp_path / "a.mp4").exists()


def test_a_checkpoint_is_a_folder_or_fetched_by_its_name(tmp_path, monkeypatch):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(random_models.checkpoint("i2v-tiny"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    config = WAN_CONFIGS["i2v-tiny"]
    assert find_checkpoint(str(tmp_path), config) == tmp_path and not asked
    assert find_checkpoint("Wan-AI/Wan2.1-I2V-14B-480P", config) == random_models.checkpoint("i2v-tiny")
    [(name, patterns)] = asked
    assert name == "Wan-AI/Wan2.1-I2V-14B-480P"
    files = [path for path in random_models.checkpoint("i2v-tiny").rglob("*") if path.is_file()]
    assert all(any(path.match(pattern) for pattern in patterns) for path in files)
    request = Request(task="i2v-tiny", ckpt_dir=name, save_file=str(tmp_path / "a.mp4"), **FEW)
    assert run(request).is_file()


def test_offline_one_line_says_what_to_download(monkeypatch):
    def offline(name, allow_patterns):
        raise LocalEntryNotFoundError("Cannot find the requested files.\nPlease check your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(InputError) as error:
        find_checkpoint("Wan-AI/Wan2.1-T2V-1.3B", WAN_CONFIGS["t2v-1.3B"])
    told = str(error.value)
    assert told.startswith("ckpt_dir Wan-AI/Wan2.1-T2V-1.3B: ") and "download it" in told and "\n" not in told


def test_decoding_latents_loads_the_vae_alone(tmp_path, monkeypatch):
    latents, video = tmp_path / "l.safetensors", tmp_path / "a.mp4"
    run(Request(task="t2v-tiny", save_file=str(video), save_latents=str(latents), **FEW))
    whole = video.read_bytes()

    def refuse(*_, **__):
        raise AssertionError("not needed")

    monkeypatch.setattr("wan.pipeline.T5EncoderModel", refuse)
    monkeypatch.setattr("wan.modules.model.WanModel.from_pretrained", refuse)
    run(Request(task="t2v-tiny", save_file=str(tmp_path / "b.mp4"), decode_latents=str(latents)))
    assert (tmp_path / "b.mp4").read_bytes() == whole


def test_exact_and_device_are_the_same_picture_on_a_cpu(tmp_path):
    for name, options in {"a": {}, "b": {"exact": True, "device": "cpu"}}.items():
        run(Request(task="t2v-tiny", save_file=str(tmp_path / f"{name}.mp4"), **FEW, **options))
    a, b = (np.stack(list(VideoFile(tmp_path / f"{name}.mp4").frames())) for name in "ab")
    assert np.array_equal(a, b)
    assert not torch.are_deterministic_algorithms_enabled()


def test_memory_options_hold_for_scripts_too(tmp_path):
    for name, memory in {"a": MemoryOptions(), "b": MemoryOptions(vae_cpu=True, dit_chunk=64)}.items():
        run(Request(task="vace-tiny", save_file=str(tmp_path / f"{name}.mp4"), memory=memory, **FEW))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_a_solver_goes_on_from_a_state(name, after):
    def flow(latent, t):
        return torch.sin(3 * latents_of(latent)) * (t / 1000)

    def latents_of(latent):
        return latent.roll(1, dims=-1)

    def solver():
        return Solver(name, 8, 5.0, "cpu")

    torch.manual_seed(0)
    start = torch.randn(4, 2, 4, 5)
    first, latent = solver(), start
    whole = denoise(at_steps(flow, first), solver(), start)
    for t in first.timesteps[:after]:
        latent = first.step(flow(latent, t[None]), t, latent)
    state = first.state_dict()
    second = solver()
    second.load_state_dict(state)
    assert len(second.timesteps) == 8 - after
    rest = denoise(at_steps(flow, second), second, latent)
    assert torch.equal(rest, whole)


def test_importing_and_helping_take_no_libraries():
    code = "import sys, wan, wan.cli; wan.cli.build_parser(); print(*sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"transformers", "diffusers", "av", "tokenizers"} & set(modules.stdout.split())
