"""Bad input: each case is told in one line, exits with 2 and changes nothing on the disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import generate
from leanwan.errors import InputError
from wan import random_models
from wan.modules.model import LARGEST, WanModel
from wan.utils.video import open_image
from wan.weights.reading import checkpoint_files, read_tensors

TOY = ["--task", "t2v-tiny"]
HUGE = "9" * 5000


@pytest.fixture(autouse=True)
def in_a_folder_of_odd_things(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.mp4").write_bytes(b"precious")
    Path("there.png").write_bytes(b"precious")
    Path("folder.mp4").mkdir()
    os.symlink("there.mp4", "link.mp4")
    os.symlink("nowhere", "broken.mp4")
    os.mkfifo("pipe.mp4")


def everything():
    """What is in the folder: names, and the contents of files."""
    return {
        str(path): path.read_bytes() if path.is_file() else path.lstat().st_mode for path in Path().rglob("*")
    }


def numbers(flag, *wrong):
    values = ("x", "", "nan", "inf", "1e400", HUGE, "1,5", *wrong)
    return [([*TOY, flag, value], flag) for value in values] + [([*TOY, f"{flag}=-inf"], flag)]


def empties():
    names = ["ckpt_dir", "save_file", "save_latents", "decode_latents", "resume", "like", "prompts", "device"]
    names += ["prompt_extend_model", "offload_folder"]
    own = {
        "i2v": ["image"],
        "flf2v": ["first_frame", "last_frame"],
        "vace": ["src_video", "src_mask", "src_ref_images"],
    }
    return [([*TOY, f"--{name}", ""], f"--{name}") for name in names] + [
        (["--task", f"{task}-tiny", f"--{name}", ""], f"--{name}")
        for task, all_names in own.items()
        for name in all_names
    ]


def outputs():
    cases = [
        (["--save_file", "there.mp4"], "--save_file there.mp4: exists"),
        (["--save_file", "folder.mp4"], "is a directory"),
        (["--save_file", "link.mp4"], "is a link"),
        (["--save_file", "broken.mp4"], "is a link"),
        (["--save_file", "pipe.mp4"], "is no regular file"),
        (["--save_file", "pipe.mp4", "--overwrite"], "is no regular file"),
        (["--save_file", "/dev/null"], "cannot write this kind of video"),
        (["--save_file", "a.gif"], "cannot write this kind of video"),
        (["--save_file", "a"], "cannot write this kind of video"),
        (["--save_file", "x" * 300 + ".mp4"], "--save_file"),
        (["--save_file", "x" * 248 + ".mp4"], "--save_file"),
        (["--save_file", "a\0.mp4"], "zero byte"),
        (["--save_latents", "/dev/null"], "is no regular file"),
        (["--save_latents", "there.mp4"], "--save_latents there.mp4: exists"),
        (["--save_file", "a.mp4", "--save_latents", "a.mp4"], "are the same file"),
        (["--save_file", "a.mp4", "--save_latents", "./folder.mp4/../a.mp4"], "are the same file"),
    ]
    for path in ("there.mp4", "no", ".", "pipe.mp4", "link.mp4"):
        cases += [([flag, path], f"{flag} ") for flag in ("--decode_latents", "--resume", "--like")]
    return [([*TOY, *arguments], told) for arguments, told in cases]


CASES = [
    *numbers("--base_seed", "1.5", str(2**63), str(10**30)),
    *numbers("--frame_num", "0", "-3", "8", "1.5", "400000001"),
    *numbers("--sample_steps", "0", "-1", "1001", "2.5"),
    *numbers("--sample_shift", "0", "-1", "101"),
    *numbers("--sample_guide_scale", "-1", "1001"),
    *numbers("--save_every", "-1"),
    *numbers("--vae_tile", "-8", "1", "100", "8.5"),
    *numbers("--dit_chunk", "-1", "1", "2.5"),
    *numbers("--dit_stream", "-1", "1e300"),
    *numbers("--stream_buffers", "0", "1", "-2", "2.5"),
    *numbers("--ulysses_size", "0", "2"),
    *numbers("--ring_size", "0", "2"),
    *empties(),
    *outputs(),
    ([*TOY, "--prompt", "a\udcff"], "--prompt: is not UTF-8 text"),
    ([*TOY, "--prompt", "a\0"], "--prompt: has a zero byte"),
    ([*TOY, "--device", "gpu"], "--device"),
    ([*TOY, "--device", "cuda:99999999999999999999"], "--device"),
    ([*TOY, "--ckpt_dir", "there.mp4"], "--ckpt_dir"),
    ([*TOY, "--ckpt_dir", "folder.mp4"], "--ckpt_dir"),
    ([*TOY, "--size", "128x96"], "--size"),
    ([*TOY, "--task", "t2v"], "--task"),
    ([*TOY, "--sample_solver", "euler2"], "--sample_solver"),
    *[([*TOY, "--attention", value], "--attention") for value in ("", "x", "Sage", "flash2")],
    (
        [*TOY, "--device", "cpu", "--attention", "flash"],
        "--attention flash: computes on CUDA devices only, not on cpu",
    ),
    (
        [*TOY, "--device", "cpu", "--attention", "sage"],
        "--attention sage: computes on CUDA devices only, not on cpu",
    ),
    (
        [*TOY, "--attention", "sage", "--dit_chunk"],
        "--attention and --dit_chunk: sage quantises blocks of tokens",
    ),
    (
        [*TOY, "--attention", "sage", "--activation_offload"],
        "--attention and --activation_offload: sage quantises",
    ),
    (
        [*TOY, "--attention", "sage", "--low_vram"],
        "--attention, --dit_chunk, --activation_offload: sage quantises",
    ),
    ([*TOY, "--attention", "sage", "--exact"], "--attention and --exact: sage quantises"),
    ([*TOY, "--compile", "--exact"], "--compile and --exact: "),
    ([*TOY, "--compile", "--dit_chunk"], "--compile and --dit_chunk: compiled blocks have all"),
    ([*TOY, "--compile", "--dit_stream"], "--compile and --dit_stream: compiled blocks have all"),
    (
        [*TOY, "--compile", "--activation_offload"],
        "--compile and --activation_offload: compiled blocks have all",
    ),
    (
        [*TOY, "--compile", "--low_vram"],
        "--compile, --dit_stream, --dit_chunk, --activation_offload: compiled",
    ),
    ([*TOY, "--no_such_flag"], "--no_such_flag"),
    ([*TOY, "--offload_folder", "there.mp4"], "--offload_folder"),
    (["--task", "i2v-tiny", "--image", "there.png", "--save_file", "a.mp4"], "not a readable image"),
    (["--task", "i2v-tiny", "--image", "pipe.mp4", "--save_file", "a.mp4"], "--image pipe.mp4"),
    (["--task", "vace-tiny", "--src_video", "there.mp4", "--save_file", "a.mp4"], "not a readable video"),
    (["--task", "vace-tiny", "--src_ref_images", ",", "--save_file", "a.mp4"], "--src_ref_images"),
    (["--resume", "there.mp4", "--prompt", "a"], "--prompt: settled by the state"),
    (["--resume", "there.mp4", "--like", "there.mp4"], "--like"),
    (["--prompts", "no.txt"], "--prompts no.txt"),
    (["--prompts", "folder.mp4"], "--prompts folder.mp4"),
]


@pytest.mark.parametrize(
    "arguments, told", CASES, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_one_line_and_nothing_changes(arguments, told, capsys):
    before = everything()
    assert generate.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("generate.py: ") and error.count("\n") == 1 and told in error, error[:500]
    assert everything() == before


def test_overwrite_replaces_what_is_there():
    few = ["--frame_num", "1", "--sample_steps", "1", "--base_seed", "1"]
    assert generate.main(["--task", "t2i-tiny", *few, "--save_file", "there.png", "--overwrite"]) == 0
    assert Image.open("there.png").size == (128, 96)


@pytest.mark.parametrize("prompt", ["🎬" * 60, "a\nb\r\tc\x1b[31m", "a/b\\c:d*e?", ".", "é" * 200])
def test_default_names_are_short_and_plain(prompt):
    name = generate.parse_arguments([*TOY, "--prompt", prompt]).save_file
    assert len(name.encode()) < 200 and name.isprintable() and not set(name) & set('/\\:?"<>|\x1b')


# Pictures


def test_a_picture_of_16_bits_keeps_its_tones():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save("deep.png")
    assert np.array_equal(np.asarray(open_image("deep.png", "image"))[..., 0], ramp // 257)


@pytest.mark.parametrize(
    "kind, told", [("turned", "stored turned"), ("clear", "transparent"), ("plain", None)]
)
def test_what_a_picture_has_and_is_not_used_is_told(kind, told, caplog):
    picture = Image.new("RGBA" if kind == "clear" else "RGB", (8, 4))
    exif = Image.Exif()
    if kind == "turned":
        exif[0x0112] = 6
    picture.save("a.png", exif=exif)
    assert open_image("a.png", "image").size == (8, 4)
    assert told in caplog.text if told else not caplog.text


# Checkpoints


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        torch.zeros(2),
        {"a": {"b": torch.zeros(2)}},
        {"a": 3},
        {1: torch.zeros(2)},
        {"a": torch.zeros(4).to_sparse()},
    ],
    ids=["list", "tensor", "nested", "number", "name", "sparse"],
)
def test_pickles_that_are_no_checkpoint(content):
    torch.save(content, "weights.pth")
    with pytest.raises(InputError, match="cannot be read as a checkpoint") as error:
        list(read_tensors(Path("weights.pth")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "index",
    ["[]", "3", "{}", "{", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../there.mp4"}}',
     '{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "folder.mp4/x"}}', "[" * 100000],
)  # fmt: skip
def test_an_index_names_files_beside_it(index):
    Path("w.index.json").write_text(index)
    with pytest.raises(InputError, match="cannot be read as a checkpoint"):
        checkpoint_files(Path("w.index.json"))


CONFIGS = [{name: value} for name in LARGEST for value in (0, -1, 10**9, "8", None, True, 1.5)]
CONFIGS += [{"num_heads": 3}, {"no_such": 1}, {"patch_size": [0, 2, 2]}, {"model_type": "x"}]


@pytest.mark.parametrize("change", CONFIGS, ids=str)
def test_configs_that_describe_no_model(change, tmp_path):
    config = json.loads((random_models.checkpoint("t2v-tiny") / "config.json").read_text())
    Path("config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match="does not describe a WanModel") as error:
        WanModel.from_config(tmp_path)
    assert "\n" not in str(error.value)


def test_configs_that_are_no_object(tmp_path):
    for text in ("[]", "3", "null", "{", "\xff"):
        Path("config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(InputError, match="does not describe a WanModel"):
            WanModel.from_config(tmp_path)


def test_a_checkpoint_of_numbers_that_are_none(capsys):
    checkpoint = random_models.write_checkpoint("checkpoint", "t2v-tiny")
    from safetensors.torch import load_file

    path = checkpoint / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["head.head.bias"][0] = float("nan")
    save_file(weights, path)
    few = ["--frame_num", "5", "--sample_steps", "2", "--save_file", "a.mp4"]
    assert generate.main([*TOY, *few, "--ckpt_dir", str(checkpoint)]) == 2
    assert "denoising, step 1 gave values that are infinite or not numbers" in capsys.readouterr().err
    assert not Path("a.mp4").exists()


def test_an_image_that_is_too_narrow(capsys):
    Image.new("RGB", (2000, 2)).save("narrow.png")
    line = ["--task", "i2v-tiny", "--frame_num", "5", "--sample_steps", "1", "--image", "narrow.png"]
    assert generate.main([*line, "--save_file", "a.mp4"]) == 2
    assert "an image of 2000x2 is too narrow" in capsys.readouterr().err
    assert not list(Path().glob("a.mp4*"))


# The process


def process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(Path(generate.__file__)), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_while_libraries_are_imported():
    code = "import builtins, sys; real = builtins.__import__\n"
    code += "def stopped(name, *rest):\n"
    code += "    if name.startswith('wan'): raise KeyboardInterrupt\n"
    code += "    return real(name, *rest)\n"
    code += "builtins.__import__ = stopped\n"
    code += f"import runpy; runpy.run_path({str(generate.__file__)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "generate.py: interrupted\n")


def test_a_log_that_nobody_reads_does_not_stop_the_run():
    line = ["--task", "t2i-tiny", "--sample_steps", "1", "--save_file", "a.png"]
    reader, writer = os.pipe()
    os.close(reader)
    running = process(*line, stdout=writer)
    os.close(writer)
    errors = running.communicate()[1]
    assert Path("a.png").is_file() and "Traceback" not in errors


def test_files_have_the_modes_that_files_have():
    before = os.umask(0o027)
    try:
        few = ["--frame_num", "1", "--sample_steps", "1", "--base_seed", "1"]
        line = ["--task", "t2i-tiny", *few, "--save_file", "a.png", "--save_latents", "latents"]
        assert generate.main(line) == 0
    finally:
        os.umask(before)
    assert [oct(Path(name).stat().st_mode & 0o777) for name in ("a.png", "latents")] == ["0o640"] * 2
