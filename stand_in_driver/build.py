"""Builds the library for the PyTorch of this environment: g++, nm, and the headers that the wheels bring."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
LIBRARY = "libcuda.so.1"  # the names that PyTorch opens
MANAGEMENT = "libnvidia-ml.so.1"
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-Wall", "-Wextra"]
# What PyTorch's libraries take from CUDA's runtime, driver and cuBLAS; cuFile is another library.
THEIRS = re.compile(r"^(__cuda[A-Z]|cuda[A-Z]|cublas|cu[A-EG-Z]|cuF(?!ile))\w*$")


class UnavailableError(RuntimeError):
    """What is missing here."""


def cuda_build() -> Path:
    """PyTorch's folder, found without importing it.

    Raises UnavailableError: not Linux, no PyTorch, one without CUDA, or no compiler.
    """
    if sys.platform != "linux":
        raise UnavailableError("the stand-in driver runs on Linux only")
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise UnavailableError(f"{sys.executable} has no torch")
    folder = Path(spec.origin).parent
    if not re.search(r"^cuda\b.*=\s*'[\d.]+'", (folder / "version.py").read_text(), re.MULTILINE):
        raise UnavailableError(f"the torch in {folder} has no CUDA: install a build of it that has")
    for program in ("g++", "nm"):
        if shutil.which(program) is None:
            raise UnavailableError(f"no {program} is here: install it, the driver is built with it")
    return folder


def headers(torch: Path) -> list[Path]:
    """Folders of CUDA's headers beside PyTorch: the runtime's own first; Triton's has the few that it lacks."""
    site = torch.parent
    found = [path.parent for path in sorted(site.glob("nvidia/*/include/cuda_runtime_api.h"))]
    found += [site / "triton/backends/nvidia/include"]
    if len(found) < 2 or not (found[-1] / "crt/host_defines.h").is_file():
        raise UnavailableError(f"no headers of CUDA in {site}: torch's wheels for Linux bring them with them")
    return found


def cached() -> Path:
    """The folder of the library for this PyTorch, which is built there if it was not yet.

    Raises UnavailableError, with the compiler's words if the sources do not fit this CUDA.
    """
    torch = cuda_build()
    sources = sorted(SOURCE.iterdir())
    content = b"".join(path.read_bytes() for path in [*sources, torch / "version.py", Path(__file__)])
    name = hashlib.sha256(content + str(torch).encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "stand-in-driver" / name
    if not (folder / LIBRARY).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            library = _build(torch, sources, Path(scratch))
            folder.mkdir(exist_ok=True)
            link = Path(scratch) / MANAGEMENT
            link.symlink_to(LIBRARY)
            for file in (link, library):
                os.replace(file, folder / file.name)  # whole, whoever builds at the same time
    return folder


def _build(torch: Path, sources: list[Path], scratch: Path) -> Path:
    include = [f"-I{folder}" for folder in headers(torch)]
    objects = []
    for source in sources:
        if source.suffix == ".cpp":
            objects.append(str(scratch / f"{source.stem}.o"))
            _run("g++", *FLAGS, *include, "-c", str(source), "-o", objects[-1])
    asked = _names("-D", "--undefined-only", *map(str, sorted((torch / "lib").glob("*.so"))))
    # Those of the driver that the allocator asks for by name.
    asked |= set(
        re.findall(r"(?<=\0)cu[A-Z]\w+(?=\0)", (torch / "lib/libc10_cuda.so").read_bytes().decode("latin-1"))
    )
    lacking = sorted(name for name in asked - _names("--defined-only", *objects) if THEIRS.match(name))
    rest = scratch / "rest.cpp"
    rest.write_text(
        'extern "C" {\nint stand_in_missing(const char*);\n'
        + "".join(f'int {name}() {{ return stand_in_missing("{name}"); }}\n' for name in lacking)
        + "}\n"
    )
    library = scratch / LIBRARY
    _run("g++", *FLAGS, "-shared", f"-Wl,-soname,{LIBRARY}", *objects, str(rest), "-ldl", "-o", str(library))
    return library


def _names(*arguments: str) -> set[str]:
    """Symbols that nm lists, without their versions."""
    lines = _run("nm", *arguments).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line and not line.endswith(":")}


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise UnavailableError(f"{command[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout
