"""Streamed weights: the same bits as resident ones, in the right order, in the ring's bytes and no more."""

import contextlib
import copy
import itertools
import logging
import threading
import time
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from leanwan import read_ahead, streaming
from leanwan.errors import InputError
from leanwan.streaming import Streamer
from virtual_gpu import RaceError, VirtualGPU
from virtual_gpu import streams as virtual_streams
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel

DIM = 24
WIDTHS = (40, 17, 64, 8, 33)  # of the layers, so that no two groups are of one size


class Layer(nn.Module):
    """Two dtypes, weights of odd sizes, and modules that are called one by one."""

    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(DIM, width)
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, DIM, bias=False, dtype=torch.bfloat16)

    def forward(self, x):
        return x + self.down(self.norm(self.up(x)).bfloat16()).float()


def network(widths=WIDTHS):
    torch.manual_seed(0)
    return nn.ModuleList(Layer(width) for width in widths).requires_grad_(False)


def sample():
    return torch.randn(7, DIM, generator=torch.Generator().manual_seed(1))


def run(layers, x, order=None):
    for i in range(len(layers)) if order is None else order:
        x = layers[i](x)
    return x


def size(group):
    """Bytes of a group in the ring."""
    return sum(-(-p.nbytes // streaming.ALIGNMENT) * streaming.ALIGNMENT for p in group.parameters())


@pytest.fixture(autouse=True)
def small_stages(monkeypatch):
    """Staging buffers that are smaller than a group, that no tensor's size divides, and that are soon used again."""
    monkeypatch.setattr(streaming, "STAGE_BYTES", 1000)
    monkeypatch.setattr(streaming, "PINNED_BYTES", 3000)


@pytest.fixture
def gpu():
    with VirtualGPU() as gpu:
        yield gpu


@contextlib.contextmanager
def restored(module, gpu):
    """Checks that everything is afterwards as it was before."""
    parameters = list(module.parameters())
    values = [p.clone() for p in parameters]
    live, threads = gpu.live, threading.active_count()
    yield
    assert all(now is was for now, was in zip(module.parameters(), parameters, strict=True))
    assert all(torch.equal(p, value) for p, value in zip(parameters, values))
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert gpu.live == live
    assert threading.active_count() == threads


@pytest.mark.parametrize("buffers", [2, 3, 4, 9])
@pytest.mark.parametrize("share", [0, 0.3, 0.7, 1, 5], ids="resident{}".format)
def test_equals_resident(gpu, buffers, share):
    layers = network()
    x = sample().to("vgpu")
    expected = [run(layers, sample())]
    expected.append(run(layers, expected[0]))
    room = share * sum(map(size, layers))
    with restored(layers, gpu):
        with Streamer(layers, "vgpu", buffers=buffers, resident_bytes=room):
            first = run(layers, x)
            second = run(layers, first)
        assert torch.equal(first.cpu(), expected[0]) and torch.equal(second.cpu(), expected[1])
        del first, second


def test_weights_may_be_mapped_from_a_file(gpu, tmp_path):
    layers = network()
    safetensors.torch.save_file(layers.state_dict(), tmp_path / "weights.safetensors")
    layers.load_state_dict(safetensors.torch.load_file(tmp_path / "weights.safetensors"), assign=True)
    with restored(layers, gpu), Streamer(layers, "vgpu"):
        assert torch.equal(run(layers, sample().to("vgpu")).cpu(), run(network(), sample()))


def test_works_in_inference_mode_and_with_weights_that_want_gradients(gpu):
    expected = run(network(), sample())
    with torch.inference_mode():
        layers = network()
        with Streamer(layers, "vgpu"):
            assert torch.equal(run(layers, sample().to("vgpu")).cpu(), expected)
    layers = network().requires_grad_(True)
    with Streamer(layers, "vgpu"), torch.no_grad():
        assert torch.equal(run(layers, sample().to("vgpu")).cpu(), expected)
    assert all(p.requires_grad for p in layers.parameters())


def test_parameters_of_modules_with_children_come_along(gpu):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([3.0]))
            self.inner = nn.Linear(DIM, DIM)

        def forward(self, x):
            return self.inner(x * self.gain) * self.gain

    module = Scaled().requires_grad_(False)
    expected = module(sample())
    with restored(module, gpu), Streamer([module], "vgpu"):
        assert torch.equal(module(sample().to("vgpu")).cpu(), expected)


def test_groups_without_weights_are_no_groups(gpu):
    layers = network()
    groups = [nn.Identity(), layers[0], nn.GELU(), *layers[1:]]
    with Streamer(groups, "vgpu"):
        assert torch.equal(run(layers, sample().to("vgpu")).cpu(), run(network(), sample()))
    with Streamer([], "vgpu"):
        pass


# Bytes -----------------------------------------------------------------------------------------------------


def bytes_at_calls(layers, x, gpu):
    """The device's live bytes whenever a module is called."""
    live = []
    handles = [
        module.register_forward_pre_hook(lambda *_: live.append(gpu.live)) for module in layers.modules()
    ]
    run(layers, x)
    for handle in handles:
        handle.remove()
    return live


@pytest.mark.parametrize("buffers, share", [(2, 0), (3, 0), (2, 0.5), (3, 0.4), (2, 1)])
def test_holds_the_ring_and_the_resident_groups_and_nothing_else(gpu, buffers, share):
    layers = network()
    x = sample().to("vgpu")
    empty = gpu.live
    with Streamer(layers, "vgpu", buffers=buffers, resident_bytes=share * sum(map(size, layers))) as streamer:
        attached = gpu.live - empty
        streamed = bytes_at_calls(layers, x, gpu)
    assert gpu.live == empty
    assert 0 <= attached - streamer.device_bytes < 512 * (buffers + len(layers))  # rounded, buffer by buffer
    if share < 1:
        assert streamer.device_bytes <= buffers * max(map(size, layers)) + share * sum(map(size, layers))
    layers.to("vgpu")
    resident = gpu.live
    computed = [live - resident for live in bytes_at_calls(layers, x, gpu)]
    assert [live - empty - attached for live in streamed] == computed


def test_a_ring_is_no_larger_than_what_is_streamed(gpu):
    layers = network()
    assert Streamer(layers[:1], "vgpu", buffers=5).device_bytes == size(layers[0])
    assert Streamer(layers, "vgpu", buffers=2, resident_bytes=10**9).device_bytes == sum(map(size, layers))


def test_a_ring_of_two_has_room_for_the_largest_pair(gpu):
    layers = network()
    sizes = [*map(size, layers)]
    pairs = [a + b for a, b in zip(sizes, sizes[1:] + sizes[:1])]
    assert Streamer(layers, "vgpu").device_bytes == max(pairs) < 2 * max(sizes)


@given(st.lists(st.integers(1, 999), min_size=1, max_size=40), st.integers(-10, 50_000))
def test_resident_groups_fit_and_are_spread(sizes, room):
    stays = streaming.spread(sizes, room)
    kept = [size if stay else 0 for size, stay in zip(sizes, stays, strict=True)]
    total = sum(sizes)
    assert sum(kept) == total if room >= total else sum(kept) <= max(room, 0)
    # Up to every group, those that stay take their share of the room, to within the largest group.
    for i in range(len(sizes)):
        share = sum(sizes[: i + 1]) * min(max(room, 0), total) / total
        assert share - max(sizes) < sum(kept[: i + 1]) <= share or room >= total


def test_counts_the_published_model_without_computing(monkeypatch):
    monkeypatch.undo()
    dim, ffn = 5120, 13824
    with torch.device("meta"):
        ffns = [nn.Sequential(nn.Linear(dim, ffn), nn.Linear(ffn, dim)).bfloat16() for _ in range(3)]
        x = torch.empty(64, dim, dtype=torch.bfloat16)
    with VirtualGPU(meta=True) as gpu, torch.no_grad():
        x = x.to("vgpu")
        with Streamer(ffns, "vgpu") as streamer:
            for ffn in ffns:
                x = ffn(x)
            assert streamer.device_bytes == pytest.approx(2 * 2 * (2 * 5120 * 13824), rel=1e-3)
            assert streamer.device_bytes <= gpu.peak < 1.05 * streamer.device_bytes
        assert gpu.live == x.nbytes


# Order -----------------------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch):
    """What the main thread does: ("fetch", i) as it asks the worker for a group, ("launch", i) when one computed."""
    events = []
    fetch, forward = Streamer._fetch, Layer.forward

    def logged_fetch(self, group, slot):
        events.append(("fetch", self._groups.index(group)))
        fetch(self, group, slot)

    def logged_forward(self, x):
        y = forward(self, x)
        events.append(("launch", WIDTHS.index(self.up.out_features)))
        return y

    monkeypatch.setattr(Streamer, "_fetch", logged_fetch)
    monkeypatch.setattr(Layer, "forward", logged_forward)
    return events


def interleaved(fetched, launched):
    return [
        event
        for i, j in zip(fetched, launched, strict=True)
        for event in (("fetch", i), ("launch", j))
        if event[1] is not None
    ]


def test_the_next_group_is_asked_for_before_this_one_computes(gpu, log):
    layers = network()
    with Streamer(layers, "vgpu"):
        run(layers, run(layers, sample().to("vgpu")))
    # The first two at once; after the last, the first again; each once per pass.
    fetched = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    launched = [None, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert log == interleaved(fetched, launched)


def test_a_longer_ring_fetches_further_ahead(gpu, log):
    layers = network()
    with Streamer(layers, "vgpu", buffers=4):
        run(layers, run(layers, sample().to("vgpu")))
    fetched = [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    launched = [None, None, None, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert log == interleaved(fetched, launched)


def test_what_fits_the_ring_is_fetched_once(gpu, log):
    layers = network(WIDTHS[:3])
    with Streamer(layers, "vgpu", buffers=3):
        run(layers, run(layers, run(layers, sample().to("vgpu"))))
    assert [i for kind, i in log if kind == "fetch"] == [0, 1, 2]


def test_resident_groups_are_fetched_once_and_passed_over(gpu, log):
    layers = network()
    with Streamer(layers, "vgpu", resident_bytes=size(layers[1])) as streamer:
        resident = [streamer._groups.index(group) for group in streamer._resident]
        run(layers, run(layers, sample().to("vgpu")))
    assert len(resident) == 1
    fetched = [i for kind, i in log if kind == "fetch"]
    streamed = [i for i in range(5) if i not in resident]
    assert fetched == streamed[:2] + resident + streamed[2:] + streamed + streamed[:1]


def test_the_record_shows_copies_beside_the_computation_and_none_back():
    layers = network()
    with VirtualGPU(record_ops=True) as gpu:
        x = sample().to("vgpu")
        with Streamer(layers, "vgpu"):
            ring = [entry.allocation for entry in gpu.record if entry.kind == "alloc"][-1:]
            run(layers, run(layers, x))
        record = gpu.record
        del x
    copies = [entry for entry in record if entry.kind == "copy_in"][1:]
    computing = {entry.stream for entry in record if entry.kind == "op" and "copy_" not in entry.name}
    assert {entry.allocation for entry in copies} == set(ring)
    assert len({entry.stream for entry in copies}) == 1
    assert not computing & {entry.stream for entry in copies}
    assert not [entry for entry in record if entry.kind == "copy_out"]
    # Two passes, and of a third what was fetched ahead before the end.
    once = sum(map(size, layers))
    assert 2 * once <= sum(entry.nbytes for entry in copies) <= 2 * once + size(layers[0])


def test_only_the_worker_waits_for_the_device(gpu, monkeypatch):
    waiting = []
    synchronize = virtual_streams.Event.synchronize

    def noted(event):
        waiting.append(threading.current_thread().name)
        synchronize(event)

    def refused(*_):
        raise AssertionError("a stream or the device was waited for")

    layers, x = network(), sample().to("vgpu")
    with monkeypatch.context() as patch:
        patch.setattr(virtual_streams.Event, "synchronize", noted)
        patch.setattr(virtual_streams.Stream, "synchronize", refused)
        patch.setattr(torch.get_device_module("vgpu"), "synchronize", refused)
        with Streamer(layers, "vgpu"):
            run(layers, run(layers, x))
    assert waiting and all(name.startswith("streamer") for name in waiting)


@pytest.mark.parametrize("buffers", [2, 3])
@pytest.mark.parametrize("slow", ["worker", "main", "both"])
def test_delays_change_nothing(gpu, monkeypatch, slow, buffers):
    expected = run(network(), run(network(), sample()))

    def delayed(function, seconds):
        def call(*args):
            time.sleep(next(seconds))
            return function(*args)

        return call

    layers = network()
    if slow != "main":
        pauses = itertools.cycle([0, 0.004, 0.001, 0])
        monkeypatch.setattr(streaming._Group, "read", delayed(streaming._Group.read, pauses))
    if slow != "worker":
        pauses = itertools.cycle([0.02, 0, 0.01])
        monkeypatch.setattr(Layer, "forward", delayed(Layer.forward, pauses))
    with restored(layers, gpu), Streamer(layers, "vgpu", buffers=buffers):
        assert torch.equal(run(layers, run(layers, sample().to("vgpu"))).cpu(), expected)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, len(WIDTHS) - 1), max_size=14),
    st.integers(2, 6),
    st.sampled_from([0, 0.2, 0.5, 0.8]),
)
def test_any_order_of_calls_is_right(order, buffers, share):
    layers = network()
    expected = run(layers, sample(), order)
    with VirtualGPU() as gpu, restored(layers, gpu):
        x = sample().to("vgpu")
        with Streamer(layers, "vgpu", buffers=buffers, resident_bytes=share * sum(map(size, layers))):
            x = run(layers, x, order)
        assert torch.equal(x.cpu(), expected)
        del x


def test_modules_of_a_group_may_be_called_alone_and_again(gpu):
    layers = network()
    x = sample()
    expected = [layers[1].up(part) for part in x.split(2)]
    x = x.to("vgpu")
    with Streamer(layers, "vgpu"):
        layers[0](x)
        for part, whole in zip(x.split(2), expected, strict=True):
            assert torch.equal(layers[1].up(part).cpu(), whole)


def test_weights_are_asked_for_one_group_before_their_copy(gpu, monkeypatch):
    order, lock = [], threading.Lock()
    read, ask = streaming._Group.read, streaming._Group.read_ahead

    def noted(kind, function):
        def call(group, *args):
            with lock:
                order.append((kind, streamer._groups.index(group)))
            return function(group, *args)

        return call

    monkeypatch.setattr(streaming, "STAGE_BYTES", 1 << 20)  # a group is read in one piece
    monkeypatch.setattr(streaming._Group, "read", noted("read", read))
    monkeypatch.setattr(streaming._Group, "read_ahead", noted("ask", ask))
    layers = network()
    streamer = Streamer(layers, "vgpu", resident_bytes=size(layers[1]))
    resident = [streamer._groups.index(group) for group in streamer._resident]
    with streamer:
        run(layers, run(layers, sample().to("vgpu")))
    order = [entry for entry in order if entry != ("read", *resident)]
    asked, copied = ([i for kind, i in order if kind == k] for k in ("ask", "read"))
    assert len(asked) > 4 and not set(asked) & set(resident)
    for i, (kind, group) in enumerate(order[:-1]):
        if kind == "ask":  # behind the copies before it, ahead of its own, which is the next
            assert order[i + 1] == ("read", group)


@pytest.mark.parametrize("advised", [True, False])
def test_reading_ahead_takes_any_tensor(monkeypatch, tmp_path, advised):
    if not advised:
        monkeypatch.setattr(read_ahead, "_advise", lambda: None)
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 1000)
    mapped = torch.from_file(str(path), size=250_000, dtype=torch.uint8)
    for tensor in (mapped, mapped[4097:9000], torch.randn(3, 5000).T, torch.ones(1)):
        before = tensor.clone()
        assert read_ahead.read_ahead(tensor)
        assert torch.equal(tensor, before)


