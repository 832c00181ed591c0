"""Runs of inserted lines: putting them in, recognising them, taking them out."""

from __future__ import annotations

import hashlib
import re

ABSENT = "0" * 40  # id of a file that does not exist, as in git's index lines
LINE = re.compile(rb"[^\n]*\n|[^\n]+")


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
    return _fingerprint([line.rstrip(b"\r\n") for line in lines])


def _fingerprint(bare):
    digest = hashlib.sha1(b"\n".join(bare)).hexdigest()
    return f"{len(bare)}:{digest[:12]}"


def fingerprints(hunks):
    """The fingerprints of their lines, top to bottom."""
    return tuple(fingerprint(lines) for _, lines in hunks)


def line_count(run):
    return int(run.split(":")[0])


def find(lines, runs):
    """Where the runs of lines with these fingerprints begin: {run: [place]}, top to bottom, without those not there."""
    bare = [line.rstrip(b"\r\n") for line in lines]
    wanted = {}
    for run in runs:
        wanted.setdefault(line_count(run), set()).add(run)
    found = {}
    for count, these in wanted.items():
        for place in range(len(bare) - count + 1):
            run = _fingerprint(bare[place : place + count])
            if run in these:
                found.setdefault(run, []).append(place)
    return found


def take_out(lines, runs, found=None):
    """`lines` without the runs that have these fingerprints, top to bottom; None if one is not there.

    found: what find gives for these or more, if it is known.
    """
    found = find(lines, runs) if found is None else found
    left, done = [], 0
    for run in runs:
        place = next((place for place in found.get(run, []) if place >= done), None)
        if place is None:
            return None
        left += lines[done:place]
        done = place + line_count(run)
    return left + lines[done:]
