"""Tokens in chunks: the rows of the whole pass, whatever the length and the chunk.

A row's bits depend on nothing but its own arithmetic, which is shown with kernels that are called for one row at a
time. The processor's own kernels may round a row otherwise where they are given other rows beside it: there the
bound holds, and the bits where its kernels give them.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leanwan.dit.chunks import apply_chunking, check_chunk
from leanwan.dit.tokens import spans
from leanwan.errors import InputError
from wan.modules import model as dit_module
from wan.modules import vace_model as vace_module
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel

SIZES = {
    "dim": 48,
    "ffn_dim": 64,
    "num_heads": 4,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 16,
    "text_len": 8,
}
KINDS = ("t2v", "i2v", "vace")
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2**-6}  # of the largest value; in bf16 two of its steps

lengths_and_chunks = st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(64, max(64, n))))


def make_model(kind, dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "vace":
        model = VaceWanModel(vace_layers=[0], vace_in_dim=8, **SIZES)
    else:
        model = WanModel(model_type=kind, in_dim=16 if kind == "t2v" else 36, **SIZES)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(model.storage_dtype(name, dtype))
    model.compute_dtype = dtype
    return model.eval().requires_grad_(False)


def make_inputs(kind, length):
    """A call of `length` tokens in one row."""
    generator = torch.Generator().manual_seed(length)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "x": [noise(16, 1, 2, 2 * length)],
        "t": torch.tensor([500.0]),
        "context": [noise(5, SIZES["text_dim"])],
        "seq_len": length,
    }
    if kind == "i2v":
        inputs |= {"clip_fea": noise(1, 257, 1280), "y": [noise(20, 1, 2, 2 * length)]}
    if kind == "vace":
        inputs |= {"vace_context": [noise(8, 1, 2, 2 * length)]}
    return inputs


MODELS = {(kind, dtype): make_model(kind, dtype) for kind in KINDS for dtype in BOUND}


@given(st.integers(1, 80_000), st.one_of(st.just(0), st.integers(64, 4096)))
def test_spans_cut_everything_once_in_pieces_of_a_chunk(length, chunk):
    pieces = spans(length, chunk)
    assert [i for piece in (pieces[0], pieces[-1]) for i in (piece.start, piece.stop)][::3] == [0, length]
    assert all(a.stop == b.start for a, b in zip(pieces, pieces[1:]))
    sizes = [piece.stop - piece.start for piece in pieces]
    if len(sizes) > 1:
        assert max(sizes) <= chunk and min(sizes) >= 4
        assert len(sizes) <= length / (chunk - 31) + 2
    # Kernels take 32 rows at a time: all but the last piece leave none of the few that they treat otherwise.
    assert not any(0 < size % 32 < 4 for size in sizes[:-1])


@pytest.fixture(scope="module")
def row_by_row():
    """Linear layers and attention that compute one row per call."""
    linear, attend = F.linear, dit_module.flash_attention

    def one_by_one(x, weight, bias=None):
        rows = [linear(row.clone(), weight, bias) for row in x.reshape(-1, 1, x.size(-1)).unbind()]
        return torch.cat(rows).reshape(*x.shape[:-1], -1)

    def query_by_query(q, k, v):
        return torch.cat([attend(row.clone(), k, v) for row in q.split(1, dim=1)], dim=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", one_by_one)
        patch.setattr(dit_module, "flash_attention", query_by_query)
        patch.setattr(vace_module, "flash_attention", query_by_query)
        yield


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_computed_alike_in_any_chunk(kind, dtype):
    model = MODELS[kind, dtype]

    @settings(deadline=None, max_examples=4)
    @given(lengths_and_chunks.filter(lambda case: case[0] > case[1]))
    def check(case):
        length, chunk = case
        inputs = make_inputs(kind, length)
        assert torch.equal(model(**inputs, chunk=chunk)[0], model(**inputs)[0])

    check()


def kernels_agree(model, length, chunk):
    """Whether this processor's kernels give each piece the rows that they give the whole."""
    dtype = model.compute_dtype
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    def same(function, x):
        whole = function(x)
        return all(torch.equal(function(x[:, span]), whole[:, span]) for span in spans(length, chunk))

    heads, head_dim = SIZES["num_heads"], SIZES["dim"] // SIZES["num_heads"]
    queries = noise(1, length, heads, head_dim).to(dtype)
    contexts = [noise(1, n, heads, head_dim).to(dtype) for n in (length, SIZES["text_len"], 257)]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.in_features in (48, 64)]
    return all(
        same(lambda q, k=k: dit_module.flash_attention(q, k, k.flip(1)), queries) for k in contexts
    ) and all(same(m, noise(1, length, m.in_features).to(m.weight.dtype)) for m in layers)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_with_the_processors_kernels(kind, dtype):
    """Within the bound on any processor; bit for bit where its kernels do not look at the number of rows."""
    model = MODELS[kind, dtype]

    @settings(deadline=None, max_examples=8)
    @given(lengths_and_chunks)
    def check(case):
        length, chunk = case
        inputs = make_inputs(kind, length)
        whole, chunked = model(**inputs)[0], model(**inputs, chunk=chunk)[0]
        assert (whole - chunked).abs().max() <= BOUND[dtype] * whole.abs().max()
        if chunk >= length or kernels_agree(model, length, chunk):
            assert torch.equal(whole, chunked)

    check()


