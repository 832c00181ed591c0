"""The offload folder: the same weights, converted once, whatever interrupts it."""

import errno
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from test_resume import OFTEN, SETTINGS, command, in_a_child

from leanwan.dit.forward import storage_dtype
from leanwan.errors import InputError
from wan import random_models
from wan.modules.model import WanModel, weights_path
from wan.utils.events import Step, listening
from wan.utils.progress import ProgressBars
from wan.weights import converted, mapped
from wan.weights.converted import OffloadFolder
from wan.weights.fingerprints import FileSizes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return random_models.write_checkpoint(tmp_path_factory.mktemp("toy") / "t2v", "t2v-tiny", shards=2)


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
    other = random_models.write_checkpoint(tmp_path / "other", "t2v-tiny", seed=1, shards=2)
    assert_same_weights(load(other, tmp_path), WanModel.from_pretrained(other, torch.bfloat16))
    assert len(converted_files(tmp_path)) == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_conversion_leaves_nothing(checkpoint, tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, "fsync", fail)
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
    checkpoint = random_models.write_checkpoint(tmp_path / "toy", "t2v-tiny")
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


def flipped(file, bits):
    """Writes a file with one of its bits the other way round, for each of these bits."""
    data = bytearray(file.read_bytes())
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        yield bit
        data[bit // 8] ^= 1 << bit % 8


@pytest.fixture
def small(tmp_path):
    """A converted file."""
    file = tmp_path / "small.safetensors"
    types = {"a.weight": torch.bfloat16, "b": torch.float16, "c.bias": torch.float32}
    tensors = {name: torch.randn(3, 5, dtype=types[name]) for name in types}
    read = [(name, lambda name=name: tensors[name]) for name in tensors]
    mapped.write_mapped(file, read, types.__getitem__, "0123456789abcdef" * 4, "Converting")
    opened = mapped.MappedFile(file, "0123456789abcdef" * 4)
    assert all(torch.equal(opened.read(name), tensors[name]) for name in tensors)
    return file


@pytest.mark.parametrize("eighth", range(8))
def test_every_bit_of_a_file_counts(eighth, small):
    for bit in flipped(small, range(eighth, 8 * small.stat().st_size, 8)):
        with pytest.raises(InputError, match="is damaged, delete it"):
            mapped.MappedFile(small, "0123456789abcdef" * 4)
            pytest.fail(f"bit {bit} does not count")


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b"[]", b"{}", b'{"__metadata__": 5}', b'{"__metadata__": {}, "a": 5}', b"\xff"]
)
def test_a_header_that_is_none(header, tmp_path):
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    for checked in (False, True):
        with pytest.raises(InputError, match="is damaged, delete it"):
            mapped.MappedFile(file, "", checked)


