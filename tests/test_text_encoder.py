"""The text encoder computes what its checkpoint and the UMT5 formulas say, which is what upstream computes."""

import itertools
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from leanwan.encoder_layers import text_encoder_groups
from leanwan.errors import InputError
from upstream_driver.toy_encoders import encode
from virtual_gpu import VirtualGPU
from wan.modules.t5 import T5EncoderModel
from wan.random_models import t5_weights, train_tokenizer

SIZES = {"vocab_size": 400, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_heads": 4}
TEXT_LEN = 48
TEXTS = [
    "a red ball rolls to the right across a green table",
    "",
    "snow falls slowly on a quiet street, a lamp glows, a dog walks through the picture, two cats sit at the window",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    train_tokenizer(SIZES["vocab_size"]).save_pretrained(folder / "tokenizer")
    torch.save(weights(), folder / "weights.pth")
    return folder


def weights():
    """Embeddings are so small that the norm's eps counts."""
    tensors = t5_weights(SimpleNamespace(t5_config=SIZES))
    return tensors | {"token_embedding.weight": tensors["token_embedding.weight"] * 0.01}


def load(folder, dtype=torch.float32, text_len=TEXT_LEN, **options):
    return T5EncoderModel(
        text_len, dtype, "cpu", folder / "weights.pth", folder / "tokenizer", config=SIZES, **options
    )


def difference(result, expected):
    """Largest difference relative to the largest value."""
    return ((result.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def bucket(distance):
    """Relative position bucket of 32: 16 for keys behind, 16 ahead; 8 of each exact, then two per octave up to 128."""
    ahead, n = 16 * (distance > 0), abs(distance)
    large = next(k for k in range(15, 7, -1) if k == 8 or n * n >= 64 * 2 ** (k - 8))
    return ahead + (n if n < 8 else large)


def formulas(tensors, ids):
    """UMT5's encoder in fp64 for one prompt without padding, by the checkpoint's names: [L] to [L, d_model]."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    length, heads = len(ids), SIZES["num_heads"]
    buckets = torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])

    def rms_norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def split(x):
        return x.view(length, heads, -1).transpose(0, 1)

    x = tensors["token_embedding.weight"][ids]
    for i in range(SIZES["num_layers"]):
        prefix = f"blocks.{i}."
        block = {
            name.removeprefix(prefix).removesuffix(".weight"): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        h = rms_norm(x, block["norm1"])
        q, k, v = (split(h @ block[f"attn.{name}"].T) for name in "qkv")
        scores = q @ k.mT + block["pos_embedding.embedding"][buckets].permute(2, 0, 1)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).reshape(length, -1) @ block["attn.o"].T
        h = rms_norm(x, block["norm2"])
        gate = h @ block["ffn.gate.0"].T
        gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gate * (h @ block["ffn.fc1"].T)) @ block["ffn.fc2"].T
    return rms_norm(x, tensors["norm.weight"])


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_the_formulas(folder, dtype, bound, record_property):
    encoder = load(folder, dtype)
    results = encoder(TEXTS, "cpu")
    ids, mask = encoder.tokenizer(TEXTS, return_mask=True)
    lengths = mask.sum(1).tolist()
    assert [tuple(result.shape) for result in results] == [(length, 64) for length in lengths]
    assert lengths[1] == 1 and lengths[2] == TEXT_LEN and 1 < lengths[0] < TEXT_LEN  # empty, cut, padded
    for result, prompt, length in zip(results, ids, lengths):
        assert result.dtype == dtype and not result.requires_grad
        largest = difference(result, formulas(weights(), prompt[:length]))
        print(f"{dtype}, {length} tokens: {largest:.1e}")
        assert largest <= bound


def test_every_bucket_is_compared(folder):
    """The prompt that fills the length reaches distances into the logarithmic buckets on both sides."""
    reached = {bucket(d) for d in range(1 - TEXT_LEN, TEXT_LEN)}
    assert len(reached) == 27 and {12, 28} <= reached
    assert [bucket(d) for d in (-7, -8, -16, -127, -128, 0, 1, 8, 12, 128)] == [
        7,
        8,
        10,
        15,
        15,
        0,
        17,
        24,
        25,
        31,
    ]


def test_padding_and_other_prompts_change_nothing(folder):
    together = load(folder)(TEXTS, "cpu")
    for text, expected in zip(TEXTS, together):
        torch.testing.assert_close(load(folder)(text, "cpu")[0], expected, rtol=1e-5, atol=1e-6)
    longer = load(folder, text_len=2 * TEXT_LEN)(TEXTS[0], "cpu")[0]
    torch.testing.assert_close(longer, together[0], rtol=1e-5, atol=1e-6)


def test_text_is_cleaned(folder):
    encoder = load(folder)
    assert torch.equal(encoder(" a  red \n ball", "cpu")[0], encoder("a red ball", "cpu")[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_may_stay_on_the_cpu(folder, dtype):
    encoder = load(folder, dtype)
    expected = encoder(TEXTS, "cpu")
    with VirtualGPU() as gpu:
        encoder.model.block.to("vgpu")
        encoder.model.final_layer_norm.to("vgpu")
        results = encoder(TEXTS, torch.device("vgpu"))
        assert all(result.device.type == "vgpu" for result in results)
        assert all(torch.equal(result.cpu(), e) for result, e in zip(results, expected))
        table = encoder.model.embed_tokens.weight
        assert table.device.type == "cpu"
        encoder.model.to("cpu")
        del results
        assert gpu.live == 0


def test_pieces_are_visited_in_their_order_and_hold_every_block(folder):
    encoder = load(folder)
    visits = []
    for i, piece in enumerate(text_encoder_groups(encoder.model)):
        for module in piece:
            module.register_forward_pre_hook(lambda module, args, i=i: visits.append(i))
    encoder("a red ball", "cpu")
    assert [i for i, _ in itertools.groupby(visits)] == list(range(5 * SIZES["num_layers"]))
    of_pieces = [id(p) for piece in text_encoder_groups(encoder.model) for p in piece.parameters()]
    of_blocks = [id(p) for p in encoder.model.block.parameters()]
    assert sorted(of_pieces) == sorted(of_blocks)


def test_shard_fn_replaces_the_move(folder):
    calls = []

    def shard(model, sync_module_states):
        calls.append(sync_module_states)
        return model

    load(folder, shard_fn=shard)
    assert calls == [False]


def test_default_sizes_without_a_checkpoint(folder):
    """UMT5-XXL, held by nothing: 10.58 GiB in bf16."""
    model = T5EncoderModel(512, tokenizer_path=folder / "tokenizer").model
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    block = 4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096 + 32 * 64
    assert sum(p.numel() for p in model.parameters()) == 256384 * 4096 + 24 * block + 4096
    assert round(sum(p.nbytes for p in model.parameters()) / 2**30, 2) == 10.58


def test_scores_are_not_held_in_fp32(folder):
    """512 tokens, 8 heads, bf16: at no time more than five score matrices, or two and a half in fp32."""
    sizes = SIZES | {"num_heads": 8, "num_layers": 2}
    tensors = t5_weights(SimpleNamespace(t5_config=sizes))
    path = folder / "eight_heads.pth"
    torch.save(tensors, path)
    encoder = T5EncoderModel(512, torch.bfloat16, "cpu", path, folder / "tokenizer", config=sizes)
    with VirtualGPU() as gpu:
        encoder.model.to("vgpu")
        gpu.reset_peak()
        weights_held = gpu.live
        encoder("a red ball", torch.device("vgpu"))
        scores = 8 * 512 * 512 * 2
        assert gpu.peak - weights_held <= 5 * scores
        encoder.model.to("cpu")


def damaged(tensors, change):
    if change == "missing":
        del tensors["blocks.1.ffn.fc1.weight"]
    elif change == "unexpected":
        tensors["blocks.1.ffn.fc3.weight"] = torch.zeros(1)
    elif change == "misshaped":
        tensors["blocks.1.attn.q.weight"] = torch.zeros(64, 32)
    elif change == "more layers":
        tensors["blocks.3.norm1.weight"] = torch.ones(64)
    return tensors


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", "missing: block.1.layer.1.DenseReluDense.wi_1.weight"),
        ("unexpected", "unexpected: blocks.1.ffn.fc3.weight"),
        ("misshaped", "blocks.1.attn.q.weight (64, 32) instead of (64, 64)"),
        ("more layers", "unexpected: blocks.3.norm1.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit(folder, tmp_path, change, message):
    path = tmp_path / "weights.pth"
    torch.save(damaged(weights(), change), path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        T5EncoderModel(TEXT_LEN, torch.float32, "cpu", path, folder / "tokenizer", config=SIZES)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_files(folder, tmp_path):
    with pytest.raises(InputError, match="nowhere.pth"):
        T5EncoderModel(
            TEXT_LEN, checkpoint_path=tmp_path / "nowhere.pth", tokenizer_path=folder / "tokenizer"
        )
    with pytest.raises(InputError, match="no such tokenizer directory"):
        T5EncoderModel(TEXT_LEN, checkpoint_path=folder / "weights.pth", tokenizer_path=tmp_path / "nowhere")


@pytest.mark.skipif("WAN_UPSTREAM" not in os.environ, reason="WAN_UPSTREAM names no checkout of upstream")
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_upstream(folder, dtype, bound):
    sizes = {
        "vocab_size": SIZES["vocab_size"],
        "dim": SIZES["d_model"],
        "dim_attn": SIZES["d_kv"] * SIZES["num_heads"],
        "dim_ffn": SIZES["d_ff"],
        "num_heads": SIZES["num_heads"],
        "encoder_layers": SIZES["num_layers"],
    }
    name = str(dtype).removeprefix("torch.")
    texts = TEXTS + ["Ã© a &amp;amp; b，ｆｕｌｌ width \n\n ☃"]
    expected = encode(
        Path(os.environ["WAN_UPSTREAM"]),
        folder,
        encoder="text",
        dtype=name,
        sizes=sizes,
        texts=texts,
        text_len=TEXT_LEN,
    )
    results = load(folder, dtype)(texts, "cpu")
    assert [r.shape for r in results] == [e.shape for e in expected]
    assert [r.dtype for r in results] == [e.dtype for e in expected]
    largest = max(map(difference, results, expected))
    print(f"{dtype}: {largest:.1e}")
    assert largest <= bound