# Races: what the order rests on, taken away, is noticed ------------------------------------------------------


@pytest.fixture
def large_stages(monkeypatch, small_stages):
    """So many staging buffers that the host never waits for one, which would hide a missing event."""
    monkeypatch.setattr(streaming, "STAGE_BYTES", 1 << 20)
    monkeypatch.setattr(streaming, "PINNED_BYTES", 64 << 20)


def race():
    layers = network()
    with VirtualGPU(), Streamer(layers, "vgpu"):
        run(layers, run(layers, sample().to("vgpu")))


def test_no_race_as_it_is(large_stages):
    race()


def test_computing_before_the_arrival_is_a_race(large_stages, monkeypatch):
    class Deaf:
        def __init__(self, stream):
            self.record_event = stream.record_event

        def wait_event(self, event):
            pass

    stream = Streamer._compute_stream
    monkeypatch.setattr(Streamer, "_compute_stream", lambda self: Deaf(stream(self)))
    with pytest.raises(RaceError, match="copy_"):
        race()


def test_overwriting_a_buffer_in_use_is_a_race(large_stages, monkeypatch):
    def leave(self):
        if self._current is not None:
            self._current.restore()
            self._current = None

    monkeypatch.setattr(Streamer, "_leave", leave)
    with pytest.raises(RaceError, match="copy_"):
        race()


@pytest.mark.parametrize("heard", ["both", "own"])
def test_a_jump_that_waits_for_one_end_of_the_ring_is_a_race(large_stages, monkeypatch, heard):
    """Two groups that do not follow those in the ring: the first may reach into what the other end held."""
    if heard == "own":
        copy = Streamer._copy
        monkeypatch.setattr(
            Streamer,
            "_copy",
            lambda self, group, slot, released: copy(self, group, slot, [slot.released]),
        )
    layers = network()
    order = [0, 1, 3, 0, 2, 4, 1, 2, 0, 3, 4, 2]
    expected = contextlib.nullcontext() if heard == "both" else pytest.raises(RaceError, match="copy_")
    with expected, VirtualGPU(), Streamer(layers, "vgpu"):
        run(layers, sample().to("vgpu"), order)


def test_refilling_a_staging_buffer_too_soon_is_a_race(monkeypatch):
    monkeypatch.setattr(virtual_streams.Event, "synchronize", lambda event: None)
    with pytest.raises(RaceError, match="pinned"):
        race()


# Failures ----------------------------------------------------------------------------------------------------


def test_an_exception_in_a_block_leaves_nothing_behind(gpu, monkeypatch):
    layers, x = network(), sample().to("vgpu")

    def boom(_):
        raise RuntimeError("boom")

    monkeypatch.setattr(layers[2].norm, "forward", boom)
    live = gpu.live
    with restored(layers, gpu):
        with pytest.raises(RuntimeError, match="boom") as caught, Streamer(layers, "vgpu"):
            run(layers, x)
        # The traceback still holds its activations, but no weights.
        assert gpu.live - live < max(map(size, layers))
        del caught


def test_an_exception_of_the_worker_reaches_the_caller(gpu, monkeypatch):
    layers, x = network(), sample().to("vgpu")
    read, reads = streaming._Group.read, itertools.count()

    def failing(self, start, out):
        if next(reads) == 40:
            raise OSError("the file is gone")
        read(self, start, out)

    live = gpu.live
    with restored(layers, gpu):
        with monkeypatch.context() as patch:
            patch.setattr(streaming._Group, "read", failing)
            with pytest.raises(OSError, match="the file is gone") as caught, Streamer(layers, "vgpu"):
                for _ in range(9):
                    run(layers, x)
            assert gpu.live - live < max(map(size, layers))
            del caught
        with Streamer(layers, "vgpu"):
            assert torch.equal(run(layers, x).cpu(), run(network(), sample()))


@pytest.mark.parametrize("part", [0.1, 0.6, 0.95])
def test_out_of_memory_leaves_nothing_behind(part):
    layers = network()
    with VirtualGPU():
        needed = Streamer(layers, "vgpu", buffers=3, resident_bytes=size(layers[1])).device_bytes
    with VirtualGPU(capacity=int(part * needed), granularity=1024) as gpu, restored(layers, gpu):
        with pytest.raises(torch.OutOfMemoryError):
            Streamer(layers, "vgpu", buffers=3, resident_bytes=size(layers[1])).attach()
        assert gpu.live == 0


