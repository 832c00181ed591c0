"""patches/apply.py on trees that were made to harm: links, settings of git, other programs at the same time."""

# ruff: noqa: F811

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from test_patch_apply import (
    ABOVE,
    BASE_TREE,
    EXPECTED,
    NAMES,
    PATCHED,
    apply,  # noqa: F401
    apply_module,  # noqa: F401
    edit,
    files,
    git,
    kit,  # noqa: F401
    put,
    python,
    refused,
    runner,
    state,
    tree,  # noqa: F401
)

pytestmark = [
    pytest.mark.skipif(shutil.which("git") is None, reason="needs git to make the trees"),
    pytest.mark.skipif(os.name == "nt", reason="symbolic links need a right there"),
]
ALL_FLAGS = [[], ["--check"], ["--reverse"], ["--only", NAMES[0]], ["--reverse", "--only", NAMES[2]]]


@pytest.fixture
def outside(tmp_path):
    """A folder beside the tree that nothing may change."""
    folder = tmp_path / "outside"
    put(folder, {"own.txt": b"own\n"})
    return folder


# Links


@pytest.mark.parametrize("flags", ALL_FLAGS, ids=" ".join)
@pytest.mark.parametrize("content", [BASE_TREE, PATCHED], ids=["base", "patched"])
@pytest.mark.parametrize(
    "name",
    [
        "generate.py",
        "GUIDE.md",
        "wan",
        "wan/vae.py",
        "wan/memory",
        "wan/memory/tiles.py",
        "wan/memory/__init__.py",
    ],
)
def test_links_in_the_tree_are_refused_by_name(apply, tree, outside, name, content, flags):
    put(tree, content)
    if (tree / name).exists():
        (tree / name).rename(outside / "there")
    elif "." in name:
        (outside / "there").write_bytes(b"")
    else:
        (outside / "there").mkdir()
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).symlink_to(outside / "there")
    before = state(tree), state(outside)
    refused(apply(tree, *flags), "nothing was changed", str(tree / name), "is a link")
    assert (state(tree), state(outside)) == before


@pytest.mark.parametrize("target", ["own.txt", "missing.txt", "."])
@pytest.mark.parametrize("name", ["generate.py", "wan/memory/tiles.py", "README.md"])
@pytest.mark.parametrize("ending", [".wan-patch-new", ".wan-patch-old"])
def test_links_with_the_names_of_temporary_files(apply, tree, outside, ending, name, target):
    """Refused where they could be written; the README, which no patch of these edits, has none."""
    link = tree / (name + ending)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside / target)
    before = state(tree), state(outside)
    for flags in [], ["--check"], ["--reverse"]:
        if name == "README.md":
            assert apply(tree, *flags)[0] == 0 and link.is_symlink()
        else:
            refused(apply(tree, *flags), str(link), "is a link")
            assert state(tree) == before[0]
        assert state(outside) == before[1]


def test_reverse_removes_nothing_through_a_link(apply, tree, outside):
    assert apply(tree)[0] == 0
    (tree / "wan/memory").rename(outside / "memory")
    (tree / "wan/memory").symlink_to(outside / "memory")
    before = state(outside)
    refused(apply(tree, "--reverse"), str(tree / "wan/memory"), "is a link")
    assert state(outside) == before


