"""The virtual GPU refuses what only happens to work: accesses that no stream, event or synchronisation orders."""

import threading
from contextlib import nullcontext

import pytest
import torch

from virtual_gpu import RaceError, VirtualGPU
from virtual_gpu.backend import DeviceModule as vgpu


@pytest.fixture
def gpu():
    with VirtualGPU() as gpu:
        yield gpu


@pytest.fixture
def side(gpu):
    return vgpu.Stream()


def ready(stream, *shape):
    """A buffer that `stream` may use."""
    buffer = torch.zeros(*shape, device="vgpu")
    stream.wait_stream(vgpu.current_stream())
    return buffer


def test_a_copy_ordered_by_an_event(gpu, side):
    staged, buffer = torch.arange(8.0).pin_memory(), ready(side, 8)
    with vgpu.stream(side):
        assert vgpu.current_stream() is side
        buffer.copy_(staged, non_blocking=True)
        arrived = side.record_event()
    arrived.wait()
    assert (buffer + 1).tolist() == list(range(1, 9))
    kinds = [(r.kind, r.stream) for r in gpu.record if r.kind in ("copy_in", "wait_event", "record_event")]
    assert kinds[2:] == [
        ("copy_in", "stream 1"),
        ("record_event", "stream 1"),
        ("wait_event", "default stream"),
    ]


def test_reading_before_the_copy_arrived(gpu, side):
    buffer = ready(side, 8)
    with vgpu.stream(side), gpu.label("block 3"):
        buffer.copy_(torch.ones(8).pin_memory(), non_blocking=True)
    with pytest.raises(
        RaceError,
        match=r"aten::add.Tensor on default stream, which reads.*\(block 3\) on stream 1, which writes",
    ):
        buffer + 1
    vgpu.synchronize()
    assert (buffer + 1).tolist() == [2] * 8


def test_overwriting_what_is_still_read(gpu, side):
    buffer = ready(side, 8)
    result = buffer * 2
    done = vgpu.current_stream().record_event()
    with vgpu.stream(side):
        with pytest.raises(
            RaceError, match="copy_ on stream 1, which writes.*mul.* on default stream, which reads"
        ):
            buffer.copy_(torch.ones(8), non_blocking=True)
        side.wait_event(done)
        buffer.copy_(torch.ones(8), non_blocking=True)
        done = side.record_event()
    done.synchronize()
    assert result.tolist() == [0] * 8 and buffer.tolist() == [1] * 8


def test_an_event_covers_only_what_came_before_it(gpu, side):
    buffer = ready(side, 2, 8)
    with vgpu.stream(side):
        buffer[0].copy_(torch.ones(8), non_blocking=True)
        first = side.record_event()
        buffer[1].copy_(torch.ones(8), non_blocking=True)
    first.wait()
    assert (buffer[0] + 1).sum().item() == 16  # the other row is in flight, and is another range of bytes
    with pytest.raises(RaceError):
        buffer + 1
    vgpu.synchronize()


def test_order_is_transitive(gpu, side):
    third = vgpu.Stream()
    buffer = ready(side, 8)
    with vgpu.stream(side):
        buffer.add_(1)
    third.wait_stream(side)
    vgpu.current_stream().wait_stream(third)
    assert buffer.sum().item() == 8


def test_new_memory_may_still_be_in_use_on_its_stream(gpu, side):
    torch.zeros(8, device="vgpu")
    buffer = torch.empty(8, device="vgpu")  # where the zeros were, as it may be
    with vgpu.stream(side), pytest.raises(RaceError, match="allocation on default stream"):
        buffer.zero_()


def test_a_blocking_copy_makes_the_host_wait(gpu, side):
    buffer = ready(side, 8)
    with vgpu.stream(side):
        buffer.copy_(torch.ones(8).pin_memory())
    assert buffer.sum().item() == 8


@pytest.mark.parametrize("told", [False, True])
def test_freeing_what_another_stream_still_uses(told):
    def use():
        side = vgpu.Stream()
        with vgpu.stream(side):
            weight = torch.ones(8).to("vgpu", non_blocking=True)
        vgpu.current_stream().wait_stream(side)
        weight * 2
        if told:
            weight.record_stream(vgpu.current_stream())

    with VirtualGPU() as gpu:
        use()
        if told:
            torch.zeros(8, device="vgpu")
            assert [r.kind for r in gpu.record if r.kind == "record_stream"] == ["record_stream"]
        else:
            with pytest.raises(RaceError, match="memory of stream 1 was freed.*mul"):
                torch.zeros(8, device="vgpu")


@pytest.mark.parametrize("wait", [False, True])
def test_the_host_must_not_overwrite_staging_before_it_was_read(wait):
    def stage():
        side, staging = vgpu.Stream(), torch.empty(8, pin_memory=True)
        assert staging.is_pinned() and not torch.empty(8).is_pinned()
        buffer = ready(side, 2, 8)
        with vgpu.stream(side):
            for row in range(2):
                staging.fill_(row + 1)
                buffer[row].copy_(staging, non_blocking=True)
                if wait:
                    side.record_event().synchronize()
        vgpu.synchronize()
        return buffer.tolist()

    with nullcontext() if wait else pytest.raises(RaceError, match="host overwrote pinned"), VirtualGPU():
        assert stage() == [[1] * 8, [2] * 8]


def test_a_copy_overwritten_last_is_found_at_the_end():
    with pytest.raises(RaceError, match="host overwrote pinned memory"), VirtualGPU():
        staging = torch.ones(8).pin_memory()
        buffer = torch.empty(8, device="vgpu")
        buffer.copy_(staging, non_blocking=True)
        staging.zero_()


def test_an_asynchronous_copy_to_the_host_arrives_when_waited_for(gpu):
    device, host = torch.ones(8, device="vgpu"), torch.zeros(8).pin_memory()
    host.copy_(device, non_blocking=True)
    late = device.to("cpu", non_blocking=True)
    assert not host.any() and not late.any()
    vgpu.current_stream().synchronize()
    assert host.all() and late.all()


def test_pinned_bytes_are_counted_and_limited():
    with VirtualGPU(pin_limit=1024) as gpu:
        kept = torch.zeros(128).pin_memory()
        part = torch.empty(64, pin_memory=True)[:8]
        assert gpu.pinned == 512 + 256
        with pytest.raises(RuntimeError, match="cannot pin 512 bytes"):
            kept.pin_memory()
        del part
        assert gpu.pinned == 512 and gpu.live == 0


def test_races_are_found_when_only_counting():
    with VirtualGPU(meta=True):
        side = vgpu.Stream()
        buffer = ready(side, 10**9)
        staging = torch.empty(10**9, pin_memory=True)
        with vgpu.stream(side):
            buffer.copy_(staging, non_blocking=True)
        with pytest.raises(RaceError):
            buffer.sum()
        vgpu.current_stream().wait_stream(side)
        buffer.sum()


def test_another_thread_has_its_own_current_stream(gpu, side):
    results = []

    def work():
        with vgpu.stream(side), gpu.label("worker"):
            results.append(torch.ones(8).to("vgpu") * 2)
            results.append(side.record_event())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    product, done = results
    assert vgpu.current_stream() is vgpu.default_stream() and gpu.timeline.here.label is None
    with pytest.raises(RaceError, match="worker"):
        product + 1
    done.wait()
    assert (product + 1).tolist() == [3] * 8
    assert {r.label for r in gpu.record if r.kind == "copy_in"} == {"worker"}
    product.record_stream(vgpu.current_stream())
