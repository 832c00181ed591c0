#!/usr/bin/env python3
"""Put this folder's patches into a Wan2.1 tree, or take them out again.

    python apply.py TREE [--check] [--reverse] [--only NAME]

TREE is an upstream checkout, clone or unpacked download. A file that is byte for byte a known version (BASE, or
BASE with some of the patches; line endings LF or CRLF) is edited directly, with or without git. A file with other
changes is merged three-way, if the git repository of TREE has BASE's version of it. If one file can be neither
edited nor merged, or one cannot be written, no file changes.

Exit code: 0 done, or nothing to do; 2 refused, with one line that says why; 130 interrupted. After 2 and 130 the
tree is as it was.

Standard library only, Python 3.8 or newer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ABSENT = "0" * 40  # id of a file that does not exist, as in git's index lines
NEW, OLD = ".wan-patch-new", ".wan-patch-old"  # endings of temporary files, beside the file that they replace
FILE_HEADER = re.compile(
    rb"diff --git a/(?P<path>\S+) b/(?P=path)\n"
    rb"(?P<new>new file mode 100644\n)?"
    rb"index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40})(?: 100644)?\n"
    rb"(?:--- (?P<old_name>\S+)\n\+\+\+ b/(?P=path)\n)?"
)
HUNK_HEADER = re.compile(rb"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@\n")
LINE = re.compile(rb"[^\n]*\n|[^\n]+")


class Refused(Exception):
    """The tree can't be patched; the message is the line that tells the user why."""


class Tangled(Refused):
    def __init__(self, paths):
        super().__init__(
            f"nothing was changed: other changes are right where the patches insert, in {', '.join(paths)}; undo those "
            "changes or patch by hand"
        )


class Edit(NamedTuple):
    """What one patch does to one file: lines inserted at places, with git's blob ids before and after."""

    patch: str
    before: str
    after: str
    hunks: list  # (number of the line to insert after, list of lines), top to bottom

    def insert(self, lines):
        """`lines` with the edit; inserted lines take the line ending of the file's first line."""
        ending = line_ending(lines)
        result, done = [], 0
        for place, added in self.hunks:
            result += lines[done:place] + [line[:-1] + ending for line in added]
            done = place
        return result + lines[done:]

    def remove(self, lines):
        """The inverse of `insert`."""
        result, done = [], 0
        for place, added in self.hunks:
            end = done + place - len(result)
            result += lines[done:end]
            done = end + len(added)
        return result + lines[done:]


class Change(NamedTuple):
    """A file's content before and after; None where it does not exist."""

    file: str
    old: bytes | None
    new: bytes | None


def line_ending(lines):
    return b"\r\n" if lines and lines[0].endswith(b"\r\n") else b"\n"


def line_count(content):
    return content.count(b"\n")


