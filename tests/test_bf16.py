"""bf16, what real checkpoints run in: which parameters, and every rounding of the published model's autocast.

The reference is the published architecture with weights in fp32 and without a cast of its own but those to fp32
and back that its norms are defined with; it runs on the virtual GPU, whose autocast casts what CUDA's casts. Ours
computes the same kernels on the same numbers, so that one rounding more or less, or one elsewhere, shows.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leanwan.dit.conditioning import sinusoidal_embedding
from leanwan.dit.forward import Rope
from virtual_gpu import VirtualGPU
from wan.modules.model import WanModel, rope_frequencies
from wan.modules.vace_model import VaceWanModel
from wan.vace import WanVace

KINDS = ("t2v", "i2v", "flf2v", "vace")
SIZES = {
    "dim": 64,
    "ffn_dim": 96,
    "num_heads": 4,
    "num_layers": 3,
    "freq_dim": 32,
    "text_dim": 32,
    "text_len": 16,
}
GRID = (2, 6, 8)  # frames, rows, columns of tokens
STRENGTH = 0.8


def make_model(kind):
    """Weights in fp32, none of which bf16 could hold."""
    torch.manual_seed(0)
    if kind == "vace":
        model = VaceWanModel(vace_layers=[0, 2], vace_in_dim=8, **SIZES)
    else:
        model = WanModel(model_type=kind, in_dim=16 if kind == "t2v" else 36, **SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval().requires_grad_(False)


def in_bf16(model):
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(model.storage_dtype(name, torch.bfloat16))
    model.compute_dtype = torch.bfloat16
    return model


def make_inputs(kind):
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    frames, rows, columns = GRID
    latent = (frames, 2 * rows, 2 * columns)
    inputs = {
        "x": [noise(16, *latent)],
        "t": torch.tensor([531.0]),
        "context": [noise(11, SIZES["text_dim"]).bfloat16()],
        "seq_len": frames * rows * columns,
    }
    if kind in ("i2v", "flf2v"):
        inputs |= {
            "clip_fea": noise(2 if kind == "flf2v" else 1, 257, 1280).half(),
            "y": [noise(20, *latent)],
        }
    if kind == "vace":
        inputs |= {"vace_context": [noise(8, *latent)], "vace_context_scale": STRENGTH}
    return inputs


# The reference


def rms(norm, x):
    wide = x.float()
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + norm.eps)).to(x.dtype) * norm.weight


def layer_norm(norm, x):
    return F.layer_norm(x.float(), norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


def heads(x):
    return x.unflatten(2, (SIZES["num_heads"], -1))


def turned(x):
    """Rotary embedding of [1, L, heads, head_dim], in fp64, token by token of the grid."""
    half = x.size(3) // 2
    tables = rope_frequencies(2 * half).split([half - 2 * (half // 3), half // 3, half // 3], dim=1)
    places = torch.cartesian_prod(*map(torch.arange, GRID))
    turn = torch.cat([table[place] for table, place in zip(tables, places.unbind(1))], 1).to(x.device)
    pairs = torch.view_as_complex(x.double().unflatten(3, (half, 2)))
    return torch.view_as_real(pairs * turn[:, None]).flatten(3).float()


def attention(q, k, v):
    out = F.scaled_dot_product_attention(*(x.to(v.dtype).transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).to(q.dtype)


def block_reference(block, x, time, text, image):
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + time).unbind(1)
    own, cross = block.self_attn, block.cross_attn
    hidden = layer_norm(block.norm1, x).float() * (1 + scale) + shift
    q, k = (
        turned(heads(rms(norm, layer(hidden)))) for norm, layer in ((own.norm_q, own.q), (own.norm_k, own.k))
    )
    x = x + own.o(attention(q, k, heads(own.v(hidden))).flatten(2)) * gate
    q = heads(rms(cross.norm_q, cross.q(layer_norm(block.norm3, x))))
    out = attention(q, heads(rms(cross.norm_k, cross.k(text))), heads(cross.v(text)))
    if image is not None:
        key = heads(rms(cross.norm_k_img, cross.k_img(image)))
        out = out + attention(q, key, heads(cross.v_img(image)))
    x = x + cross.o(out.flatten(2))
    hidden = layer_norm(block.norm2, x).float() * (1 + ffn_scale) + ffn_shift
    return x + block.ffn(hidden) * ffn_gate


def patches(embedding, latent):
    frames = [embedding(frame[None]) for frame in latent.split(1, dim=1)]
    return torch.cat(frames, dim=2).flatten(2).transpose(1, 2).contiguous()


def reference(
    model, x, t, context, seq_len, clip_fea=None, y=None, vace_context=None, vace_context_scale=1.0
):
    stream = patches(model.patch_embedding, x[0] if y is None else torch.cat([x[0], y[0]]))
    with torch.autocast("vgpu", enabled=False):
        time = model.time_embedding(sinusoidal_embedding(SIZES["freq_dim"], t))
        modulation = model.time_projection(time).unflatten(1, (6, -1))
    missing = context[0].new_zeros(SIZES["text_len"] - len(context[0]), SIZES["text_dim"])
    text = model.text_embedding(torch.cat([context[0], missing])[None])
    image = None
    if clip_fea is not None:
        if model.model_type == "flf2v":
            clip_fea = clip_fea.flatten(0, 1)[None] + model.img_emb.emb_pos
        image = model.img_emb.proj(clip_fea)
    hints = {}
    if vace_context is not None:
        second = patches(model.vace_patch_embedding, vace_context[0])
        second = model.vace_blocks[0].before_proj(second) + stream
        for number, block in zip(model.vace_layers, model.vace_blocks):
            second = block_reference(block, second, modulation, text, image)
            hints[number] = block.after_proj(second)
    for number, block in enumerate(model.blocks):
        stream = block_reference(block, stream, modulation, text, image)
        if number in hints:
            stream = stream + hints[number] * vace_context_scale
    with torch.autocast("vgpu", enabled=False):
        shift, scale = (model.head.modulation + time[:, None]).unbind(1)
        out = model.head.head(layer_norm(model.head.norm, stream) * (1 + scale) + shift)
    out = torch.einsum("fhwpqrc->cfphqwr", out[0].unflatten(0, GRID).unflatten(3, (*model.patch_size, 16)))
    return out.reshape(x[0][:16].shape).float()


def to(device, value):
    if isinstance(value, list):
        return [to(device, entry) for entry in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("kind", KINDS)
def test_every_rounding_is_that_of_autocast(kind):
    model = make_model(kind)
    inputs = make_inputs(kind)
    with VirtualGPU() as gpu:
        there = {name: to("vgpu", value) for name, value in inputs.items()}
        ours = in_bf16(model).to(gpu.device)(**there)[0].cpu()
        with torch.autocast("vgpu", dtype=torch.bfloat16), torch.no_grad():
            expected = reference(model.to(gpu.device), **there).cpu()
        del there
    assert expected.std() > 0.1
    assert torch.equal(ours, expected)


def test_rotary_embedding_is_computed_in_fp64():
    """fp32 would be off by some 1e-7, which bf16 rounds away but for a few numbers."""
    tokens = GRID[0] * GRID[1] * GRID[2]
    x = torch.randn(1, tokens, SIZES["num_heads"], 16, generator=torch.Generator().manual_seed(2))
    expected = turned(x)
    rope = Rope(rope_frequencies(16), GRID)
    for span in (slice(0, tokens), slice(32, 71)):
        assert torch.equal(rope(x[:, span].clone(), span), expected[:, span])


# Parameters


@pytest.mark.parametrize("kind", KINDS)
def test_types_of_all_parameters(kind):
    """Spelled out for one block of each kind; the others have the same names."""
    attention = [f"{layer}.{part}" for layer in "qkvo" for part in ("weight", "bias")]
    image = [f"{layer}_img.{part}" for layer in "kv" for part in ("weight", "bias")]
    narrow = {f"self_attn.{name}" for name in attention} | {f"cross_attn.{name}" for name in attention}
    narrow |= {f"ffn.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    wide = {"modulation", "norm3.weight", "norm3.bias"}
    wide |= {f"{which}.norm_{side}.weight" for which in ("self_attn", "cross_attn") for side in "qk"}
    if kind in ("i2v", "flf2v"):
        narrow |= {f"cross_attn.{name}" for name in image}
        wide |= {"cross_attn.norm_k_img.weight"}
    bf16 = {f"blocks.{n}.{name}" for n in range(3) for name in narrow}
    fp32 = {f"blocks.{n}.{name}" for n in range(3) for name in wide}
    both = ("weight", "bias")
    bf16 |= {f"patch_embedding.{part}" for part in both}
    bf16 |= {f"text_embedding.{layer}.{part}" for layer in (0, 2) for part in both}
    fp32 |= {f"time_embedding.{layer}.{part}" for layer in (0, 2) for part in both}
    fp32 |= {f"{name}.{part}" for name in ("time_projection.1", "head.head") for part in both} | {
        "head.modulation"
    }
    if kind in ("i2v", "flf2v"):
        bf16 |= {f"img_emb.proj.{layer}.{part}" for layer in (1, 3) for part in both}
        fp32 |= {f"img_emb.proj.{layer}.{part}" for layer in (0, 4) for part in both}
    if kind == "flf2v":
        fp32 |= {"img_emb.emb_pos"}
    if kind == "vace":
        bf16 |= {f"vace_patch_embedding.{part}" for part in both}
        bf16 |= {f"vace_blocks.{n}.{name}" for n in range(2) for name in narrow}
        fp32 |= {f"vace_blocks.{n}.{name}" for n in range(2) for name in wide}
        bf16 |= {f"vace_blocks.{n}.after_proj.{part}" for n in range(2) for part in both}
        bf16 |= {f"vace_blocks.0.before_proj.{part}" for part in both}
    types = {name: parameter.dtype for name, parameter in in_bf16(make_model(kind)).named_parameters()}
    assert types == dict.fromkeys(bf16, torch.bfloat16) | dict.fromkeys(fp32, torch.float32)


# VACE's mask


class Recorder:
    """A VAE that keeps what it is given."""

    def __init__(self):
        self.seen = []

    def encode(self, videos):
        self.seen.append(videos)
        return [torch.zeros(16, 1, 1, 1) for _ in videos]


def test_a_mask_of_one_half_keeps_its_pixel():
    half = torch.tensor(0.5)
    above = torch.nextafter(half, torch.tensor(1.0))
    mask = torch.stack([torch.tensor(0.0), half, above, torch.tensor(1.0)]).reshape(1, 1, 1, 4)
    video = torch.full((3, 1, 1, 4), 0.7)
    vae = Recorder()
    WanVace.vace_encode_frames(None, [video], None, masks=[mask], vae=vae)
    kept, made = (videos[0][0, 0, 0] for videos in vae.seen[:2])
    assert (kept != 0).tolist() == [True, True, False, False]
    assert (made != 0).tolist() == [False, False, True, True]
