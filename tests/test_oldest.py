"""The oldest PyTorch that is promised: said alike, and what streams there, where no virtual GPU can be."""

import re
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from test_streaming import network, run, sample, size

from leanwan import streaming
from virtual_gpu import DEVICE

ROOT = Path(__file__).parent.parent


def promised():
    (version,) = re.findall(r"^torch>=([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    return version


@pytest.mark.parametrize(
    "file, pattern",
    [
        (".ci/constraints-oldest.txt", r"^torch==(\d+\.\d+)\.0$"),
        ("leanwan/pyproject.toml", r'"torch>=([\d.]+)"'),
        ("README.md", r"\(from ([\d.]+) on;"),
        ("README.md", r"^Tried with .*; with ([\d.]+) all but"),
    ],
)
def test_it_is_said_alike(file, pattern):
    assert re.findall(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE) == [promised()]


@pytest.fixture
def allocated(monkeypatch):
    """Makes DEVICE one with the host's memory, whose streams have always done their work; yields what it gave."""
    empty, given = torch.empty, []

    def host_empty(*args, device=None, pin_memory=False, **options):
        if device != DEVICE:
            return empty(*args, device=device, **options)
        given.append(empty(*args, **options))
        return given[-1]

    monkeypatch.setattr(torch, "empty", host_empty)
    monkeypatch.setattr(torch, "get_device_module", lambda device: MagicMock())
    monkeypatch.setattr(streaming, "STAGE_BYTES", 1000)
    monkeypatch.setattr(streaming, "PINNED_BYTES", 3000)
    yield given


@pytest.mark.parametrize("buffers", [2, 3, 9])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_streamed_weights_are_those_at_home(allocated, buffers, share):
    layers = network()
    weights = list(layers.parameters())
    expected = run(layers, run(layers, sample()))
    room = share * sum(map(size, layers))
    with streaming.Streamer(layers, DEVICE, buffers=buffers, resident_bytes=room) as streamer:
        assert sum(buffer.nbytes for buffer in allocated) == streamer.device_bytes
        assert torch.equal(run(layers, run(layers, sample())), expected)
        there = {buffer.untyped_storage().data_ptr() for buffer in allocated}
        last = {p.untyped_storage().data_ptr() for p in layers[-1].parameters()}
        assert last <= there
    assert all(now is was for now, was in zip(layers.parameters(), weights))
