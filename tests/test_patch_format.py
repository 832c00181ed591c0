"""Every patch in patches/ holds nothing but insertions of the project's own, and says what, why, with what effect."""

import ast
import hashlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = ROOT / "patches"
SERIES = (PATCHES / "series").read_text().split()
ABSENT = "0" * 40


def diffs(name):
    """(header, [(path, id before, id after, [(hunk header, its lines)])]) of a patch, read without apply.py."""
    header, *parts = re.split(
        r"^diff --git ", (PATCHES / name).read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    result = []
    for part in parts:
        first, rest = part.split("\n", 1)
        path = re.fullmatch(r"a/(\S+) b/\1", first)[1]
        index = re.search(r"^index (\w+)\.\.(\w+)(?: 100644)?$", rest, flags=re.MULTILINE)
        head, *hunks = re.split(r"^(?=@@)", rest, flags=re.MULTILINE)
        extra = [line for line in head.splitlines() if not re.match(r"index |--- |\+\+\+ ", line)]
        assert extra in ([], ["new file mode 100644"])
        result.append((path, index[1], index[2], [(h.split("\n")[0], h.split("\n")[1:-1]) for h in hunks]))
    return header, result


def test_series_is_the_directory_in_order():
    assert sorted(file.name for file in PATCHES.glob("*.patch")) == SERIES
    assert [name[:5] for name in SERIES] == [f"{number:04}-" for number in range(1, len(SERIES) + 1)]


def test_base_is_a_full_commit_id():
    assert re.fullmatch(r"[0-9a-f]{40}\n", (PATCHES / "BASE").read_text())


def test_patches_keep_their_line_endings_in_a_checkout():
    assert "*.patch -text" in (PATCHES / ".gitattributes").read_text().splitlines()
    assert all(b"\r" not in (PATCHES / name).read_bytes() for name in SERIES)


@pytest.mark.parametrize("name", SERIES)
def test_header_says_what_why_effect(name):
    header, _ = diffs(name)
    assert len(header.splitlines()[0]) <= 80 and header.splitlines()[1] == ""
    paragraphs = dict(part.split(": ", 1) for part in header.strip().split("\n\n")[1:])
    assert list(paragraphs) in (["What", "Why", "Effect"], ["What", "Why", "Effect", "Replaces"])
    assert all(len(text) > 80 for text in paragraphs.values())


@pytest.mark.parametrize("name", SERIES)
def test_only_insertions_without_context(name):
    _, files = diffs(name)
    assert files
    for path, before, after, hunks in files:
        assert re.fullmatch(r"[0-9a-f]{40}", before) and re.fullmatch(r"[0-9a-f]{40}", after), path
        assert hunks or before == ABSENT
        inserted = 0
        for header, lines in hunks:
            numbers = re.fullmatch(r"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@", header)
            assert numbers, f"{path}: {header}"
            assert all(line.startswith("+") for line in lines), f"{path}: {header}"
            assert len(lines) == int(numbers[3] or 1)
            assert int(numbers[2]) == int(numbers[1]) + inserted + 1
            inserted += len(lines)


@pytest.mark.parametrize("name", SERIES)
def test_inserted_lines_are_tidy(name):
    for path, before, _, hunks in diffs(name)[1]:
        for line in (line[1:] for _, lines in hunks for line in lines):
            assert line == line.rstrip() and "\t" not in line, f"{path}: {line}"
            assert before == ABSENT or len(line) <= 80, f"{path}: {line}"  # upstream's limit in its files


def test_patches_stack():
    """Each patch starts from the content that the one before it left."""
    current = {}
    for name in SERIES:
        for path, before, after, _ in diffs(name)[1]:
            assert current.get(path, before) == before, f"{name}: {path}"
            current[path] = after


def test_files_that_the_patches_create_are_the_projects_own():
    """The same file byte for byte as here: one source, no copy to drift."""
    own = {}
    for name in SERIES:
        for path, before, after, _ in diffs(name)[1]:
            if before == ABSENT or path in own:
                own[path] = after
    for path, expected in own.items():
        data = (ROOT / path).read_bytes()
        assert hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == expected, path


def test_files_that_the_patches_create_find_what_they_import():
    """Applied up to any patch, each relative import leads to a file that is there."""
    present = {"wan/modules/model.py"}  # upstream's own
    for name in SERIES:
        created = [path for path, before, _, _ in diffs(name)[1] if before == ABSENT]
        present.update(created)
        for path in created:
            for node in ast.walk(ast.parse((ROOT / path).read_text())):
                if isinstance(node, ast.ImportFrom) and node.level:
                    package = Path(path).parents[node.level - 1]
                    package = package.joinpath(*node.module.split(".")) if node.module else package
                    whole = package.with_suffix(".py").as_posix() in present
                    modules = [package] if whole else [package / alias.name for alias in node.names]
                    for module in modules:
                        assert module.with_suffix(".py").as_posix() in present, f"{path}: {module}"
