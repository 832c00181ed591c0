"""Where files may be written, and what killed processes leave there."""

import os
import subprocess
import sys

import pytest

from leanwan.errors import InputError
from wan.utils.files import check_target, replacing, sweep


def test_paths_are_checked_before_the_work(tmp_path):
    check_target(tmp_path / "clip.safetensors", "save_latents")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="is a directory"):
        check_target(tmp_path, "save_latents")
    with pytest.raises(InputError, match="no folder"):
        check_target(tmp_path / "none" / "clip", "save_latents")
    with pytest.raises(InputError, match="save_latents"):
        check_target(tmp_path / ("x" * 300), "save_latents")


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink(path.with_name("file"), path)])
def test_only_regular_files_are_replaced(make, tmp_path):
    (tmp_path / "file").touch()
    make(tmp_path / "target")
    with pytest.raises(InputError, match="would be replaced"):
        check_target(tmp_path / "target", "save_file")
    assert len(list(tmp_path.iterdir())) == 2


def test_what_killed_processes_left_is_swept(tmp_path):
    code = (
        "import os, sys\n"
        "from wan.utils.files import replacing\n"
        "with replacing(sys.argv[1]) as path:\n"
        "    path.touch()\n"
        "    os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.mp4"], check=True)
    for name in (".wan-notes", ".wan-00000000-1-00000000.mp4", "wan.mp4"):
        (tmp_path / name).touch()
    assert len(list(tmp_path.iterdir())) == 4
    with replacing(tmp_path / "b.mp4") as mine:
        mine.touch()
        sweep(tmp_path)
        assert mine.exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        "b.mp4", ".wan-notes", ".wan-00000000-1-00000000.mp4", "wan.mp4"
    }  # fmt: skip
