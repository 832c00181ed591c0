"""What others wrote or typed: whatever it is, it is taken as it is meant or refused in one harmless line."""

import contextlib
import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import generate
from leanwan.errors import LINE_LENGTH, InputError, listed, shown
from leanwan.flags import is_option
from leanwan.options import MemoryOptions
from wan import cli
from wan.run import Request
from wan.run import settings as run_settings
from wan.run.batch import read_entries
from wan.run.settings import PROGRAM, read_settings
from wan.run.state import State, _checksum, read_state, resumed_request, write_state
from wan.utils.outside import parse_json
from wan.utils.video import save_video

MANY = int(os.environ.get("WAN_FUZZ", "150"))  # cases of each kind
HUGE, DEEP = "9" * 400, "[" * 100_000
NAMES = [item.name for item in fields(Request) if is_option(item)]
MEMORY = [item.name for item in fields(MemoryOptions)]
FUZZ = settings(
    max_examples=MANY,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EDGES = [
    10**400,
    -(10**400),
    2**63,
    1e308,
    float("nan"),
    float("inf"),
    True,
    None,
    "",
    "\0",
    "\ud800",
    "\x1b[2J",
    [],
    {},
]
EDGES += [[5], ["\0"], {"a": 1}, [[]], "x" * 5000, "auto", "off", "t2v-tiny", 5, 17, 1.5]
values = st.one_of(
    st.sampled_from(EDGES),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=20),
    st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=4),
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def one_line():
    """Inside, what is refused is refused by an InputError of one harmless line."""
    try:
        yield
    except InputError as error:
        told = error.told("--")
        assert all(c.isprintable() or c.isspace() and ord(c) >= 160 for c in told), told[:300]
        assert len(told) < LINE_LENGTH + 3000, told[:300]


# Gates


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        '{"a":' * 100_000,
        "NaN",
        "-Infinity",
        "1e999",
        HUGE,
        f"-{HUGE}",
        "9" * 5000,
        "",
        "{",
        b"\xff",
        "\ud800",
        "'a'",
    ],
    ids=range(13),
)
def test_json_that_is_refused(text):
    with pytest.raises(ValueError) as told:
        parse_json(text)
    assert len(str(told.value)) < 200


def test_json_that_is_taken():
    assert parse_json('{"a": [1, -2.5e3, null, true, "\\u00e9"]}') == {"a": [1, -2500.0, None, True, "é"]}
    assert parse_json(str(2**64 - 1)) == 2**64 - 1 and parse_json(str(-(2**63))) == -(2**63)


def test_what_is_shown():
    assert shown("a\x1b[2J\n\u202e\ud800\x7f b\u3000é漢") == r"a\x1b[2J\n\u202e\ud800\x7f b" + "\u3000é漢"
    assert len(shown("x" * 10**6)) < 400 and shown("x" * 300) == "x" * 300
    assert "digits" in shown(10**5000) and shown(Path("a")) == "a" and shown(None) == "None"
    assert listed(["a", "b\n"]) == r"a, b\n"
    assert listed([str(i) for i in range(100_000)]).endswith("8, 9 and 99990 more")
    told = InputError("no \x1b such --flag" * 1000, tuple("abc" * 1000), "\x1b").told("--")
    assert told.isprintable() and "--a, --b, --c" in told and "and 2990 more" in told


@FUZZ
@given(st.dictionaries(st.sampled_from([*NAMES, "planned", "memory"]), values, max_size=4))
def test_requests_of_anything(given):
    with one_line():
        Request(**{"task": "t2v-tiny"} | given).to_json()


@pytest.mark.parametrize("name", [*NAMES, "planned", "memory"])
def test_every_option_of_a_request(name):
    for value in EDGES:
        with one_line():
            Request(**{"task": "t2v-tiny"} | {name: value}).to_json()


@pytest.mark.parametrize("name", MEMORY)
def test_every_memory_option(name):
    for value in EDGES:
        with one_line():
            Request(task="t2v-tiny", memory=MemoryOptions(**{name: value})).to_json()


FLAGS = [f"--{name}" for name in [*NAMES, *MEMORY, "like", "prompts"]]
TEXTS = [
    HUGE,
    "9" * 5000,
    "-1",
    "nan",
    "1e400",
    "\0",
    "a\0b",
    "\udcff",
    "\x1b]0;x\x07",
    "",
    ".",
    "/",
    "..",
    "x" * 5000,
    "5",
]


@FUZZ
@given(st.lists(st.tuples(st.sampled_from(FLAGS), st.sampled_from(TEXTS) | st.text(max_size=9)), max_size=4))
def test_command_lines_of_anything(pairs):
    with one_line():
        cli._parse(["--task", "t2v-tiny", *[word for pair in pairs for word in pair]])
    assert not os.listdir()


@pytest.mark.parametrize("flag", FLAGS)
def test_every_flag(flag):
    for text in TEXTS:
        with one_line():
            cli._parse(["--task", "t2v-tiny", flag, text])
    assert not os.listdir()


# Files


@FUZZ
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), values, max_size=4))
def test_lines_of_prompts(given):
    Path("list.jsonl").write_text(json.dumps({"task": "t2v-tiny"} | given) + "\n")
    with one_line():
        read_entries("list.jsonl", {}, {})


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        f'{{"base_seed": {HUGE}}}',
        '{"prompt": "\\ud800"}',
        '{"lora": [5]}',
        '{"task": ["x"]}',
        '{"base_seed": null}',
    ],
)
def test_lines_that_are_refused(line):
    Path("list.jsonl").write_text(line)
    with pytest.raises(InputError, match=r"^prompts list.jsonl: line 1: "):
        read_entries("list.jsonl", {"task": "t2v-tiny"}, {})


