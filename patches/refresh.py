#!/usr/bin/env python3
"""For maintainers: write a patch anew from an edited tree, in the form that apply.py reads.

    python refresh.py TREE NAME

TREE is a clone of upstream at BASE with the patches before NAME put in and committed, and the edits that are to be
NAME's not committed. The header of NAME, all lines above its first diff, stays; a new patch starts as such a header.
"""

import os
import re
import subprocess
import sys

from apply import HERE, parse_patch, read

DIFF = "diff -U0 --full-index --no-renames --no-color --no-ext-diff --src-prefix=a/ --dst-prefix=b/"


def main():
    tree, name = sys.argv[1:]
    file = os.path.join(HERE, name)
    header = re.split(rb"^diff --git ", read(file), maxsplit=1, flags=re.MULTILINE)[0]
    subprocess.run(["git", "-C", tree, "add", "--all", "--intent-to-add"], check=True)
    diff = subprocess.run(["git", "-C", tree, *DIFF.split()], check=True, capture_output=True).stdout
    # git repeats a line of the file after the second @@
    text = header + re.sub(rb"^(@@ [^@]* @@).*$", rb"\1", diff, flags=re.MULTILINE)
    parse_patch(name, text)
    with open(file, "wb") as stream:
        stream.write(text)


if __name__ == "__main__":
    main()
