"""The patches of a folder, and what earlier versions of them inserted."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from . import Refused, read
from .lines import ABSENT, LINE, compose, fingerprints

FILE_HEADER = re.compile(
    rb"diff --git a/(?P<path>\S+) b/(?P=path)\n"
    rb"(?P<new>new file mode 100644\n)?"
    rb"index (?P<before>[0-9a-f]{40})\.\.(?P<after>[0-9a-f]{40})(?: 100644)?\n"
    rb"(?:--- (?P<old_name>\S+)\n\+\+\+ b/(?P=path)\n)?"
)
HUNK_HEADER = re.compile(rb"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@\n")
REPLACED = re.compile(rb"^(\S+) ([0-9a-f]{40})$", flags=re.MULTILINE)  # in a patch's head


class Edit(NamedTuple):
    """What one patch does to one file: lines inserted at places, with git's blob ids before and after."""

    patch: str
    before: str
    after: str
    hunks: list  # (number of the line to insert after, list of lines), top to bottom


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