def test_attaching_and_detaching_may_be_repeated(gpu):
    layers = network()
    with restored(layers, gpu):
        streamer = Streamer(layers, "vgpu")
        streamer.detach()
        for _ in range(2):
            streamer.attach()
            streamer.attach()
            run(layers, sample().to("vgpu"))
            streamer.detach()
            streamer.detach()


@pytest.mark.parametrize("pin_limit", [0, 1000, 2500])
def test_without_page_locked_memory_it_is_slower_but_right(caplog, pin_limit):
    layers = network()
    with VirtualGPU(pin_limit=pin_limit) as gpu, restored(layers, gpu), caplog.at_level(logging.WARNING):
        with Streamer(layers, "vgpu"):
            assert gpu.pinned <= pin_limit
            assert torch.equal(run(layers, sample().to("vgpu")).cpu(), run(network(), sample()))
        torch.get_device_module("vgpu").synchronize()
        assert gpu.pinned == 0
    assert len(caplog.messages) == 1 and "page-locked" in caplog.text


@pytest.mark.parametrize("available, expected", [(10**12, 3000), (5000, 2000), (0, 2000)])
def test_page_locked_memory_is_bounded(gpu, monkeypatch, available, expected):
    memory = SimpleNamespace(available=available)
    monkeypatch.setattr(streaming.psutil, "virtual_memory", lambda: memory)
    with Streamer(network(), "vgpu"):
        assert gpu.pinned == expected
    torch.get_device_module("vgpu").synchronize()
    assert gpu.pinned == 0


