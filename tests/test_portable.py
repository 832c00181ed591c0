"""Nothing that the product imports is POSIX's alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from wan import random_models
from wan.modules.model import WanModel
from wan.run import Request
from wan.run.state import State, read_state, write_state
from wan.weights.converted import OffloadFolder

ROOT = Path(__file__).parent.parent
POSIX = ["fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix_ipc", "spwd", "crypt"]
PATCHES = ROOT / "patches"
SOURCES = [*sorted((ROOT / "leanwan").rglob("*.py")), *sorted((ROOT / "wan").rglob("*.py"))]
SOURCES += [ROOT / "generate.py", PATCHES / "apply.py"]
SOURCES += sorted((PATCHES / "patching").glob("*.py"))
MODULES = [
    str(source.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for source in SOURCES
]

# The libraries may know POSIX: they are loaded first, and have Windows' ways themselves.
IMPORT_ALL = """
import importlib, sys
for name in {libraries}:
    importlib.import_module(name)
for name in {blocked}:
    sys.modules[name] = None
sys.path[:0] = [{root!r}, {patches!r}]
for name in {modules}:
    importlib.import_module(name)
"""
LIBRARIES = [
    "torch", "numpy", "tempfile", "subprocess", "diffusers", "transformers", "safetensors.torch", "tokenizers",
    "einops", "easydict", "ftfy", "regex", "PIL.Image", "imageio", "imageio_ffmpeg", "av", "tqdm", "psutil", "filelock",
]  # fmt: skip
NEED_AN_EXTRA = ["wan.web.api", "wan.web.form", "wan.web.gate", "wan.web.page"]


def test_everything_imports_without_posix():
    modules = [name.removeprefix("patches.") for name in MODULES if name not in NEED_AN_EXTRA]
    code = IMPORT_ALL.format(
        libraries=LIBRARIES, blocked=POSIX, modules=modules, root=str(ROOT), patches=str(PATCHES)
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("source", SOURCES, ids=MODULES)
def test_no_module_or_signal_of_posix_is_named(source):
    """Also where it is imported late, inside functions; but it may be tried, where its absence is provided for."""
    tree = ast.parse(source.read_text())
    tried = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.Try)
        and any(getattr(handler.type, "id", "") == "ImportError" for handler in block.handlers)
        for node in block.body
    }
    for node in ast.walk(tree):
        if id(node) in tried:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module.split(".")[0]]
        assert not set(names) & set(POSIX), f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named = f"{node.value.id}.{node.attr}"
            assert named not in POSIX_NAMES, f"line {node.lineno}: {named}"


def test_files_are_closed_and_places_empty_when_renamed(tmp_path, monkeypatch):
    """As Windows wants it: nothing is renamed that is open, nor over what is there as a directory or open."""
    replace, open_files = os.replace, lambda: {file.path for file in psutil.Process().open_files()}

    def windows_replace(source, target):
        assert not os.path.isdir(target) and not {str(source), str(target)} & open_files()
        renamed.append(Path(target))
        replace(source, target)

    renamed = []
    monkeypatch.setattr(os, "replace", windows_replace)
    (tmp_path / "toy").mkdir()
    checkpoint = random_models.write_checkpoint(tmp_path / "toy", "t2v-tiny")
    folder = OffloadFolder(tmp_path / "converted")
    for _ in range(2):
        WanModel.from_pretrained(checkpoint, offload_folder=folder)
    path, state = tmp_path / "a.state", State(Request(task="t2v-tiny"), latent=torch.zeros(16, 1, 2, 2))
    for _ in range(2):
        write_state(path, state)
        read_state(path)
    (converted,) = folder.path.glob("*.safetensors")
    record = converted.with_suffix(".json")
    assert renamed == [tmp_path / "toy", converted, record, record, path, path]


POSIX_NAMES = {
    "signal.SIGHUP", "signal.SIGKILL", "signal.SIGALRM", "signal.SIGUSR1", "signal.SIGUSR2", "signal.SIGPIPE",
    "signal.alarm", "signal.pause", "os.fork", "os.getuid", "os.geteuid", "os.killpg", "os.setsid", "os.mkfifo",
    "os.chown", "os.statvfs", "os.sysconf", "os.rename",
}  # fmt: skip
