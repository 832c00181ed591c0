"""patches/apply.py on small trees of the test's own, with a series of three small patches.

The series has what a series can have: a file edited by two patches, insertions at the top and the end, a document, new
files in a new folder (one of them empty), a patch that edits a file which another one made, and one that computes in
place of a file that it does not edit. There is a later version of the series, too, with other lines and other files.
"""

import ast
import contextlib
import errno
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parent.parent / "patches"
NAMES = ["0001-one.patch", "0002-two.patch", "0003-three.patch"]

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git to make the trees")


def numbered(word, count=20):
    return [f"{word} line {n}" for n in range(1, count + 1)]


def text(lines):
    return ("\n".join(lines) + "\n").encode()


def with_lines(lines, *insertions):
    """`lines` with (after, line, line ...) inserted, counted in the original."""
    result = list(lines)
    for after, *added in sorted(insertions, reverse=True):
        result[after:after] = added
    return result


GENERATE, PIPELINE, VAE, GUIDE = (numbered(word) for word in ("generate", "pipeline", "vä", "guide"))
BASE_TREE = {
    "generate.py": text(GENERATE),
    "wan/pipeline.py": text(PIPELINE),
    "wan/vae.py": text(VAE),
    "wan/model.py": b"model\n",
    "GUIDE.md": text(GUIDE),
    "README.md": b"read me\r\nmixed ends\n",
}
GENERATE_1 = with_lines(GENERATE, (5, "    one = 1", ""), (15, "# ünï"))
GENERATE_2 = with_lines(
    GENERATE_1, (7, "    two = 2", "    also = 2")
)  # right below the first patch's insertion
ONE = {
    **BASE_TREE,
    "generate.py": text(GENERATE_1),
    "wan/pipeline.py": text(with_lines(PIPELINE, (0, "top"))),
    "GUIDE.md": text(with_lines(GUIDE, (20, "more"))),
}
TWO = {
    **ONE,
    "generate.py": text(GENERATE_2),
    "wan/memory/__init__.py": b"",
    "wan/memory/tiles.py": b"one\n",
}
THREE = {
    **TWO,
    "wan/memory/tiles.py": b"one\ntwo\n",
    "wan/vae.py": text(with_lines(VAE, (20, "end"))),
}
EXPECTED = [BASE_TREE, ONE, TWO, THREE]
PATCHED = EXPECTED[-1]

# The later version: a line less here, one more there, one file renamed, one no longer edited.
LATER_ONE = {
    **BASE_TREE,
    "generate.py": text(with_lines(GENERATE, (5, "    one = 1"), (15, "# ünï"))),
    "wan/pipeline.py": text(with_lines(PIPELINE, (0, "top"), (3, "    more"))),
}
LATER_TWO = {**LATER_ONE, "wan/memory/__init__.py": b"filled\n", "wan/memory/crops.py": b"one\n"}
LATER_THREE = {
    **LATER_TWO,
    "generate.py": text(with_lines(GENERATE, (2, "zero"), (5, "    one = 1", "    two = 3"), (15, "# ünï"))),
    "wan/vae.py": text(with_lines(VAE, (20, "end"))),
}
LATER = [BASE_TREE, LATER_ONE, LATER_TWO, LATER_THREE]


def put(tree, content):
    for path, data in content.items():
        file = tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


def files(tree):
    """{path: content} of all files outside .git."""
    return {
        file.relative_to(tree).as_posix(): file.read_bytes()
        for file in sorted(tree.rglob("*"))
        if file.is_file() and ".git" not in file.parts
    }


def state(tree):
    """All that must not change when nothing is done: contents, kinds, modes and times of files, folders."""
    return {
        path.relative_to(tree).as_posix(): (
            path.read_bytes() if path.is_file() else None,
            path.lstat().st_mode,
            path.lstat().st_mtime_ns if path.is_file() else None,
        )
        for path in sorted(tree.rglob("*"))
        if ".git" not in path.parts
    }


