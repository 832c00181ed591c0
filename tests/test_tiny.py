"""Toy checkpoints: the real layout, the same bytes each time, all or nothing, and no tensor without effect."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

import wan
from leanwan.errors import InputError
from wan import random_models
from wan.configs.tiny import TINY_CONFIGS
from wan.modules.model import WanModel

COMMON = {
    "Wan2.1_VAE.pth",
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "google/umt5-xxl/special_tokens_map.json",
    "google/umt5-xxl/tokenizer.json",
    "google/umt5-xxl/tokenizer_config.json",
    "models_t5_umt5-xxl-enc-bf16.pth",
}
IMAGE = {
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "xlm-roberta-large/special_tokens_map.json",
    "xlm-roberta-large/tokenizer.json",
    "xlm-roberta-large/tokenizer_config.json",
}


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def tensors(directory):
    found = {}
    for path in directory.iterdir():
        if path.suffix in (".pth", ".safetensors"):
            load = load_file if path.suffix == ".safetensors" else torch.load
            found |= {f"{path.name}: {name}": tensor for name, tensor in load(path).items()}
    return found


@pytest.mark.parametrize("task", TINY_CONFIGS)
def test_layout_and_types(task):
    directory = random_models.checkpoint(task)
    assert files(directory) == COMMON | (IMAGE if task in ("i2v-tiny", "flf2v-tiny") else set())
    assert json.loads((directory / "config.json").read_text()) == TINY_CONFIGS[task].dit_config
    types = {"diffusion": torch.float32, "Wan2.1_VAE": torch.float32, "models_t5": torch.bfloat16}
    types["models_clip"] = torch.float16
    for name, tensor in tensors(directory).items():
        assert tensor.dtype == next(dtype for file, dtype in types.items() if name.startswith(file)), name
        assert tensor.isfinite().all() and (tensor != 0).float().mean() > 0.99, name


def test_same_bytes_for_the_same_seed(tmp_path):
    first, again, other = (
        tensors(random_models.write_checkpoint(tmp_path / name, "t2v-tiny", seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert first.keys() == again.keys() == other.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    written = (tmp_path / "first").rglob("*")
    assert all(
        path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "first")).read_bytes()
        for path in written
        if path.is_file() and path.suffix != ".pth"
    )


def test_shards(tmp_path):
    directory = random_models.write_checkpoint(tmp_path / "sharded", "t2v-tiny", shards=3)
    index = json.loads((directory / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(directory.glob("diffusion_pytorch_model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in shards] and len(shards) == 3
    one = WanModel.from_pretrained(random_models.checkpoint("t2v-tiny")).state_dict()
    many = WanModel.from_pretrained(directory).state_dict()
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())


def test_text_encoder_is_the_largest_component():
    """As among the real models: it decides whether a card suffices, until it leaves the device."""
    for config in TINY_CONFIGS.values():
        dit, vae, t5 = (
            sum(tensor.numel() for tensor in weights(config).values())
            for weights in (random_models.dit_weights, random_models.vae_weights, random_models.t5_weights)
        )
        clip = (
            sum(t.numel() for t in random_models.clip_weights(config).values())
            if "clip_config" in config
            else 0
        )
        assert t5 > max(dit, vae, clip)


@pytest.mark.parametrize("occupied", ["file", "directory"])
def test_never_overwrites(tmp_path, occupied):
    target = tmp_path / "there"
    if occupied == "file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "config.json").write_text("precious")
    with pytest.raises(InputError, match="exists and is not an empty directory") as error:
        random_models.write_checkpoint(target, "t2v-tiny")
    assert "\n" not in str(error.value) and str(target) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (target if occupied == "file" else target / "config.json").read_text() == "precious"


def test_unknown_task(tmp_path):
    with pytest.raises(InputError, match="task t2v-14B"):
        random_models.write_checkpoint(tmp_path / "new", "t2v-14B")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("interruption", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written(tmp_path, monkeypatch, interruption):
    def fail(*args):
        raise interruption

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(type(interruption)):
        random_models.write_checkpoint(tmp_path / "new", "t2v-tiny")
    assert not list(tmp_path.iterdir())


def test_cache_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = random_models.checkpoint("t2v-tiny")
    assert directory.is_relative_to(tmp_path) and f"v{random_models.VERSION}" in directory.parts
    made = (directory / "config.json").stat().st_mtime_ns
    assert random_models.checkpoint("t2v-tiny") == directory
    assert (directory / "config.json").stat().st_mtime_ns == made


def test_cache_made_by_two_at_once(tmp_path):
    command = [
        sys.executable,
        "-c",
        "from wan import random_models; print(random_models.checkpoint('i2v-tiny'))",
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    root = Path(__file__).parents[1]
    both = [
        subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    [first, second] = {process.communicate()[0] for process in both} | {None}
    directory = Path((first or second).strip())
    assert [process.returncode for process in both] == [0, 0]
    assert files(directory) == COMMON | IMAGE
    assert [path.name for path in directory.parent.iterdir()] == ["i2v-tiny"]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set XDG_CACHE_HOME") as error:
        random_models.checkpoint("t2v-tiny")
    assert "\n" not in str(error.value)


def test_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(random_models.checkpoint("t2v-tiny") / "google/umt5-xxl")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == TINY_CONFIGS["t2v-tiny"].t5_config["vocab_size"]
    for text in ("a red ball rolls to the right", "猫 jumps, 2 zebras", ""):
        ids = tokenizer(text).input_ids
        assert ids[-1] == 1 and 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer("a red ball rolls to the right").input_ids) < 12


# One of each kind; the quietest among them, as measured over all.
SAMPLES = {
    "t5": [
        "embed_tokens",
        "block.1.layer.0.SelfAttention.relative_attention_bias",
        "block.0.layer.1",
    ],
    "dit": [
        "blocks.2.self_attn.k.bias",
        "blocks.1.modulation",
        "blocks.0.cross_attn.norm_k",
        "head.head.bias",
    ],
    "vae": [
        "decoder.upsamples.3.time_conv.bias",
        "decoder.middle.1.to_qkv",
        "decoder.upsamples.14.residual.6.bias",
    ],
}


@pytest.fixture(scope="module")
def pipeline():
    task = "t2v-tiny"
    return wan.WanT2V(TINY_CONFIGS[task], random_models.checkpoint(task), device=torch.device("cpu"))


@pytest.mark.parametrize("component, part", [(c, part) for c, parts in SAMPLES.items() for part in parts])
def test_every_tensor_shows(pipeline, component, part):
    def run():
        return pipeline.generate("a boat", size=(64, 64), frame_num=5, sampling_steps=2, seed=0)

    before = run()
    assert before.std() > 0.2 and (before.abs() == 1).float().mean() < 0.01
    owner = {"t5": pipeline.text_encoder.model, "dit": pipeline.model, "vae": pipeline.vae.model}[component]
    parameter = next(p for name, p in owner.named_parameters() if name.startswith(part))
    original = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    try:
        parameter.data += 0.1 * original.abs().mean() * torch.randn(original.shape, generator=generator)
        after = run()
    finally:
        parameter.data = original
    assert (after - before).abs().max() > 2e-4
