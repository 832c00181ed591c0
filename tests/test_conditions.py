"""Conditions computed ahead, and both prompts per visit: the same bits, and each byte copied as often as must be."""

import contextlib
import os

import pytest
import torch
from test_activation_offload import on
from test_chunking import KINDS, make_inputs, make_model

from leanwan.activations import ActivationOffload, apply_activation_offload
from leanwan.dit.ahead import _Kept, streamed_ahead
from leanwan.dit.conditioning import context_layers
from leanwan.dit.forward import cross_attentions
from leanwan.streaming import Streamer
from virtual_gpu import RaceError, VirtualGPU

TIMES = (999.0, 500.0)
ALIGNMENT = 256


def calls(kind, length, samples=1):
    """Arguments of two steps with two prompts each; with two samples both prompts are in one call."""
    inputs = make_inputs(kind, length)
    (prompt,) = inputs["context"]
    prompts = [prompt, prompt[:3] * 0.5]
    for t in TIMES:
        for given in [[p] for p in prompts] if samples == 1 else [prompts]:
            call = inputs | {"t": torch.tensor([t] * samples), "context": given}
            for name in ("x", "y", "vace_context"):
                if name in call:
                    call[name] = call[name] * samples
            if "clip_fea" in call:
                call["clip_fea"] = call["clip_fea"].repeat(samples, 1, 1)
            yield call


@contextlib.contextmanager
def streamed(model, gpu, kind, length):
    """The model's layer groups pass through the device, its conditions are computed ahead."""
    inputs = on(gpu.device, list(calls(kind, length, 2))[0]["context"])
    clip = make_inputs(kind, length).get("clip_fea")
    times = [torch.tensor([t], device=gpu.device) for t in TIMES]
    made = []

    def make_streamer(groups, device):
        made.append(Streamer(groups, device))
        return made[0]

    given = (model, gpu.device, times, inputs, clip, model.compute_dtype, make_streamer)
    with streamed_ahead(*given) as ahead:
        yield ahead, made[0]


def conditions(ahead, samples=1):
    """Those of each call, as `calls` gives them."""
    for time in range(len(TIMES)):
        for prompts in [[0], [1]] if samples == 1 else [[0, 1]]:
            yield [ahead(time, prompt) for prompt in prompts]


def flows(model, gpu, kind, length, ahead, samples=1, **options):
    results = []
    for call, given in zip(calls(kind, length, samples), conditions(ahead, samples), strict=True):
        call = {name: on(gpu.device, value) for name, value in call.items()}
        results += model(**call, conditions=given, **options)
    return [flow.cpu() for flow in results]


def expected_flows(model, kind, length, chunk):
    return [flow for call in calls(kind, length) for flow in model(**call, chunk=chunk)]