def python(*arguments):
    return subprocess.run([sys.executable, "-B", *arguments], check=False, capture_output=True, text=True)


def git(tree, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "core.autocrlf=false"]
    return subprocess.run(
        ["git", "-C", str(tree), *identity, *arguments], check=True, capture_output=True, text=True
    ).stdout


def commit_all(tree):
    git(tree, "add", "--all")
    git(tree, "commit", "-q", "-m", "state")


MODEL_ID = "12fae23f5d7540583715d79f44deb044bda2e21c"


def write_series(clone, patches, work, expected):
    """Patches in the folder `patches` that bring `clone`, copied to `work`, from one expected content to the next."""
    patches.mkdir()
    for name in ("apply.py", "refresh.py"):
        shutil.copy(PATCHES / name, patches)
    shutil.copytree(PATCHES / "patching", patches / "patching", ignore=shutil.ignore_patterns("__pycache__"))
    (patches / "BASE").write_text(git(clone, "rev-parse", "HEAD"))
    (patches / "series").write_text("".join(name + "\n" for name in NAMES))
    for name in NAMES:
        (patches / name).write_text(f"{name}\n\nWhat: a test\n\n")
    with (patches / NAMES[2]).open("a") as stream:
        stream.write(f"Replaces: this\nwan/model.py {MODEL_ID}\n\n")
    shutil.copytree(clone, work)
    for name, content in zip(NAMES, expected[1:]):
        put(work, content)
        done = python(patches / "refresh.py", work, name)
        assert done.returncode == 0, done.stderr
        commit_all(work)


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """(a clone at BASE, a patches folder for it), the patches written by patches/refresh.py."""
    folder = tmp_path_factory.mktemp("kit")
    clone = folder / "clone"
    clone.mkdir()
    git(clone, "init", "-q")
    put(clone, BASE_TREE)
    commit_all(clone)
    write_series(clone, folder / "patches", folder / "work", EXPECTED)
    return clone, folder / "patches"


@pytest.fixture(scope="session")
def later(kit, tmp_path_factory):
    """A patches folder with the later version of the series."""
    folder = tmp_path_factory.mktemp("later")
    write_series(kit[0], folder / "patches", folder / "work", LATER)
    code = (
        "import refresh, sys\n"
        "series = refresh.load_series(sys.argv[1])\n"
        "print(*refresh.rows({path: series.known(path) for path in series.chains}), sep='\\n')"
    )
    command = [sys.executable, "-B", "-c", code, kit[1]]
    done = subprocess.run(command, check=True, capture_output=True, cwd=folder / "patches")
    (folder / "patches" / "history").write_bytes(done.stdout)
    return folder / "patches"


@pytest.fixture
def tree(kit, tmp_path):
    """A fresh clone at BASE."""
    return Path(shutil.copytree(kit[0], tmp_path / "Wan2.1 tree"))