# Input -------------------------------------------------------------------------------------------------------


def test_a_cpu_needs_no_streaming():
    layers = network()
    parameters = list(layers.parameters())
    with Streamer(layers, "cpu", resident_bytes=10**9) as streamer:
        assert streamer.device_bytes == 0
        assert all(now is was for now, was in zip(layers.parameters(), parameters, strict=True))
        assert not any(module._forward_pre_hooks for module in layers.modules())
        assert torch.equal(run(layers, sample()), run(network(), sample()))


@pytest.mark.parametrize("buffers", [1, 0, -2, 2.5, "2", None, True])
def test_a_ring_needs_two_buffers(buffers):
    with pytest.raises(InputError, match="stream_buffers"):
        Streamer(network(), "cpu", buffers=buffers)


def test_groups_must_be_disjoint_and_at_home(gpu):
    layers = network()
    with pytest.raises(ValueError, match="overlap"):
        Streamer([layers[0], layers[1], layers[0].up], "vgpu")
    with pytest.raises(ValueError, match="CPU memory"):
        Streamer([layers[0].to("vgpu")], "vgpu")


# The DiT -----------------------------------------------------------------------------------------------------

DIT = {
    "dim": 48,
    "ffn_dim": 64,
    "num_heads": 4,
    "num_layers": 4,
    "freq_dim": 16,
    "text_dim": 20,
    "text_len": 12,
}


def dit(kind):
    torch.manual_seed(0)
    if kind == "vace":
        model = VaceWanModel(vace_layers=[0, 2], vace_in_dim=8, **DIT)
    else:
        model = WanModel(model_type=kind, in_dim=16 if kind == "t2v" else 36, **DIT)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def dit_call(model, kind, device, chunk=0):
    generator = torch.Generator().manual_seed(2)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    latents = [noise(16, 3, 8, 12), noise(16, 3, 8, 12)]
    context = [noise(5, DIT["text_dim"]), noise(9, DIT["text_dim"])]
    inputs = {"x": latents, "t": torch.tensor([900.0, 30.0]).to(device), "context": context, "seq_len": 72}
    if kind == "i2v":
        inputs |= {"clip_fea": noise(2, 257, 1280), "y": [noise(20, 3, 8, 12) for _ in latents]}
    if kind == "vace":
        inputs |= {"vace_context": [noise(8, 3, 8, 12) for _ in latents]}
    return torch.stack(model(**inputs, chunk=chunk)).cpu()


def keep_on_device(model, groups):
    """Puts all that is not streamed on the device, in place."""
    streamed = {module for group in groups for module in group.modules()}
    for module in model.modules():
        if module not in streamed:
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to("vgpu"), requires_grad=False))


@pytest.mark.parametrize("kind", ["t2v", "i2v", "vace"])
def test_layer_groups_are_visited_in_their_order(kind):
    model = dit(kind)
    groups = model.layer_groups()
    visited = []
    for i, group in enumerate(groups):
        for module in group.modules():
            module.register_forward_pre_hook(lambda *_, i=i: visited.append(i))
    dit_call(model, kind, "cpu", chunk=64)
    passes = [i for i, _ in itertools.groupby(visited)]
    assert passes == 2 * list(range(len(groups)))  # two samples
    blocks = [*model.blocks, *getattr(model, "vace_blocks", [])]
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() == 2)
    assert weights == sum(p.numel() for group in groups for p in group.parameters() if p.dim() == 2)


