"""Attention: which kernel is taken where, and that each computes the same."""

import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from leanwan.errors import InputError
from wan.modules import attention
from wan.modules.attention import (
    CHOICES,
    FUSED,
    IN_PIECES,
    SAGE,
    attend_in_pieces,
    check_attention,
    choose_kernel,
    flash_attention,
    kernel_of,
    load_flash_attn,
    load_sage,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TURING, AMPERE, ADA, HOPPER, BLACKWELL = (7, 5), (8, 6), (8, 9), (9, 0), (12, 0)


@pytest.fixture(autouse=True)
def fresh():
    load_flash_attn.cache_clear()
    attention._tell.cache_clear()
    yield
    load_flash_attn.cache_clear()


def tensors(rows, keys, heads=3, width=16, batch=2, dtype=FP32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, n, heads, width, generator=generator).to(dtype) for n in (rows, keys, keys)]


def reference(q, k, v, scale=None, causal=False):
    """In fp64, the formula as it is written."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)
    if causal:
        scores.masked_fill_(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(
    "dtype, width, capability, flash_attn, fused, expected",
    [
        (BF16, 128, TURING, (), False, IN_PIECES),
        (BF16, 128, TURING, (2, 3), False, IN_PIECES),  # flash-attn refuses these cards
        (FP16, 128, TURING, (), True, FUSED),
        (BF16, 128, AMPERE, (), True, FUSED),
        (BF16, 128, AMPERE, (2,), True, "flash-attn 2"),
        (BF16, 128, ADA, (3, 2), True, "flash-attn 2"),
        (BF16, 128, HOPPER, (3, 2), True, "flash-attn 3"),
        (BF16, 128, HOPPER, (2,), True, "flash-attn 2"),
        (BF16, 128, BLACKWELL, (3, 2), True, "flash-attn 2"),
        (BF16, 512, AMPERE, (2,), False, IN_PIECES),
        (FP32, 128, AMPERE, (2,), True, FUSED),
        (FP32, 30, AMPERE, (2,), False, IN_PIECES),
    ],
)
def test_the_kernel_fits_the_card(dtype, width, capability, flash_attn, fused, expected):
    assert choose_kernel(dtype, width, capability, flash_attn, fused) == expected


def test_a_cpu_has_a_fused_kernel():
    assert kernel_of(*tensors(4, 4)) == FUSED


def test_a_card_is_asked_what_it_can(monkeypatch):
    """What is asked of PyTorch exists in this version, and is asked about the call that follows."""
    asked = []

    def can_use(call):
        asked.append((call.query.shape, call.key.shape, call.is_causal, call.attn_mask, call.dropout))
        return False

    q, k, v = tensors(4, 6)
    card = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", can_use)
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", can_use)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: TURING if device is card else None
    )

    class OnCard(torch.Tensor):
        device = card

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    assert kernel_of(q.as_subclass(OnCard), k, v, causal=True) == IN_PIECES
    assert asked == [((2, 3, 4, 16), (2, 3, 6, 16), True, None, 0.0)] * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("bound", [1, 400, 3000, 2**27])  # bytes: one row, rows of a head, heads, all at once
def test_pieces_make_the_whole(monkeypatch, bound, scale, causal):
    monkeypatch.setattr(attention, "SCORE_BYTES", bound)
    for dtype, limit in ((torch.float64, 1e-12), (FP32, 2e-6), (BF16, 1e-2)):
        q, k, v = tensors(17, 17 if causal else 23, dtype=dtype)
        out = attend_in_pieces(q, k, v, scale, causal)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), reference(q, k, v, scale, causal), atol=limit, rtol=limit)


def test_pieces_in_bf16_are_rounded_once(monkeypatch):
    """What is computed in fp32 and rounded at the end is the nearest bf16 but for ties."""
    monkeypatch.setattr(attention, "SCORE_BYTES", 400)
    q, k, v = tensors(17, 23, dtype=BF16)
    exact = reference(q, k, v).float().to(BF16)
    assert (attend_in_pieces(q, k, v) != exact).float().mean() < 0.01


def test_scores_are_bounded(monkeypatch):
    """No call has more scores than allowed, and whole rows of them."""
    sizes = []
    whole = F.scaled_dot_product_attention

    def watch(q, k, v, **options):
        sizes.append(q.shape[:-1].numel() * k.size(2) * 4)
        assert k.size(2) == 50 and k.dtype == FP32
        return whole(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(attention, "SCORE_BYTES", 2000)
    attend_in_pieces(*tensors(40, 50, heads=4, batch=1, dtype=BF16))
    assert max(sizes) <= 2000 and sum(sizes) == 4 * 40 * 50 * 4
    sizes.clear()
    monkeypatch.setattr(attention, "SCORE_BYTES", 2 * 40 * 50 * 4)
    attend_in_pieces(*tensors(40, 50, heads=4, batch=1))
    assert len(sizes) == 2  # two heads at a time


def test_keys_that_do_not_count_are_left_out():
    q, k, v = tensors(5, 7)
    out = flash_attention(q, k, v, k_lens=torch.tensor([7, 4]))
    expected = torch.cat([reference(q[:1], k[:1], v[:1]), reference(q[1:], k[1:, :4], v[1:, :4])])
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_types():
    q, k, v = tensors(5, 7)
    assert flash_attention(q, k, v.to(BF16)).dtype == FP32  # q's, computed in v's
    assert torch.equal(flash_attention(q, k, v), flash_attention(q, k, v, dtype=None))
    in_bf16 = flash_attention(q.to(BF16), k.to(BF16), v.to(BF16))
    assert torch.equal(flash_attention(q, k, v, dtype=BF16), in_bf16.float())
    assert torch.equal(flash_attention(q.half(), k.half(), v.half(), dtype=BF16).float(),
                       flash_attention(q.half(), k.half(), v.half()).float())  # fmt: skip
    torch.testing.assert_close(flash_attention(q, k, v, q_scale=0.5), flash_attention(q * 0.5, k, v))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dropout_p": 0.1}, "dropout_p 0.1"),
        ({"window_size": (8, 8)}, r"window_size \(8, 8\)"),
        ({"causal": True}, "causal: as many keys"),
    ],
)
def test_what_is_not_supported_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(*tensors(5, 7), **arguments)


def test_the_sixth_argument_is_dropout():
    """As in the published code: a scale there would be silently wrong."""
    names = (
        "q k v q_lens k_lens dropout_p softmax_scale q_scale causal window_size deterministic dtype version"
    )
    assert list(inspect.signature(flash_attention).parameters) == [*names.split(), "choice"]
    assert inspect.signature(flash_attention).parameters["choice"].kind is inspect.Parameter.KEYWORD_ONLY
    with pytest.raises(ValueError, match="dropout_p"):
        flash_attention(*tensors(5, 5), None, None, 0.125)


@pytest.mark.skipif("WAN_UPSTREAM" not in os.environ, reason="WAN_UPSTREAM names no upstream tree")
def test_the_signature_is_upstreams():
    import ast

    tree = ast.parse((Path(os.environ["WAN_UPSTREAM"]) / "wan/modules/attention.py").read_text())
    function = next(node for node in tree.body if getattr(node, "name", "") == "flash_attention")
    ours = list(inspect.signature(flash_attention).parameters)
    assert [a.arg for a in function.args.args] == ours[: ours.index("choice")]


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """What flash-attn's function of this name is documented to do."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    out = torch.empty_like(q)
    for i in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        assert rows.stop - rows.start <= max_seqlen_q and keys.stop - keys.start <= max_seqlen_k
        out[rows] = reference(q[None, rows], k[None, keys], v[None, keys], softmax_scale, causal)[0].to(
            q.dtype
        )
    return out


