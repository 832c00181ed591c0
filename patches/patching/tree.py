"""The files of a tree: which lines of the patches they have, and what they would be with others."""

from __future__ import annotations

from . import Refused
from .lines import (
    ABSENT,
    LINE,
    blob_id,
    compose,
    find,
    fingerprints,
    insert,
    line_count,
    line_ending,
    take_out,
)
from .objects import merge, read_blob

# Versions before BASE whose lines are BASE's, line for line, wherever a patch inserts.
ALSO_FITS = {"wan/image2video.py": ["6882c53f347bf4b48216a2355a9a42290e631a33"]}  # 2025-05-16 to 2025-12-02


class Tangled(Refused):
    def __init__(self, paths):
        super().__init__(
            f"nothing was changed: other changes are right where the patches insert, in {paths}; undo those changes or "
            "patch by hand"
        )


class TreeFile:
    """A file of the tree that the series edits, or an earlier version of it.

    own: its content without the patches' lines; None if it does not exist then.
    level: how many edits of the chain it has; None for those of an earlier version.
    problem: None, "missing", "foreign" (there, where a patch creates one), "tangled" (with pieces of what the patches
        insert), or "unknown" (other than BASE's, whose version is not at hand to merge).
    """

    def __init__(self, tree, path, series, history):
        self.path, self.chain = path, series.chains.get(path, [])
        self.content = self.own = tree.read(path)
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
                self.base = read_blob(tree.path, before)
                self.problem = "unknown" if self.base is None else None
            else:
                self.problem = "foreign"

    def _recognise(self, known):
        """Sets `own` and `level` by the version whose lines are there, of several the one with the most."""
        lines = LINE.findall(self.content)
        found = find(lines, {run for _, runs in known for run in runs})
        for level, runs in sorted(known, key=lambda item: -sum(map(line_count, item[1]))):
            left = None if level == 0 else take_out(lines, runs, found)
            if left is not None:
                self.level, lines = level, left
                break
        self.own = b"".join(lines)
        # of several lines, since one alone may be upstream's as well
        rest = {run for _, runs in known for run in runs if line_count(run) > 1}
        if find(lines, rest):
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


def look_at(tree, series, history, merging):
    """The files of the Rooted tree to edit, and lines about those left out; Refused if one is not as needed.

    history: what load_history gives.
    merging: whether files with other changes need BASE's version; to take all lines out they don't.
    """
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
            f"{tree.path} is not a Wan2.1 tree: it has no {paths('missing')}; give the folder that holds Wan2.1's wan"
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
