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
import os
import sys

from patching import Refused
from patching.lines import blob_id
from patching.rooted import Rooted
from patching.series import load_history, load_series
from patching.tree import check_order, look_at
from patching.writing import Change, catch_signals, check_temporary, check_writable, clean, write

HERE = os.path.dirname(os.path.abspath(__file__))


def run(folder, only=None, reverse=False, check=False):
    """Apply this folder's series to a tree, or take it out. Returns what to tell; raises Refused or OSError."""
    series = load_series(HERE)
    names = series.names
    if only is not None and only + ".patch" in names:
        only += ".patch"
    if only is not None and only not in names:
        raise Refused(f"there is no patch {only} here; there are: {', '.join(names)}")
    selected = names if only is None else [only]
    with Rooted(folder) as tree:
        files, report = look_at(tree, series, load_history(HERE), merging=not reverse or only is not None)
        if only is not None:
            check_order(files, names, only, reverse)
        changes = plan(tree, files, report, only, reverse, check)
        if not reverse:
            for name in selected:
                for path, expected in series.replaced[name]:
                    if blob_id(tree.read(path)) != expected:
                        report.append(f"warning: {path} is not as at BASE; {name} computes as if it were")
        if not check:
            write(tree, changes)
            clean(tree, [file.path for file in files])
    ending = "nothing to do" if not changes else "checked, nothing was changed" if check else "done"
    return [*report, f"{', '.join(selected)}: {ending}"]


def plan(tree, files, report, only, reverse, check):
    """The Changes to make to the files, each of which could be made; adds to the report what becomes of which."""
    changes = []
    for file in files:
        check_temporary(tree, file.path)
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
        changes.append(Change(file.path, file.content, content))
        check_writable(tree, file.path)
        verb = "brought up to date" if file.level is None else "put in"
        verb = ("would be " if check else "") + ("taken out" if reverse or content is None else verb)
        report.append(f"{file.path}: {verb}{'' if file.fits else ', merged with other changes'}")
    return changes


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
        said = f"{'' if isinstance(error, Refused) else 'nothing was changed: '}{error}"
        shown = (letter if letter.isprintable() else repr(letter)[1:-1] for letter in said)
        print(f"apply.py: {''.join(shown)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("apply.py: interrupted, nothing was changed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    catch_signals()
    sys.exit(main())