def test_files_of_another_format_are_made_anew(checkpoint, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(converted, "FORMAT", "1")
        load(checkpoint, tmp_path)
    (before,) = converted_files(tmp_path)
    caplog.set_level("INFO")
    assert_same_weights(load(checkpoint, tmp_path), WanModel.from_pretrained(checkpoint, torch.bfloat16))
    (now,) = converted_files(tmp_path)
    assert now != before and f"Removing {before}" in caplog.text


def test_a_folder_that_cannot_be_made(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="offload_folder .*file: cannot be used"):
        load(checkpoint, tmp_path / "file")


def test_a_file_is_checked_once(checkpoint, tmp_path, monkeypatch):
    checked, checksum = [], mapped.MappedFile._checksum
    monkeypatch.setattr(
        mapped.MappedFile, "_checksum", lambda self: checked.append(self.path) or checksum(self)
    )
    for _ in range(3):
        load(checkpoint, tmp_path)
    (file,) = converted_files(tmp_path)
    assert checked == [file]
    os.utime(file, (1, 1))  # another version of it, for all that is known
    load(checkpoint, tmp_path)
    file.with_suffix(".json").write_text("[")
    load(checkpoint, tmp_path)
    assert checked == [file] * 3


def test_what_no_run_can_use_is_removed(tmp_path):
    folder, checkpoint = tmp_path / "folder", tmp_path / "toy"
    name = "diffusion_pytorch_model.safetensors"
    for seed in range(2):  # the second in the place of the first
        shutil.rmtree(checkpoint, ignore_errors=True)
        load(random_models.write_checkpoint(checkpoint, "t2v-tiny", seed=seed), folder)
    (file,) = converted_files(folder)
    other = random_models.write_checkpoint(tmp_path / "other", "t2v-tiny", seed=2)
    load(other, folder)
    assert len(converted_files(folder)) == 2
    (tmp_path / "away").mkdir()
    (checkpoint / name).rename(tmp_path / "away" / name)
    stray = folder / f"diffusion_pytorch_model-{'0' * 16}.lock"
    stray.touch()
    for precious in ("notes.safetensors", "other.lock", "a.json"):
        (folder / precious).touch()
    load(other, folder)
    (used,) = (path for path in converted_files(folder) if path.name != "notes.safetensors")
    assert used != file
    assert {path.name for path in folder.iterdir()} == {
        *("notes.safetensors", "other.lock", "a.json", used.name, used.with_suffix(".json").name)
    }
    long_ago = time.time() - 40 * 24 * 3600
    for path in (used, used.with_suffix(".json")):
        os.utime(path, (long_ago, long_ago))
    load(random_models.write_checkpoint(tmp_path / "third", "t2v-tiny", seed=3), folder)
    assert not used.exists()


def test_a_lock_that_is_held_stays(checkpoint, tmp_path):
    lock = tmp_path / f"diffusion_pytorch_model-{'0' * 16}.lock"
    with FileLock(lock):
        load(checkpoint, tmp_path)
        assert lock.exists()


def test_room_is_looked_for_before_converting(checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(mapped.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(mapped, "_header", lambda *_: pytest.fail("written"))
    with pytest.raises(InputError, match=r"disk is full \(0.0 GiB are needed, 0.0 are free\)"):
        load(checkpoint, tmp_path / "folder")
    assert not list((tmp_path / "folder").glob(".wan-*"))


def test_converting_and_checking_tell_how_far_they_are(checkpoint, tmp_path):
    events = []
    with listening(events.append):
        load(checkpoint, tmp_path)
    (file,) = converted_files(tmp_path)
    done = {}
    for event in events:
        assert event.done == done.get(event.stage, 0) + 1 <= event.total
        done[event.stage] = event.done
    tensors = len(WanModel.from_config(checkpoint).state_dict())
    index = "diffusion_pytorch_model.safetensors.index.json"
    assert done == {
        f"Converting {index}": tensors,
        f"Checking {file.name}": 1,
        f"Loading {file.name}": tensors,
    }


@pytest.mark.parametrize("when", ["seen", "unseen"])
def test_a_mapped_file_that_is_cut_short_is_told(when, tmp_path, monkeypatch, capfd):
    """Before the next pass; and where that comes too late, the signal that ends the process says where it was."""
    monkeypatch.chdir(tmp_path)
    tell = ProgressBars.__call__

    def cut(bars, event):
        tell(bars, event)
        if event == Step("denoise", 2, 4):
            os.truncate(*converted_files(Path("folder")), 4096)

    def disturb():
        ProgressBars.__call__ = cut
        faulthandler.disable()  # as it is outside of tests
        if when == "unseen":
            FileSizes.check = lambda self: None

    line = ["--task", "t2v-tiny", *SETTINGS, "--save_file"]
    code = in_a_child([*line, "a.mp4", *OFTEN, "--offload_folder", "folder"], disturb)
    (state,), errors = tmp_path.glob("a.mp4.*.state"), capfd.readouterr().err
    if when == "unseen":
        assert code == -signal.SIGBUS and "Fatal Python error: Bus error" in errors
        return
    assert code == 2 and "was cut short while it was in use" in errors.splitlines()[-1]
    converted_files(Path("folder"))[0].unlink()
    assert command("--resume", state) == 0 and command(*line, "b.mp4") == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_the_files_are_safetensors(checkpoint, tmp_path):
    from safetensors.torch import load_file

    load(checkpoint, tmp_path)
    (file,) = converted_files(tmp_path)
    stored = load_file(file)
    reference = WanModel.from_pretrained(checkpoint, torch.bfloat16).state_dict()
    assert {n: t.dtype for n, t in stored.items()} == {n: storage_dtype(n, torch.bfloat16) for n in reference}
    assert weights_path(checkpoint).suffix == ".json"
