"""What plans know of a card: cuBLAS' workspaces, the memory of its attention, and rates by what will run."""

import contextlib
import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch

import wan.run.plan_request
from leanwan.accelerator import WORKSPACE_VARIABLE
from leanwan.budget import Budget
from leanwan.errors import InputError
from leanwan.options import LOW_VRAM, MemoryOptions
from virtual_gpu import VirtualGPU
from wan.modules import attention
from wan.modules.attention import FUSED, IN_PIECES, fused_on
from wan.modules.model import WanModel
from wan.planning import rates
from wan.planning.plan import GIB
from wan.planning.predict.blocks import Shape, Way, forward_pass
from wan.planning.predict.card import Card, beside_attention
from wan.planning.predict.work import meta_model
from wan.planning.rates import rates_of, usual
from wan.run import Request
from wan.run.plan_request import card_of, plan, planner_for, planner_of, planner_within
from wan.run.request import PLANNED

CARD = torch.device("cuda:0")
BUDGET = Budget(None, free=4 * GIB, total=8 * GIB)
TURING, AMPERE, HOPPER = (7, 5), (8, 6), (9, 0)
MIB = 2**20
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(WORKSPACE_VARIABLE, raising=False)


def request_of(task="t2v-1.3B", size="832*480", **settings):
    return Request(task=task, size=size, ckpt_dir="Wan-AI/any", **settings)


def stages_of(request, card, **memory):
    options = MemoryOptions(**memory)
    return planner_of(dataclasses.replace(request, memory=options), usual(GIB), card=card).of(options).stages


@pytest.mark.parametrize(
    ("task", "size", "measured"),
    [
        ("t2v-1.3B", "832*480", {"text": 306332672, "denoise": 338390528, "decode": 555784704}),
        ("t2v-14B", "1280*720", {"text": 306332672, "denoise": 724939776, "decode": 728630784}),
    ],
)
def test_predicted_is_what_pytorch_counts(task, size, measured):
    """Its CUDA allocator's peaks at full size, PyTorch 2.10 playing a card of capability 8.6."""
    stages = stages_of(request_of(task, size), Card(AMPERE), **LOW_VRAM)
    assert {name: stage.bytes for name, stage in stages.items()} == measured


@pytest.mark.parametrize(
    ("task", "memory", "expected"),
    [
        ("t2v-1.3B", {}, {"text": 8 * MIB, "denoise": 9 * MIB, "decode": 9 * MIB}),
        ("t2v-1.3B", {"t5_cpu": True}, {"text": 0, "denoise": 9 * MIB, "decode": 9 * MIB}),
        ("vace-1.3B", {"t5_cpu": True}, {"text": 0, "encode": 0, "denoise": 9 * MIB, "decode": 9 * MIB}),
        ("vace-1.3B", {}, {"text": 8 * MIB, "encode": 8 * MIB, "denoise": 9 * MIB, "decode": 9 * MIB}),
        ("i2v-14B", {}, dict.fromkeys(("image", "encode", "denoise", "decode"), 9 * MIB) | {"text": 8 * MIB}),
    ],
)
def test_workspaces_come_with_the_first_products_and_stay(task, memory, expected):
    """In whole runs and in stages alone."""
    request = request_of(task, frame_num=5)
    plain = {name: nbytes + (128 * 2**10 if nbytes else 0) for name, nbytes in expected.items()}
    exact = {name: 33 * MIB if nbytes else 0 for name, nbytes in expected.items()}
    for offload in (True, False):
        options = MemoryOptions(dit_stream=0.0, offload_model=offload, **memory)
        counted = planner_of(request, usual(GIB)).predictor
        for card, there in ((Card(TURING), plain), (Card(TURING, exact=True), exact)):
            predictor = planner_of(request, usual(GIB), card=card).predictor
            bare, stages = counted.stages(options), predictor.stages(options)
            for name, wanted in there.items():
                assert stages[name].bytes - bare[name].bytes == wanted, name
                assert predictor.live(name, options) - counted.live(name, options) == wanted, name


@pytest.mark.parametrize(("heads", "score_bytes"), [(1, 2**27), (4, 2**27), (4, 2000), (4, 2 * 100 * 24 * 4)])
@pytest.mark.parametrize("chunk", [0, 128])
def test_attention_in_pieces_takes_what_is_counted(monkeypatch, heads, score_bytes, chunk):
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    monkeypatch.setattr(attention, "kernel_of", lambda *_: IN_PIECES)
    sizes = {"dim": 48, "ffn_dim": 12, "num_heads": heads, "num_layers": 1, "text_dim": 16, "text_len": 8}
    model, shape = meta_model(lambda: WanModel(**sizes), BF16), (16, 2, 32, 32)
    way = Way(chunk=chunk, card=Card(kernel=IN_PIECES))
    predicted = forward_pass(model, Shape(shape), way, itemsize=2, samples=1)
    with VirtualGPU(meta=True) as gpu, torch.no_grad():
        model.to(gpu.device).compute_dtype = BF16
        x, t, context = (torch.zeros(*size, device=gpu.device) for size in (shape, (1,), (8, 16)))
        gpu.reset_peak()
        before = gpu.live
        model([x], t, [context], 512, chunk=chunk)
        assert gpu.peak - before == predicted.peak


