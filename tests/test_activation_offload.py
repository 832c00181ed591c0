"""Activations in RAM: the bits of the pass on the device, and copies that streams and events order."""

import contextlib
import gc

import pytest
import torch
from test_chunking import SIZES, make_inputs, make_model

from leanwan import activations
from leanwan.activations import ActivationOffload, apply_activation_offload
from leanwan.dit.chunks import apply_chunking
from virtual_gpu import RaceError, VirtualGPU

KINDS = ("t2v", "i2v", "vace")
HEADS = SIZES["num_heads"]


def on(device, value):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [on(device, v) for v in value] if isinstance(value, list) else value


def run(model, inputs, gpu=None, **options):
    """The flows, of the device if there is one."""
    if gpu is None:
        return model(**inputs, **options)
    flows = model(**{name: on(gpu.device, value) for name, value in inputs.items()}, **options)
    return [flow.cpu() for flow in flows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits(kind, dtype):
    for heads, chunk, length, pin_limit in [
        (1, 64, 150, None),
        (2, 64, 150, 0),
        (3, 97, 210, 50_000),
        (4, 70, 105, None),
        (None, 64, 40, None),
        (1, 0, 150, None),
    ]:
        model, inputs = make_model(kind, dtype), make_inputs(kind, length)
        expected = run(model, inputs, chunk=chunk)[0]
        with VirtualGPU(pin_limit=pin_limit) as gpu:
            undo = apply_activation_offload(model, gpu.device, chunk, heads)
            model.to(gpu.device)
            live = gpu.live
            for _ in range(2):
                assert torch.equal(run(model, inputs, gpu, chunk=chunk)[0], expected), (heads, chunk)
            assert gpu.live == live
            undo()
            assert torch.equal(run(model, inputs, gpu, chunk=chunk)[0], expected)


def test_two_samples():
    model = make_model("t2v")
    first, second = make_inputs("t2v", 150), make_inputs("t2v", 140)
    both = first | {"t": torch.tensor([500.0, 400.0])}
    both |= {name: first[name] + second[name] for name in ("x", "context")}
    expected = run(model, both, chunk=64)
    with VirtualGPU() as gpu:
        apply_activation_offload(model, gpu.device, 64, 3)
        model.to(gpu.device)
        assert all(map(torch.equal, run(model, both, gpu, chunk=64), expected))


def test_what_grows_with_the_length_is_a_few_heads():
    """Device bytes beside weights, over lengths: 2 (keys, values) times 2 (buffers) of one head, and the latents."""
    model, peaks = make_model("t2v", torch.bfloat16), []
    lengths = (1000, 5000)
    with VirtualGPU(meta=True) as gpu, torch.no_grad():
        model.to(gpu.device)
        apply_activation_offload(model, gpu.device, 64, 1)
        for length in lengths:
            inputs = make_inputs("t2v", length)
            inputs["x"] = [x.to(gpu.device) for x in inputs["x"]]
            gpu.reset_peak()
            before = gpu.live
            run(model, inputs, gpu, chunk=64)
            peaks.append(gpu.peak - before)
    per_token = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    head_dim = SIZES["dim"] // HEADS
    latent = 16 * 4 * 4  # bytes of a token's numbers
    assert per_token <= 2 * 2 * head_dim * 2 + 4 * latent


@pytest.mark.parametrize("kind", ["t2v", "vace"])
def test_bytes_that_travel(kind):
    """Of a pass in bf16, per token and channel: the residual stream in fp32, all else in two bytes."""
    model, inputs = make_model(kind, torch.bfloat16), make_inputs(kind, 150)
    # The stream for keys, queries, both attentions' sums and the FFN; keys, values, queries and attention output.
    visits = 5 * 4 + 4 * 2
    leaves = 3 * 4 + 4 * 2  # the stream with each sum; the same
    blocks = SIZES["num_layers"] + (kind == "vace")
    visits, leaves = blocks * visits + 4, blocks * leaves + 4  # the head; the embedded patches
    if kind == "vace":  # before_proj: both streams come and one leaves; after_proj: both come and one leaves
        visits, leaves = visits + 4 * 4, leaves + 3 * 4
    with VirtualGPU() as gpu:
        model.to(gpu.device)
        apply_activation_offload(model, gpu.device, 64, 2)
        inputs = {name: on(gpu.device, value) for name, value in inputs.items()}
        start = len(gpu.record)
        model(**inputs, chunk=64)
        copied = {
            kind: sum(r.nbytes for r in gpu.record[start:] if r.kind == kind)
            for kind in ("copy_in", "copy_out")
        }
    number = 150 * SIZES["dim"]
    assert copied == {"copy_in": number * visits + model.freqs.nbytes, "copy_out": number * leaves}


def test_page_locked_up_to_a_bound_and_kept():
    model, inputs = make_model("t2v"), make_inputs("t2v", 150)
    with VirtualGPU(pin_limit=120_000) as gpu:
        model.to(gpu.device)
        undo = apply_activation_offload(model, gpu.device, 64, 2)
        run(model, inputs, gpu, chunk=64)
        pinned = gpu.pinned
        assert 0 < pinned <= 120_000
        allocated = sum(r.kind == "pin" for r in gpu.record)
        run(model, inputs, gpu, chunk=64)
        assert gpu.pinned == pinned and sum(r.kind == "pin" for r in gpu.record) == allocated
        undo()
        gc.collect()
        assert gpu.pinned == 0


def test_applied_and_undone():
    model = make_model("vace")
    before = dict(vars(model))
    apply_activation_offload(model, "cpu", 64)()
    with VirtualGPU() as gpu:
        undo_chunks = apply_chunking(model, 64)
        undo = apply_activation_offload(model, gpu.device, 64)
        with pytest.raises(RuntimeError, match="activation_offload"):
            apply_activation_offload(model, gpu.device, 64)
        undo_chunks()
        undo()
        undo()
        assert vars(model) == before


def test_an_exception_leaves_nothing_on_the_device(monkeypatch):
    model, inputs = make_model("t2v"), make_inputs("t2v", 150)
    expected = run(model, inputs, chunk=64)[0]
    with VirtualGPU() as gpu:
        model.to(gpu.device)
        apply_activation_offload(model, gpu.device, 64)
        live = gpu.live
        with monkeypatch.context() as patch:
            patch.setattr(model.blocks[1].ffn[1], "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(model, inputs, gpu, chunk=64)
        gc.collect()
        assert gpu.live == live
        assert torch.equal(run(model, inputs, gpu, chunk=64)[0], expected)


# Each ordering that is left out is a race


def race():
    model, inputs = make_model("t2v"), make_inputs("t2v", 210)
    with VirtualGPU() as gpu:
        model.to(gpu.device)
        apply_activation_offload(model, gpu.device, 64, 1)
        run(model, inputs, gpu, chunk=64)


def deaf(method, stream_of):
    """The method, while a stream does not wait for any event."""

    def call(*args, **kwargs):
        place = next(a for a in args if isinstance(a, ActivationOffload) or hasattr(a, "_place"))
        stream = stream_of(getattr(place, "_place", place))
        stream.wait_event = lambda event: None
        try:
            return method(*args, **kwargs)
        finally:
            del stream.wait_event

    return call


def test_no_race_in_order():
    race()


@pytest.mark.parametrize(
    ("owner", "method", "stream_of"),
    [
        (activations._Slot, "fetch", ActivationOffload.compute_stream),  # computing before the arrival
        (activations._Slot, "fetch", lambda place: place.coming),  # fetching into a slot in use
        (activations._Slot, "send", lambda place: place.going),  # sending what is not computed yet
        (
            activations._Heads,
            "write",
            ActivationOffload.compute_stream,
        ),  # overwriting what has not left
        (ActivationOffload, "_leave", ActivationOffload.compute_stream),
    ],
)
def test_a_wait_left_out_is_a_race(monkeypatch, owner, method, stream_of):
    monkeypatch.setattr(owner, method, deaf(getattr(owner, method), stream_of))
    with pytest.raises(RaceError):
        race()


def test_reading_ram_before_it_is_written_is_a_race(monkeypatch):
    monkeypatch.setattr(activations._Home, "await_written", lambda *args: None)
    with pytest.raises(RaceError, match="pinned memory"):
        race()


def test_freeing_under_a_copy_is_a_race(monkeypatch):
    """After an exception; else the head reads what was sent last."""
    method = deaf(ActivationOffload.__exit__, ActivationOffload.compute_stream)
    monkeypatch.setattr(ActivationOffload, "__exit__", method)
    model, inputs = make_model("t2v"), make_inputs("t2v", 210)
    model.blocks[1].norm2.forward = lambda x: 1 / 0
    with pytest.raises(RaceError, match="freed"), VirtualGPU() as gpu:
        model.to(gpu.device)
        apply_activation_offload(model, gpu.device, 64, 1)
        with contextlib.suppress(ZeroDivisionError):
            run(model, inputs, gpu, chunk=64)
        gc.collect()


def test_an_early_release_is_a_race(monkeypatch):
    def release(slot, place):
        slot.held = False

    monkeypatch.setattr(activations._Slot, "release", release)
    with pytest.raises(RaceError):
        race()
