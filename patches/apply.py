#!/usr/bin/env python3
"""Put this folder's patches into a Wan2.1 tree, bring them up to date, or take them out again.

    python apply.py TREE [--check] [--reverse] [--only NAME]

TREE is the folder that holds Wan2.1's wan/: a clone, an unpacked download, or site-packages. Lines of the patches, of
this version or an earlier one (listed in `history`), are recognised and taken out first. What is left of a file is
edited directly, with or without git, if it is byte for byte as at BASE (line endings LF or CRLF); with other changes
it is merged three-way, if the git repository of TREE has BASE's version of it. If one file can be neither edited nor
merged, or one cannot be written, no file changes.

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
# Versions before BASE whose lines are BASE's, line for line, wherever a patch inserts.
ALSO_FITS = {"wan/image2video.py": ["6882c53f347bf4b48216a2355a9a42290e631a33"]}  # 2025-05-16 to 2025-12-02
FILE_HEADER = re.compile(
    rb"diff --git a/(?P<path>\S+) b/(?P=path)\n"
    rb"(?P<new>new file mode 100644\n)?"
    rb"index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40})(?: 100644)?\n"
    rb"(?:--- (?P<old_name>\S+)\n\+\+\+ b/(?P=path)\n)?"
)
HUNK_HEADER = re.compile(rb"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@\n")
LINE = re.compile(rb"[^\n]*\n|[^\n]+")
REPLACED = re.compile(rb"^(\S+) ([0-9a-f]{40})$", flags=re.MULTILINE)  # in a patch's head


class Refused(Exception):
    """The tree can't be patched; the message is the line that tells the user why."""


class Tangled(Refused):
    def __init__(self, paths):
        super().__init__(
            f"nothing was changed: other changes are right where the patches insert, in {paths}; undo those changes or "
            "patch by hand"
        )


class Edit(NamedTuple):
    """What one patch does to one file: lines inserted at places, with git's blob ids before and after."""

    patch: str
    before: str
    after: str
    hunks: list  # (number of the line to insert after, list of lines), top to bottom


class Change(NamedTuple):
    """A file's content before and after; None where it does not exist."""

    file: str
    old: bytes | None
    new: bytes | None


def insert(lines, hunks):
    """`lines` with the hunks in them."""
    result, done = [], 0
    for place, added in hunks:
        result += lines[done:place] + added
        done = place
    return result + lines[done:]


def compose(edits):
    """Edits that follow each other, as the hunks of one."""
    count = max((place for edit in edits for place, _ in edit.hunks), default=0)
    lines = list(range(1, 1 + count))  # of the first one's `before`, by their numbers
    for edit in edits:
        lines = insert(lines, edit.hunks)
    hunks, place = [], 0
    for line in lines:
        if isinstance(line, int):
            place = line
        elif hunks and hunks[-1][0] == place:
            hunks[-1][1].append(line)
        else:
            hunks.append((place, [line]))
    return hunks


def line_ending(content):
    return b"\r\n" if content.split(b"\n", 1)[0].endswith(b"\r") else b"\n"


def blob_id(content):
    """Git's id of a file with this content, line endings taken as LF; ABSENT for None."""
    if content is None:
        return ABSENT
    content = content.replace(b"\r\n", b"\n")
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def fingerprint(lines):
    """Recognises a run of lines, whatever their endings: "COUNT:DIGEST"."""
    text = b"\n".join(line.rstrip(b"\r\n") for line in lines)
    return f"{len(lines)}:{hashlib.sha1(text).hexdigest()[:12]}"


def fingerprints(hunks):
    """The fingerprints of their lines, top to bottom."""
    return tuple(fingerprint(lines) for _, lines in hunks)


def line_count(run):
    return int(run.split(":")[0])


def find(lines, run, start=0):
    """Where the run of lines with this fingerprint begins, from `start` on; None if it is not there."""
    count = line_count(run)
    starts = range(start, len(lines) - count + 1)
    return next((place for place in starts if fingerprint(lines[place : place + count]) == run), None)


def take_out(lines, runs):
    """`lines` without the runs that have these fingerprints, top to bottom; None if one is not there."""
    left, done = [], 0
    for run in runs:
        place = find(lines, run, done)
        if place is None:
            return None
        left += lines[done:place]
        done = place + line_count(run)
    return left + lines[done:]


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


