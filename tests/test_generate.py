"""The command line: its flags, its one-line errors, what it writes and what it keeps when something fails."""

import os
from pathlib import Path

import av
import pytest
import torch
from PIL import Image

import generate
import wan
from leanwan.options import LOW_VRAM, MemoryOptions
from wan import random_models
from wan.tasks import TASKS

ROOT = Path(generate.__file__).parent
FEW = ["--frame_num", "5", "--sample_steps", "2", "--base_seed", "3"]

# Wan2.1's flags: type, default
UPSTREAM_FLAGS = {
    "task": (str, "t2v-14B"),
    "size": (str, "1280*720"),
    "frame_num": (int, None),
    "ckpt_dir": (str, None),
    "offload_model": (bool, None),
    "ulysses_size": (int, 1),
    "ring_size": (int, 1),
    "t5_fsdp": (True, False),
    "t5_cpu": (True, False),
    "dit_fsdp": (True, False),
    "save_file": (str, None),
    "src_video": (str, None),
    "src_mask": (str, None),
    "src_ref_images": (str, None),
    "prompt": (str, None),
    "use_prompt_extend": (True, False),
    "prompt_extend_method": (str, "local_qwen"),
    "prompt_extend_model": (str, None),
    "prompt_extend_target_lang": (str, "zh"),
    "base_seed": (int, -1),
    "image": (str, None),
    "first_frame": (str, None),
    "last_frame": (str, None),
    "sample_solver": (str, "unipc"),
    "sample_steps": (int, None),
    "sample_shift": (float, None),
    "sample_guide_scale": (float, None),  # 5 by default, but for trained toys
}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return generate.main([str(argument) for argument in arguments])


def frames_of(path):
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        return len(frames), frames[0].shape[:2], float(container.streams.video[0].average_rate)


@pytest.mark.parametrize("flag", UPSTREAM_FLAGS)
def test_upstream_flags_keep_type_and_default(flag):
    action = next(action for action in generate.build_parser()._actions if action.dest == flag)
    kind, default = UPSTREAM_FLAGS[flag]
    assert action.default == default and action.option_strings == [f"--{flag}"]
    if kind is True:
        assert action.nargs == 0 and action.const is True
    elif kind is bool:
        assert [action.type(text) for text in ("yes", "True", "t", "1", "no", "false", "F", "0")] == 4 * [
            True
        ] + 4 * [False]
    else:
        assert (action.type or str) is kind


def test_choices_are_upstreams_and_the_toys():
    choices = {action.dest: action.choices for action in generate.build_parser()._actions}
    tasks = ["t2v-14B", "t2v-1.3B", "i2v-14B", "t2i-14B", "flf2v-14B", "vace-1.3B", "vace-14B"]
    assert [task for task in choices["task"] if not TASKS[task].toy] == tasks
    assert list(choices["sample_solver"]) == ["unipc", "dpm++", "euler"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--task", "t2v-14B"], (50, 5.0, 5.0, 81)),
        (["--task", "t2i-14B"], (50, 5.0, 5.0, 1)),
        (["--task", "i2v-14B"], (40, 5.0, 5.0, 81)),
        (["--task", "i2v-14B", "--size", "832*480"], (40, 3.0, 5.0, 81)),
        (["--task", "flf2v-14B", "--size", "832*480"], (50, 16.0, 5.0, 81)),
        (["--task", "vace-14B"], (50, 16.0, 5.0, 81)),
        (["--task", "vace-1.3B", "--size", "480*832", "--sample_steps", "7"], (7, 16.0, 5.0, 81)),
        (["--task", "vace-toy"], (20, 3.0, 2.0, 17)),
        (["--task", "t2v-toy", "--sample_guide_scale", "5"], (20, 3.0, 5.0, 17)),
    ],
)
def test_defaults_of_the_tasks(arguments, expected):
    request = generate.parse_arguments([*arguments, "--ckpt_dir", "."])
    given = (request.sample_steps, request.sample_shift, request.sample_guide_scale, request.frame_num)
    assert given == expected
    assert request.memory.offload_model is True and request.base_seed >= 0


def test_low_vram_is_one_switch():
    memory = generate.parse_arguments(["--task", "t2v-tiny", "--low_vram"]).memory
    assert memory.offload_model is True and memory.vae_cpu and memory.t5_stream and memory.vae_tile == 128
    assert memory.dit_stream == 0.0 and memory.dit_chunk > 0 and memory.activation_offload
    own = generate.parse_arguments(
        ["--task", "t2v-tiny", "--low_vram", "--dit_chunk", "128", "--t5_cpu"]
    ).memory
    assert own.dit_chunk == 128 and own.t5_cpu and not own.t5_stream


