"""Several processes against one: the same file, byte for byte, and an end for all when one of them ends.

By default two processes and few cases; with WAN_RANKS=4 all tasks on two to four, every option, every fault.
"""

import ast
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks_program import request_of
from safetensors.torch import load_file, save_file

import wan
from leanwan.errors import InputError
from wan import random_models
from wan.distributed import started_as_one_of_several
from wan.run import Runner
from wan.run.over_ranks import check_sizes
from wan.run.request import Request
from wan.run.settings import read_plan
from wan.run.state import read_state
from wan.utils.video import VideoFile

TREE = Path(__file__).parents[1]
MOST = int(os.environ.get("WAN_RANKS", "2"))
wide = pytest.mark.skipif(MOST < 3, reason="WAN_RANKS=4 tries more processes and all options")

SHORT = {"frame_num": 9, "sample_steps": 2, "base_seed": 3, "size": "96*80"}
FEW = [
    {"task": "t2v-tiny", "sample_guide_scale": 1.0},  # all ranks share the tokens
    {
        "task": "vace-tiny",
        "dtype": "bfloat16",
        "dit_fsdp": True,
        "t5_fsdp": True,
        "memory": {"dit_chunk": 64, "guidance_together": True, "vae_tile": 64},
    },
]


def start(size, cases, folder, *fault, environment=lambda rank: {}, tree=lambda rank: TREE):
    """The processes of so many ranks, each with the code and in the folder `tree`; what they say is in files."""
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        env = os.environ | {name: str(value) for name, value in names.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env |= environment(rank)
        command = [sys.executable, "tests/ranks_program.py", str(folder / "cases.json"), *fault]
        with open(folder / f"rank{rank}.txt", "w") as said:
            processes.append(subprocess.Popen(command, env=env, cwd=tree(rank), stdout=said, stderr=said))
    return processes


def wait(processes, folder, seconds=900):
    """Exit codes, and what each said."""
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [(folder / f"rank{rank}.txt").read_text() for rank in range(len(processes))]


def named(cases, folder):
    folder.mkdir(exist_ok=True)
    endings = ["png" if "2i" in case["task"] else "mp4" for case in cases]
    return [
        SHORT | {"save_file": str(folder / f"{n}.{ending}")} | case
        for n, (case, ending) in enumerate(zip(cases, endings))
    ]


def by_one(cases, folder):
    """The files that one process makes."""
    runner = Runner()
    made = []
    for case in named(cases, folder):
        case = {name: value for name, value in case.items() if "fsdp" not in name}
        made.append(runner.run(request_of(case)).read_bytes())
    return made


def by_ranks(size, cases, folder):
    cases = named(cases, folder)
    codes, said = wait(start(size, cases, folder), folder)
    assert codes == [0] * size, said
    assert not any(said[1:]), "only the first rank says anything"
    return [Path(case["save_file"]).read_bytes() for case in cases]


@pytest.fixture(autouse=True)
def types_as_they_were():
    yield
    from wan.tasks import TASKS

    for task in TASKS.values():
        if task.toy:
            task.config.param_dtype = torch.float32


def test_two_ranks_make_the_file_of_one(tmp_path):
    assert by_ranks(2, FEW, tmp_path / "ranks") == by_one(FEW, tmp_path / "one")


def test_killed_rank(tmp_path):
    """The first rank says so in one line, and how to go on; one process goes on to the same file."""
    (case,) = named([{"task": "t2v-tiny", "save_every": 0, "sample_steps": 4}], tmp_path / "ranks")
    processes = start(2, [case], tmp_path, "1:3:kill")
    processes[1].wait(900)
    killed = time.monotonic()
    codes, said = wait(processes, tmp_path)
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - killed < 120, (codes, said)
    assert "a rank was lost" in said[0].splitlines()[-1] and "Traceback" not in said[0]
    (state,) = (tmp_path / "ranks").glob("[!.]*.state")
    resumed = Runner().run(request_of({"resume": str(state)})).read_bytes()
    case |= {"save_file": str(tmp_path / "whole.mp4")}
    assert resumed == Runner().run(request_of(case)).read_bytes()


def test_sizes_that_do_not_fit():
    for asked, size in [
        ({"ulysses_size": 3}, 2),
        ({"ulysses_size": 2, "ring_size": 2}, 2),
        ({"ring_size": 2}, None),
    ]:
        ranks = size and type("Ranks", (), {"size": size})
        with pytest.raises(InputError, match="ranks are asked for"):
            check_sizes(Request(task="t2v-tiny", **asked), ranks)
    check_sizes(Request(task="t2v-tiny", ulysses_size=2, ring_size=3), type("Ranks", (), {"size": 6}))
    for flag in ("dit_fsdp", "t5_fsdp"):
        with pytest.raises(InputError, match="start them with torchrun"):
            Runner().run(Request(task="t2v-tiny", **{flag: True}))


def test_one_process_knows_nothing_of_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not started_as_one_of_several()
    package = Path(wan.__file__).parent
    for path in [*package.glob("*.py"), *package.glob("[!d]*/*.py")]:
        if path.name == "over_ranks.py":
            continue
        for node in ast.parse(path.read_text("utf-8")).body:  # those in functions and for types alone may
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any("distributed." in name or name == "torch.distributed" for name in names), path


# All of it

TASKS = ["t2v-tiny", "t2i-tiny", "i2v-tiny", "flf2v-tiny", "vace-tiny"]
ALL = {"vae_tile": 64, "dit_chunk": 64, "dit_stream": 0.0, "t5_stream": True, "guidance_together": True}
WIDE = [
    {"task": task, "dtype": dtype, "memory": memory, "size": "128*96", "frame_num": 1 if "2i" in task else 9}
    for task, (dtype, memory) in itertools.product(TASKS, [("float32", {}), ("bfloat16", ALL)])
]


@pytest.fixture(scope="module")
def wide_by_one(tmp_path_factory):
    return by_one(WIDE, tmp_path_factory.mktemp("one") / "made")


@wide
@pytest.mark.parametrize("size", range(2, MOST + 1))
def test_all_tasks(size, tmp_path, wide_by_one):
    assert by_ranks(size, WIDE, tmp_path / "ranks") == wide_by_one


@wide
@pytest.mark.parametrize("size", range(2, MOST + 1))
def test_shared_weights(size, tmp_path):
    """The program holds each rank to its part; see check_share there."""
    cases = [
        {"task": task, "dtype": dtype, "dit_fsdp": True, "t5_fsdp": True, "memory": memory}
        for task, dtype, memory in [
            ("t2v-tiny", "bfloat16", {"dit_chunk": 64, "offload_folder": str(tmp_path / "kept")}),
            ("vace-tiny", "float32", {"guidance_together": True}),
            ("t2v-tiny", "float32", {"offload_model": False}),
        ]
    ]
    assert by_ranks(size, cases, tmp_path / "ranks") == by_one(cases, tmp_path / "one")


@wide
@pytest.mark.parametrize(
    ("fault", "code", "told"), [("input", 2, "rank 1: no such thing"), ("memory", 1, "none left")]
)
def test_failing_rank(fault, code, told, tmp_path):
    """What ends one rank the first one tells, in one line, and all end."""
    (case,) = named([{"task": "t2v-tiny", "save_every": 0, "sample_guide_scale": 1.0}], tmp_path / "ranks")
    codes, said = wait(start(3, [case], tmp_path, f"1:2:{fault}"), tmp_path)
    assert codes == [code, 1, 1] and told in said[0].splitlines()[-1], (codes, said)
    assert "Traceback" not in said[0] and not any(said[1:])
    assert len(list((tmp_path / "ranks").glob("[!.]*.state"))) == 1


@wide
def test_other_arguments(tmp_path):
    cases = named([{"task": "t2v-tiny"}], tmp_path / "ranks")
    processes = start(
        3, cases, tmp_path, environment=lambda rank: {"WAN_OTHER": "other"} if rank == 2 else {}
    )
    codes, said = wait(processes, tmp_path)
    assert codes == [2, 1, 1] and "rank 2 has other arguments than rank 0" in said[0], (codes, said)
    assert len(said[0].splitlines()) == 1 and not any(said[1:])


@wide
@pytest.mark.parametrize(
    "what", ["another version of this program", "another diffusion_pytorch_model.safetensors"]
)
def test_other_machines(what, tmp_path):
    """On one of them the code, or the weights, at the same place are others."""
    trees = [tmp_path / f"machine{rank}" for rank in range(2)]
    for tree in trees:
        for name in ("wan", "virtual_gpu", "tests/ranks_program.py"):
            (copy_file if name.endswith(".py") else shutil.copytree)(TREE / name, tree / name)
        shutil.copytree(random_models.checkpoint("t2v-tiny"), tree / "weights")
    if "version" in what:
        with open(trees[1] / "wan" / "sampling.py", "a") as file:
            file.write("\n")
    else:
        path = trees[1] / "weights" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        weights["head.head.bias"] += 1
        save_file(weights, path, {"format": "pt"})
    (case,) = named([{"task": "t2v-tiny", "ckpt_dir": "weights"}], tmp_path / "made")
    codes, said = wait(start(2, [case], tmp_path, tree=lambda rank: trees[rank]), tmp_path)
    assert codes == [2, 1] and f"rank 1 has {what} than rank 0" in said[0].splitlines()[-1], (codes, said)
    assert "Traceback" not in said[0] and not said[1] and not os.listdir(tmp_path / "made")


def copy_file(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


@wide
def test_full_disk_of_the_first_rank(tmp_path):
    """From the third pass on it takes nothing: all end, and the state that it took before makes the same file."""
    settings = {"task": "t2v-tiny", "sample_steps": 4, "save_every": 0}
    (case,) = named([settings], tmp_path / "ranks")
    codes, said = wait(start(2, [case], tmp_path, "0:3:disk"), tmp_path)
    assert codes == [1, 1] and not said[1], (codes, said)
    assert "Traceback" not in said[0] and "is the disk full?" in said[0].splitlines()[-1], said
    (state,) = (tmp_path / "ranks").glob("[!.]*.state")
    assert read_state(state).solver["_step_index"] == 2
    codes, said = wait(start(2, [{"resume": str(state)}], tmp_path), tmp_path)
    assert codes == [0, 0], said
    assert [Path(case["save_file"]).read_bytes()] == by_one([settings], tmp_path / "one")


@wide
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_resume_with_another_number(before, after, tmp_path):
    """Ctrl-C to all, as torchrun passes it on; the same file as without."""
    (whole,) = named([{"task": "vace-tiny", "sample_steps": 6}], tmp_path / "whole")
    expected = Runner().run(request_of(whole)).read_bytes()
    (case,) = named([{"task": "vace-tiny", "sample_steps": 6, "save_every": 0}], tmp_path / "ranks")
    processes = start(before, [case], tmp_path)
    while not list((tmp_path / "ranks").glob("[!.]*.state")):
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGINT)
    codes, said = wait(processes, tmp_path)
    assert codes[0] == 130 and "Traceback" not in said[0], (codes, said)
    (state,) = (tmp_path / "ranks").glob("[!.]*.state")
    codes, said = wait(start(after, [{"resume": str(state)}], tmp_path), tmp_path)
    assert codes == [0] * after, said
    assert Path(case["save_file"]).read_bytes() == expected


@wide
def test_vace_by_its_own_processes(tmp_path):
    from wan import WanVace, WanVaceMP
    from wan.configs import WAN_CONFIGS

    built = WAN_CONFIGS["vace-tiny"], random_models.checkpoint("vace-tiny")
    frames = torch.rand(3, 5, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    call = {
        "input_frames": [frames],
        "input_masks": None,
        "input_ref_images": None,
        "sampling_steps": 2,
        "seed": 1,
    }
    expected = WanVace(*built, device="cpu").generate("a boat", **call)
    several = WanVaceMP(*built, True, 3, 1, processes=3, device="cpu")
    try:
        assert torch.equal(several.generate("a boat", **call), expected)
        assert torch.equal(
            several.generate("a boat", **call | {"guide_scale": 1.0}).isfinite().all(), torch.tensor(True)
        )
    finally:
        several.close()


def machines(memory):
    """Each process on a machine of its own, which has a virtual GPU of so many bytes, 0 for no limit."""
    names = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return lambda rank: names | {"WAN_VIRTUAL": str(memory[rank])}


def frames_of(case):
    return np.stack(list(VideoFile(case["save_file"]).frames())).astype(int)


@wide
def test_machines_with_a_gpu_each(tmp_path):
    """What is planned is what the smaller GPU can do."""
    (case,) = named([{"task": "vace-tiny"}], tmp_path / "ranks")
    (one,) = named([{"task": "vace-tiny"}], tmp_path / "one")
    by_one([{"task": "vace-tiny"}], tmp_path / "one")
    for memory, streamed in ([0, 0], False), ([0, 2**27], True):
        codes, said = wait(start(2, [case], tmp_path, environment=machines(memory)), tmp_path)
        assert codes == [0, 0], said
        assert np.abs(frames_of(case) - frames_of(one)).mean() < (0.1 if streamed else 1e-9)
        assert read_plan(case["save_file"])["t5_stream"] == streamed
        Path(case["save_file"]).unlink()


@wide
@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_on_a_rank(rank, tmp_path):
    """All end; what goes on from the last step plans for less and makes the same picture."""
    settings = {"task": "t2v-tiny", "sample_steps": 4}
    (whole,) = named([settings], tmp_path / "whole")
    by_one([settings], tmp_path / "whole")
    (case,) = named([settings], tmp_path / "ranks")
    environment = machines([2**28] * 2)
    codes, said = wait(start(2, [case], tmp_path, f"{rank}:3:memory", environment=environment), tmp_path)
    assert codes == [1, 1] and not said[1], (codes, said)
    assert "none left" in said[0].splitlines()[-1] and "--vram_fraction 0.5" in said[0], said
    (state,) = (tmp_path / "ranks").glob("[!.]*.state")
    assert read_state(state).solver["_step_index"] == 2
    codes, said = wait(start(2, [{"resume": str(state)}], tmp_path, environment=environment), tmp_path)
    assert codes == [0, 0], said
    assert read_plan(case["save_file"])["t5_stream"]
    assert np.abs(frames_of(case) - frames_of(whole)).mean() < 0.1
