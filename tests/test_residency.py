"""Components at home and on visit: of modules alone, and of the four pipelines on the virtual GPU."""

import collections
import contextlib
import functools
import gc
import itertools

import pytest
import torch
from PIL import Image
from torch import nn

import wan
from leanwan.options import LOW_VRAM
from leanwan.residency import Component, visit_when_called
from virtual_gpu import VirtualGPU, least_capacity
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.sampling import SOLVERS
from wan.utils.stages import Stages

# Components alone

FINE = 4096  # bytes; toys on a GPU that reserves in steps of 2 MiB would all need the same


def layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    return model.requires_grad_(False).eval()


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def places(*modules):
    return {tensor.device.type for module in modules for tensor in tensors(module)}


def is_home(module, before, gpu):
    same = all(now is then for now, then in zip(tensors(module), before))
    return same and places(module) == {"cpu"} and gpu.live == 0


def test_a_visit():
    model, x = layers(), torch.randn(2, 64)
    before, expected = tensors(model), model(x)
    with VirtualGPU() as gpu:
        component = Component([model], gpu.device)
        with component.on_device():
            assert places(model) == {"vgpu"} and gpu.live > 0
            assert torch.equal(model(x.to("vgpu")).cpu(), expected)
        assert is_home(model, before, gpu)
        moved = [r.allocation for r in gpu.record if r.kind == "copy_in"]
        assert not [r for r in gpu.record if r.kind == "copy_out" and r.allocation in moved]


def test_arriving_and_leaving_twice():
    model = layers()
    before = tensors(model)
    with VirtualGPU() as gpu:
        component = Component([model], gpu.device)
        component.leave()
        component.arrive()
        there, live = tensors(model), gpu.live
        component.arrive()
        assert all(now is then for now, then in zip(tensors(model), there)) and gpu.live == live
        del there
        component.leave()
        component.leave()
        assert is_home(model, before, gpu)


def test_no_room_leaves_everything_at_home():
    model = layers()
    before = tensors(model)
    with VirtualGPU(granularity=FINE) as gpu, Component([model], gpu.device).on_device():
        needed = gpu.reserved
    with VirtualGPU(capacity=needed - 1, granularity=FINE) as gpu:
        component = Component([model], gpu.device)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                component.arrive()
            gc.collect()
            assert is_home(model, before, gpu)
        gpu.capacity = needed
        with component.on_device():
            assert places(model) == {"vgpu"}


@pytest.mark.parametrize("stay", [False, True])
def test_an_exception_sends_it_home(stay):
    model = layers()
    before = tensors(model)
    with VirtualGPU() as gpu:
        component = Component([model], gpu.device)
        with pytest.raises(KeyboardInterrupt), component.on_device(stay=stay):
            raise KeyboardInterrupt
        assert is_home(model, before, gpu)


def test_staying():
    model = layers()
    before = tensors(model)
    with VirtualGPU() as gpu:
        component = Component([model], gpu.device)
        with component.on_device(stay=True):
            pass
        assert places(model) == {"vgpu"}
        moves = len([r for r in gpu.record if r.kind == "copy_in"])
        with component.on_device():
            assert len([r for r in gpu.record if r.kind == "copy_in"]) == moves
        assert is_home(model, before, gpu)


def test_what_lives_on_the_device_stays_there():
    model = layers()
    with VirtualGPU() as gpu:
        model[0].to("vgpu")
        live = gpu.live
        with Component([model], gpu.device).on_device():
            assert places(model) == {"vgpu"}
        assert places(model[0]) == {"vgpu"} and places(model[1], model[2]) == {"cpu"} and gpu.live == live


def test_what_is_apart_stays_home():
    model = layers()
    with VirtualGPU() as gpu, Component([model], gpu.device, apart=[model[2]]).on_device():
        assert places(model[0], model[1]) == {"vgpu"} and places(model[2]) == {"cpu"}


