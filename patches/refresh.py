#!/usr/bin/env python3
"""For maintainers: write patches anew, in the form that apply.py reads.

    python refresh.py              all patches, with the files that they create as these are in this project now
    python refresh.py TREE NAME    one patch, from an edited tree

TREE is a clone of upstream at BASE with the patches before NAME put in and committed, and the edits that are to be
NAME's not committed. The header of NAME, all lines above its first diff, stays; a new patch starts as such a header.
A file of this project that NAME is to create is new in TREE too; its content there does not matter if a refresh
without arguments follows.

The first also brings `history` up to date, by which apply.py recognises what earlier versions of the patches inserted:
all versions that this project's git has, and those that `history` has already.
"""

import os
import re
import subprocess
import sys
import tempfile

from patching import Refused, read
from patching.lines import ABSENT, blob_id
from patching.series import load_history, load_series, parse_patch

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
DIFF = "diff -U0 --full-index --no-renames --no-color --no-ext-diff --src-prefix=a/ --dst-prefix=b/"


def git(*arguments):
    """What the git command prints; None if it fails or there is no git."""
    try:
        return subprocess.run(["git", *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def creation(path):
    """The diff that creates the project's file `path`, as git writes it."""
    content = read(os.path.join(ROOT, path))
    text = f"diff --git a/{path} b/{path}\nnew file mode 100644\nindex {ABSENT}..{blob_id(content)}\n"
    lines = content.splitlines(keepends=True)
    if lines:
        count = f",{len(lines)}" if len(lines) > 1 else ""
        text += f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1{count} @@\n"
    return text.encode() + b"".join(b"+" + line for line in lines)


def with_own_files(text):
    """The patch, every file that it creates as it is in the project."""
    parts = re.split(rb"^(?=diff --git )", text, flags=re.MULTILINE)
    for place, part in enumerate(parts):
        new = re.match(rb"diff --git a/(\S+) b/\1\nnew file mode ", part)
        if new:
            parts[place] = creation(new[1].decode())
    return b"".join(parts)


def from_tree(tree, text):
    """The patch with the header of `text` and the edits of the tree."""
    header = re.split(rb"^diff --git ", text, maxsplit=1, flags=re.MULTILINE)[0]
    subprocess.run(["git", "-C", tree, "add", "--all", "--intent-to-add"], check=True)
    diff = subprocess.run(["git", "-C", tree, *DIFF.split()], check=True, capture_output=True).stdout
    # git repeats a line of the file after the second @@
    return header + re.sub(rb"^(@@ [^@]* @@).*$", rb"\1", diff, flags=re.MULTILINE)


def refresh(name, change):
    file = os.path.join(HERE, name)
    text = change(read(file))
    parse_patch(name, text)
    with open(file, "wb") as stream:
        stream.write(text)


def earlier_series():
    """The Series of each commit that changed the patches, as far as this project's git has them."""
    commits = (git("-C", HERE, "log", "--format=%H", "--", "*.patch", "series") or b"").decode().split()
    for commit in commits:
        with tempfile.TemporaryDirectory() as folder:
            listed = git("-C", HERE, "show", f"{commit}:./series") or b""
            for name in ["BASE", "series", *listed.decode().split()]:
                with open(os.path.join(folder, name), "wb") as stream:
                    stream.write(git("-C", HERE, "show", f"{commit}:./{name}") or b"")
            try:
                yield load_series(folder)
            except Refused as error:
                print(f"{commit}: {error}", file=sys.stderr)


def rows(known):
    """Lines of `history`: PATH, stacked or alone, and the fingerprints of the inserted runs, top to bottom."""
    return {
        " ".join([path, "alone" if level == 0 else "stacked", *runs])
        for path, items in known.items()
        for level, runs in items
    }


def refresh_history():
    current, *earlier = (
        rows({path: series.known(path) for path in series.chains})
        for series in [load_series(HERE), *earlier_series()]
    )
    lines = rows(load_history(HERE)).union(*earlier) - current
    with open(os.path.join(HERE, "history"), "w", newline="\n") as stream:
        stream.writelines(line + "\n" for line in sorted(lines))


def main():
    if sys.argv[1:]:
        tree, name = sys.argv[1:]
        refresh(name, lambda text: from_tree(tree, text))
    else:
        for name in load_series(HERE).names:
            refresh(name, with_own_files)
        refresh_history()


if __name__ == "__main__":
    main()