@pytest.mark.usefixtures("large_stages")
@pytest.mark.parametrize("room", [0, 30_000])
@pytest.mark.parametrize("chunk", [0, 64])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "vace"])
def test_a_streamed_transformer_equals_a_resident_one(gpu, kind, chunk, room):
    model = dit(kind)
    expected = dit_call(copy.deepcopy(model).to("vgpu"), kind, "vgpu", chunk)
    groups = model.layer_groups()
    keep_on_device(model, groups)
    with restored(model, gpu), Streamer(groups, "vgpu", resident_bytes=room):
        assert torch.equal(dit_call(model, kind, "vgpu", chunk), expected)


def test_streams_under_autocast_from_weights_in_fp32(gpu):
    model = dit("t2v")
    resident = copy.deepcopy(model).to("vgpu")
    groups = model.layer_groups()
    keep_on_device(model, groups)
    x = torch.randn(6, DIT["dim"], generator=torch.Generator().manual_seed(3)).to("vgpu")

    def feed_forward(model):
        y = x
        for block in [*model.blocks, *model.blocks]:
            y = y + block.ffn(y).float()
        return y.cpu()

    with torch.autocast("vgpu", dtype=torch.bfloat16):
        expected = feed_forward(resident)
        with Streamer(groups, "vgpu"):
            assert torch.equal(feed_forward(model), expected)
    assert not torch.equal(feed_forward(resident), expected)  # autocast did something


# The encoders ------------------------------------------------------------------------------------------------


def text_encoder():
    sizes = {"vocab_size": 9, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 40, "num_layers": 3}
    stack = UMT5EncoderModel(UMT5Config(**sizes, attn_implementation="eager")).encoder
    groups = [layer for block in stack.block for layer in block.layer]
    return stack, groups, {"inputs_embeds": torch.randn(2, 7, 32)}


def image_encoder():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 3}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=8, patch_size=4))
    return tower, list(tower.encoder.layers), {"pixel_values": torch.randn(2, 3, 8, 8)}


@pytest.mark.parametrize("encoder", [text_encoder, image_encoder])
def test_streams_the_modules_of_the_library(gpu, log, encoder):
    torch.manual_seed(0)
    module, groups, inputs = encoder()
    module.eval().requires_grad_(False)
    expected = module(**inputs).last_hidden_state
    keep_on_device(module, groups)
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to("vgpu"))
    inputs = {name: tensor.to("vgpu") for name, tensor in inputs.items()}
    with restored(module, gpu), Streamer(groups, "vgpu"):
        assert torch.equal(module(**inputs).last_hidden_state.cpu(), expected)
    assert log == [("fetch", i) for i in [*range(len(groups)), 0]]


# A real GPU --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("buffers, share", [(2, 0), (3, 0), (2, 0.5)])
@pytest.mark.parametrize("pinned", [True, False])
def test_equals_resident_on_cuda(monkeypatch, buffers, share, pinned):
    """The compute stream is kept busy, so that copies would overtake it if nothing ordered them."""
    monkeypatch.undo()
    empty = torch.empty

    def pageable(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("no page-locked memory")
        return empty(*args, **kwargs)

    if not pinned:
        monkeypatch.setattr(torch, "empty", pageable)
    torch.manual_seed(0)
    layers = [nn.Linear(2048, 2048, bias=i % 2 == 0, dtype=torch.bfloat16) for i in range(12)]
    network = nn.ModuleList(layers).requires_grad_(False)
    x = torch.randn(256, 2048, dtype=torch.bfloat16, device="cuda")

    def forward(network):
        y = x
        for layer in [*network] * 4:
            torch.cuda._sleep(1_000_000)
            y = torch.tanh(layer(y)) + x
        return y

    expected = forward(copy.deepcopy(network).to("cuda"))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()

    def requested():  # of what is allocated: the allocator may give more than was asked for
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    before = requested()
    with Streamer(
        network, "cuda", buffers=buffers, resident_bytes=share * sum(map(size, network))
    ) as streamer:
        assert requested() - before == streamer.device_bytes
        out = forward(network)
    assert torch.equal(out, expected)
    del out
    assert requested() == before
