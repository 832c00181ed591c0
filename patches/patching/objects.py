"""Git, by which nothing starts: it reads objects and merges files in a repository of its own.

What a repository names in its settings (hooks, monitors, filters, pagers, remotes to fetch what is missing from), git
never sees: it gets the folder of the objects alone. What it gives is checked by its id.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading

from . import Refused
from .lines import blob_id
from .rooted import LARGEST, read_regular

SECONDS = 60  # for one call of git; it needs a fraction of one


def find_git():
    """The program in one of PATH's absolute folders, none in the current one; None if there is none."""
    name = "git.exe" if os.name == "nt" else "git"
    folders = filter(os.path.isabs, os.environ.get("PATH", "").split(os.pathsep))
    return next(filter(None, (shutil.which(os.path.join(folder, name)) for folder in folders)), None)


def git(*arguments, files=None, objects=None):
    """What git prints, at most LARGEST bytes; None if there is no git, or it fails. Refused if it hangs.

    files: {name: content} in the folder that it works in. objects: a folder of objects for it to read.
    """
    program = find_git()
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        own = os.path.join(folder, "objects")
        os.mkdir(own)
        os.mkdir(os.path.join(folder, "refs"))
        for name, content in {"HEAD": b"ref: refs/heads/none\n", **(files or {})}.items():
            with open(os.path.join(folder, name), "wb") as stream:
                stream.write(content)
        environment = {
            name: value for name, value in os.environ.items() if not name.upper().startswith("GIT_")
        }
        environment.update(GIT_DIR=folder, GIT_OBJECT_DIRECTORY=objects or own, GIT_CONFIG_NOSYSTEM="1")
        environment.update(HOME=folder, XDG_CONFIG_HOME=folder)
        with subprocess.Popen(
            [program, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            output = process.stdout.read(LARGEST + 1)
            late = not timer.is_alive()
            timer.cancel()
    if late:
        raise Refused(
            f"nothing was changed: git did not end within {SECONDS} seconds; its repository may be damaged"
        )
    return output if process.returncode == 0 and len(output) <= LARGEST else None


def merge(mine, old, new):
    """`mine` with the changes that lead from `old` to `new`, merged by git; None if they conflict."""
    return git("merge-file", "-p", "mine", "old", "new", files={"mine": mine, "old": old, "new": new})


def object_folder(tree):
    """Where the git repository that the folder TREE is in has its objects; None if it is in none.

    So is one that borrows objects of another (alternates): git would follow it anywhere.
    """
    folder = tree
    while not os.path.lexists(os.path.join(folder, ".git")):
        below, folder = folder, os.path.dirname(folder)
        if folder == below:
            return None
    place = os.path.join(folder, ".git")
    if not os.path.isdir(place):  # a worktree's or a submodule's is a file
        place = _named(folder, place, "gitdir: ")
    if place is not None and os.path.lexists(os.path.join(place, "commondir")):
        place = _named(place, os.path.join(place, "commondir"), "")
    if place is None or os.path.lexists(os.path.join(place, "objects", "info", "alternates")):
        return None
    return os.path.join(place, "objects")


def _named(folder, file, prefix):
    """The path that a file of git's names, from the folder on; None if it names none, or another machine's."""
    said = os.fsdecode(read_regular(file, file) or b"").rstrip("\r\n")
    path = said[len(prefix) :]
    if not said.startswith(prefix) or path[:2].replace("\\", "/") == "//" or "\0" in path:
        return None
    return os.path.join(folder, path)


def read_blob(tree, id_):
    """The content that has this id, line endings taken as LF, out of the repository that TREE is in; or None."""
    objects = object_folder(tree)
    content = objects and git("cat-file", "blob", id_, objects=objects)
    return content if content is not None and blob_id(content) == id_ else None
