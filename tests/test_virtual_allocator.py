"""The model of CUDA's caching allocator: what it takes from the driver, where it puts things, when it gives up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from virtual_gpu import least_capacity
from virtual_gpu.allocator import MIB, CachingAllocator
from virtual_gpu.replay import RecordingAllocator, replay

PAGES = {True: 2 * MIB, False: 20 * MIB}  # of an expandable segment, by whether its requests are small


def both(test):
    return pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable"])(test)


@pytest.mark.parametrize(
    ("request_bytes", "size", "default", "expandable"),
    [
        (1, 512, 2, 2),
        (513, 1024, 2, 2),
        (MIB, MIB, 2, 2),
        (MIB + 1, MIB + 512, 20, 20),
        (10 * MIB - 512, 10 * MIB - 512, 20, 20),
        (10 * MIB, 10 * MIB, 10, 20),
        (10 * MIB + 1, 10 * MIB + 512, 12, 20),
        (20 * MIB + 1, 20 * MIB + 512, 22, 40),
        (101 * MIB, 101 * MIB, 102, 120),
    ],
)
def test_a_first_request(request_bytes, size, default, expandable):
    for option, reserved in ((False, default), (True, expandable)):
        allocator = CachingAllocator(expandable_segments=option)
        block = allocator.alloc(request_bytes)
        assert (allocator.allocated, allocator.reserved) == (size, reserved * MIB)
        allocator.free(block)
        assert (allocator.allocated, allocator.reserved) == (0, reserved * MIB)
        assert (allocator.peak_allocated, allocator.peak_reserved) == (size, reserved * MIB)
        allocator.empty_cache()
        allocator.reset_peak()
        assert allocator.reserved == allocator.peak_reserved == allocator.peak_allocated == 0


@both
def test_no_bytes_take_no_block(expandable):
    allocator = CachingAllocator(0, expandable)
    assert allocator.alloc(0) is None and allocator.reserved == 0


@both
def test_requests_share_a_segment(expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    first = [allocator.alloc(MIB).address for _ in range(2)]
    assert first == [0, MIB] and allocator.reserved == 2 * MIB
    second = [allocator.alloc(2 * MIB).address for _ in range(10)]
    assert [a - second[0] for a in second] == [n * 2 * MIB for n in range(10)]
    assert allocator.reserved == 22 * MIB
    allocator.alloc(2 * MIB)
    assert allocator.reserved == 42 * MIB


def separated(allocator, *sizes):
    """Free blocks of these sizes in one segment, with used ones between."""
    blocks = [(allocator.alloc(size), allocator.alloc(2 * MIB)) for size in sizes]
    for block, _ in blocks:
        allocator.free(block)
    return [block.address for block, _ in blocks]


@both
@pytest.mark.parametrize(
    ("request_bytes", "chosen"), [(2 * MIB + 1, 2), (3 * MIB, 2), (3 * MIB + 1, 0), (5 * MIB, 1)]
)
def test_the_smallest_block_that_fits(request_bytes, chosen, expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    addresses = separated(allocator, 4 * MIB, 5 * MIB, 3 * MIB)
    reserved = allocator.reserved
    assert allocator.alloc(request_bytes).address == addresses[chosen]
    assert allocator.reserved == reserved


@both
def test_of_equal_blocks_the_lowest(expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    addresses = separated(allocator, 2 * MIB, 2 * MIB, 2 * MIB)
    assert [allocator.alloc(2 * MIB).address for _ in range(3)] == addresses


def test_an_expandable_end_is_kept_for_what_needs_it():
    allocator = CachingAllocator(expandable_segments=True)
    (hole,) = separated(allocator, 15 * MIB)  # 3 MiB are left at the end of what is mapped
    assert allocator.alloc(2 * MIB).address == hole


@pytest.mark.parametrize(
    ("hole", "expandable", "split"),
    [(3 * MIB, False, False), (3 * MIB + 512, False, True), (2 * MIB + 512, True, True)],
)
def test_up_to_a_mebibyte_is_not_split_off_in_the_large_pool(hole, expandable, split):
    allocator = CachingAllocator(expandable_segments=expandable)
    separated(allocator, hole, 13 * MIB)
    block = allocator.alloc(2 * MIB)
    assert block.size == (2 * MIB if split else hole)
    assert allocator.allocated == 6 * MIB  # what was asked for, two blocks between the holes included


@both
def test_neighbours_merge_when_they_are_freed(expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    blocks = [allocator.alloc(4 * MIB) for _ in range(5)]
    start = blocks[0].address
    for n in (1, 3, 2):
        allocator.free(blocks[n])
    assert allocator.alloc(12 * MIB).address == start + 4 * MIB and allocator.reserved == 20 * MIB


@both
def test_streams_do_not_share(expandable):
    allocator = CachingAllocator(expandable_segments=expandable)
    allocator.free(allocator.alloc(1, "one"))
    allocator.alloc(1, "two")
    assert allocator.reserved == 4 * MIB


@both
def test_blocks_that_other_streams_use_wait_for_them(expandable):
    allocator, through = CachingAllocator(40 * MIB, expandable), []
    block = allocator.alloc(20 * MIB)
    allocator.free(block, done=lambda: bool(through))
    assert allocator.allocated == 0
    other = allocator.alloc(20 * MIB)
    assert other.address != block.address and allocator.reserved == 40 * MIB
    through.append("now")
    again = allocator.alloc(20 * MIB)
    assert again is not other and allocator.reserved == 40 * MIB
    allocator.free(again, done=lambda: False)
    assert allocator.alloc(20 * MIB).address != other.address  # rather than give up, it waits
    assert allocator.reserved == 40 * MIB


@both
def test_the_cache_is_emptied_before_it_gives_up(expandable):
    allocator = CachingAllocator(100 * MIB, expandable)
    allocator.free(allocator.alloc(60 * MIB, "one"))
    allocator.alloc(100 * MIB, "two")
    assert allocator.reserved == 100 * MIB
    with pytest.raises(torch.OutOfMemoryError, match="1 bytes requested") as caught:
        allocator.alloc(1, "two")
    assert caught.value.requested == 1
    assert allocator.reserved == 100 * MIB == allocator.allocated


@pytest.mark.parametrize(("expandable", "least"), [(False, 80), (True, 60)])
def test_what_is_left_of_a_segment_in_use_cannot_go_back(expandable, least):
    for capacity in (least - 1, least):
        allocator = CachingAllocator(capacity * MIB, expandable)
        whole = allocator.alloc(40 * MIB)
        allocator.free(whole)
        assert allocator.alloc(2 * MIB).address == whole.address
        if capacity < least:
            with pytest.raises(torch.OutOfMemoryError):
                allocator.alloc(39 * MIB)
        else:
            allocator.alloc(39 * MIB)
            assert allocator.reserved == least * MIB


def test_pages_between_go_back_and_are_filled_first():
    allocator = CachingAllocator(expandable_segments=True)
    blocks = [allocator.alloc(20 * MIB) for _ in range(4)]
    allocator.free(blocks[1])
    allocator.empty_cache()
    assert allocator.reserved == 60 * MIB
    assert allocator.alloc(15 * MIB).address == blocks[1].address and allocator.reserved == 80 * MIB
    assert allocator.alloc(15 * MIB).address == blocks[3].end


def test_a_process_that_is_held_to_less_counts_whole_segments():
    for limit, goes in ((39, False), (40, True)):
        allocator = CachingAllocator(100 * MIB, expandable_segments=True)
        allocator.limit = limit * MIB
        allocator.alloc(15 * MIB)
        if goes:
            allocator.alloc(6 * MIB)
        else:
            with pytest.raises(torch.OutOfMemoryError):
                allocator.alloc(6 * MIB)


# Properties

SIZES = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 3 * MIB),
    st.integers(1, 60).map(lambda n: n * MIB // 2),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("alloc"), SIZES, st.sampled_from("ab")),
        st.tuples(st.sampled_from(["free", "free", "free later"]), st.integers(0, 99), st.none()),
        st.tuples(st.sampled_from(["done", "empty"]), st.none(), st.none()),
    ),
    max_size=80,
)
MODEL = given(STEPS, st.booleans(), st.one_of(st.none(), st.integers(1, 60).map(lambda n: 4 * n * MIB)))


def play(allocator, steps):
    """Runs the steps; yields the blocks in use after each, those that wait to be freed, and whether it was refused."""
    used, waiting, through = [], [], {}
    for kind, value, stream in steps:
        refused = False
        if kind == "alloc":
            try:
                used.append((allocator.alloc(value, stream), value))
            except torch.OutOfMemoryError:
                refused, waiting = True, []
        elif kind == "done":
            through.update(dict.fromkeys(through, True))
            waiting = []
        elif kind == "empty":
            allocator.empty_cache()
            waiting = []
        elif used:
            block, _ = used.pop(value % len(used))
            if kind == "free":
                allocator.free(block)
            else:
                ticket = object()
                through[ticket] = False
                waiting.append(block)
                allocator.free(block, done=lambda ticket=ticket: through[ticket])
        yield used, waiting, refused


def head(block):
    while block.previous is not None:
        block = block.previous
    return block


def chain(block):
    while block is not None:
        yield block
        block = block.next


def check(allocator, used=()):
    """Blocks of a segment lie end to end, the free ones are merged and listed once, what is mapped is reserved."""
    pools = allocator._pools.values()
    listed = [block for pool in pools for *_, block in [*pool._free, *pool._unmapped]]
    segments = [list(chain(first)) for first in {head(block) for block in [*listed, *used]}]
    assert all(
        pool._free == sorted(pool._free) and pool._unmapped == sorted(pool._unmapped) for pool in pools
    )
    assert sum(block.size for blocks in segments for block in blocks if block.mapped) == allocator.reserved
    for blocks in segments:
        for block, after in zip(blocks, blocks[1:]):
            assert after.previous is block and after.address == block.end
            assert not (block.free and after.free and block.mapped == after.mapped)
    free = [block for blocks in segments for block in blocks if block.free]
    assert len(free) == len(listed) and set(free) == set(listed)


def held(blocks, expandable):
    """Bytes that cannot go back to the driver while these blocks are in use."""
    if expandable:
        touched = set()
        for block in blocks:
            page = PAGES[block.pool.small]
            touched |= {(page, n) for n in range(block.address // page, (block.end - 1) // page + 1)}
        return sum(page for page, _ in touched)
    segments = {}
    for block in blocks:
        segments[head(block)] = sum(part.size for part in chain(head(block)))
    return sum(segments.values())


@MODEL
@settings(max_examples=150, deadline=None)
def test_an_emptied_cache_holds_only_what_blocks_touch(steps, expandable, capacity):
    allocator, used = CachingAllocator(capacity, expandable), []
    for used, _, _ in play(allocator, steps):  # noqa: B007  the last ones are looked at
        pass
    allocator.empty_cache()
    assert allocator.reserved == held([block for block, _ in used], expandable)


@MODEL
@settings(max_examples=50, deadline=None)
def test_the_same_steps_give_the_same_addresses(steps, expandable, capacity):
    def addresses():
        allocator = CachingAllocator(capacity, expandable)
        return [
            ([block.address for block, _ in used], refused, allocator.reserved)
            for used, _, refused in play(allocator, steps)
        ]

    assert addresses() == addresses()


@MODEL
@settings(max_examples=100, deadline=None)
def test_it_gives_up_only_if_the_driver_has_too_little(steps, expandable, capacity):
    allocator = CachingAllocator(capacity, expandable)
    for (_, size, _), (used, _, refused) in zip(steps, play(allocator, steps)):
        if refused:
            allocator.empty_cache()
            unit = 2 * MIB if size <= MIB else 20 * MIB
            most = -(-size // unit) * unit
            assert allocator.reserved == held([block for block, _ in used], expandable)
            assert allocator.reserved + most > capacity


# Recorded requests


@both
def test_a_replay_reserves_what_the_run_did(expandable):
    recorded = RecordingAllocator(None, expandable)
    blocks = [recorded.alloc(n * MIB, stream) for n in range(1, 9) for stream in "ab"]
    for block in blocks[::3]:
        recorded.free(block)
    recorded.free(recorded.alloc(60 * MIB, "a"))
    recorded.empty_cache()
    recorded.alloc(11 * MIB, "a")
    again = replay(recorded.trace, CachingAllocator(None, expandable))
    assert again.peak_reserved == recorded.peak_reserved > again.reserved == recorded.reserved
    assert again.allocated == recorded.allocated


@MODEL
@settings(max_examples=30, deadline=None)
def test_the_least_capacity_serves_all_and_less_does_not(steps, expandable, _):
    recorded = RecordingAllocator(None, expandable)
    for _ in play(recorded, [step for step in steps if step[0] != "free later"]):
        pass
    least = least_capacity(recorded)
    assert recorded.peak_allocated <= least <= recorded.peak_reserved
    replay(recorded.trace, CachingAllocator(least, expandable))
    if least:
        with pytest.raises(torch.OutOfMemoryError):
            replay(recorded.trace, CachingAllocator(least - 2 * MIB, expandable))


def test_a_finer_granularity_is_the_same_model_at_another_size():
    toy = CachingAllocator(expandable_segments=False, granularity=4096)
    toy.alloc(512)
    assert toy.reserved == 4096
    toy.alloc(2048 + 512)
    assert toy.reserved == 4096 + 40960
    toy.alloc(100 * 512)
    assert toy.reserved == 4096 + 40960 + 53248