def test_the_tree_itself_may_be_named_by_a_link(apply, tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    assert apply(tmp_path / "link")[0] == 0
    assert files(tree) == PATCHED


@pytest.mark.parametrize("name", ["generate.py", "generate.py.wan-patch-new", "generate.py.wan-patch-old"])
def test_a_file_that_shares_its_content_with_one_outside(apply, tree, outside, name):
    """Installers link packages to their cache: the cache's file stays."""
    if (tree / name).exists():
        (tree / name).rename(outside / "there")
    else:
        (outside / "there").write_bytes(b"own\n")
    os.link(outside / "there", tree / name)
    before = state(outside)
    assert apply(tree)[0] == 0
    assert files(tree) == PATCHED
    assert state(outside) == before


@pytest.mark.parametrize("name", ["wan", "wan/memory"])
@pytest.mark.parametrize("number", range(0, 60, 4))
def test_a_folder_exchanged_for_a_link_while_it_works(apply_module, tree, outside, monkeypatch, name, number):
    """At any look at it: what was a folder then is a link when it is opened."""
    put(tree, PATCHED)
    shutil.copytree(tree / "wan", outside / "wan")
    shutil.copytree(tree / "wan/memory", outside / "memory")
    before = state(outside)
    from patching import rooted

    real, count = rooted.look, [0]

    def exchange(place, shown, dir_fd=None):
        info = real(place, shown, dir_fd)
        if shown == str(tree / name) and info is not None:
            if count[0] == number:
                (tree / name).rename(tree / "moved")
                (tree / name).symlink_to(outside / Path(name).name)
            count[0] += 1
        return info

    monkeypatch.setattr(rooted, "look", exchange)
    assert apply_module.main([str(tree), "--reverse"]) in (0, 2), "0 if it was done by then"
    assert (tree / name).is_symlink() or count[0] <= number
    assert state(outside) == before


EXCHANGER = """
import os, sys
tree, outside = sys.argv[1:]
print("ready", flush=True)
while True:
    try:
        os.rename(tree + "/wan/memory", tree + "/aside")
        os.symlink(outside + "/memory", tree + "/wan/memory")
        os.remove(tree + "/wan/memory")
        os.rename(tree + "/aside", tree + "/wan/memory")
    except OSError:
        pass
"""


def test_a_folder_exchanged_for_a_link_by_another_process(apply, tree, outside):
    rounds = int(os.environ.get("WAN_PATCH_ROUNDS", 20))
    put(tree, PATCHED)
    shutil.copytree(tree / "wan/memory", outside / "memory")
    before = state(outside)
    command = [sys.executable, "-c", EXCHANGER, str(tree), str(outside)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            process.stdout.readline()
            for _ in range(rounds):
                for flags in ["--reverse"], []:
                    apply(tree, *flags)
                    assert state(outside) == before
        finally:
            process.kill()


# What is no file


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def make_device(path):
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


def make_endless_link(path):
    path.symlink_to("/dev/zero")


def make_large(path):
    path.write_bytes(b"x" * 60_000_000)


def make_long(path):
    path.write_bytes(b"\n" * 20_001)


KINDS = [make_fifo, make_socket, make_device, make_endless_link, make_large, make_long, Path.mkdir]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "name", ["generate.py", "GUIDE.md", "wan/memory/tiles.py", "wan/model.py", "wan/vae.py.wan-patch-new"]
)
def test_what_is_no_file_of_a_tree_is_refused_at_once(apply, tree, make, name):
    put(tree, {"wan/memory/mine.py": b"mine\n"})
    (tree / name).unlink(missing_ok=True)
    make(tree / name)
    before = sorted(tree.rglob("*"))
    for flags in [], ["--check"]:
        started = time.monotonic()
        refused(apply(tree, *flags), "nothing was changed", str(tree / name))
        assert time.monotonic() - started < 5
    assert sorted(tree.rglob("*")) == before


@pytest.mark.parametrize("make", [make_fifo, make_device, Path.touch], ids=lambda make: make.__name__)
def test_what_is_no_folder(apply, tree, make):
    make(tree / "wan/memory")
    refused(apply(tree), str(tree / "wan/memory"), "move it away")


# Git


@pytest.fixture
def marked(tmp_path):
    """(a program that leaves a mark, whether it did)."""
    program, mark = tmp_path / "hostile", tmp_path / "mark"
    program.write_text(f"#!/bin/sh\necho $0 >> '{mark}'\nexit 1\n")
    program.chmod(0o755)
    return program, mark.exists


SETTINGS = {
    "fsmonitor": "[core]\nfsmonitor = {program}\n",
    "pagers": "[core]\npager = {program}\n[pager]\ncat-file = {program}\nmerge-file = {program}\n",
    "editor": "[core]\neditor = {program}\n[sequence]\neditor = {program}\n",
    "hooks": "[core]\nhooksPath = hooks\n",
    "diff": '[diff]\nexternal = {program}\n[diff "mine"]\ntextconv = {program}\ncommand = {program}\n',
    "filter": '[filter "mine"]\nsmudge = {program}\nclean = {program}\nprocess = {program}\nrequired = true\n',
    "merge": '[merge "mine"]\ndriver = {program}\n[merge]\ndefault = mine\n',
    "alias": "[alias]\ncat-file = !{program}\nmerge-file = !{program}\n",
    "alternate refs": "[core]\nalternateRefsCommand = {program}\n",
    "credentials": "[credential]\nhelper = !{program}\n[core]\naskPass = {program}\n",
    "signatures": "[gpg]\nprogram = {program}\n[commit]\ngpgSign = true\n",
    "proxy": "[core]\ngitProxy = {program}\nsshCommand = {program}\n[http]\nproxy = http://127.0.0.1:1\n",
    "include": "[include]\npath = {folder}/more\n",
    "worktree": "[core]\nworktree = /\nbare = false\n",
    "format": "[core]\nrepositoryFormatVersion = 99\n[extensions]\nunknown = true\n",
    "broken": "[core\n",
}
REMOTES = {
    "ext": "url = ext::{program}\n",
    "ssh": "url = ssh://host/x\n[core]\nsshCommand = {program}\n",
    "uploadpack": "url = {folder}\nuploadpack = {program}\n",
    "vcs": "vcs = mine\nurl = mine\n",
    "instead": 'url = a:b\n[url "ext::{program} "]\ninsteadOf = a:\n',
    "allowed": 'url = ext::{program}\n[protocol]\nallow = always\n[protocol "ext"]\nallow = always\n',
}
PROMISOR = (
    "[core]\nrepositoryFormatVersion = 1\n[extensions]\npartialClone = origin\n"
    '[remote "origin"]\npromisor = true\npartialCloneFilter = blob:none\nfetch = +refs/*:refs/*\n'
)
BLOB = (
    subprocess.run(
        ["git", "hash-object", "--stdin"], input=BASE_TREE["generate.py"], capture_output=True, check=True
    )
    .stdout.decode()
    .strip()
)


def loose(tree):
    return tree / ".git/objects" / BLOB[:2] / BLOB[2:]


def configure(tree, text, program):
    for place in ".git/hooks", ".git":
        (tree / place).mkdir(exist_ok=True)
    for hook in "post-checkout", "post-merge", "reference-transaction", "fsmonitor-watchman", "pre-auto-gc":
        shutil.copy(program, tree / ".git/hooks" / hook)
    (tree / ".git/more").write_text(f"[core]\nfsmonitor = {program}\n")
    (tree / ".gitattributes").write_text("* filter=mine diff=mine merge=mine\n")
    with (tree / ".git/config").open("a") as stream:
        stream.write(text.format(program=program, folder=tree / ".git"))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_trees_repository_start_nothing(apply, tree, marked, monkeypatch, name):
    """And stop nothing: what is merged needs the objects alone."""
    program, was_started = marked
    edit(tree, *ABOVE)
    configure(tree, SETTINGS[name], program)
    monkeypatch.chdir(tree)
    assert "generate.py: would be put in, merged" in apply(tree, "--check")[1]
    assert apply(tree)[0] == 0
    assert (tree / "generate.py").read_bytes() == PATCHED["generate.py"].replace(*ABOVE[1:])
    assert not was_started()


@pytest.mark.parametrize("name", REMOTES)
@pytest.mark.parametrize("flags", [["--check"], []], ids=["check", "put in"])
def test_what_is_missing_is_not_fetched(apply, tree, marked, monkeypatch, name, flags):
    program, was_started = marked
    shutil.copy(program, program.parent / "git-remote-mine")
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "ext:ssh:file:mine")
    monkeypatch.setenv("GIT_SSH_COMMAND", str(program))
    edit(tree, *ABOVE)
    configure(tree, PROMISOR + REMOTES[name], program)
    loose(tree).unlink()
    before = state(tree)
    refused(apply(tree, *flags), "generate.py", "git fetch origin")
    assert not was_started() and state(tree) == before