def test_visiting_for_each_call():
    model, x = layers(), torch.randn(2, 64)
    before, expected = tensors(model), model(x)
    with VirtualGPU() as gpu:
        visit_when_called(model, gpu.device)
        x = x.to("vgpu")
        for _ in range(2):
            out = model(x)
            assert places(model) == {"cpu"} and torch.equal(out.cpu(), expected)
        with pytest.raises(RuntimeError):
            model(x[:, 1:])
        del x, out
        gc.collect()
        assert is_home(model, before, gpu)


def test_on_a_cpu_nothing_moves():
    model = layers()
    before = tensors(model)
    with Component([model], "cpu").on_device():
        assert all(now is then for now, then in zip(tensors(model), before))


# The pipelines

FLAGS = [{}, {"vae_cpu": True}, {"t5_cpu": True}, {"vae_cpu": True, "t5_cpu": True}]
PIPELINES = {"t2v": wan.WanT2V, "i2v": wan.WanI2V, "flf2v": wan.WanFLF2V, "vace": wan.WanVace}
STAGES = {
    "t2v": ["text", "denoise", "decode"],
    "i2v": ["text", "image", "encode", "denoise", "decode"],
    "flf2v": ["text", "image", "encode", "denoise", "decode"],
    "vace": ["text", "encode", "denoise", "decode"],
}
every_task = pytest.mark.parametrize("task", PIPELINES)


def build(task, gpu, **memory):
    # Without tiles, for their number may depend on the memory that is free.
    name = f"{task}-tiny"
    memory = {"vae_tile": 0} | memory
    return PIPELINES[task](WAN_CONFIGS[name], random_models.checkpoint(name), device=gpu.device, **memory)


def generate(pipeline, task, **options):
    options = {"frame_num": 5, "sampling_steps": 1, "seed": 0, **options}
    image = Image.linear_gradient("L").resize((128, 96)).convert("RGB")
    if task == "t2v":
        return pipeline.generate("a red ball", size=(128, 96), **options)
    if task == "i2v":
        return pipeline.generate("a red ball", image, max_area=128 * 96, **options)
    if task == "flf2v":
        return pipeline.generate("a red ball", image, image.rotate(180), max_area=128 * 96, **options)
    rising = torch.linspace(-1, 1, 128).expand(3, 5, 96, 128)
    mask = (rising[:1] > 0).float()
    return pipeline.generate("a red ball", [rising], [mask], [[-rising[:, :1]]], size=(128, 96), **options)


def networks(pipeline):
    """The modules that have a home, by component."""
    found = {
        "text": [pipeline.text_encoder.model],
        "dit": [pipeline.model],
        "encoder": [pipeline.vae.model.encoder, pipeline.vae.model.conv1],
        "decoder": [pipeline.vae.model.decoder, pipeline.vae.model.conv2],
    }
    if hasattr(pipeline, "clip"):
        found["image"] = [pipeline.clip.model]
    return found