def blob_id(content):
    """Git's id of a file with this content, line endings taken as LF; ABSENT for None."""
    if content is None:
        return ABSENT
    content = content.replace(b"\r\n", b"\n")
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def read(file):
    """The file's bytes, or None if it does not exist."""
    try:
        with open(file, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return None


def parse_patch(name, text):
    """The patch's edits as (path, Edit). Raises Refused unless it only inserts, without context, with full ids."""

    def need(condition):
        if not condition:
            raise Refused(f"{name} is damaged, it does not only insert; fetch the patches folder again")

    edits = []
    for part in re.split(rb"^(?=diff --git )", text.replace(b"\r\n", b"\n"), flags=re.MULTILINE)[1:]:
        header = FILE_HEADER.match(part)
        need(header)
        path, before = header["path"].decode(), header["before"].decode()
        need((before == ABSENT) == bool(header["new"]))
        lines = LINE.findall(part[header.end() :])
        hunks, inserted = [], 0
        while lines:
            hunk = HUNK_HEADER.fullmatch(lines.pop(0))
            need(hunk)
            place, start, count = int(hunk[1]), int(hunk[2]), int(hunk[3] or 1)
            added = [line[1:] for line in lines[:count] if line.startswith(b"+") and line.endswith(b"\n")]
            need(len(added) == count and start == place + inserted + 1)
            need(not hunks or hunks[-1][0] < place)
            hunks.append((place, added))
            inserted += count
            del lines[:count]
        old_name = b"/dev/null" if header["new"] else b"a/" + header["path"]
        need(header["old_name"] == (old_name if hunks else None))
        need(hunks or header["new"])  # only a new file can be empty
        edits.append((path, Edit(name, before, header["after"].decode(), hunks)))
    need(edits)
    return edits


def load_series(folder):
    """BASE's commit, the patch names in order, and for each path its edits in that order."""
    with open(os.path.join(folder, "BASE")) as stream:
        base = stream.read().strip()
    with open(os.path.join(folder, "series")) as stream:
        names = stream.read().split()
    chains = {}
    for name in names:
        for path, edit in parse_patch(name, read(os.path.join(folder, name)) or b""):
            chain = chains.setdefault(path, [])
            if chain and chain[-1].after != edit.before:
                raise Refused(f"{name} does not fit on {chain[-1].patch}; fetch the patches folder again")
            chain.append(edit)
    return base, names, chains


def move(content, chain, level, target):
    """`content` with `level` edits of the chain, brought to `target` edits; None where the file does not exist."""
    lines = LINE.findall(content or b"")
    for edit in chain[level:target]:
        lines = edit.insert(lines)
    for edit in reversed(chain[target:level]):
        lines = edit.remove(lines)
    return None if target == 0 and chain[0].before == ABSENT else b"".join(lines)


def git(*arguments):
    """What the git command prints; None if it fails or there is no git."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def merge(mine, old, new):
    """`mine` with the changes that lead from `old` to `new`, merged by git; None if they conflict."""
    with tempfile.TemporaryDirectory() as folder:
        names = [os.path.join(folder, name) for name in ("mine", "old", "new")]
        for name, content in zip(names, (mine, old, new)):
            with open(name, "wb") as stream:
                stream.write(content)
        return git("merge-file", "-p", *names)


class TreeFile:
    """A file of the tree that the series edits.

    `level` is the number of the chain's edits that the file already has. It is None if the file has other changes and
    they get in the way of telling, or BASE's version is not at hand to tell (then `versions` is None too).
    """

    def __init__(self, tree, path, chain):
        self.path, self.chain = path, chain
        self.file = os.path.realpath(os.path.join(tree, *path.split("/")))
        self.content = read(self.file)
        self.ids = [chain[0].before] + [edit.after for edit in chain]
        self.level = None
        self.versions = None  # contents of the known versions, for a file that has to be merged with them
        found = blob_id(self.content)
        if found in self.ids:
            self.level = self.ids.index(found)
        elif self.content is not None:
            base = git("-C", tree, "cat-file", "blob", self.ids[0])
            if base is not None:
                ending = line_ending(LINE.findall(self.content))
                base = base.replace(b"\r\n", b"\n").replace(b"\n", ending)
                self.versions = [move(base, chain, 0, level) for level in range(len(self.ids))]
                levels = range(len(self.ids))
                self.level = next(
                    (level for level in levels if self._moves(level, 0) and self._moves(level, -1)), None
                )

    def _moves(self, here, there):
        """Whether merging takes the file from one level to the other: every line comes or goes, none was there."""
        here, there = self.versions[here], self.versions[there]
        merged = merge(self.content, here, there)
        expected = line_count(self.content) + line_count(there) - line_count(here)
        return merged is not None and line_count(merged) == expected

    def levels(self, patches):
        """The levels below and with the edits that these patches make to the file; None if they make none."""
        places = [place for place, edit in enumerate(self.chain) if edit.patch in patches]
        return (places[0], places[-1] + 1) if places else None

    def at(self, target):
        """The content with `target` edits."""
        if self.versions is None:
            content = move(self.content, self.chain, self.level, target)
            if blob_id(content) != self.ids[target]:
                raise Refused(f"the patches to {self.path} are damaged; fetch the patches folder again")
            return content
        content = merge(self.content, self.versions[self.level], self.versions[target])
        if content is None:
            raise Tangled([self.path])
        return content


def look_at(tree, base, chains):
    """The files that the series edits; Refused if TREE is no upstream tree or a file can't be brought to a level."""
    if not os.path.isdir(tree):
        raise Refused(f"{tree} is not a folder; give the one that holds Wan2.1's generate.py")
    files = [TreeFile(tree, path, chain) for path, chain in chains.items()]
    missing = [file.path for file in files if file.level is None and file.content is None]
    if missing:
        raise Refused(f"{tree} is not a Wan2.1 tree: it has no {', '.join(missing)}")
    unknown = [file.path for file in files if file.level is None and file.versions is None]
    if unknown:
        raise Refused(
            f"nothing was changed: not as in Wan2.1 at {base[:12]}: {', '.join(unknown)}; to be merged with other "
            f"changes TREE must be a git clone that has that commit (git fetch origin {base})"
        )
    tangled = [file.path for file in files if file.level is None]
    if tangled:
        raise Tangled(tangled)
    return files


def check_order(files, names, only, reverse):
    """Patches stack: Refused if one below `only` is missing or, to take it out, one above it is still there."""
    place = names.index(only)
    for name in names[place + 1 :] if reverse else names[:place]:
        present = [file.level >= file.levels([name])[1] for file in files if file.levels([name])]
        if reverse and any(present):
            raise Refused(f"nothing was changed: {name} stands on {only}; take {name} out first")
        if not reverse and not all(present):
            raise Refused(f"nothing was changed: {only} stands on {name}; put {name} in first")


def check_writable(change):
    """A file or folder that its owner made read-only stays as it is, also for root."""
    folder = os.path.dirname(change.file)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    for name in (folder, change.file):
        if os.path.exists(name) and not os.stat(name).st_mode & stat.S_IWUSR:
            raise Refused(f"nothing was changed: {name} is read-only; make it writable (chmod u+w) first")


def clean(tree, files):
    """Remove temporary files, and folders that nothing is left in."""
    for file in files:
        for name in (file + NEW, file + OLD):
            if os.path.exists(name):
                os.remove(name)
        folder = os.path.dirname(file)
        while os.path.isdir(folder) and not os.listdir(folder) and folder != os.path.realpath(tree):
            os.rmdir(folder)
            folder = os.path.dirname(folder)


def put_back(changes):
    """Give the files their old content again, from the copies beside them."""
    failed = []
    for change in changes:
        try:
            if change.old is not None:
                os.replace(change.file + OLD, change.file)
            elif os.path.exists(change.file):
                os.remove(change.file)
        except OSError as error:
            failed.append(f"{change.file} ({error.strerror})")
    if failed:
        raise Refused(f"could not put back {', '.join(failed)}; the old content is beside it, in *{OLD}")


def write(tree, changes):
    """Give every file its new content; if that fails, leave all as they were and raise.

    Everything that needs room on the disk is written under temporary names first; after that there are only renames.
    """
    begun = []
    try:
        for change in changes:
            if change.old is not None:
                shutil.copy2(change.file, change.file + OLD)
            if change.new is not None:
                os.makedirs(os.path.dirname(change.file), exist_ok=True)
                with open(change.file + NEW, "wb") as stream:
                    stream.write(change.new)
                    stream.flush()
                    os.fsync(stream.fileno())
                if change.old is not None:
                    shutil.copymode(change.file, change.file + NEW)
        for change in changes:
            begun.append(change)
            if change.new is None:
                os.remove(change.file)
            else:
                os.replace(change.file + NEW, change.file)
        for change in changes:
            if read(change.file) != change.new:
                raise Refused(f"nothing was changed: {change.file} did not keep what was written to it")
        ignore_signals()
    except BaseException:
        put_back(begun)
        clean(tree, [change.file for change in changes])
        raise


def run(tree, only=None, reverse=False, check=False):
    """Apply this folder's series to a tree, or take it out. Returns what to tell; raises Refused or OSError."""
    base, names, chains = load_series(HERE)
    if only is not None and only + ".patch" in names:
        only += ".patch"
    if only is not None and only not in names:
        raise Refused(f"there is no patch {only} here; there are: {', '.join(names)}")
    files = look_at(tree, base, chains)
    if only is not None:
        check_order(files, names, only, reverse)
    selected = names if only is None else [only]

    report, changes = [], []
    for file in files:
        levels = file.levels(selected)
        if levels is None:
            continue
        target = min(file.level, levels[0]) if reverse else max(file.level, levels[1])
        if target == file.level:
            report.append(f"{file.path}: {'not there' if reverse else 'already there'}")
            continue
        changes.append(Change(file.file, file.content, file.at(target)))
        check_writable(changes[-1])
        verb = ("would be " if check else "") + ("taken out" if reverse else "put in")
        report.append(f"{file.path}: {verb}{', merged with other changes' if file.versions else ''}")
    if not check:
        write(tree, changes)
        clean(tree, [file.file for file in files])
    ending = "nothing to do" if not changes else "checked, nothing was changed" if check else "done"
    return [*report, f"{', '.join(selected)}: {ending}"]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Put the patches of this folder into a Wan2.1 tree.")
    parser.add_argument("tree", metavar="TREE", help="folder that holds Wan2.1's generate.py")
    parser.add_argument("--check", action="store_true", help="say what would be done, change nothing")
    parser.add_argument("--reverse", action="store_true", help="take the patches out")
    parser.add_argument("--only", metavar="NAME", help="one patch of the series instead of all")
    args = parser.parse_args(argv)
    try:
        print("\n".join(run(args.tree, args.only, args.reverse, args.check)))
    except (Refused, OSError) as error:
        print(
            f"apply.py: {'' if isinstance(error, Refused) else 'nothing was changed: '}{error}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("apply.py: interrupted, nothing was changed", file=sys.stderr)
        return 130
    return 0


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def interrupt(number, frame):
    """Signal handler: raises once, nothing disturbs the way back."""
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals():
    for number in SIGNALS:
        if signal.getsignal(number) is interrupt:
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish
            signal.signal(number, interrupt)
    sys.exit(main())
