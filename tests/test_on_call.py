"""What is constant of a DiT's passes, computed once, for a caller that does not say what comes next."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from test_retrofit import dit_inputs, make_pipeline

from leanwan import attach
from leanwan.dit import ahead
from leanwan.dit.ahead import PROMPTS
from virtual_gpu import VirtualGPU

LEAN = {"dit_stream": 0.0, "dit_chunk": 64}


@pytest.fixture
def gpu():
    with VirtualGPU() as gpu:
        yield gpu
        assert gpu.live == 0


@pytest.fixture
def counted():
    """How many times and prompts have been embedded."""
    counts = SimpleNamespace(times=0, prompts=0)

    def of(name, function):
        def call(*args):
            setattr(counts, name, getattr(counts, name) + 1)
            return function(*args)

        return call

    with (
        mock.patch.object(ahead, "embed_time", of("times", ahead.embed_time)),
        mock.patch.object(ahead, "embed_text", of("prompts", ahead.embed_text)),
    ):
        yield counts


def prompts_of(count):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2 + n % 7, 20, generator=generator) for n in range(count)]


def flow(model, device, **changes):
    inputs = dit_inputs(device) | {name: _to(value, device) for name, value in changes.items()}
    return model(**inputs)[0].cpu()


def _to(value, device):
    return [item.to(device) for item in value] if isinstance(value, list) else value.to(device)


def test_a_walk_embeds_each_time_and_prompt_once(gpu, counted):
    """As programs walk: with a time for both prompts. Tensors are made anew for each call, with the same contents."""
    pipeline, prompts = make_pipeline(), prompts_of(2)
    times = [torch.tensor([t]) for t in (900.0, 500.0, 100.0)]
    expected = [flow(pipeline.model, "cpu", t=t, context=[prompt]) for t in times for prompt in prompts]
    undo = attach(pipeline, device="vgpu", **LEAN)
    found = [flow(pipeline.model, "vgpu", t=t, context=[prompt]) for t in times for prompt in prompts]
    assert all(map(torch.equal, found, expected))
    assert (counted.times, counted.prompts) == (3, 2)
    undo()


def test_more_prompts_than_are_kept(gpu, counted):
    pipeline, prompts = make_pipeline(), prompts_of(PROMPTS + 2)
    expected = [flow(pipeline.model, "cpu", context=[prompt]) for prompt in prompts]
    undo = attach(pipeline, device="vgpu", **LEAN)
    for _ in range(2):
        assert all(map(torch.equal, (flow(pipeline.model, "vgpu", context=[p]) for p in prompts), expected))
    many = flow(
        pipeline.model,
        "vgpu",
        x=dit_inputs("cpu")["x"] * len(prompts),
        context=prompts,
        t=torch.full((6,), 500.0),
    )
    assert torch.equal(many, expected[0]), "more at once than are kept"
    undo()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_written_over_is_another(mode):
    pipeline = make_pipeline()
    t, prompt = torch.tensor([900.0]), prompts_of(1)[0]
    expected = [
        flow(pipeline.model, "cpu", t=t, context=[prompt]),
        flow(pipeline.model, "cpu", t=t - 300, context=[2 * prompt]),
    ]
    undo = attach(pipeline, device="cpu", **LEAN)
    with mode():
        inputs = dit_inputs("cpu") | {"t": t.to("cpu"), "context": [prompt.to("cpu")]}
        first = pipeline.model(**inputs)[0].cpu()
        inputs["t"].sub_(300)
        inputs["context"][0].mul_(2)
        second = pipeline.model(**inputs)[0].cpu()
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    undo()


def test_image_features(gpu):
    pipeline = make_pipeline(model_type="i2v", in_dim=20)
    generator = torch.Generator().manual_seed(4)
    images = [torch.randn(1, 257, 1280, generator=generator) for _ in range(2)]
    given = {"y": [torch.ones(4, 3, 8, 6)]}
    expected = [flow(pipeline.model, "cpu", clip_fea=image, **given) for image in images]
    undo = attach(pipeline, device="vgpu", **LEAN)
    for _ in range(2):
        found = [flow(pipeline.model, "vgpu", clip_fea=image, **given) for image in images]
        assert all(map(torch.equal, found, expected))
    undo()


def test_a_failing_pass_leaves_the_device_empty(gpu):
    pipeline = make_pipeline()
    undo = attach(pipeline, device="vgpu", **LEAN)
    handle = pipeline.model.head.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flow(pipeline.model, "vgpu")
    handle.remove()
    assert gpu.live == 0
    assert flow(pipeline.model, "vgpu").isfinite().all()
    undo()