@pytest.mark.parametrize("save_file", [".", "/"])
def test_names_that_cannot_be_numbered(save_file):
    Path("list.txt").write_text("a\nb\n")
    with pytest.raises(InputError):
        read_entries("list.txt", {"task": "t2v-tiny", "save_file": save_file}, {})


def picture(comment, path="made.png"):
    metadata = PngInfo()
    metadata.add_text("Comment", comment)
    Image.new("RGB", (8, 8)).save(path, pnginfo=metadata)
    return path


def comment(made, memory=None):
    told = {"program": PROGRAM, "version": "0", "settings": made}
    return json.dumps(told if memory is None else told | {"memory": memory})


@FUZZ
@given(
    st.dictionaries(st.sampled_from(NAMES), values, max_size=4) | values,
    st.none() | st.dictionaries(st.sampled_from(MEMORY), values, max_size=4) | values,
)
def test_files_to_be_like(made, memory):
    with one_line():
        cli._parse(["--like", picture(comment(made, memory))])
    assert os.listdir() == ["made.png"]


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        HUGE,
        "5",
        "[]",
        "{}",
        f'{{"program": "{PROGRAM}"}}',
        f'{{"program": "{PROGRAM}", "settings": {HUGE}}}',
        "\x1b",
    ],
)
def test_files_that_are_like_nothing(text):
    with pytest.raises(InputError, match="^like made.png: has no settings in it"):
        read_settings(picture(text))


def test_metadata_that_is_no_text():
    save_video(torch.zeros(3, 1, 16, 16), "made.mp4", comment="c" * 40)
    data = Path("made.mp4").read_bytes()
    Path("made.mp4").write_bytes(data.replace(b"c" * 40, b"\xff" * 40))
    with pytest.raises(InputError, match="^like made.mp4: "):
        read_settings("made.mp4")


def test_no_path_to_write_to_comes_from_a_file():
    paths = [
        "offload_folder",
        "save_file",
        "save_latents",
        "preview",
        "prompt_cache",
        "resume",
        "decode_latents",
    ]
    own = run_settings.settings(Request(task="t2v-tiny", prompt="a"))
    told = own | dict.fromkeys(paths, "elsewhere")
    file = picture(comment(told, told | {"vae_cpu": True}))
    request = generate.parse_arguments(["--like", file])
    assert request.prompt == "a" and request.memory.vae_cpu
    assert "elsewhere" not in json.dumps(request.to_json())


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A state's file, and its values and tensors."""
    path = tmp_path_factory.mktemp("state") / "a.state"
    request = Request(task="t2v-tiny", prompt="a", base_seed=1, save_file="a.mp4")
    write_state(path, State(request, {"a": "b"}, latent=torch.zeros(1, 1, 2, 2), solver={"_step_index": 1}))
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}  # noqa: SIM118


def forged(state, text):
    metadata, tensors = state
    save_file(tensors, "b.state", metadata | {"state": text, "checksum": _checksum(text, tensors)})
    return "b.state"


def tell(path):
    """Both ways to read it."""
    for read in (read_state, lambda path: resumed_request(path, {}, {})):
        with one_line():
            read(path)


WHERE = ["version", "torch", "request", "weights", "conditioning", "latent", "solver", "finished"]
PARTS = st.sampled_from(
    [("request", name) for name in [*NAMES, "memory", "planned"]] + [(name,) for name in WHERE]
)


@FUZZ
@given(PARTS | st.sampled_from([("request", "memory", name) for name in MEMORY]), values)
def test_states_with_anything_in_them(state, place, value):
    made = json.loads(state[0]["state"])
    part = made
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    tell(forged(state, json.dumps(made)))


@pytest.mark.parametrize("text", [DEEP, HUGE, "5", "[]", "{}", "null", '{"version": null}', "\ud800"])
def test_states_that_are_none(state, text):
    metadata, tensors = state
    with contextlib.suppress(UnicodeEncodeError):
        path = forged(state, text)
        for read in (read_state, lambda path: resumed_request(path, {}, {})):
            with pytest.raises(InputError, match=r"b\.state"):
                read(path)


@pytest.mark.parametrize("inside", [(), ("memory",)])
@pytest.mark.parametrize("change", ["more", "less"])
def test_states_of_another_version_of_the_same_number(state, inside, change):
    made = json.loads(state[0]["state"])
    part = made["request"]
    for name in inside:
        part = part[name]
    if change == "more":
        part["sharpness"] = 5
    else:
        del part["vae_cpu" if inside else "sample_shift"]
    path = forged(state, json.dumps(made))
    for read in (read_state, lambda path: resumed_request(path, {}, {})):
        with pytest.raises(InputError, match=r"b\.state: was made by another version"):
            read(path)


# The terminal


def test_escapes_never_reach_the_terminal(capsys, caplog):
    clear = "\x1b[2J\x1b]0;owned\x07"
    Path("list.jsonl").write_text(json.dumps({clear: 1}))
    assert generate.main(["--prompts", "list.jsonl", "--task", "t2v-tiny"]) == 2
    assert generate.main(["--resume", f"{clear}.state"]) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and err.count(r"\x1b[2J") == 2


def test_the_log_is_escaped(capfd):
    code = "import logging, sys; from wan.utils.program import log_to; log_to(sys.stdout)\n"
    code += "try: 1 / 0\nexcept Exception as error: logging.exception('a\\x1b[2J\\nb %s', 'c\\r\\ud800')\n"
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", code], cwd=Path(generate.__file__).parent).returncode == 0
    out = capfd.readouterr().out
    assert r"a\x1b[2J\nb c\r\ud800" in out and "\x1b" not in out and "ZeroDivisionError" in out
