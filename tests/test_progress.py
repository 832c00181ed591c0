"""How far a run is, and when it will end: events with the time left, bars, one line of the end."""

import io
import re
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from leanwan.vae import tiles
from leanwan.vae.tiles import apply_tiling
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.modules.vae import WanVAE
from wan.run import Request
from wan.run.forecast import Forecast
from wan.utils import events, progress
from wan.utils.events import Expected, Finished, Pace, StageDone, StageStarted, Step, counted, listening
from wan.utils.stages import Stages


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(events.time, "monotonic", lambda: now.seconds)
    return now


def test_the_time_left_is_that_of_the_pace_so_far(clock):
    pace = Pace(start=10)
    assert pace.left(10, 20) is None
    clock.seconds += 6
    assert pace.left(12, 20) == pytest.approx(24)


def test_what_is_counted_tells_who_listens(clock):
    told = []
    with listening(told.append):
        for _ in counted("abc", 3, "Converting x"):
            clock.seconds += 2
    assert list(counted("ab", 2, "unheard")) == ["a", "b"]
    assert told == [Step("Converting x", done, 3) for done in (1, 2, 3)]
    assert [step.seconds_left for step in told] == [4, 2, 0]


def test_steps_that_were_taken_before_are_not_part_of_the_pace(clock):
    told = []
    stages = Stages("cpu", told.append)
    with stages("denoise"):
        for _ in stages.steps("xy", 50, 48):
            clock.seconds += 10
    assert [step.seconds_left for step in told if isinstance(step, Step)] == [10, 0]


def test_a_stage_is_told_of_calls_and_starts_anew(clock):
    told, layers = [], [nn.Identity(), nn.Identity()]
    stages = Stages("cpu", told.append)
    with stages("text"):
        with stages.calls(layers, rounds=2):
            for layer in layers * 2:
                layer(torch.zeros(1))
        count = stages.counter()
        for done, total in ((1, 4), (2, 4), (1, 9), (2, 9)):
            clock.seconds += 1
            count(done, total)
    layers[0](torch.zeros(1))
    stages.counter()(1, 2)  # nothing is under way
    steps = [event for event in told if isinstance(event, Step)]
    assert steps[:4] == [Step("text", done, 4) for done in (1, 2, 3, 4)]
    assert [step.seconds_left for step in steps[4:]] == [None, 2, None, 7]


def test_the_vae_tells_its_tiles(monkeypatch):
    config = WAN_CONFIGS["t2v-tiny"]
    path = random_models.checkpoint("t2v-tiny") / config.vae_checkpoint
    vae, told = WanVAE(vae_pth=path, device="cpu", dim=config.vae_dim), []
    latent = torch.randn(16, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    undo = apply_tiling(vae, 64)
    plain = vae.decode([latent])[0]
    undo()
    apply_tiling(vae, 64, on_frame=lambda done, total: told.append((done, total)))
    assert torch.equal(vae.decode([latent])[0], plain)
    assert told == [(done, 4) for done in range(1, 5)]  # two tiles of two latent frames
    told.clear()
    vae.encode([plain])
    assert told == [(done, 10) for done in range(1, 11)]  # of five frames
    run_pass, failures = tiles.run_pass, [torch.OutOfMemoryError("full")]

    def failing(*args):
        run_pass(*args)
        if failures:
            raise failures.pop()

    told.clear()
    monkeypatch.setattr(tiles, "run_pass", failing)
    monkeypatch.setattr(tiles.torch, "get_device_module", lambda _: SimpleNamespace(empty_cache=lambda: None))
    tiles.decode(vae.model, latent, vae.scale, 128, on_frame=lambda *step: told.append(step))
    assert told == [(1, 2), (2, 2), *[(done, 4) for done in range(1, 5)]]


def drawn(*told, monkeypatch):
    """What is drawn and logged of some events."""
    screen, lines = io.StringIO(), []
    make = progress.tqdm
    monkeypatch.setattr(progress, "tqdm", lambda **given: make(**given, file=screen, mininterval=0))
    monkeypatch.setattr(progress.log, "info", lines.append)
    bars = progress.ProgressBars()
    for event in told:
        bars(event)
    return re.split(r"[\r\n]+", screen.getvalue()), lines


def test_bars_follow_whatever_is_told(monkeypatch):
    told = [Step("Loading a", 1, 2), Step("Checking b", 1, 1), StageStarted("decode"), Step("decode", 1, 4)]
    told += [Step("decode", 2, 4), Step("decode", 1, 9), StageDone("decode", 2.0), Step("denoise", 31, 50)]
    bars, lines = drawn(*told, monkeypatch=monkeypatch)
    text = " ".join(bars)
    for shown in ("Loading a:  50%", "Checking b: 100%", "Decode:  50%", "Decode:  11%", "Denoise:  62%"):
        assert shown in text
    assert lines == ["Stage decode: 2.0 s"]


def test_the_end_is_told_once_unless_it_moves(monkeypatch, tmp_path):
    now = datetime.now()
    ends = [now + timedelta(seconds=s) for s in (7200, 7230, 6900, 12000, 12001)]
    _, lines = drawn(*map(Expected, ends), Finished(tmp_path), monkeypatch=monkeypatch)
    assert len(lines) == 3 and lines[0].startswith("The run will end at about ")
    assert lines[0].endswith("in 2 h 0 min") and lines[1].endswith("in 3 h 20 min")


def test_a_run_ends_after_what_is_left_of_it():
    class Model:
        blocks, dim = nn.ModuleList(nn.Linear(100, 100, bias=False) for _ in range(3)), 100

    pipeline = SimpleNamespace(model=Model, device=torch.device("cpu"), config={"vae_dim": 96})
    request = Request(task="t2v-tiny", size="128*96", frame_num=17)
    forecast = Forecast(request, pipeline)
    seconds = lambda event: (forecast.end_after(event) - datetime.now()).total_seconds()  # noqa: E731
    assert forecast.end_after(Step("denoise", 1, 10)) is None  # no pace yet
    assert forecast.end_after(Step("text", 1, 10, 5.0)) is None  # what is to come is not known yet
    pixels, tokens = 128 * 96 * 17, 128 * 96 * 17 / 4 / 256
    dit = 2 * (2 * 30000 * tokens + 4 * 3 * 100 * tokens**2)
    later = 8.2e6 * pixels / dit * 2 + pixels / 1e7
    assert seconds(Step("denoise", 5, 10, 10.0)) == pytest.approx(10 + later, rel=0.01)
    assert seconds(Step("decode", 5, 10, 10.0)) == pytest.approx(10 + pixels / 1e7, rel=0.01)
    pipeline.device = torch.device("cuda")
    assert seconds(Step("denoise", 5, 10, 10.0)) == pytest.approx(10 + 4 * later, rel=0.05)
