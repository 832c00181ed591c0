"""The offload folder: the same weights, converted once, whatever interrupts it."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wan import tiny
from wan.memory import offload_folder
from wan.memory.offload_folder import OffloadFolder
from wan.modules.forward import storage_dtype
from wan.modules.model import WanModel, weights_path
from wan.utils.errors import InputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("toy") / "t2v", "t2v-tiny", shards=2)


def load(checkpoint, folder, dtype=torch.bfloat16):
    return WanModel.from_pretrained(checkpoint, dtype=dtype, offload_folder=OffloadFolder(folder))


def converted_files(folder):
    return sorted(folder.glob("*.safetensors"))


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

    monkeypatch.setattr(offload_folder.os, "fsync", fail)
    with pytest.raises(
        InputError if isinstance(error, OSError) else KeyboardInterrupt, match="disk is full|^$"
    ):
        load(checkpoint, tmp_path)
    assert not converted_files(tmp_path) and not list(tmp_path.glob("*.partial"))
    monkeypatch.undo()
    assert_same_weights(load(checkpoint, tmp_path), WanModel.from_pretrained(checkpoint, torch.bfloat16))


def test_a_killed_conversion_is_done_again(checkpoint, tmp_path):
    code = (
        "import os, sys, torch; from wan.memory import offload_folder as o; from wan.modules.model import WanModel\n"
        "o.os.fsync = lambda _: os._exit(9)\n"
        "WanModel.from_pretrained(sys.argv[1], torch.bfloat16, offload_folder=o.OffloadFolder(sys.argv[2]))"
    )
    assert subprocess.run([sys.executable, "-c", code, checkpoint, tmp_path]).returncode == 9
    assert list(tmp_path.glob("*.partial")) and not converted_files(tmp_path)
    assert_same_weights(load(checkpoint, tmp_path), WanModel.from_pretrained(checkpoint, torch.bfloat16))
    assert not list(tmp_path.glob("*.partial"))


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
    with pytest.raises(InputError, match="--offload_folder .*file: cannot be used"):
        load(checkpoint, tmp_path / "file")


def test_the_files_are_safetensors(checkpoint, tmp_path):
    from safetensors.torch import load_file

    load(checkpoint, tmp_path)
    (file,) = converted_files(tmp_path)
    stored = load_file(file)
    reference = WanModel.from_pretrained(checkpoint, torch.bfloat16).state_dict()
    assert {n: t.dtype for n, t in stored.items()} == {n: storage_dtype(n, torch.bfloat16) for n in reference}
    assert weights_path(checkpoint).suffix == ".json"
