"""Tokens over ranks: the bits of one process, and as many bytes sent as arithmetic says."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks_in_threads import on_ranks
from test_activation_offload import on
from test_chunking import SIZES, make_inputs, make_model

from leanwan.activations import apply_activation_offload
from leanwan.dit.chunks import apply_chunking
from leanwan.dit.tokens import spans
from virtual_gpu import VirtualGPU
from wan.distributed.sequence import apply_ranks, heads_of_ranks, parts_of
from wan.modules.model import WanModel

HEADS, WIDTH = SIZES["num_heads"], SIZES["dim"] // SIZES["num_heads"]


@given(st.integers(1, 80_000), st.integers(2, 9), st.one_of(st.just(0), st.integers(64, 4096)))
def test_every_token_has_one_rank_and_pieces_that_kernels_take_alike(length, ranks, chunk):
    parts = parts_of(length, ranks)
    assert len(parts) == ranks and parts[0].start == 0 and parts[-1].stop == length
    assert all(a.stop == b.start for a, b in zip(parts, parts[1:]))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 3 * 64
    pieces = [piece for part in parts for piece in spans(length, chunk, part)]
    assert pieces[0].start == 0 and pieces[-1].stop == length
    assert all(a.stop == b.start for a, b in zip(pieces, pieces[1:]))
    if chunk:
        assert max(piece.stop - piece.start for piece in pieces) <= chunk
    assert not any(0 < (piece.stop - piece.start) % 32 < 4 for piece in pieces[:-1])
    if 0 < length % 32 < 4:  # the last piece is the one that any cut of all tokens ends with
        assert pieces[-1] == spans(length, 64)[-1]


@given(st.integers(1, 50), st.integers(1, 60))
def test_every_head_has_one_rank(heads, ranks):
    shares = heads_of_ranks(heads, ranks)
    assert [h for share in shares for h in range(share.start, share.stop)] == list(range(heads))
    assert max(s.stop - s.start for s in shares) - min(s.stop - s.start for s in shares) <= 1


def shared(model, inputs, size, chunk=0, **options):
    """The flows of each rank, and the bytes that it sent."""

    def work(team):
        mine = copy.deepcopy(model)
        apply_chunking(mine, chunk)
        apply_ranks(mine, team)
        return mine(**inputs, **options), team.sent

    return on_ranks(size, work)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("t2v", torch.bfloat16), ("i2v", torch.float32), ("vace", torch.bfloat16)]
)
def test_bits(kind, dtype):
    model = make_model(kind, dtype)
    for size, length, chunk in [(3, 329, 97), (5, 200, 0), (2, 65, 64)]:
        inputs = make_inputs(kind, length)
        expected = model(**inputs)[0]
        for flows, _ in shared(model, inputs, size, chunk):
            assert torch.equal(flows[0], expected), (size, length, chunk)


@pytest.mark.parametrize("together", [False, True])
def test_two_samples(together):
    model = make_model("t2v")
    first, second = make_inputs("t2v", 210), make_inputs("t2v", 210)
    both = first | {"t": torch.tensor([500.0, 400.0])}
    both |= {
        "x": [*first["x"], second["x"][0].flip(0)],
        "context": [*first["context"], second["context"][0] * 2],
    }
    expected = model(**both)
    for flows, _ in shared(model, both, 3, 64, together=together):
        assert all(map(torch.equal, flows, expected))


@pytest.mark.parametrize("kind", ["vace"])
def test_activations_in_ram(kind):
    """Also where a rank has more tokens of its heads than of its own, and with fewer heads a visit than it has."""
    model = make_model(kind)
    for size, length, chunk, heads in [(3, 329, 97, 1), (5, 200, 0, None)]:
        inputs = make_inputs(kind, length)
        expected = model(**inputs)[0]
        with VirtualGPU() as gpu:
            inputs = {name: on(gpu.device, value) for name, value in inputs.items()}

            def work(team, inputs=inputs, chunk=chunk, heads=heads):
                mine = copy.deepcopy(model).to(team.device)
                apply_chunking(mine, chunk)
                apply_activation_offload(mine, team.device, chunk, heads)
                apply_ranks(mine, team)
                return mine(**inputs)[0].cpu()

            for flow in on_ranks(size, work, gpu.device):
                assert torch.equal(flow, expected), (size, length, chunk)


def test_bytes_sent():
    model, length, size = make_model("t2v", torch.bfloat16), 256, 4
    sent = [sent for _, sent in shared(model, make_inputs("t2v", length), size)]
    token, others = SIZES["dim"] * 2, size - 1
    per_block = 4 * (length // size) * token * others // size  # q, k, v and what was attended to
    flow = (length // size) * 16 * 4 * 4 * others
    assert sent == [SIZES["num_layers"] * per_block + flow] * size


def test_a_fault_is_seen(monkeypatch):
    """A rank that sends its neighbour's heads: the comparison above fails."""
    wrong = lambda heads, ranks: [*heads_of_ranks(heads, ranks)[1:], heads_of_ranks(heads, ranks)[0]]  # noqa: E731
    model, inputs = make_model("t2v"), make_inputs("t2v", 200)
    monkeypatch.setattr("wan.distributed.sequence.heads_of_ranks", wrong)
    (flows, _), _ = shared(model, inputs, 2)
    assert not torch.equal(flows[0], model(**inputs)[0])


class Alone:
    """One rank of several, without the others: it gets zeros. For counting bytes."""

    def __init__(self, rank, size, device):
        self.rank, self.size, self.device = rank, size, device

    def exchange(self, parts, shapes):
        return [parts[0].new_zeros(shape) for shape in shapes]


@pytest.mark.parametrize("offloaded", [False, True])
def test_bytes_on_a_rank(offloaded):
    """Each of four ranks holds a quarter of what one process holds of the tokens, beside pieces and the flow."""
    frames, chunk = 32, 64
    wide = WanModel(**SIZES | {"dim": 768, "num_heads": 8, "num_layers": 1}).requires_grad_(False)

    def peak(size, rank):
        with VirtualGPU() as gpu, torch.no_grad():
            model = copy.deepcopy(wide).to(gpu.device)
            inputs = {name: on(gpu.device, value) for name, value in make_inputs("t2v", 64).items()}
            inputs |= {"x": [inputs["x"][0].expand(-1, frames, -1, -1)], "seq_len": frames * 64}
            apply_chunking(model, chunk)
            if offloaded:
                apply_activation_offload(model, gpu.device, chunk)
            apply_ranks(model, Alone(rank, size, gpu.device))
            before = gpu.live
            gpu.reset_peak()
            model(**inputs)
            return gpu.peak - before

    whole = peak(1, 0)
    for rank in (0, 3):
        assert peak(4, rank) < 0.5 * whole
