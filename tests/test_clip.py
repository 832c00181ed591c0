"""The image encoder computes what its checkpoint and the formulas of a vision transformer say, as upstream does."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from leanwan.encoder_layers import image_encoder_groups
from leanwan.errors import InputError
from upstream_driver.toy_encoders import encode
from virtual_gpu import VirtualGPU
from wan.modules.clip import CLIPModel
from wan.random_models import CLIP_EMBED_DIM, CLIP_TEXT, clip_weights, train_tokenizer

SIZES = {"num_hidden_layers": 3, "intermediate_size": 128}  # else ViT-H/14: 1280 wide, 16 heads, 257 tokens
DTYPES = [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)]


def weights():
    """Embeddings are so small that the first norm's eps counts."""
    tensors = clip_weights(SimpleNamespace(clip_config=SIZES))
    return {name: t * 0.01 if "visual" in name and "embedding" in name else t for name, t in tensors.items()}


def videos():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(shape, generator=generator) * 2 - 1 for shape in [(3, 2, 50, 70), (3, 1, 224, 224)]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.save(weights(), folder / "weights.pth")
    save_file(dict(zip("ab", videos())), folder / "videos.safetensors")
    train_tokenizer(400).save_pretrained(folder / "tokenizer")
    return folder


def load(folder, dtype=torch.float32):
    return CLIPModel(dtype, "cpu", folder / "weights.pth", "unused", config=SIZES)