@pytest.mark.parametrize(
    ("capability", "kernel", "itemsize", "expected"),
    [
        (AMPERE, FUSED, 2, 163840 + 1024),  # all of these as PyTorch 2.10 asked for them
        (HOPPER, FUSED, 2, 163840 + 1024),
        (TURING, FUSED, 2, 0),  # fp16
        (TURING, FUSED, 4, 0),
        (HOPPER, FUSED, 4, 0),
    ],
)
def test_what_kernels_make_beside_their_result(capability, kernel, itemsize, expected):
    beside = beside_attention(Card(capability, kernel), 40, 1024, 75600, 128, itemsize)
    assert sum(-(-nbytes // 512) * 512 for nbytes in beside) == expected


def test_a_card_without_a_fused_kernel_needs_more():
    """What a head's keys, values and rows take in fp32, where attention is what takes most."""
    request = request_of("t2v-14B", "1280*720")
    options = {"dit_stream": 0.0, "vae_cpu": True, "vae_tile": 128, "dit_chunk": 1024}
    pieces, fused = (
        stages_of(request, Card(TURING, kernel), **options)["denoise"] for kernel in (IN_PIECES, FUSED)
    )
    assert 50 * MIB < pieces.bytes - fused.bytes < 2 * 4 * 128 * (75600 + 1024)


def test_planned_cards_have_the_attention_of_their_capability():
    assert not fused_on(TURING, BF16) and fused_on(TURING, FP16) and fused_on(TURING, FP32)
    assert fused_on((8, 0), BF16) and not fused_on((7, 0), BF16)
    request = request_of()
    assert planner_within(request, 8 * GIB).card == Card(AMPERE)
    assert planner_within(dataclasses.replace(request, exact=True), 80 * GIB).card == Card(HOPPER, exact=True)


def test_plans_without_a_card_count_the_workspaces(monkeypatch):
    """Of the card that is planned for, in the mode that is asked for."""
    request = request_of(frame_num=5, planned=PLANNED)
    peaks = [
        plan(dataclasses.replace(request, exact=exact), vram=0, ram=64 * GIB).stages["decode"].bytes
        for exact in (False, True)
    ]
    assert peaks[1] - peaks[0] == 2**25 - 8519680


# Cards that are there


@pytest.fixture
def card(monkeypatch):
    """Plays a card of capability 7.5 to planning; calls are noted in what is returned."""
    seen = SimpleNamespace(kernel=IN_PIECES, choices=[], rates=[], made=[])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: TURING)
    empty = torch.empty

    def made(*size, device=None, **rest):
        seen.made.append(size)
        return empty(*size, **rest)

    def kernel_of(q, k, v, choice):
        seen.choices.append((q.shape, q.dtype, choice))
        return seen.kernel

    def measured(device, cache, known, choice):
        seen.rates.append((known, choice, os.environ.get(WORKSPACE_VARIABLE)))
        return usual(GIB)

    planning = wan.run.plan_request
    monkeypatch.setattr(torch, "empty", made)
    monkeypatch.setattr(planning, "kernel_of", kernel_of)
    monkeypatch.setattr(planning, "rates_of", measured)
    monkeypatch.setattr(planning, "budget_on", lambda *_: BUDGET)
    monkeypatch.setattr(planning, "configure_allocator", lambda device: False)
    planning._kernel_on.cache_clear()
    yield seen
    planning._kernel_on.cache_clear()


def test_a_card_is_asked_for_its_attention_once(card):
    request = request_of(attention="sdpa")
    assert card_of(request, CARD) == card_of(request, CARD) == Card(TURING, IN_PIECES)
    assert card.choices == [((1, 1, 1, 128), BF16, "sdpa")] and len(card.made) == 1
    assert card_of(request, torch.device("vgpu")) == Card()


def test_attention_that_cannot_run_is_refused_before_anything_is_measured(card):
    with pytest.raises(InputError, match="pip install"):
        planner_for(request_of(attention="flash"), CARD)
    assert not card.rates and not card.made


@pytest.mark.parametrize(("exact", "workspace"), [(False, None), (True, ":4096:8")])
def test_what_is_in_force_is_what_is_planned_with(card, exact, workspace):
    """The workspace's size is read at the first product of a process, which measuring has."""
    planner, budget = planner_for(request_of(exact=exact), CARD)
    assert budget is BUDGET and not planner.expandable
    assert planner.card == planner.predictor.card == Card(TURING, IN_PIECES, exact)
    assert card.rates == [(planner.card, "auto", workspace)]
    assert WORKSPACE_VARIABLE not in os.environ


def test_rates_are_measured_by_what_will_run(monkeypatch):
    """Within half a GiB, also where the scores are there."""
    asked = []

    def kernel_of(q, k, v, causal, choice):
        asked.append((q.dtype, choice))
        return IN_PIECES

    monkeypatch.setattr(attention, "kernel_of", kernel_of)
    with VirtualGPU(GIB // 2, meta=True) as gpu, contextlib.suppress(NotImplementedError):
        rates.measure(gpu.device, usual(GIB), "sdpa")
    assert set(asked) == {(BF16, "sdpa")} and gpu.peak > 128 * MIB


def test_rates_are_remembered_by_what_ran(monkeypatch, tmp_path):
    """Other kernels and other arithmetic have others."""
    properties = SimpleNamespace(name="a card", multi_processor_count=40, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    measured = []

    def measure(device, others, choice):
        measured.append(choice)
        return dataclasses.replace(others, products=float(len(measured)))

    monkeypatch.setattr(rates, "measure", measure)
    cards = [Card(TURING, IN_PIECES), Card(TURING, "flash-attn 2"), Card(TURING, IN_PIECES, exact=True)]
    for _ in range(2):
        found = [rates_of(CARD, tmp_path / "rates.json", one, "auto").products for one in cards]
        assert found == [1, 2, 3] and len(measured) == 3
