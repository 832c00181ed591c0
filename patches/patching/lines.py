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