def test_settings_of_the_environment_start_nothing(apply, tree, marked, monkeypatch, tmp_path):
    program, was_started = marked
    edit(tree, *ABOVE)
    (tmp_path / ".gitconfig").write_text(f"[core]\npager = {program}\n[pager]\ncat-file = {program}\n")
    for name in (
        "GIT_PAGER",
        "GIT_EXTERNAL_DIFF",
        "GIT_SSH_COMMAND",
        "GIT_PROXY_COMMAND",
        "GIT_ASKPASS",
        "GIT_EDITOR",
    ):
        monkeypatch.setenv(name, str(program))
    for name in "GIT_DIR", "GIT_OBJECT_DIRECTORY", "GIT_EXEC_PATH", "GIT_INDEX_FILE", "GIT_WORK_TREE":
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "generate.py: put in, merged" in apply(tree)[1]
    assert not was_started()


@pytest.mark.parametrize("path", [".", "", "{tree}"])
def test_no_git_out_of_the_current_folder(apply, tree, marked, monkeypatch, path):
    """But one that PATH names in full: there the user has it."""
    program, was_started = marked
    edit(tree, *ABOVE)
    shutil.copy(program, tree / "git")
    monkeypatch.chdir(tree)
    monkeypatch.setenv("PATH", path.format(tree=tree) + os.pathsep + os.environ["PATH"])
    result = apply(tree)
    assert was_started() == (path == "{tree}")
    assert result[0] == (2 if was_started() else 0)


