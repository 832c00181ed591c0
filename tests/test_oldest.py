"""The oldest PyTorch that is promised is the same wherever it is said, and the one that is tried."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def promised():
    (version,) = re.findall(r"^torch>=([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    return version


@pytest.mark.parametrize(
    "file, pattern",
    [
        (".ci/constraints-oldest.txt", r"^torch==(\d+\.\d+)\.0$"),
        ("README.md", r"\(from ([\d.]+) on;"),
        ("README.md", r"^Tried with .*; with ([\d.]+) all but"),
    ],
)
def test_it_is_said_alike(file, pattern):
    assert re.findall(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE) == [promised()]