class Series(NamedTuple):
    """The patches of a folder.

    base: commit of upstream.
    names: of the patches, in order.
    chains: {path: its edits in that order}.
    replaced: {name: [(path, blob id)]}, files whose work the patch does in their place, as at BASE.
    """

    base: str
    names: list
    chains: dict
    replaced: dict

    def known(self, path):
        """What is inserted into the file, as (level, fingerprints): by each patch with those below it, the levels from
        1 on, and by each alone, 0."""
        chain = self.chains.get(path, [])
        stacked = [(level, fingerprints(compose(chain[:level]))) for level in range(1, len(chain) + 1)]
        return stacked + [(0, fingerprints(edit.hunks)) for edit in chain]


def load_series(folder):
    """The folder's Series; Refused if a patch is damaged."""
    with open(os.path.join(folder, "BASE")) as stream:
        base = stream.read().strip()
    with open(os.path.join(folder, "series")) as stream:
        names = stream.read().split()
    chains, replaced = {}, {}
    for name in names:
        text = read(os.path.join(folder, name)) or b""
        head = text.replace(b"\r\n", b"\n").split(b"\ndiff --git ", 1)[0]
        replaced[name] = [(path.decode(), id_.decode()) for path, id_ in REPLACED.findall(head)]
        for path, edit in parse_patch(name, text):
            chain = chains.setdefault(path, [])
            if chain and chain[-1].after != edit.before:
                raise Refused(f"{name} does not fit on {chain[-1].patch}; fetch the patches folder again")
            chain.append(edit)
    return Series(base, names, chains, replaced)


def load_history(folder):
    """{path: what earlier versions of the patches inserted, as Series.known() has it, the levels None}."""
    history = {}
    for line in (read(os.path.join(folder, "history")) or b"").decode().splitlines():
        path, kind, *runs = line.split()
        history.setdefault(path, []).append((0 if kind == "alone" else None, tuple(runs)))
    return history


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
    """A file of the tree that the series edits, or an earlier version of it.

    own: its content without the patches' lines; None if it does not exist then.
    level: how many edits of the chain it has; None for those of an earlier version.
    problem: None, "missing", "foreign" (there, where a patch creates one), "tangled" (with pieces of what the patches
        insert), or "unknown" (other than BASE's, whose version is not at hand to merge).
    """

    def __init__(self, tree, path, series, history):
        self.path, self.chain = path, series.chains.get(path, [])
        self.file = os.path.realpath(os.path.join(tree, *path.split("/")))
        self.content = self.own = read(self.file)
        self.level, self.problem, self.base = 0, None, None
        before = self.chain[0].before if self.chain else ABSENT
        fitting = [before, *ALSO_FITS.get(path, [])]
        if blob_id(self.content) not in fitting:
            if self.content is None:
                self.problem = "missing"
                return
            self._recognise(series.known(path) + history.get(path, []))
            if before == ABSENT and self.level != 0:
                self.own = self.own or None  # nothing but the patches' lines was in it
        self.fits = not self.chain or blob_id(self.own) in fitting
        if not self.fits and self.problem is None:
            if before != ABSENT:
                self.base = git("-C", tree, "cat-file", "blob", before)
                self.problem = "unknown" if self.base is None else None
            else:
                self.problem = "foreign"

    def _recognise(self, known):
        """Sets `own` and `level` by the version whose lines are there, of several the one with the most."""
        lines = LINE.findall(self.content)
        for level, runs in sorted(known, key=lambda item: -sum(map(line_count, item[1]))):
            left = None if level == 0 else take_out(lines, runs)
            if left is not None:
                self.level, lines = level, left
                break
        self.own = b"".join(lines)
        # of several lines, since one alone may be upstream's as well
        rest = {run for _, runs in known for run in runs if line_count(run) > 1}
        if any(find(lines, run) is not None for run in rest):
            self.problem = "tangled"

    def levels(self, patches):
        """The levels below and with the edits that these patches make to the file; None if they make none."""
        places = [place for place, edit in enumerate(self.chain) if edit.patch in patches]
        return (places[0], places[-1] + 1) if places else None

    def at(self, target):
        """The content with `target` edits."""
        if target == self.level:
            return self.content
        edits = self.chain[:target]
        if not edits:
            return self.own
        ending = line_ending(self.own or b"")
        hunks = [(place, [line[:-1] + ending for line in lines]) for place, lines in compose(edits)]
        if self.fits:
            content = b"".join(insert(LINE.findall(self.own or b""), hunks))
            if blob_id(self.own) == edits[0].before and blob_id(content) != edits[-1].after:
                raise Refused(f"the patches to {self.path} are damaged; fetch the patches folder again")
            return content
        base = self.base.replace(b"\r\n", b"\n").replace(b"\n", ending)
        content = merge(self.own, base, b"".join(insert(LINE.findall(base), hunks)))
        if (
            content is None
            or b"".join(take_out(LINE.findall(content), fingerprints(hunks)) or []) != self.own
        ):
            raise Tangled(self.path)
        return content