@pytest.mark.parametrize("length, chunk", [(105, chunk) for chunk in (64, 65, 70, 97, 104)] + [(2080, 2047)])
def test_pieces_end_where_kernels_of_32_rows_do(length, chunk):
    """Lengths and chunks whose remainders PyTorch's attention computes by another kernel if they are left alone."""
    sizes = [piece.stop - piece.start for piece in spans(length, chunk)]
    assert all(size % 32 == 0 for size in sizes[:-1]) and sizes[-1] % 32 == length % 32


# Applied and undone


def test_applied_and_undone():
    for kind in KINDS:
        model, inputs = make_model(kind), make_inputs(kind, 150)
        before = dict(vars(model))
        expected, chunked = model(**inputs)[0], model(**inputs, chunk=64)[0]
        undo = apply_chunking(model, 64)
        assert torch.equal(model(**inputs)[0], chunked)
        with pytest.raises(RuntimeError, match="dit_chunk"):
            apply_chunking(model, 128)
        undo()
        undo()
        assert vars(model) == before and torch.equal(model(**inputs)[0], expected)


def test_zero_leaves_the_model_alone():
    model = make_model("t2v")
    before = dict(vars(model))
    apply_chunking(model, 0)()
    assert vars(model) == before


class Foreign(nn.Module):
    """A model of another tree: the modules of the checkpoint, another forward pass, its call signature."""

    def __init__(self, model):
        super().__init__()
        for name, child in copy.deepcopy(model).named_children():
            self.add_module(name, child)
        for name in ("model_type", "freq_dim", "text_len", "patch_size", "freqs", "vace_layers"):
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None):
        raise AssertionError("the forward pass of its own")


class ForeignVace(Foreign):
    def forward(self, x, t, vace_context, context, seq_len, vace_context_scale=1.0, clip_fea=None, y=None):
        raise AssertionError("the forward pass of its own")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_another_tree(kind):
    """It gets this forward pass with the attention of its own tree, by its own order of arguments."""
    model, inputs = make_model(kind), make_inputs(kind, 150)
    foreign = (ForeignVace if kind == "vace" else Foreign)(model)
    undo = apply_chunking(foreign, 64)
    order = (
        ["x", "t", "vace_context", "context", "seq_len"]
        if kind == "vace"
        else ["x", "t", "context", "seq_len"]
    )
    positional = [inputs.pop(name) for name in order]
    result = foreign(*positional, **inputs)[0]
    assert torch.equal(result, model(*positional, **inputs, chunk=64)[0])
    undo()
    with pytest.raises(AssertionError, match="its own"):
        foreign(*positional, **inputs)


@pytest.mark.parametrize("tokens", [1, 63, -64, 64.0, "64", True])
def test_bad_chunks(tokens):
    with pytest.raises(InputError, match="dit_chunk") as caught:
        check_chunk(tokens)
    assert "\n" not in str(caught.value)