@pytest.mark.parametrize("name", ["config", "HEAD", "index", "packed-refs", "commondir", "config.worktree"])
def test_pipes_among_gits_files(apply, tree, name):
    edit(tree, *ABOVE)
    (tree / ".git" / name).unlink(missing_ok=True)
    os.mkfifo(tree / ".git" / name)
    if name == "commondir":
        refused(apply(tree), str(tree / ".git" / name), "neither a file nor a folder")
    else:
        assert "generate.py: put in, merged" in apply(tree)[1]


def test_an_object_that_is_a_pipe(apply, tree, monkeypatch):
    from patching import objects

    monkeypatch.setattr(objects, "SECONDS", 0.5)
    edit(tree, *ABOVE)
    loose(tree).unlink()
    os.mkfifo(loose(tree))
    refused(apply(tree), "git did not end")


@pytest.mark.parametrize("content", [b"forged\n", b"generate line 1\n" * 4_000_000], ids=["forged", "60 MB"])
def test_an_object_that_is_not_what_its_name_says(apply, tree, content):
    edit(tree, *ABOVE)
    loose(tree).chmod(0o644)
    loose(tree).write_bytes(zlib.compress(b"blob %d\0" % len(content) + content, 1))
    before = state(tree)
    refused(apply(tree), "generate.py", "git fetch origin")
    assert state(tree) == before


def test_no_objects_out_of_another_repository(apply, tree, tmp_path):
    edit(tree, *ABOVE)
    shutil.copytree(tree / ".git/objects", tmp_path / "objects")
    loose(tree).unlink()
    (tree / ".git/objects/info/alternates").write_text(f"{tmp_path}/objects\n")
    refused(apply(tree), "generate.py", "git fetch origin")


@pytest.mark.parametrize(
    "said",
    [b"", b"gitdir: ", b"gitdir: //host/share\n", b"gitdir: \\\\host\\share", b"gitdir: /\\host\\x",
     b"gitdir: /dev/zero", b"gitdir: a\0b", b"gitdir: nowhere\n", b"\xff\xfe", b"gitdir: .git\n"],
)  # fmt: skip
def test_a_file_in_place_of_gits_folder(apply, tree, said):
    shutil.rmtree(tree / ".git")
    (tree / ".git").write_bytes(said)
    assert apply(tree)[0] == 0, "nobody asks git"
    assert apply(tree, "--reverse")[0] == 0
    edit(tree, *ABOVE)
    refused(apply(tree), "generate.py", "git fetch origin")


