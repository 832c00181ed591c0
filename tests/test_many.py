"""Results that know how they were made, and many of them in one go."""

import json
import os
import subprocess
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image
from test_resume import SETTINGS, at_event, command, in_a_child, signal

import wan
from leanwan.errors import InputError
from wan.run.settings import read_settings

FEW = ["--frame_num", "1", "--sample_steps", "2", "--base_seed", "3"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def files():
    return sorted(os.listdir())


def test_like_a_video_makes_it_again_and_flags_override():
    prompt = 'a "red" ball = 1; naïve 猫\n\\n $HOME'
    assert command("--task", "t2v-tiny", *SETTINGS, "--prompt", prompt, "--save_file", "a.mp4") == 0
    settings = read_settings("a.mp4")
    assert settings["prompt"] == prompt and settings["base_seed"] == 3 and settings["sample_steps"] == 4
    assert command("--like", "a.mp4", "--save_file", "b.mp4", "--low_vram") == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    assert command("--like", "a.mp4", "--save_file", "c.mp4", "--base_seed", "4") == 0
    assert read_settings("c.mp4") == settings | {"base_seed": 4}


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_like_a_picture(seed):
    picture = ["--task", "t2i-tiny", *FEW, "--base_seed", seed, "--prompt", "a ball"]
    assert command(*picture, "--save_file", "a.png") == 0
    assert command("--like", "a.png", "--save_file", "b.png") == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert Image.open("a.png").size == (128, 96)


def test_like_what_has_no_settings(capsys):
    Image.new("RGB", (8, 8)).save("plain.png")
    Path("notes.png").write_text("no picture")
    for name, told in (
        ("plain.png", "has no settings in it"),
        ("notes.png", "has no settings"),
        ("no", "no such file"),
    ):
        assert command("--like", name) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(InputError, match="save_file plain.png: has no settings"):
        read_settings("plain.png", "save_file")


def test_metadata_is_all_that_a_comment_changes():
    """Frames and their times are those of a file without it."""
    assert command("--task", "t2v-tiny", *SETTINGS, "--save_file", "a.mp4") == 0
    bare = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-i",
        "a.mp4",
        "-c",
        "copy",
        "-map_metadata",
        "-1",
        "-f",
        "framemd5",
        "-",
    ]
    tagged = [word for word in bare if word not in ("-map_metadata", "-1")]
    outputs = [subprocess.run(line, capture_output=True, check=True).stdout for line in (bare, tagged)]
    hashes = [[line for line in output.splitlines() if line[:1] != b"#"] for output in outputs]
    assert hashes[0] == hashes[1] and len(hashes[0]) == 5


def test_many_prompts_load_once_and_a_rerun_skips_what_is_there(monkeypatch, caplog):
    caplog.set_level("INFO")
    Path("list.txt").write_text("a red ball\n\n  two cats  \na boat\n")
    loaded = []
    load = wan.WanT2V.__init__

    def counting(self, *args, **kwargs):
        loaded.append(1)
        load(self, *args, **kwargs)

    monkeypatch.setattr(wan.WanT2V, "__init__", counting)
    line = ["--task", "t2i-tiny", *FEW, "--prompts", "list.txt"]
    assert command(*line) == 0
    assert files() == ["list.txt", "list_001.png", "list_003.png", "list_004.png"] and len(loaded) == 1
    assert [read_settings(name)["prompt"] for name in files()[1:]] == ["a red ball", "two cats", "a boat"]
    one = ["--task", "t2i-tiny", *FEW, "--prompt", "two cats", "--save_file", "one.png"]
    assert command(*one) == 0 and Path("one.png").read_bytes() == Path("list_003.png").read_bytes()

    Path("list_003.png").unlink()
    before = {name: os.stat(name).st_mtime_ns for name in ("list_001.png", "list_004.png")}
    assert command(*line) == 0 and Path("list_003.png").read_bytes() == Path("one.png").read_bytes()
    assert before == {name: os.stat(name).st_mtime_ns for name in before}
    assert caplog.messages[-1] == "1 made, 2 were there"


def test_a_random_seed_is_no_reason_to_make_it_again():
    Path("list.txt").write_text("a red ball\n")
    line = ["--task", "t2i-tiny", *FEW[:-2], "--prompts", "list.txt"]
    assert command(*line) == 0
    first = Path("list_001.png").read_bytes()
    assert command(*line) == 0 and Path("list_001.png").read_bytes() == first


def test_one_failure_does_not_stop_the_rest(caplog):
    caplog.set_level("INFO")
    entries = [
        {"task": "t2i-tiny", "prompt": "a", "save_file": "a.png"},
        {"task": "i2v-tiny", "image": "missing.png", "prompt": "b", "save_file": "b.mp4", "frame_num": 5},
        {"prompt": "c", "base_seed": 7},
    ]
    Path("list.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert command("--task", "t2i-tiny", *FEW, "--prompts", "list.jsonl", "--save_file", "x.png") == 1
    assert files() == ["a.png", "list.jsonl", "x_003.png"]
    assert read_settings("x_003.png")["base_seed"] == 7
    assert caplog.messages[-1] == "2 made, 0 were there, 1 failed: line 2"
    assert "line 2: image missing.png: no such file" in caplog.text


def test_a_rerun_goes_on_with_what_was_half_done():
    Path("list.txt").write_text("a red ball\n")
    line = ["--task", "t2v-tiny", *SETTINGS, "--prompts", "list.txt"]
    assert in_a_child([*line, "--save_every", "0"], at_event(5, signal.SIGKILL)) == -signal.SIGKILL
    (state,) = Path().glob("*.state")
    assert command(*line) == 0 and files() == ["list.txt", "list_001.mp4"]
    one = ["--task", "t2v-tiny", *SETTINGS, "--prompt", "a red ball", "--save_file", "one.mp4"]
    assert command(*one) == 0 and Path("one.mp4").read_bytes() == Path("list_001.mp4").read_bytes()


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("list.txt", b"", "has no line with a prompt in it"),
        ("list.txt", b"a\n\xff\xfe", "it is not UTF-8 text"),
        ("list.jsonl", b"{", "line 1: not JSON"),
        ("list.jsonl", b'{"prompt": "a"}\n[1]', "line 2: not a JSON object"),
        ("list.jsonl", b'{"promt": "a"}', "line 1: no such setting: promt"),
        ("list.jsonl", b'{"frame_num": 8}', "line 1: frame_num 8: give 4n+1"),
        ("list.jsonl", b'{"resume": "a"}', "line 1: "),
        ("list.jsonl", b'{"frame_num": "9"}', "line 1: "),
        ("list.jsonl", b'{"prompt": 9}', "line 1: "),
        (
            "list.jsonl",
            b'{"save_file": "a.png"}\n{"save_file": "./a.png"}',
            "line 1 and line 2 have one save_file",
        ),
    ],
)
def test_a_list_that_cannot_work_is_refused_at_once(name, text, told, capsys):
    Path(name).write_bytes(text)
    assert command("--task", "t2i-tiny", "--prompts", name) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and files() == [name]