def look_at(tree, series, merging):
    """The files of TREE to edit, and lines about those left out; Refused if one is not as needed.

    merging: whether files with other changes need BASE's version; to take all lines out they don't.
    """
    if not os.path.isdir(tree):
        raise Refused(f"{tree} is not a folder; give the one that holds Wan2.1's wan")
    history = load_history(HERE)
    files = [TreeFile(tree, path, series, history) for path in {**series.chains, **history}]
    if not any(file.content and file.level != 0 for file in files):
        for file in files:
            if file.level != 0:  # an empty file alone is no sign of the patches
                file.problem = "foreign"

    def paths(problem):
        return ", ".join(file.path for file in files if file.problem == problem)

    report = []
    for file in list(files):  # an installed package has no program, and documents may be of any day
        document = file.path.endswith(".md") and file.problem == "unknown" and merging
        if "/" not in file.path and (file.problem == "missing" or document):
            files.remove(file)
            report.append(f"{file.path}: {'not as at BASE' if document else 'not there'}, left out")
    if paths("missing"):
        raise Refused(
            f"{tree} is not a Wan2.1 tree: it has no {paths('missing')}; give the folder that holds Wan2.1's wan"
        )
    if paths("foreign"):
        raise Refused(
            f"nothing was changed: the patches create {paths('foreign')}, but what is there is not from these patches "
            "or was edited; move it away first"
        )
    if paths("tangled"):
        raise Tangled(paths("tangled"))
    if paths("unknown") and merging:
        raise Refused(
            f"nothing was changed: not as in Wan2.1 at {series.base[:12]}: {paths('unknown')}; to be merged with other "
            f"changes TREE must be a git clone that has that commit (git fetch origin {series.base})"
        )
    return files, report


def check_order(files, names, only, reverse):
    """Patches stack: Refused if one below `only` is missing or, to take it out, one above it is still there."""
    if any(file.level is None for file in files):
        raise Refused(
            "nothing was changed: the tree has an earlier version of the patches; run without --only first"
        )
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
    series = load_series(HERE)
    names = series.names
    if only is not None and only + ".patch" in names:
        only += ".patch"
    if only is not None and only not in names:
        raise Refused(f"there is no patch {only} here; there are: {', '.join(names)}")
    files, report = look_at(tree, series, merging=not reverse or only is not None)
    if only is not None:
        check_order(files, names, only, reverse)
    selected = names if only is None else [only]

    changes = []
    for file in files:
        if only is None:
            target = 0 if reverse else len(file.chain)
        elif file.levels([only]) is None:
            continue
        else:
            below, above = file.levels([only])
            target = min(file.level, below) if reverse else max(file.level, above)
        content = file.at(target)
        if content == file.content:
            if file.chain:
                report.append(f"{file.path}: {'not there' if reverse else 'already there'}")
            continue
        changes.append(Change(file.file, file.content, content))
        check_writable(changes[-1])
        verb = "brought up to date" if file.level is None else "put in"
        verb = ("would be " if check else "") + ("taken out" if reverse or content is None else verb)
        report.append(f"{file.path}: {verb}{'' if file.fits else ', merged with other changes'}")
    if not reverse:
        for name in selected:
            for path, expected in series.replaced[name]:
                if blob_id(read(os.path.join(tree, *path.split("/")))) != expected:
                    report.append(f"warning: {path} is not as at BASE; {name} computes as if it were")
    if not check:
        write(tree, changes)
        clean(tree, [file.file for file in files])
    ending = "nothing to do" if not changes else "checked, nothing was changed" if check else "done"
    return [*report, f"{', '.join(selected)}: {ending}"]


def main(argv=None):
    parser = argparse.ArgumentParser(description="Put the patches of this folder into a Wan2.1 tree.")
    parser.add_argument("tree", metavar="TREE", help="folder that holds Wan2.1's wan")
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
