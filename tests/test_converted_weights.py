"""The offload folder: the same weights, converted once, whatever interrupts it."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from wan import tiny
from wan.modules.forward import storage_dtype
from wan.modules.model import WanModel, weights_path
from wan.utils.errors import InputError
from wan.weights import mapped
from wan.weights.converted import OffloadFolder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("toy") / "t2v", "t2v-tiny", shards=2)


def load(checkpoint, folder, dtype=torch.bfloat16):
    return WanModel.from_pretrained(checkpoint, dtype=dtype, offload_folder=OffloadFolder(folder))


def converted_files(folder):
    return sorted(folder.glob("[!.]*.safetensors"))


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_equal_those_loaded_without_it(checkpoint, tmp_path, dtype):
    assert_same_weights(
        load(checkpoint, tmp_path / "new", dtype), WanModel.from_pretrained(checkpoint, dtype)
    )


def test_weights_are_mapped_not_read(checkpoint, tmp_path):
    model = load(checkpoint, tmp_path)
    (file,) = converted_files(tmp_path)
    addresses = sorted(p.data_ptr() for p in model.parameters())
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(file))
    ]
    assert all(any(low <= address < high for low, high in ranges) for address in addresses)


def test_later_runs_convert_nothing(checkpoint, tmp_path, monkeypatch):
    first = load(checkpoint, tmp_path)
    monkeypatch.setattr(OffloadFolder, "_convert", lambda *_: pytest.fail("converted again"))
    assert_same_weights(load(checkpoint, tmp_path), first)


def test_compute_types_and_checkpoints_do_not_mix(checkpoint, tmp_path):
    load(checkpoint, tmp_path, torch.bfloat16)
    load(checkpoint, tmp_path, torch.float32)
    other = tiny.write_checkpoint(tmp_path / "other", "t2v-tiny", seed=1, shards=2)
    assert_same_weights(load(other, tmp_path), WanModel.from_pretrained(other, torch.bfloat16))
    assert len(converted_files(tmp_path)) == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(checkpoint, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(mapped.os, "fsync", fail)
    with pytest.raises(
        InputError if isinstance(error, OSError) else KeyboardInterrupt, match="disk is full|^$"
    ):
        load(checkpoint, tmp_path)
    assert not converted_files(tmp_path) and not list(tmp_path.glob(".wan-*"))
    monkeypatch.undo()
    assert_same_weights(load(checkpoint, tmp_path), WanModel.from_pretrained(checkpoint, torch.bfloat16))


def test_a_killed_conversion_is_done_again(checkpoint, tmp_path):
    code = (
        "import os, sys, torch\n"
        "from wan.modules.model import WanModel; from wan.weights.converted import OffloadFolder\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "WanModel.from_pretrained(sys.argv[1], torch.bfloat16, offload_folder=OffloadFolder(sys.argv[2]))"
    )
    assert subprocess.run([sys.executable, "-c", code, checkpoint, tmp_path]).returncode == 9
    assert list(tmp_path.glob(".wan-*")) and not converted_files(tmp_path)
    assert_same_weights(load(checkpoint, tmp_path), WanModel.from_pretrained(checkpoint, torch.bfloat16))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_contents_tell_checkpoints_apart(tmp_path):
    """Also two of one name, size and time."""
    name = "diffusion_pytorch_model.safetensors"
    checkpoint = tiny.write_checkpoint(tmp_path / "toy", "t2v-tiny")
    load(checkpoint, tmp_path / "converted")
    before = (checkpoint / name).stat()
    data = bytearray((checkpoint / name).read_bytes())
    data[-2] ^= 1
    (checkpoint / name).write_bytes(data)
    os.utime(checkpoint / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = load(checkpoint, tmp_path / "converted")
    assert len(converted_files(tmp_path / "converted")) == 2
    assert_same_weights(changed, WanModel.from_pretrained(checkpoint, torch.bfloat16))


def test_a_second_run_waits_for_the_first(checkpoint, tmp_path):
    """It finds the file that another process was converting, and converts nothing itself."""
    OffloadFolder(tmp_path)
    target = tmp_path / "waits.safetensors"
    code = (
        "import sys; from pathlib import Path; from wan.weights.converted import OffloadFolder\n"
        "folder = OffloadFolder(sys.argv[1])\n"
        "with folder._locked(Path(sys.argv[2])):\n"
        "    print('locked', flush=True); sys.stdin.readline(); Path(sys.argv[2]).write_text('done')"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path, target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout.readline() == "locked\n"
        release = threading.Timer(0.3, lambda: (other.stdin.write("\n"), other.stdin.flush()))
        release.start()
        with OffloadFolder(tmp_path)._locked(target):
            assert target.read_text() == "done"
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_named(checkpoint, tmp_path, damage):
    load(checkpoint, tmp_path)
    (file,) = converted_files(tmp_path)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes({"flip": data, "cut": data[: len(data) // 2], "empty": b""}[damage])
    with pytest.raises(InputError, match=f"{file.name} is damaged, delete it"):
        load(checkpoint, tmp_path)


def test_a_folder_that_cannot_be_made(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="offload_folder .*file: cannot be used"):
        load(checkpoint, tmp_path / "file")


def test_the_files_are_safetensors(checkpoint, tmp_path):
    from safetensors.torch import load_file

    load(checkpoint, tmp_path)
    (file,) = converted_files(tmp_path)
    stored = load_file(file)
    reference = WanModel.from_pretrained(checkpoint, torch.bfloat16).state_dict()
    assert {n: t.dtype for n, t in stored.items()} == {n: storage_dtype(n, torch.bfloat16) for n in reference}
    assert weights_path(checkpoint).suffix == ".json"