def test_merged_in_a_worktree_a_submodule_and_a_folder_of_another_repository(apply, kit, tree, tmp_path):
    git(tree, "worktree", "add", "-q", str(tmp_path / "worktree"))
    git(tmp_path, "init", "-q", "outer")
    git(
        tmp_path / "outer",
        "-c",
        "protocol.file.allow=always",
        "submodule",
        "--quiet",
        "add",
        str(kit[0]),
        "inner",
    )
    git(tmp_path / "outer", "init", "-q")
    put(tmp_path / "outer/vendored", BASE_TREE)
    git(tmp_path / "outer", "add", "vendored")
    for place in "worktree", "outer/inner", "outer/vendored":
        edit(tmp_path / place, *ABOVE)
        assert "generate.py: put in, merged" in apply(tmp_path / place)[1], place


def test_merged_out_of_a_pack(apply, tree):
    git(tree, "gc", "-q")
    assert not loose(tree).exists()
    edit(tree, *ABOVE)
    assert "generate.py: put in, merged" in apply(tree)[1]


# Others at the same time


@pytest.mark.parametrize("flags", ALL_FLAGS, ids=" ".join)
def test_another_one_has_the_tree(apply, tree, flags):
    from patching.rooted import Rooted

    before = state(tree)
    with Rooted(tree):
        refused(apply(tree, *flags), "another apply.py is at work", str(tree))
    assert state(tree) == before
    assert apply(tree)[0] == 0


def test_several_at_once_never_leave_a_mixed_tree(kit, tree):
    """They start together; whoever comes second is refused, or finds the work done."""
    script, done = kit[1] / "apply.py", {0: 0, 2: 0}
    for number in range(int(os.environ.get("WAN_PATCH_ROUNDS", 6))):
        turns = [[], ["--reverse"], [], ["--only", NAMES[0]]][number % 2 :]
        running = [
            subprocess.Popen(
                [sys.executable, "-B", script, tree, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for flags in turns
        ]
        for process in running:
            _, said = process.communicate(timeout=60)
            done[process.returncode] += 1
            assert process.returncode == 0 or "another apply.py" in said
        assert files(tree) in EXPECTED, "one of the whole states"
    assert done[0] and done[2], done


def test_what_something_else_writes_meanwhile_stays(apply_module, tree, monkeypatch, capsys):
    from patching.rooted import Rooted

    real = Rooted.create

    def disturb(self, path, *arguments):
        real(self, path, *arguments)
        if path == "wan/vae.py.wan-patch-new":
            (tree / "wan/vae.py").write_bytes(b"mine\n")

    monkeypatch.setattr(Rooted, "create", disturb)
    refused(runner(apply_module, capsys)(tree), str(tree / "wan/vae.py"), "something else wrote")
    assert files(tree) == {**BASE_TREE, "wan/vae.py": b"mine\n"}


# Words


@pytest.mark.parametrize(
    "name",
    ["../outside/own.txt", "/etc/passwd", "..", ".", "", "*", "series", "BASE", "../patches/0001-one", "0001-ONE",
     "./0001-one", "0001-one.patch.patch", "0001-one.patch/", "a\nb", "a\0b", "\x1b[31m"],
)  # fmt: skip
def test_only_takes_names_of_the_series(apply, tree, outside, name):
    before = state(tree), state(outside)
    result = apply(tree, "--only", name)
    refused(result, "there is no patch", ", ".join(NAMES))
    assert result[1].rstrip("\n").isprintable()
    assert (state(tree), state(outside)) == before


@pytest.mark.parametrize("folder", ["no\nwhere", "no\x1bwhere", "\udcff"])
def test_the_trees_name_is_shown_not_sent_to_the_terminal(kit, folder, tmp_path):
    done = python(kit[1] / "apply.py", str(tmp_path / folder))
    refused((done.returncode, done.stderr), "is not a folder")
    assert done.stderr.rstrip("\n").isprintable()


def test_paths_of_a_series_lead_nowhere_else(tree, kit):
    from patching import Refused
    from patching.rooted import Rooted

    with Rooted(tree) as root:
        for path in (
            "../x",
            "wan/../../x",
            "/etc/passwd",
            "wan//vae.py",
            "wan/./vae.py",
            "wan\\..\\x",
            "C:x",
            "..",
            "a\0",
        ):
            for call in root.read, root.remove, lambda path: root.create(path, b""):
                with pytest.raises(Refused, match="no path in a tree"):
                    call(path)
    assert files(tree) == BASE_TREE