@pytest.mark.parametrize(
    ("dtype", "length", "chunk"),
    [(torch.float32, 40, 0), (torch.bfloat16, 97, 64)],
    ids=["whole", "offloaded"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bits(kind, dtype, length, chunk):
    model = make_model(kind, dtype)
    expected = expected_flows(model, kind, length, chunk)
    with VirtualGPU() as gpu:
        undo = apply_activation_offload(model, gpu.device, chunk, heads=3) if chunk else lambda: None
        with streamed(model, gpu, kind, length) as (ahead, _):
            for samples, together in [(1, False), (2, False), (2, True)]:
                found = flows(model, gpu, kind, length, ahead, samples, together=together, chunk=chunk)
                assert all(map(torch.equal, found, expected)), (samples, together)
        undo()
        assert gpu.live == 0
    assert "forward" not in vars(model)


def in_turns(gpu, model, heads=None):
    """A call of a short and a longer sample, in turns, and what each gives alone."""
    one, other = make_inputs("t2v", 40), make_inputs("t2v", 150)
    both = one | {"t": torch.tensor([500.0, 400.0]), "seq_len": 150}
    both |= {name: one[name] + other[name] for name in ("x", "context")}
    expected = model(**both, chunk=128)
    model.to(gpu.device)
    undo = apply_activation_offload(model, gpu.device, 128, heads)
    found = model(**{k: on(gpu.device, v) for k, v in both.items()}, chunk=128, together=True)
    found = [flow.cpu() for flow in found]
    undo()
    model.to("cpu")
    return found, expected


def test_samples_of_different_lengths_in_turns(monkeypatch):
    model = make_model("t2v")
    for heads in (None, 1, 3):
        with VirtualGPU() as gpu:
            assert all(map(torch.equal, *in_turns(gpu, model, heads)))

    allocate = ActivationOffload._allocate

    def hasty(place, slots, count, nbytes):
        for slot in slots:
            slot.free = place.compute_stream().record_event()
        allocate(place, slots, count, nbytes)

    monkeypatch.setattr(ActivationOffload, "_allocate", hasty)
    with pytest.raises(RaceError), VirtualGPU() as gpu:
        in_turns(gpu, make_model("t2v"))


@pytest.mark.skipif(
    "WAN_WIDE_SWEEP" not in os.environ, reason="minutes of cases, asked for by WAN_WIDE_SWEEP=1"
)
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way(kind, dtype, together):
    """Head groups of each size, one that leaves a remainder among them; chunks and lengths that leave odd rests."""
    model = make_model(kind, dtype)
    for length, chunk in [(40, 0), (97, 64), (131, 97), (131, 0), (225, 70)]:
        expected = expected_flows(model, kind, length, chunk)
        for heads in (1, 2, 3, 4, None):
            with VirtualGPU() as gpu:
                undo = apply_activation_offload(model, gpu.device, chunk, heads)
                with streamed(model, gpu, kind, length) as (ahead, _):
                    for samples in (1, 2):
                        found = flows(
                            model, gpu, kind, length, ahead, samples, together=together, chunk=chunk
                        )
                        assert all(map(torch.equal, found, expected)), (length, chunk, heads, samples)
                undo()


def test_what_is_constant_is_not_called_again():
    model = make_model("i2v")
    expected = expected_flows(model, "i2v", 40, 0)
    with VirtualGPU() as gpu, streamed(model, gpu, "i2v", 40) as (ahead, _):
        constant = [
            *model.embedding_layers(),
            *(layer for attention in cross_attentions(model) for layer in context_layers(attention)),
        ]
        for layer in constant:
            for parameter in layer.parameters():
                parameter.data.fill_(torch.nan)
        assert all(map(torch.equal, flows(model, gpu, "i2v", 40, ahead), expected))


def layout(groups):
    """Bytes of the parameters of groups as they are laid out on the device."""
    sizes = [p.nbytes for group in groups for p in group.parameters()]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def settled(gpu, streamer):
    """How much is on record when the worker has enqueued all that it was given."""
    streamer._worker.submit(lambda: None).result()
    return len(gpu.record)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_step(kind):
    """Each weight of a group once a visit, and of what is constant only keys and values, and the time."""
    model, length = make_model(kind, torch.bfloat16), 40
    attentions = cross_attentions(model)
    tokens = 2 * 8 + (257 if kind == "i2v" else 0)  # of two texts, and an image
    with VirtualGPU() as gpu, streamed(model, gpu, kind, length) as (ahead, streamer):
        kept = [module for group in ahead.groups for module in group.modules() if isinstance(module, _Kept)]
        of_context = sum(p.nbytes for module in kept for p in module.parameters())
        assert len(kept) == len(attentions)
        assert of_context == len(attentions) * tokens * 2 * model.dim * 2  # keys and values in bf16

        def copied(samples, together):
            inputs = [{n: on(gpu.device, v) for n, v in c.items()} for c in calls(kind, length, samples)]
            start = settled(gpu, streamer)
            for call, given in zip(inputs, conditions(ahead, samples), strict=True):
                model(**call, together=together, conditions=given)
            settled(gpu, streamer)
            return sum(r.nbytes for r in gpu.record[start:] if r.kind == "copy_in")

        copied(1, False)  # the ring is filled
        of_time = 2 * 2 * (1 + 6) * model.dim * 4  # of two steps and prompts
        rope = model.freqs.nbytes * 2 * 2
        assert copied(1, False) == 2 * 2 * layout(ahead.groups) + of_time + rope
        assert copied(2, True) == 2 * layout(ahead.groups) + of_time + rope