@pytest.mark.parametrize("version, name", [(3, "flash_attn_interface"), (2, "flash_attn")])
def test_flash_attn_is_called_as_it_wants(monkeypatch, version, name):
    def function(*args, **kwargs):
        out = varlen(*args, **kwargs)
        return (out, None) if version == 3 else out

    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_varlen_func=function))
    monkeypatch.setattr(attention, "kernel_of", lambda *_: f"flash-attn {version}")
    q, k, v = tensors(5, 7, dtype=BF16)
    expected = reference(q, k, v, 0.3).to(BF16)
    assert torch.equal(flash_attention(q, k, v, softmax_scale=0.3), expected)
    lengths = torch.tensor([7, 4])
    expected = torch.cat([reference(q[:1], k[:1], v[:1]), reference(q[1:], k[1:, :4], v[1:, :4])]).to(BF16)
    assert torch.equal(flash_attention(q, k, v, k_lens=lengths), expected)


def broken(error, module="flash_attn"):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == module:
                raise error

    return Finder


@pytest.mark.parametrize(
    "error",
    [
        ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c10"),
        OSError("DLL load failed"),
        RuntimeError("built for\nanother CUDA"),
        ModuleNotFoundError("No module named 'einops'", name="einops"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_flash_attn_is_told_once_and_left_alone(monkeypatch, caplog, error):
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(sys, "meta_path", [broken(error), *sys.meta_path])
    for _ in range(2):
        assert 2 not in load_flash_attn()
    (message,) = caplog.messages
    assert message.startswith("flash-attn 2 cannot be imported, attention goes on without it (")
    assert type(error).__name__ in message and "\n" not in message


def test_a_flash_attn_that_is_not_there_is_not_missed(monkeypatch, caplog):
    for name in ("flash_attn", "flash_attn_interface"):
        missing = ModuleNotFoundError(f"No module named {name!r}", name=name)
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [broken(missing, name), *sys.meta_path])
    assert load_flash_attn() == {} and caplog.messages == []


def test_flash_attn_is_not_imported_before_it_is_asked_for(tmp_path):
    """Not with the package, and on a CPU not at all; nor do the libraries, which see that it is installed."""
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol')")
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.8.3\n"
    )
    code = (
        "import torch, wan.pipeline; from wan.modules.attention import flash_attention\n"
        "flash_attention(*[torch.randn(1, 4, 2, 8) for _ in range(3)])"
    )
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{tmp_path}"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_the_kernel_is_told_once(caplog):
    caplog.set_level(logging.INFO)
    for _ in range(2):
        flash_attention(*tensors(5, 5))
    assert caplog.messages == ["Attention in float32 on cpu: PyTorch's"]


# The user's choice


class Card(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    device = SimpleNamespace(type="cuda", index=0)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.fixture
def card(monkeypatch):
    """A CUDA device for what asks: returns the function that sets its capability and the packages on it."""

    def make(capability=ADA, versions=(), sage=None):
        monkeypatch.setattr(attention, "load_flash_attn", lambda: dict.fromkeys(versions, len))
        monkeypatch.setattr(attention, "load_sage", lambda: sage)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for name in ("can_use_flash_attention", "can_use_efficient_attention"):
            monkeypatch.setattr(torch.backends.cuda, name, lambda call: True)
        return torch.device("cuda", 0)

    return make


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("versions", [(), (2,), (3, 2)])
def test_the_choice_decides_the_kernel(card, choice, versions):
    card(HOPPER, versions)
    q, k, v = (x.as_subclass(Card) for x in tensors(4, 6, dtype=BF16))
    if choice == "flash" and not versions:
        with pytest.raises(
            InputError, match="attention flash: takes no heads of width 16 in bfloat16 on cuda"
        ):
            kernel_of(q, k, v, choice=choice)
        return
    newest = f"flash-attn {max(versions)}" if versions else FUSED
    expected = {"auto": newest, "sdpa": FUSED, "flash": newest, "sage": SAGE}[choice]
    assert kernel_of(q, k, v, choice=choice) == expected


def test_sage_is_called_as_it_wants(monkeypatch):
    calls = []

    def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
        calls.append((tensor_layout, is_causal, sm_scale))
        return reference(q, k, v, sm_scale, is_causal).to(q.dtype)

    monkeypatch.setattr(attention, "load_sage", lambda: sageattn)
    q, k, v = tensors(5, 7, dtype=BF16)
    expected = reference(q, k, v, 0.3).to(BF16)
    assert torch.equal(flash_attention(q, k, v, softmax_scale=0.3, choice="sage"), expected)
    assert calls == [("NHD", False, 0.3)]
    for unfit in (tensors(5, 7), tensors(5, 7, width=160, dtype=BF16)):
        with pytest.raises(InputError, match="attention sage: takes no heads of width"):
            flash_attention(*unfit, choice="sage")


@pytest.mark.parametrize(
    "choice, dtype, capability, versions, told",
    [
        ("flash", BF16, ADA, (), "is absent or broken, install flash-attn, `pip install flash-attn"),
        ("sage", BF16, ADA, (2,), "is absent or broken, install SageAttention, `pip install sageattention"),
        ("flash", FP32, ADA, (2,), "computes in bf16 and fp16 only, this model computes in float32"),
        ("flash", BF16, TURING, (2,), r"needs compute capability 8.0 \(RTX 30\) or newer, cuda:0 has 7.5"),
        ("flash", BF16, ADA, (3,), "is for compute capability 9 only: install flash-attn 2"),
        ("flash", BF16, ADA, (3, 2), None),
        ("flash", BF16, HOPPER, (3,), None),
        ("sdpa", FP32, TURING, (), None),
        ("auto", FP32, TURING, (), None),
    ],
)
def test_a_choice_that_cannot_run_is_refused(card, choice, dtype, capability, versions, told):
    device = card(capability, versions)
    if told is None:
        return check_attention(choice, device, dtype)
    with pytest.raises(InputError, match=f"^attention {choice}: .*{told}.*; give auto or sdpa$"):
        check_attention(choice, device, dtype)


def test_sage_runs_where_it_is_installed(card):
    check_attention("sage", card(ADA, (), len), BF16)
    with pytest.raises(InputError, match="needs compute capability"):
        check_attention("sage", card(TURING, (), len), BF16)


def test_a_broken_sage_is_told(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "sageattention", raising=False)
    monkeypatch.setattr(sys, "meta_path", [broken(ImportError("no triton"), "sageattention"), *sys.meta_path])
    load_sage.cache_clear()
    assert load_sage() is None
    assert "SageAttention cannot be imported" in caplog.text
    load_sage.cache_clear()