@pytest.mark.parametrize(
    "arguments, kept",
    [
        (["--dit_chunk", "0"], {"dit_chunk": 0}),
        (["--vae_tile", "auto"], {"vae_tile": "auto"}),
        (["--vae_tile", "0"], {"vae_tile": 0}),
        (["--offload_model", "False"], {"offload_model": False}),
        (["--dit_stream", "1.5"], {"dit_stream": 1.5}),
        (["--activation_offload", "False"], {"activation_offload": False}),
    ],
)
def test_a_flag_beside_low_vram_keeps_its_value_also_if_it_is_the_default(arguments, kept):
    for line in (["--low_vram", *arguments], [*arguments, "--low_vram"]):
        memory = generate.parse_arguments(["--task", "t2v-tiny", *line]).memory
        assert vars(memory) == vars(MemoryOptions(**LOW_VRAM)) | kept


def test_an_old_spelling_still_works():
    assert generate.parse_arguments(["--task", "t2v-tiny", "--stream_ring", "3"]).memory.stream_buffers == 3


@pytest.mark.parametrize(
    "task, size", [("t2v", (96, 128)), ("i2v", None), ("flf2v", None), ("vace", (96, 128))]
)
def test_each_task_makes_a_video(task, size):
    assert run("--task", f"{task}-tiny", *FEW, "--save_file", "out.mp4") == 0
    count, shape, rate = frames_of("out.mp4")
    assert count == 5 and rate == 16
    if size:
        assert shape == size
    else:  # the image's aspect, at most the area
        assert shape[0] * shape[1] <= 96 * 128 and not shape[0] % 16 and not shape[1] % 16
    assert os.listdir() == ["out.mp4"]


def test_an_image_and_its_default_name():
    assert run("--task", "t2i-tiny", "--prompt", "a red ball", *FEW[2:]) == 0
    (name,) = os.listdir()
    assert name.startswith("t2i-tiny_128*96_a_red_ball_") and name.endswith(".png")
    assert Image.open(name).size == (128, 96)


def test_the_same_seed_gives_the_same_file_and_another_does_not():
    for name, seed in (("a.mp4", 3), ("b.mp4", 3), ("c.mp4", 4)):
        assert run("--task", "t2v-tiny", *FEW, "--base_seed", seed, "--save_file", name) == 0
    a, b, c = (Path(name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert a == b and a != c


@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v", "vace"])
def test_low_vram_gives_the_same_file(task):
    arguments = ["--task", f"{task}-tiny", *FEW]
    assert run(*arguments, "--save_file", "a.mp4") == 0
    low_vram = ["--low_vram", "--dit_chunk", "64", "--offload_folder", "folder"]
    assert run(*arguments, "--save_file", "b.mp4", *low_vram) == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--task", "t2v-tony"], "argument --task: invalid choice: 't2v-tony'"),
        (
            ["--task", "i2v-14B", "--size", "1024*1024", "--ckpt_dir", "x"],
            "--size 1024*1024: choose one of 720*1280",
        ),
        (["--task", "t2v-14B"], "--ckpt_dir: give the directory"),
        (["--task", "t2v-14B", "--ckpt_dir", "nowhere"], "--ckpt_dir nowhere: no such directory"),
        (["--task", "t2v-tiny", "--frame_num", "8"], "--frame_num 8: give 4n+1"),
        (["--task", "t2i-tiny", "--frame_num", "5"], "--frame_num 5: t2i-tiny makes one image"),
        (["--task", "flf2v-tiny", "--frame_num", "1"], "--frame_num 1: flf2v-tiny needs at least 5"),
        (["--task", "t2v-tiny", "--sample_steps", "0"], "--sample_steps 0: give 1 to 1000"),
        (["--task", "t2v-tiny", "--sample_shift", "-1"], "--sample_shift -1.0: give a number above 0"),
        (["--task", "t2v-tiny", "--sample_shift", "nan"], "--sample_shift nan"),
        (["--task", "t2v-tiny", "--image", "a.png"], "--image: belongs to i2v tasks"),
        (["--task", "i2v-tiny", "--src_video", "a.mp4"], "--src_video: belongs to vace tasks"),
        (["--task", "i2v-tiny", "--image", "a.png"], "--image a.png: no such file"),
        (["--task", "flf2v-tiny", "--first_frame", "a.png"], "--first_frame and --last_frame: give both"),
        (["--task", "vace-tiny", "--src_ref_images", "a.png"], "--src_ref_images a.png: no such file"),
        (["--task", "vace-tiny", "--src_mask", "a.mp4"], "--src_mask a.mp4: there is no video to mask"),
        (["--task", "t2v-tiny", "--save_file", "no/out.mp4"], "--save_file no/out.mp4: no folder no"),
        (["--task", "t2v-tiny", "--save_file", "."], "--save_file .: is a directory"),
        (
            ["--task", "t2v-tiny", "--ulysses_size", "2"],
            "--ulysses_size and --ring_size: 2 ranks are asked for",
        ),
        (["--task", "t2v-tiny", "--dit_fsdp"], "--dit_fsdp: shares weights between ranks"),
        (["--task", "t2v-tiny", "--vae_tile", "100"], "--vae_tile 100"),
        (["--task", "t2v-tiny", "--vae_tile", "big"], "--vae_tile: 'big' is neither auto nor a number"),
        (["--task", "t2v-tiny", "--dit_chunk", "10"], "--dit_chunk 10"),
        (["--task", "t2v-tiny", "--dit_chunk", "x"], "--dit_chunk: invalid int value: 'x'"),
        (["--task", "t2v-tiny", "--stream_buffers", "1"], "--stream_buffers 1"),
        (["--task", "t2v-tiny", "--dit_stream", "-2"], "--dit_stream -2.0"),
        (["--task", "t2v-tiny", "--t5_cpu", "--t5_stream"], "--t5_stream and --t5_cpu: choose one"),
        (["--task", "t2v-tiny", "--offload_model", "maybe"], "'maybe' is neither True nor False"),
        (
            ["--task", "t2v-tiny", "--decode_latents", "no.safetensors"],
            "--decode_latents no.safetensors: no such file",
        ),
        (["--task", "t2v-tiny", "--save_latents", "no/l"], "--save_latents no/l: no folder no"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, told, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("generate.py: ") and error.count("\n") == 1, error
    assert os.listdir() == []


@pytest.fixture
def checkpoint(tmp_path):
    return random_models.write_checkpoint(tmp_path / "checkpoint", "t2v-tiny")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_file_is_named(checkpoint, name, damage, capsys):
    data = (checkpoint / name).read_bytes()
    (checkpoint / name).unlink()
    if damage == "truncated":
        (checkpoint / name).write_bytes(data[: len(data) * 2 // 3])
    assert run("--task", "t2v-tiny", *FEW, "--ckpt_dir", checkpoint, "--save_file", "a.mp4") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("generate.py: ") and name in error


def test_misfitting_tensors_are_listed(checkpoint, capsys):
    from safetensors.torch import load_file, save_file

    path = checkpoint / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["blocks.0.ffn.2.oops"] = weights.pop("blocks.0.ffn.2.bias")
    save_file(weights, path)
    assert run("--task", "t2v-tiny", *FEW, "--ckpt_dir", checkpoint) == 2
    error = capsys.readouterr().err
    assert "missing: blocks.0.ffn.2.bias" in error and "unexpected: blocks.0.ffn.2.oops" in error
    weights["blocks.0.ffn.2.bias"] = torch.zeros(3)
    del weights["blocks.0.ffn.2.oops"]
    save_file(weights, path)
    assert run("--task", "t2v-tiny", *FEW, "--ckpt_dir", checkpoint) == 2
    assert "blocks.0.ffn.2.bias (3,) instead of (64,)" in capsys.readouterr().err


def test_latents_of_another_size_or_task_are_refused(capsys):
    arguments = ["--task", "t2v-tiny", *FEW, "--save_file", "a.mp4", "--save_latents", "l.safetensors"]
    assert run(*arguments) == 0 and sorted(os.listdir()) == ["a.mp4", "l.safetensors"]
    assert run("--task", "t2v-tiny", "--size", "96*128", "--decode_latents", "l.safetensors") == 2
    assert "made with --size 128*96, not 96*128" in capsys.readouterr().err
    assert run("--task", "vace-tiny", "--decode_latents", "l.safetensors") == 2
    assert "made with --task t2v-tiny" in capsys.readouterr().err


def test_an_interrupt_leaves_the_state(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(wan.WanT2V, "denoise", interrupt)
    assert run("--task", "t2v-tiny", *FEW, "--save_file", "a.mp4") == 130
    (name,) = os.listdir()
    assert name.startswith("a.mp4.") and name.endswith(".state")


@pytest.mark.parametrize("message", ["GET was unable to find an engine to execute this computation", "odd"])
def test_lack_of_memory_is_one_line_whatever_its_name(monkeypatch, message, capsys):
    def fail(*_, **__):
        raise RuntimeError(message + "\nand more")

    monkeypatch.setattr(wan.WanT2V, "denoise", fail)
    arguments = ["--task", "t2v-tiny", *FEW, "--save_file", "a.mp4"]
    if message == "odd":  # a fault of the program shows itself
        with pytest.raises(RuntimeError, match="odd"):
            run(*arguments)
        return
    assert run(*arguments) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1] == f"generate.py: out of memory, try --low_vram ({message})"
    )


def test_a_failed_prompt_extension_is_told_and_survived(monkeypatch, caplog):
    monkeypatch.delenv("DASH_API_KEY", raising=False)
    extension = ["--use_prompt_extend", "--prompt_extend_method", "dashscope"]
    assert run("--task", "t2v-tiny", *FEW, *extension, "--save_file", "a.mp4") == 0
    assert "DASH_API_KEY" in caplog.text and os.listdir() == ["a.mp4"]