def difference(result, expected):
    """Largest difference relative to the largest value."""
    return ((result.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def formulas(tensors, images):
    """The image tower but its last block in fp64, by the checkpoint's names: [B, 3, 224, 224] to [B, 257, 1280]."""
    tensors = {name: tensor.double() for name, tensor in tensors.items() if name.startswith("visual.")}

    def norm(name, x):
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt() * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def heads(x):
        return x.unflatten(-1, (16, 80)).transpose(1, 2)

    batch = len(images)
    patches = images.double().unfold(2, 14, 14).unfold(3, 14, 14)  # [B, 3, 16, 16, 14, 14]
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(batch, 256, 3 * 14 * 14)
    x = patches @ tensors["visual.patch_embedding.weight"].flatten(1).T
    x = torch.cat([tensors["visual.cls_embedding"].expand(batch, 1, -1), x], dim=1)
    x = norm("visual.pre_norm", x + tensors["visual.pos_embedding"])
    for i in range(SIZES["num_hidden_layers"] - 1):
        block = f"visual.transformer.{i}"
        q, k, v = (
            heads(part) for part in linear(f"{block}.attn.to_qkv", norm(f"{block}.norm1", x)).chunk(3, -1)
        )
        mixed = (q @ k.mT / 80**0.5).softmax(-1) @ v
        x = x + linear(f"{block}.attn.proj", mixed.transpose(1, 2).flatten(2))
        h = linear(f"{block}.mlp.0", norm(f"{block}.norm2", x))
        x = x + linear(f"{block}.mlp.2", h * (1 + torch.erf(h / 2**0.5)) / 2)
    return x


def prepared(video):
    """Frames of one video as CLIP sees them, [T, 3, 224, 224] in fp64."""
    frames = F.interpolate(
        video.transpose(0, 1).double(), size=(224, 224), mode="bicubic", align_corners=False
    )
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.double)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.double)
    return ((frames + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


@pytest.mark.parametrize("dtype, bound", DTYPES)
def test_equals_the_formulas(folder, dtype, bound):
    result = load(folder, dtype).visual(videos())
    assert result.shape == (3, 257, 1280) and result.dtype == dtype and not result.requires_grad
    largest = difference(result, formulas(weights(), torch.cat([prepared(video) for video in videos()])))
    print(f"{dtype}: {largest:.1e}")
    assert largest <= bound


def test_the_callers_videos_stay_as_they_are(folder):
    given = videos()
    load(folder).visual(given)
    assert all(torch.equal(video, original) for video, original in zip(given, videos()))


def test_on_another_device(folder):
    encoder = load(folder, torch.float16)
    video = videos()[:1]
    expected = encoder.visual(video)
    with VirtualGPU() as gpu:
        encoder.model.to("vgpu")
        result = encoder.visual([video[0].to("vgpu")])
        assert result.device.type == "vgpu" and torch.equal(result.cpu(), expected)
        encoder.model.to("cpu")
        del result
        assert gpu.live == 0


def test_pieces_are_visited_in_their_order(folder):
    encoder = load(folder)
    visits = []
    for i, piece in enumerate(image_encoder_groups(encoder.model)):
        piece.register_forward_pre_hook(lambda module, args, i=i: visits.append(i))
    encoder.visual(videos()[:1])
    assert visits == [0, 1]


def test_only_what_is_used_is_built():
    """31 blocks of the image tower: 1.14 GiB in fp16, where both towers take 2.2."""
    model = CLIPModel(torch.float16, "cpu", None, None).model
    assert all(p.is_meta and p.dtype == torch.float16 for p in model.parameters())
    block = 4 * 1280 * (1280 + 1) + 2 * 1280 * 5120 + 5120 + 1280 + 4 * 1280
    outside = 3 * 14 * 14 * 1280 + 1280 + 257 * 1280 + 2 * 1280
    assert sum(p.numel() for p in model.parameters()) == 31 * block + outside
    assert round(sum(p.nbytes for p in model.parameters()) / 2**30, 2) == 1.14


def test_a_file_without_the_unused_parts_is_enough(folder, tmp_path):
    unused = ("textual.", "log_scale", "visual.head", "visual.post_norm", "visual.transformer.2.")
    used = {name: tensor for name, tensor in weights().items() if not name.startswith(unused)}
    torch.save(used, tmp_path / "weights.pth")
    assert torch.equal(load(tmp_path).visual(videos()[:1]), load(folder).visual(videos()[:1]))


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("visual.transformer.1.attn.to_qkv.bias", None, "missing: encoder.layers.1.self_attn.k_proj.bias"),
        (
            "visual.transformer.1.norm3.weight",
            torch.zeros(1280),
            "unexpected: visual.transformer.1.norm3.weight",
        ),
        (
            "visual.transformer.3.norm1.weight",
            torch.zeros(1280),
            "unexpected: visual.transformer.3.norm1.weight",
        ),
        ("visual.pos_embedding", torch.zeros(1, 197, 1280), "(1, 197, 1280) instead of (1, 257, 1280)"),
    ],
)
def test_a_checkpoint_that_does_not_fit(tmp_path, name, tensor, message):
    tensors = weights() | {name: tensor}
    path = tmp_path / "weights.pth"
    torch.save({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="weights.pth"):
        load(tmp_path)


@pytest.mark.skipif("WAN_UPSTREAM" not in os.environ, reason="WAN_UPSTREAM names no checkout of upstream")
@pytest.mark.parametrize("dtype, bound", DTYPES)
def test_equals_upstream(folder, dtype, bound):
    sizes = {
        "embed_dim": CLIP_EMBED_DIM,
        "vision_layers": SIZES["num_hidden_layers"],
        "vision_mlp_ratio": SIZES["intermediate_size"] / 1280,
        "vocab_size": CLIP_TEXT["vocab"],
        "max_text_len": CLIP_TEXT["positions"],
        "text_dim": CLIP_TEXT["width"],
        "text_layers": CLIP_TEXT["layers"],
    }
    name = str(dtype).removeprefix("torch.")
    tree = Path(os.environ["WAN_UPSTREAM"])
    [expected] = encode(tree, folder, encoder="image", dtype=name, sizes=sizes)
    result = load(folder, dtype).visual(videos())
    assert result.shape == expected.shape and result.dtype == expected.dtype
    largest = difference(result, expected)
    print(f"{dtype}: {largest:.1e}")
    assert largest <= bound