def homeless(pipeline, gpu, vae_cpu):
    """Names of components that are not where they belong, and what the device holds beside the VAE."""
    gc.collect()
    home = {name: {"cpu"} for name in networks(pipeline)}
    held = 0
    vae = pipeline.vae
    if not vae_cpu:
        home["encoder"] = home["decoder"] = {"vgpu"}
        statistics = {id(t): t for t in (vae.mean, vae.std, *vae.scale)}.values()
        held = sum(-(-t.nbytes // 512) * 512 for t in [*vae.model.parameters(), *statistics])
    wrong = [name for name, modules in networks(pipeline).items() if places(*modules) != home[name]]
    return wrong + [f"{gpu.live - held} bytes"] * (gpu.live != held)


@functools.cache  # the videos and counts are a few MB
def unlimited(task, vae_cpu=False, t5_cpu=False):
    """The video of a run with all the memory that it wants, its peak, the least capacity, and operators per stage."""
    operators = collections.Counter()
    with VirtualGPU(granularity=FINE, record_requests=True) as gpu:
        pipeline = build(task, gpu, vae_cpu=vae_cpu, t5_cpu=t5_cpu)
        gpu.on_op(lambda name: operators.update([pipeline.stages.current]))
        video = generate(pipeline, task)
        assert [stage.name for stage in pipeline.stages.history] == STAGES[task]
        assert not homeless(pipeline, gpu, vae_cpu)
    peak = max(stage.allocated for stage in pipeline.stages.history)
    return video, peak, least_capacity(gpu.allocator), operators


@every_task
def test_outputs_are_equal_and_peaks_ordered(task):
    videos, peaks, *_ = zip(*(unlimited(task, **flags) for flags in FLAGS))
    assert all(torch.equal(video, videos[0]) for video in videos)
    none, vae_cpu, t5_cpu, both = peaks
    assert both < t5_cpu < none and both < vae_cpu < none


@every_task
def test_streams_and_activations_in_ram_change_no_bit(task):
    videos = []
    streamed = {"dit_stream": 0.0, "activation_offload": True, "guidance_together": True, "vae_cpu": True}
    for memory in ({}, streamed):
        with VirtualGPU() as gpu:
            pipeline = build(task, gpu, dit_chunk=64, **memory)
            videos.append(generate(pipeline, task, sampling_steps=2))
            assert not homeless(pipeline, gpu, "vae_cpu" in memory)
    assert torch.equal(*videos)


WAYS = [{}, {"dit_stream": 0.0}, {"dit_stream": 0.0, "dit_chunk": 64, "guidance_together": True}]
WALKS = [(task, way, "unipc") for task in PIPELINES for way in WAYS] + [("t2v", WAYS[1], s) for s in SOLVERS]


@pytest.mark.parametrize("task, memory, solver", WALKS)
def test_the_device_is_asked_nothing_while_it_denoises(task, memory, solver, monkeypatch):
    """No copy to the host, which would wait until the device has computed what is copied."""
    walk = wan.pipeline.denoise

    def labelled(*args, **kwargs):
        with gpu.label("walk"):
            return walk(*args, **kwargs)

    monkeypatch.setattr(wan.pipeline, "denoise", labelled)
    with VirtualGPU() as gpu:
        generate(build(task, gpu, **memory), task, sampling_steps=3, sample_solver=solver)
    there = [r for r in gpu.record if r.label == "walk"]
    assert there and not [(r.name, r.nbytes) for r in there if r.kind == "copy_out"]


@every_task
def test_a_device_that_is_too_small_without_the_flags(task):
    """At the least capacity that the flags need at most, a run without them is out of memory as T5 works."""
    needed = [unlimited(task, **flags)[2] for flags in FLAGS]
    capacity = max(needed[1:])
    largest = FLAGS[1 + needed[1:].index(capacity)]
    with VirtualGPU(capacity, granularity=FINE) as gpu:
        pipeline = build(task, gpu)
        with pytest.raises(torch.OutOfMemoryError):
            generate(pipeline, task)
        assert [stage.name for stage in pipeline.stages.history] == ["text"]
        assert not homeless(pipeline, gpu, False)
    with VirtualGPU(capacity, granularity=FINE) as gpu:
        pipeline = build(task, gpu, **largest)
        assert torch.equal(generate(pipeline, task), unlimited(task)[0])
        assert not homeless(pipeline, gpu, largest.get("vae_cpu", False))


def watched(pipeline, gpu):
    """A list of (stage, names of the components that have anything on the device), sampled as operators run."""
    seen, counts = [], itertools.count()
    components = networks(pipeline)

    def look(name):
        stage = pipeline.stages.current
        if stage and (next(counts) % 100 == 0 or not seen or seen[-1][0] != stage):
            seen.append((stage, {n for n, modules in components.items() if "vgpu" in places(*modules)}))

    gpu.on_op(look)
    return seen


@every_task
def test_who_is_there_when(task):
    workers = {"text": "text", "image": "image", "encode": "encoder", "denoise": "dit", "decode": "decoder"}
    with VirtualGPU() as gpu:
        pipeline = build(task, gpu, vae_cpu=True)
        seen = watched(pipeline, gpu)
        for _ in range(2):
            assert torch.equal(generate(pipeline, task), unlimited(task)[0])
        arrived = {r.allocation for r in gpu.record if r.kind == "copy_in"}
        gone = {r.allocation for r in gpu.record if r.kind == "copy_out"}
    assert [stage for stage, _ in itertools.groupby(stage for stage, _ in seen)] == 2 * STAGES[task]
    for stage, there in seen:
        assert there <= {workers[stage]}, stage
    assert {stage for stage, there in seen if there} == set(STAGES[task])
    assert not arrived & gone  # what came, weights above all, is not copied back


@every_task
def test_only_half_of_the_vae_travels(task):
    with VirtualGPU() as gpu:
        pipeline = build(task, gpu, vae_cpu=True)
        halves = {"encode": "encoder", "decode": "decoder"}
        sizes = {
            stage: sum(p.nbytes for module in networks(pipeline)[half] for p in module.parameters())
            for stage, half in halves.items()
        }
        visits = {"t2v": {"decode": 1}, "vace": {"encode": 3, "decode": 1}}.get(
            task, {"encode": 1, "decode": 1}
        )
        moved = {}

        class Labelled(Stages):
            @contextlib.contextmanager
            def __call__(self, name):
                with gpu.label(name), super().__call__(name):
                    yield

        pipeline.stages = Labelled(gpu.device, lambda event: None)
        generate(pipeline, task)
        for r in gpu.record:
            if r.kind == "copy_in" and r.label in halves:
                moved[r.label] = moved.get(r.label, 0) + r.nbytes
    assert moved.keys() == visits.keys()
    for stage, times in visits.items():
        other = sizes["decode" if stage == "encode" else "encode"]
        assert times * sizes[stage] <= moved[stage] < times * sizes[stage] + other


class Injected(Exception):
    pass


@pytest.mark.parametrize(
    ("task", "memory"),
    [(task, {"vae_cpu": True}) for task in PIPELINES]
    + [(task, LOW_VRAM | {"vae_tile": 0}) for task in ("i2v", "vace")],
    ids=[*PIPELINES, "i2v-low_vram", "vace-low_vram"],
)
def test_nothing_stays_after_an_exception(task, memory):
    video, *_, operators = unlimited(task)
    with VirtualGPU() as gpu:
        pipeline = build(task, gpu, **memory)
        left = {}  # how many operators of a stage run until one fails

        def interfere(name):
            stage = pipeline.stages.current
            if stage in left:
                left[stage] -= 1
                if not left[stage]:
                    raise Injected

        gpu.on_op(interfere)
        for stage in STAGES[task]:
            left = {stage: operators[stage] // 2}
            with pytest.raises(Injected):
                generate(pipeline, task)
            assert pipeline.stages.history[-1].name == stage
            assert not homeless(pipeline, gpu, True), stage
        left = {}
        assert torch.equal(generate(pipeline, task), video)
        assert not homeless(pipeline, gpu, True)


def test_without_offload_the_models_stay_until_a_run_with_it():
    with VirtualGPU() as gpu:
        pipeline = build("i2v", gpu)
        weights = sum(
            p.nbytes for modules in networks(pipeline).values() for m in modules for p in m.parameters()
        )
        video = generate(pipeline, "i2v", offload_model=False)
        assert all(places(*modules) == {"vgpu"} for modules in networks(pipeline).values())
        moved = sum(r.nbytes for r in gpu.record if r.kind == "copy_in")
        assert torch.equal(generate(pipeline, "i2v", offload_model=False), video)
        assert sum(r.nbytes for r in gpu.record if r.kind == "copy_in") - moved < weights // 10
        seen = watched(pipeline, gpu)
        assert torch.equal(generate(pipeline, "i2v", offload_model=True), video)
        assert all(there == {"text", "encoder", "decoder"} for stage, there in seen if stage == "text")
        assert not homeless(pipeline, gpu, False)