def load_apply(patches):
    spec = importlib.util.spec_from_file_location("patches_apply", patches / "apply.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(patches))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(patches))
    return module


@pytest.fixture
def apply_module(kit):
    return load_apply(kit[1])


def runner(module, capsys):
    """apply(tree, *flags) runs the program and returns (exit code, what it printed)."""

    def apply(tree, *flags):
        code = module.main([str(tree), *flags])
        out, err = capsys.readouterr()
        assert (code == 0) == (err == ""), "only a refusal writes to stderr"
        return code, out or err

    return apply


@pytest.fixture
def apply(apply_module, capsys):
    return runner(apply_module, capsys)


@pytest.fixture
def apply_later(later, capsys):
    return runner(load_apply(later), capsys)


def refused(result, *words):
    code, said = result
    assert code == 2
    assert said.startswith("apply.py: ") and said.count("\n") == 1, "a refusal is one line"
    for word in words:
        assert word in said


def test_clean_clone_and_back(apply, tree):
    (tree / "generate.py").chmod(0o755)
    before = files(tree)
    code, said = apply(tree)
    assert code == 0 and said.endswith("0001-one.patch, 0002-two.patch, 0003-three.patch: done\n")
    assert "wan/memory/tiles.py: put in" in said
    assert files(tree) == PATCHED
    assert (tree / "generate.py").stat().st_mode & 0o777 == 0o755
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == before
    assert not (tree / "wan/memory").exists(), "the folder that a patch made goes with its files"
    assert git(tree, "status", "--porcelain").split() == ["M", "generate.py"], "only the mode set above"


def test_crlf_tree(apply, tree):
    crlf = {path: data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") for path, data in BASE_TREE.items()}
    put(tree, crlf)
    assert apply(tree)[0] == 0
    new = {path: data for path, data in PATCHED.items() if path not in BASE_TREE}
    old = {path: PATCHED[path].replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") for path in BASE_TREE}
    assert files(tree) == {**new, **old}
    assert apply(tree)[1].endswith("nothing to do\n")
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == crlf


def test_mixed_line_endings_stay_as_they_are(apply, tree):
    mixed = BASE_TREE["generate.py"].replace(b"line 9\n", b"line 9\r\n")
    (tree / "generate.py").write_bytes(mixed)
    assert apply(tree)[0] == 0
    assert (tree / "generate.py").read_bytes() == PATCHED["generate.py"].replace(b"line 9\n", b"line 9\r\n")
    assert apply(tree, "--reverse")[0] == 0
    assert (tree / "generate.py").read_bytes() == mixed


def test_download_without_git(apply, tree, monkeypatch):
    shutil.rmtree(tree / ".git")
    monkeypatch.setenv("PATH", str(tree))  # no git program either
    assert apply(tree)[0] == 0
    assert files(tree) == PATCHED
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == BASE_TREE


def test_inside_another_repository(apply, tree):
    shutil.rmtree(tree / ".git")
    git(tree.parent, "init", "-q")
    assert apply(tree)[0] == 0
    assert files(tree) == PATCHED
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == BASE_TREE


def edit(tree, path, old, new):
    data = (tree / path).read_bytes()
    assert data.count(old) == 1
    (tree / path).write_bytes(data.replace(old, new))


ABOVE = ("generate.py", b"generate line 1\n", b"import mine\nchanged line 1\n")
WITHIN = ("generate.py", b"generate line 5\n", b"changed line 5\n")


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_edited_above_the_insertions_is_merged(apply, tree, ending):
    edit(tree, *ABOVE)
    (tree / "generate.py").write_bytes((tree / "generate.py").read_bytes().replace(b"\n", ending))
    before = files(tree)
    code, said = apply(tree)
    assert code == 0 and "generate.py: put in, merged with other changes" in said
    merged = PATCHED["generate.py"].replace(*ABOVE[1:]).replace(b"\n", ending)
    assert files(tree) == {**PATCHED, "generate.py": merged}
    assert apply(tree)[1].endswith("nothing to do\n")
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == before


def test_edited_and_one_patch_already_in(apply, tree):
    put(tree, EXPECTED[1])
    edit(tree, *ABOVE)
    before = files(tree)
    assert apply(tree)[0] == 0
    assert files(tree) == {**PATCHED, "generate.py": PATCHED["generate.py"].replace(*ABOVE[1:])}
    assert apply(tree, "--reverse", "--only", "0003-three")[0] == 0
    assert apply(tree, "--reverse", "--only", "0002-two")[0] == 0
    assert files(tree) == before


def test_edited_after_applying_then_reversed(apply, tree):
    assert apply(tree)[0] == 0
    edit(tree, "generate.py", b"generate line 20\n", b"generate line 20\nmine\n")
    assert apply(tree)[1].endswith("nothing to do\n")
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == {**BASE_TREE, "generate.py": BASE_TREE["generate.py"] + b"mine\n"}


def test_edited_within_an_insertion_is_refused(apply, tree):
    edit(tree, *WITHIN)
    before = state(tree)
    refused(apply(tree), "nothing was changed", "generate.py", "other changes")
    refused(apply(tree, "--check"), "generate.py")
    assert state(tree) == before


def test_own_lines_inside_the_inserted_ones_are_refused_in_reverse(apply, tree):
    assert apply(tree)[0] == 0
    edit(tree, "generate.py", b"    one = 1\n", b"    one = 1\n    mine = 3\n")
    before = state(tree)
    refused(apply(tree, "--reverse"), "generate.py")
    assert state(tree) == before


def test_edited_without_base_in_git_is_refused(apply, tree):
    shutil.rmtree(tree / ".git")
    edit(tree, *ABOVE)
    edit(tree, "wan/vae.py", b"line 3\n", b"line 3!\n")
    before = state(tree)
    for flags in [], ["--check"], ["--only", "0001-one.patch"]:
        refused(apply(tree, *flags), "nothing was changed", "generate.py, wan/vae.py", "git fetch origin")
    assert apply(tree, "--reverse")[1].endswith("nothing to do\n"), "the patches are not there"
    assert state(tree) == before


@pytest.mark.parametrize(
    "mine",
    [
        {"wan/memory/tiles.py": b"mine\n"},
        {"wan/memory/tiles.py": b""},
        {"wan/memory/__init__.py": b"", "wan/memory/mine.py": b"mine\n"},  # a package of the same name
    ],
)
def test_foreign_file_where_a_patch_puts_one(apply, tree, mine):
    put(tree, mine)
    before = state(tree)
    for flags in [], ["--reverse"]:
        refused(apply(tree, *flags), min(mine), "not from these patches", "move it away")
    assert state(tree) == before


def test_own_file_beside_those_of_the_patches(apply, tree):
    put(tree, {"wan/memory/mine.py": b"mine\n"})
    assert apply(tree)[0] == 0
    assert files(tree) == {**PATCHED, "wan/memory/mine.py": b"mine\n"}
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == {**BASE_TREE, "wan/memory/mine.py": b"mine\n"}


def test_installed_package_has_no_program_and_no_documents(apply, tree):
    shutil.rmtree(tree / ".git")
    for name in "generate.py", "GUIDE.md", "README.md":
        (tree / name).unlink()
    before = files(tree)
    code, said = apply(tree)
    assert code == 0 and "generate.py: not there, left out" in said
    assert files(tree) == {path: PATCHED[path] for path in PATCHED if "/" in path}
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == before
    refused(apply(tree / "wan"), "not a Wan2.1 tree", "the folder that holds Wan2.1's wan")


def test_another_document_is_left_out_and_another_program_is_not(apply, tree):
    shutil.rmtree(tree / ".git")
    put(tree, {"GUIDE.md": b"of another day\n"})
    code, said = apply(tree)
    assert code == 0 and "GUIDE.md: not as at BASE, left out" in said
    assert files(tree) == {**PATCHED, "GUIDE.md": b"of another day\n"}
    assert apply(tree, "--reverse")[0] == 0
    put(tree, {"generate.py": b"of another day\n"})
    refused(apply(tree), "generate.py")


@pytest.mark.parametrize("flags", [[], ["--only", NAMES[0]]])
def test_known_version_before_base(apply, tree, monkeypatch, flags):
    """Its lines stand where BASE's do: it needs no git."""
    shutil.rmtree(tree / ".git")
    edit(tree, "wan/pipeline.py", b"pipeline line 9\n", b"pipeline line nine\n")
    before = files(tree)
    refused(apply(tree, *flags), "wan/pipeline.py", "git fetch")
    from patching import lines
    from patching import tree as tree_module

    id_ = lines.blob_id(before["wan/pipeline.py"])
    monkeypatch.setattr(tree_module, "ALSO_FITS", {"wan/pipeline.py": [id_]})
    assert apply(tree, *flags)[0] == 0
    assert files(tree)["wan/pipeline.py"] == b"top\n" + before["wan/pipeline.py"]
    assert apply(tree, *flags)[1].endswith("nothing to do\n")
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == before


def test_warns_where_a_patch_computes_in_place_of_another_version(apply, tree):
    assert "warning" not in apply(tree)[1]
    assert "warning" not in apply(tree, "--reverse")[1]
    edit(tree, "wan/model.py", b"model\n", b"another model\n")
    assert "warning" not in apply(tree, "--only", NAMES[0])[1]
    assert f"warning: wan/model.py is not as at BASE; {NAMES[2]} " in apply(tree)[1]
    assert "warning" not in apply(tree, "--reverse")[1]


# A tree with an earlier version of the patches


@pytest.fixture(params=range(1, 4), ids=lambda level: f"level {level}")
def earlier(request, apply, tree):
    """A tree with the first patches of the earlier version."""
    for name in NAMES[: request.param]:
        assert apply(tree, "--only", name)[0] == 0
    return tree


@pytest.mark.parametrize("with_git", [True, False])
def test_earlier_version_is_replaced(earlier, apply_later, with_git):
    if not with_git:
        shutil.rmtree(earlier / ".git")
    before = state(earlier)
    code, said = apply_later(earlier, "--check")
    assert code == 0 and "wan/pipeline.py: would be brought up to date" in said
    assert state(earlier) == before
    code, said = apply_later(earlier)
    assert code == 0 and "wan/pipeline.py: brought up to date" in said
    assert files(earlier) == LATER[-1]
    assert apply_later(earlier)[1].endswith("nothing to do\n")
    assert apply_later(earlier, "--reverse")[0] == 0
    assert files(earlier) == BASE_TREE


def test_earlier_version_is_taken_out(earlier, apply_later):
    assert apply_later(earlier, "--reverse")[0] == 0
    assert files(earlier) == BASE_TREE


def test_one_patch_on_an_earlier_version_is_refused(earlier, apply_later):
    before = state(earlier)
    for flags in ["--only", NAMES[0]], ["--reverse", "--only", NAMES[2]]:
        refused(apply_later(earlier, *flags), "earlier version", "without --only")
    assert state(earlier) == before


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_earlier_version_with_other_changes(earlier, apply_later, ending):
    edit(earlier, *ABOVE)
    (earlier / "generate.py").write_bytes((earlier / "generate.py").read_bytes().replace(b"\n", ending))
    own = BASE_TREE["generate.py"].replace(*ABOVE[1:]).replace(b"\n", ending)
    assert "generate.py: brought up to date, merged" in apply_later(earlier)[1]
    merged = LATER[-1]["generate.py"].replace(*ABOVE[1:]).replace(b"\n", ending)
    assert files(earlier) == {**LATER[-1], "generate.py": merged}
    shutil.rmtree(earlier / ".git")  # to take lines out no git is needed
    assert apply_later(earlier, "--reverse")[0] == 0
    assert files(earlier) == {**BASE_TREE, "generate.py": own}


def test_own_lines_inside_those_of_an_earlier_version_are_refused(apply, apply_later, tree):
    assert apply(tree)[0] == 0
    edit(tree, "generate.py", b"    one = 1\n", b"    one = 1\n    mine = 3\n")
    before = state(tree)
    for flags in [], ["--reverse"]:
        refused(apply_later(tree, *flags), "generate.py", "other changes")
    assert state(tree) == before


def test_update_that_stopped_half_way_is_completed(apply, apply_later, tree):
    assert apply(tree)[0] == 0
    put(tree, {path: LATER[-1][path] for path in ("wan/pipeline.py", "wan/memory/crops.py")})
    assert apply_later(tree)[0] == 0
    assert files(tree) == LATER[-1]


@contextlib.contextmanager
def maintainers_modules(monkeypatch):
    """(lines, series, tree, rooted, refresh): the modules of the project's patches folder."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(PATCHES)
        patch.setattr(sys, "dont_write_bytecode", True)
        names = [f"patching.{name}" for name in ("lines", "series", "tree", "rooted")]
        yield [importlib.import_module(name) for name in (*names, "refresh")]
        del sys.modules["refresh"]


def test_every_earlier_version_of_the_projects_patches_is_recognised(tmp_path, monkeypatch):
    """As far as its git has them, on files of numbered lines."""
    with maintainers_modules(monkeypatch) as (lines, series_module, tree, rooted, refresh):
        series = series_module.load_series(PATCHES)
        history = series_module.load_history(PATCHES)
        earlier = list(refresh.earlier_series())
        if not earlier:
            pytest.skip("needs the project's git")
        for one in earlier:
            for path, chain in one.chains.items():
                created = chain[0].before == lines.ABSENT
                own = b"" if created else text(numbered("line", 1000))
                for level in range(1, 1 + len(chain)):
                    content = lines.insert(own.splitlines(keepends=True), lines.compose(chain[:level]))
                    put(tmp_path, {path: b"".join(content)})
                    with rooted.Rooted(tmp_path) as root:
                        file = tree.TreeFile(root, path, series, history)
                    assert file.own == (own or None), (
                        f"{path}: python patches/refresh.py brings history up to date"
                    )
                    assert file.problem != "tangled"


@pytest.mark.parametrize("flags, content", [([], PATCHED), (["--reverse"], BASE_TREE)])
def test_already_done(apply, tree, flags, content):
    put(tree, content)
    before = state(tree)
    code, said = apply(tree, *flags)
    assert code == 0 and said.endswith("nothing to do\n")
    assert state(tree) == before


HALF = {
    **EXPECTED[0],
    "generate.py": EXPECTED[1]["generate.py"],
    "wan/memory/tiles.py": EXPECTED[3]["wan/memory/tiles.py"],
}


def test_half_applied_is_completed_or_taken_out(apply, tree):
    put(tree, HALF)
    code, said = apply(tree)
    assert code == 0 and "wan/memory/tiles.py: already there" in said
    assert files(tree) == PATCHED
    shutil.rmtree(tree / "wan/memory")
    put(tree, HALF)
    assert apply(tree, "--reverse")[0] == 0
    assert files(tree) == BASE_TREE


@pytest.mark.parametrize("name", ["wan/vae.py", "wan"])
def test_read_only(apply, tree, name):
    (tree / name).chmod(0o555)
    before = state(tree)
    refused(apply(tree), name, "read-only", "nothing was changed")
    assert state(tree) == before
    (tree / name).chmod(0o755)


def test_not_an_upstream_tree(apply, tree, tmp_path):
    refused(apply(tmp_path / "nowhere"), "nowhere is not a folder")
    (tmp_path / "empty").mkdir()
    refused(apply(tmp_path / "empty"), "not a Wan2.1 tree", "wan/pipeline.py")
    assert list((tmp_path / "empty").iterdir()) == []
    (tree / "wan/pipeline.py").unlink()
    before = state(tree)
    refused(apply(tree), "not a Wan2.1 tree", "wan/pipeline.py")
    assert state(tree) == before


def test_check_changes_nothing(apply, tree):
    before = state(tree)
    code, said = apply(tree, "--check")
    assert code == 0 and "generate.py: would be put in" in said and "nothing was changed" in said
    assert state(tree) == before
    put(tree, PATCHED)
    before = state(tree)
    assert "generate.py: would be taken out" in apply(tree, "--check", "--reverse")[1]
    assert state(tree) == before


def test_only(apply, tree):
    for count, name in enumerate(NAMES, 1):
        for later in NAMES[count:]:
            refused(apply(tree, "--only", later), f"put {name} in first")
        assert apply(tree, "--only", name.replace(".patch", ""))[0] == 0
        assert files(tree) == EXPECTED[count]
        assert apply(tree, "--only", name)[1].endswith(f"{name}: nothing to do\n")
    for count, name in reversed(list(enumerate(NAMES, 1))):
        for earlier in NAMES[: count - 1]:
            refused(apply(tree, "--reverse", "--only", earlier), "first")
        assert apply(tree, "--reverse", "--only", name)[0] == 0
        assert files(tree) == EXPECTED[count - 1]
    refused(apply(tree, "--only", "0009-nine"), "there is no patch 0009-nine", ", ".join(NAMES))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    "call, flags",
    [
        ("fsync", []),
        ("fsync", ["--reverse"]),
        ("replace", []),
        ("replace", ["--reverse"]),
        ("remove", ["--reverse"]),
    ],
)
def test_failure_half_way_leaves_the_tree_as_it_was(
    apply_module, tree, monkeypatch, capsys, call, flags, number, error
):
    put(tree, PATCHED if flags else BASE_TREE)
    before = state(tree)
    real, calls = getattr(os, call), []

    def fail_once(*arguments, **folders):
        if not str(arguments[0]).endswith(".wan-patch-old"):
            calls.append(arguments)
            if len(calls) == number:
                raise error
        return real(*arguments, **folders)

    monkeypatch.setattr(os, call, fail_once)
    code = apply_module.main([str(tree), *flags])
    assert len(calls) >= number
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 2)
    assert "nothing was changed" in capsys.readouterr().err
    assert state(tree) == before


def test_written_content_is_verified(apply_module, tree, monkeypatch, capsys):
    before = state(tree)
    real = os.replace

    def spoil(source, target, **folders):
        real(source, target, **folders)
        if source.endswith(".wan-patch-new") and target.endswith("vae.py"):
            (tree / "wan/vae.py").write_bytes(b"something else\n")

    monkeypatch.setattr(os, "replace", spoil)
    assert apply_module.main([str(tree)]) == 2
    assert "vae.py did not keep" in capsys.readouterr().err
    assert state(tree) == before


def run_and_kill(kit, tree, number):
    """Run apply.py in a process that gets the signal at its third rename."""
    code = (
        "import os, runpy, sys\n"
        "real, calls = os.replace, []\n"
        "def replace(source, target, **folders):\n"
        "    calls.append(target)\n"
        "    if len(calls) == 3:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    return real(source, target, **folders)\n"
        "os.replace = replace\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path[0] = os.path.dirname(sys.argv[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return python("-c", code, kit[1] / "apply.py", tree)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(kit, tree, number):
    before = state(tree)
    done = run_and_kill(kit, tree, number)
    assert done.returncode == 130 and "nothing was changed" in done.stderr
    assert state(tree) == before


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
@pytest.mark.parametrize("flags, content", [([], PATCHED), (["--reverse"], BASE_TREE)])
def test_after_a_kill_without_warning_a_second_run_mends_the_tree(kit, tree, apply, flags, content):
    assert run_and_kill(kit, tree, signal.SIGKILL).returncode == -signal.SIGKILL
    for path, data in files(tree).items():
        known = [expected.get(path) for expected in EXPECTED]
        assert path.rsplit(".", 1)[-1].startswith("wan-patch-") or data in known, "no file is half written"
    assert files(tree) not in (BASE_TREE, PATCHED)
    assert apply(tree, *flags)[0] == 0
    assert files(tree) == content


def test_same_as_plain_git_apply(apply, kit, tree, tmp_path):
    plain = Path(shutil.copytree(tree, tmp_path / "plain"))
    for count, name in enumerate(NAMES, 1):
        git(plain, "apply", "--unidiff-zero", str(kit[1] / name))
        assert apply(tree, "--only", name)[0] == 0
        assert files(plain) == files(tree) == EXPECTED[count]
    for name in reversed(NAMES):
        git(plain, "apply", "--unidiff-zero", "--reverse", str(kit[1] / name))
    assert apply(tree, "--reverse")[0] == 0
    assert files(plain) == files(tree) == BASE_TREE


@pytest.fixture
def own_kit(kit, tmp_path):
    """A copy of the patches folder that a test may spoil, and a function to run its apply.py."""
    patches = Path(shutil.copytree(kit[1], tmp_path / "patches"))

    def run(tree):
        done = python(patches / "apply.py", tree)
        return done.returncode, done.stdout or done.stderr

    return patches, run


def test_patches_folder_with_crlf(own_kit, tree):
    patches, run = own_kit
    for file in [*patches.glob("*.patch"), patches / "series", patches / "BASE"]:
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert run(tree)[0] == 0
    assert files(tree) == PATCHED


@pytest.mark.parametrize(
    "old, new",
    [
        (b"+    one = 1\n", b"+    one = 11\n"),  # not what the id promises
        (b"+    one = 1\n", b" generate line 5\n+    one = 1\n"),  # context
        (b"+    one = 1\n", b"-generate line 5\n"),  # a deletion
        (b"+    one = 1\n", b""),  # cut
        (b",2 @@\n", b",2 @@ def f():\n"),  # text of the file
        (b"@@ -5,0 +6,2 @@\n", b"@@ -5 +6,2 @@\n"),  # replaces a line
        (b"--- a/generate.py\n", b"old mode 100644\nnew mode 100755\n--- a/generate.py\n"),
    ],
)
def test_damaged_patch_is_refused(own_kit, tree, old, new):
    patches, run = own_kit
    data = (patches / NAMES[0]).read_bytes()
    assert old in data
    (patches / NAMES[0]).write_bytes(data.replace(old, new, 1))
    before = state(tree)
    refused(run(tree), "damaged")
    assert state(tree) == before


def test_refresh_refuses_an_edit_that_is_not_an_insertion(own_kit, tree):
    patches, _ = own_kit
    before = (patches / NAMES[0]).read_bytes()
    edit(tree, *WITHIN)
    done = python(patches / "refresh.py", tree, NAMES[0])
    assert done.returncode != 0 and "does not only insert" in done.stderr
    assert (patches / NAMES[0]).read_bytes() == before


def test_refresh_takes_the_projects_own_files(tmp_path):
    patches = Path(shutil.copytree(PATCHES, tmp_path / "patches"))
    names = (patches / "series").read_text().split()
    before = {name: (patches / name).read_text() for name in names}
    created = [
        (name, path)
        for name in names
        for path in re.findall(r"^diff --git a/(\S+) .*\nnew file mode", before[name], flags=re.MULTILINE)
    ]
    assert created
    for _, path in created:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PATCHES.parent / path, tmp_path / path)

    def refreshed():
        assert python(patches / "refresh.py").returncode == 0
        return {name: (patches / name).read_text() for name in names}

    assert refreshed() == before, "what is in the project is what the patches create"
    name, path = created[-1]
    (tmp_path / path).write_text("changed = 1\n")
    after = refreshed()
    assert f"+++ b/{path}\n@@ -0,0 +1 @@\n+changed = 1\n" in after[name]
    assert {other for other in names if after[other] != before[other]} == {name}
    (tmp_path / path).write_text("")
    after = refreshed()[name]
    assert f"diff --git a/{path} b/{path}\nnew file" in after and f"+++ b/{path}" not in after, "no hunk"


def test_runs_on_python_3_8():
    for path in (PATCHES / "apply.py", *(PATCHES / "patching").glob("*.py")):
        ast.parse(path.read_text(), feature_version=(3, 8))


def test_needs_no_module_that_windows_lacks(kit, tree):
    """Nor descriptors of folders. Windows has a flag by which it removes the lock itself."""
    code = (
        "import os, runpy, sys\n"
        "sys.modules.update(dict.fromkeys(['fcntl', 'grp', 'pwd', 'resource', 'termios']))\n"
        "os.O_TEMPORARY = 0\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path[0] = os.path.dirname(sys.argv[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = python("-c", code, kit[1] / "apply.py", tree)
    assert done.returncode == 0, done.stderr
    assert files(tree) == {**PATCHED, ".wan-patch-lock": b""}
    again = python("-c", code, kit[1] / "apply.py", tree, "--reverse")
    refused((again.returncode, again.stderr), "another apply.py is at work", str(tree))
