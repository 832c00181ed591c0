"""LoRA files: every key of every spelling is applied or named, merged in fp32, the same under every memory option."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import wan
from benchmarks import loading
from leanwan.dit.forward import storage_dtype
from leanwan.errors import InputError
from virtual_gpu import VirtualGPU
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.t5 import T5EncoderModel
from wan.modules.vace_model import VaceWanModel
from wan.run.state import read_state
from wan.weights.converted import OffloadFolder
from wan.weights.lora import Loras, _LoraFile, lora_identity, parse_lora
from wan.weights.lora_keys import match_changes
from wan.weights.reading import read_tensors

RANK, ALPHA = 4, 3.0
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = {"t2v": WanModel, "i2v": WanModel, "flf2v": WanModel, "vace": VaceWanModel}
every_task = pytest.mark.parametrize("task", MODELS)

DIFFUSERS = {
    "self_attn.": "attn1.", "cross_attn.": "attn2.", ".k_img": ".add_k_proj", ".v_img": ".add_v_proj",
    ".q": ".to_q", ".k": ".to_k", ".v": ".to_v", ".o": ".to_out.0", ".ffn.0": ".ffn.net.0.proj",
    ".ffn.2": ".ffn.net.2", "head.head": "proj_out", ".before_proj": ".proj_in", ".after_proj": ".proj_out",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}  # fmt: skip


def as_diffusers(layer):
    for ours, theirs in DIFFUSERS.items():
        layer = re.sub(re.escape(ours) + ("" if ours.endswith(".") else "$"), theirs, layer)
    return layer


# How a file spells a layer and the two matrices of its pair, and whether it holds alphas.
FAMILIES = {
    "diffusion_model, A and B": ("diffusion_model.{0}", "lora_A.weight", "lora_B.weight", False),
    "diffusion_model, down and up": ("diffusion_model.{0}", "lora_down.weight", "lora_up.weight", True),
    "bare": ("{0}", "lora_A.weight", "lora_B.weight", True),
    "lora_unet": ("lora_unet__{1}", "lora_down.weight", "lora_up.weight", True),
    "lora_unet, one underscore": ("lora_unet_{1}", "lora_down.weight", "lora_up.weight", True),
    "diffusers": ("transformer.{2}", "lora_A.weight", "lora_B.weight", False),
    "PEFT": ("base_model.model.{0}", "lora_A.default.weight", "lora_B.default.weight", False),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(task):
    return random_models.dit_weights(WAN_CONFIGS[f"{task}-tiny"])


def matrices(weights):
    """Names of layers that have a matrix, and the shapes of these."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in weights.items()
        if name.endswith(".weight") and tensor.dim() > 1
    }


def write_pairs(path, weights, family="diffusion_model, A and B", seed=0, dtype=torch.float32, metadata=None):
    """Writes a file that changes every matrix. Returns what it adds to each weight: (factor, up, down)."""
    spelling, down_key, up_key, with_alpha = FAMILIES[family]
    tensors, changes = {}, {}
    for number, (layer, shape) in enumerate(matrices(weights).items()):
        key = spelling.format(layer, layer.replace(".", "_"), as_diffusers(layer))
        down = (normal(seed + 2 * number, RANK, *shape[1:]) * 0.1).to(dtype)
        up = (normal(seed + 2 * number + 1, shape[0], RANK, *[1] * len(shape[2:])) * 0.1).to(dtype)
        tensors |= {f"{key}.{down_key}": down, f"{key}.{up_key}": up}
        if with_alpha:
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
        changes[f"{layer}.weight"] = (ALPHA / RANK if with_alpha else 1.0, up.float(), down.float())
    save_file(tensors, path, metadata)
    return changes


def by_hand(weights, *loras):
    """Weights in fp32 with (changes, strength) after one another."""
    merged = dict(weights)
    for changes, strength in loras:
        for name, (factor, up, down) in changes.items():
            product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            merged[name] = merged[name] + product.reshape(merged[name].shape) * (strength * factor)
    return merged


def load(task, loras, dtype=torch.float32, folder=None, skip_unknown=False):
    shapes = {name: tensor.shape for name, tensor in weights_of(task).items()}
    folder = folder and OffloadFolder(folder)
    return MODELS[task].from_pretrained(
        random_models.checkpoint(f"{task}-tiny"), dtype, folder, Loras(loras, shapes, skip_unknown)
    )


def assert_weights(model, expected, dtype=torch.float32):
    """The model's weights are the expected ones, rounded once."""
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(storage_dtype(name, dtype))), name
        assert found[name].dtype == storage_dtype(name, dtype), name


@every_task
@every_family
def test_every_spelling_of_every_matrix(tmp_path, task, family):
    weights = weights_of(task)
    changes = write_pairs(tmp_path / "lora.safetensors", weights, family)
    assert set(changes) == {f"{layer}.weight" for layer in matrices(weights)}
    merged = by_hand(weights, (changes, 0.7))
    assert not any(torch.equal(merged[name], weights[name]) for name in changes)
    assert_weights(load(task, [(tmp_path / "lora.safetensors", 0.7)]), merged)


@every_task
def test_spellings_are_told_apart(task):
    """Also with underscores no two layers are spelled alike, and keys of one spelling are found by it alone."""
    layers = list(matrices(weights_of(task)))
    for spelling in ("{0}", "{1}", "{2}"):
        spelled = {spelling.format(layer, layer.replace(".", "_"), as_diffusers(layer)) for layer in layers}
        assert len(spelled) == len(layers)


def test_norms_of_the_two_spellings_are_not_mixed_up():
    """What Wan calls norm3, the one with weights, diffusers calls norm2; Wan's own norm2 has none."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights_of("t2v").items()}
    size = shapes["blocks.0.norm3.weight"]
    attention = {"blocks.0.attn1.to_q.lora_A.weight": (4, 64), "blocks.0.attn1.to_q.lora_B.weight": (64, 4)}
    changes, unknown = match_changes({"blocks.0.norm2.diff": size, **attention}, shapes)
    assert not unknown and {c.parameter for c in changes} == {
        "blocks.0.norm3.weight",
        "blocks.0.self_attn.q.weight",
    }
    own = {key.replace("attn1.to_q", "self_attn.q"): shape for key, shape in attention.items()}
    assert list(match_changes({"blocks.0.norm2.diff": size, **own}, shapes)[1]) == ["blocks.0.norm2.diff"]


@every_task
def test_full_differences(tmp_path, task):
    """Of every parameter: weights, biases, norms, modulation, head, norm_k_img, embeddings; beside pairs, and alone."""
    weights = weights_of(task)
    pairs = write_pairs(tmp_path / "lora.safetensors", weights)
    tensors = load_file(tmp_path / "lora.safetensors")
    differences = {name: normal(seed, *tensor.shape) for seed, (name, tensor) in enumerate(weights.items())}
    for name, difference in differences.items():
        owner, _, kind = name.rpartition(".")
        suffix = {"weight": f"{owner}.diff", "bias": f"{owner}.diff_b", "modulation": f"{owner}.diff_m"}
        tensors[f"diffusion_model.{suffix.get(kind, name + '.diff')}"] = difference
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = by_hand(weights, (pairs, 0.5))
    expected = {name: tensor + 0.5 * differences[name] for name, tensor in expected.items()}
    assert_weights(load(task, [(tmp_path / "lora.safetensors", 0.5)]), expected)


def test_a_bias_of_a_pair_is_scaled_as_the_pair(tmp_path):
    weights = weights_of("t2v")
    pairs = write_pairs(tmp_path / "lora.safetensors", weights, "bare")
    tensors = load_file(tmp_path / "lora.safetensors")
    bias = tensors["blocks.1.ffn.0.lora_B.bias"] = normal(5, 128)
    save_file(tensors, tmp_path / "lora.safetensors")
    expected = by_hand(weights, (pairs, -2.0))
    expected["blocks.1.ffn.0.bias"] = expected["blocks.1.ffn.0.bias"] + -2.0 * ALPHA / RANK * bias
    assert_weights(load("t2v", [(tmp_path / "lora.safetensors", -2.0)]), expected)


@pytest.mark.parametrize("strengths", [(0.7, -0.3), (-0.3, 0.7), (1.0, 0.0), (0.0, 0.0)])
def test_two_files_with_strengths_of_any_sign(tmp_path, strengths):
    weights = weights_of("t2v")
    first = write_pairs(tmp_path / "first.safetensors", weights, "lora_unet")
    second = write_pairs(tmp_path / "second.safetensors", weights, "diffusers", seed=1000)
    loras = [(tmp_path / "first.safetensors", strengths[0]), (tmp_path / "second.safetensors", strengths[1])]
    assert_weights(load("t2v", loras), by_hand(weights, (first, strengths[0]), (second, strengths[1])))
    swapped = load("t2v", loras[::-1])
    assert_weights(swapped, by_hand(weights, (second, strengths[1]), (first, strengths[0])))
    if not any(strengths):
        assert_weights(swapped, weights)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounded_once(tmp_path, stored):
    """Merged in fp32 whatever the file's type is, then rounded; merging rounded weights gives others."""
    weights = weights_of("t2v")
    changes = write_pairs(tmp_path / "lora.safetensors", weights, dtype=stored)
    merged = by_hand(weights, (changes, 0.7))
    assert_weights(
        load("t2v", [(tmp_path / "lora.safetensors", 0.7)], torch.bfloat16), merged, torch.bfloat16
    )
    name = "blocks.0.ffn.0.weight"
    factor, up, down = changes[name]
    twice = (weights[name].bfloat16() + (0.7 * (up @ down)).bfloat16()).bfloat16()
    assert not torch.equal(twice, merged[name].bfloat16())


@pytest.mark.parametrize("place", ["header", "beside"])
def test_pefts_settings_give_the_alpha(tmp_path, place):
    """diffusers keeps them in the file's header, PEFT in a file beside it."""
    weights = weights_of("t2v")
    path = tmp_path / "adapter_model.safetensors"
    settings = {"lora_alpha": ALPHA, "r": RANK, "use_rslora": False}
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})}
    changes = write_pairs(path, weights, "PEFT", metadata=header if place == "header" else None)
    identity = lora_identity([(path, 1)])
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        assert lora_identity([(path, 1)]) != identity
    scaled = {name: (ALPHA / RANK, up, down) for name, (_, up, down) in changes.items()}
    assert_weights(load("t2v", [(path, 1)]), by_hand(weights, (scaled, 1)))
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
        with pytest.raises(InputError, match="use_rslora, which is not supported"):
            load("t2v", [(path, 1)])


def test_against_diffusers_and_peft(tmp_path, measured):
    """Their own loading of the same file into the same weights: the merged weights, and what the network predicts."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    from diffusers.loaders import WanLoraLoaderMixin
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from goldens import DIT_CASES, dit_inputs
    from test_diffusers import difference, their_dit

    inputs = dit_inputs("t2v", DIT_CASES["whole"])
    latents = {"hidden_states": torch.stack(inputs["x"]), "timestep": inputs["t"], "return_dict": False}
    latents["encoder_hidden_states"] = torch.stack([padded(context) for context in inputs["context"]])
    weights = weights_of("t2v")
    # diffusers leaves out patch_embedding in the first, and wants every layer of the blocks and no other in the last.
    for family in ("diffusion_model, A and B", "diffusers", "lora_unet, one underscore"):
        known = {n: w for n, w in weights.items() if not n.startswith("patch")}
        known = {n: w for n, w in known.items() if "unet" not in family or n.startswith("blocks")}
        write_pairs(tmp_path / "lora.safetensors", known, family)
        ours = convert_wan_transformer_to_diffusers(
            load("t2v", [(tmp_path / "lora.safetensors", 0.7)]).state_dict()
        )
        theirs = their_dit("t2v")
        state = WanLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "lora.safetensors"))
        theirs.load_lora_adapter(state, adapter_name="lora")
        theirs.set_adapters("lora", 0.7)
        with torch.no_grad():
            expected = theirs(**latents)[0]
            theirs.fuse_lora()
            theirs.unload_lora()
            for name, tensor in theirs.state_dict().items():
                measured(difference(ours[name], tensor), 1e-5, name)
            theirs.load_state_dict(ours)
            measured(difference(theirs(**latents)[0], expected), 1e-5, "flow")


@pytest.mark.parametrize("task", ["i2v", "vace"])
def test_against_pefts_own_loading(tmp_path, measured, task):
    """Of an adapter's folder into this model: what the network predicts, and the merged weights."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from goldens import DIT_CASES, dit_inputs

    inputs = dit_inputs(task, DIT_CASES["whole"])
    weights = {name: w for name, w in weights_of(task).items() if w.dim() == 2}
    path = tmp_path / "adapter_model.safetensors"
    write_pairs(path, weights, "PEFT")
    save_file({key.replace(".default.", "."): tensor for key, tensor in load_file(path).items()}, path)
    settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(matrices(weights)))
    settings.save_pretrained(tmp_path)
    ours = load(task, [(path, 1.0)])
    theirs = peft.PeftModel.from_pretrained(load(task, []), tmp_path)
    with torch.no_grad():
        for mine, other in zip(ours(**inputs), theirs.base_model.model(**inputs), strict=True):
            measured(((mine - other).norm() / other.norm()).item(), 1e-5, "flow")
    merged = theirs.merge_and_unload().state_dict()
    assert not torch.equal(merged["blocks.0.ffn.0.weight"], weights["blocks.0.ffn.0.weight"])
    for name, tensor in ours.state_dict().items():
        measured((tensor - merged[name]).abs().max().item(), 1e-5, name)


def padded(context, length=512):
    return torch.nn.functional.pad(context, (0, 0, 0, length - len(context)))


# Memory


@pytest.fixture(scope="module")
def all_families(tmp_path_factory):
    """By task: a LoRA of each family with its strength, and a checkpoint that they are merged into by hand."""

    def make(task):
        folder = tmp_path_factory.mktemp("loras")
        weights, loras, changes = weights_of(task), [], []
        for number, family in enumerate(FAMILIES):
            loras.append((folder / f"{number}.safetensors", 0.2 * (number - 2)))
            changes.append((write_pairs(loras[-1][0], weights, family, seed=1000 * number), loras[-1][1]))
        shutil.copytree(random_models.checkpoint(f"{task}-tiny"), folder / "merged")
        save_file(by_hand(weights, *changes), folder / "merged" / WEIGHTS)
        return loras, folder / "merged"

    return {task: make(task) for task in ("t2v", "vace")}


def video(task, checkpoint, calls=None, **options):
    """A video made on the virtual GPU; `calls` counts passes of the DiT."""
    pipeline_class = {"t2v": wan.WanT2V, "vace": wan.WanVace}[task]
    call = {"size": (128, 96), "frame_num": 5, "sampling_steps": 1, "seed": 0}
    call |= {
        name: options.pop(name)
        for name in ("sample_solver", "guide_scale", "sampling_steps")
        if name in options
    }
    with VirtualGPU() as gpu:
        config = WAN_CONFIGS[f"{task}-tiny"]
        pipeline = pipeline_class(config, checkpoint, device=gpu.device, **{"vae_tile": 0, **options})
        if calls is not None:
            pipeline.model.register_forward_hook(lambda *_: calls.append(1))
        if task == "t2v":
            return pipeline.generate("a red ball", **call)
        rising = torch.linspace(-1, 1, 128).expand(3, 5, 96, 128)
        return pipeline.generate("a red ball", [rising], [(rising[:1] > 0).float()], [None], **call)


@pytest.fixture
def quick_text(monkeypatch):
    """Embeddings that cost nothing: the text encoder takes most of a toy run, and no LoRA changes it."""
    embed = lambda self, texts, device: [normal(len(text), 12, 4096).to(device) for text in texts]  # noqa: E731
    monkeypatch.setattr(T5EncoderModel, "__call__", embed)


@pytest.mark.parametrize(
    "task, options",
    [
        ("t2v", [{}, {"dit_stream": 0.0}, {"offload_model": False}, {"offload_folder": "converted"}]),
        (
            "vace",
            [
                {
                    "offload_folder": "converted",
                    "dit_stream": 0.0001,
                    "dit_chunk": 64,
                    "activation_offload": True,
                }
            ],
        ),
    ],
)
def test_videos_are_those_of_a_checkpoint_merged_by_hand(
    all_families, quick_text, tmp_path, monkeypatch, task, options
):
    """Under every memory option."""
    monkeypatch.chdir(tmp_path)
    loras, merged = all_families[task]
    checkpoint = random_models.checkpoint(f"{task}-tiny")
    expected = video(task, merged)
    assert not torch.equal(video(task, checkpoint), expected)
    for memory in options:
        assert torch.equal(video(task, checkpoint, loras=loras, **memory), expected), memory


def test_merged_once_into_the_offload_folder(tmp_path, monkeypatch):
    """Other files, strengths and orders are kept apart, and so is the model without any."""
    weights = weights_of("t2v")
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    a, b = (write_pairs(path, weights, seed=1000 * seed) for seed, path in enumerate(paths))
    folder, bf16 = tmp_path / "folder", torch.bfloat16
    runs = [((a, 1.0),), ((a, 0.5),), ((b, 1.0),), ((a, 1.0), (b, 1.0)), ((b, 1.0), (a, 1.0)), ()]
    for count, run in enumerate(runs, 1):
        loras = [(paths[0] if changes is a else paths[1], strength) for changes, strength in run]
        assert_weights(load("t2v", loras, bf16, folder), by_hand(weights, *run), bf16)
        assert len(list(folder.glob("*.safetensors"))) == count
        with monkeypatch.context() as patch:
            patch.setattr(OffloadFolder, "_convert", lambda *_: pytest.fail("converted again"))
            patch.setattr(Loras, "merge", lambda *_: pytest.fail("merged again"))
            assert_weights(load("t2v", loras, bf16, folder), by_hand(weights, *run), bf16)
    shutil.copy(paths[1], paths[0])
    assert (
        lora_identity([(paths[0], 1)]) == lora_identity([(paths[1], 1.0)]) != lora_identity([(paths[1], 0.5)])
    )


def test_peak_ram_of_merging(tmp_path):
    """What is kept, and a few tensors: one in the checkpoint, its change, the matrices of the pair."""
    loading.write_checkpoint(tmp_path, "t2v-1.3B", layers=2)
    loading.write_lora(tmp_path / "lora.safetensors", tmp_path, rank=32)
    result = loading.measure(tmp_path, lora=tmp_path / "lora.safetensors")
    largest = 4 * 1536 * 8960
    assert result["kept"] > 250e6 and result["anonymous"] <= result["kept"] + 2 * largest + 64 * 2**20
    mapped = loading.measure(tmp_path, tmp_path / "folder", tmp_path / "lora.safetensors")
    assert mapped["kept"] == result["kept"] and mapped["anonymous"] <= 3 * largest + 64 * 2**20


def test_four_steps_without_guidance_are_four_passes(all_families, quick_text):
    loras, _ = all_families["t2v"]
    for guide_scale, passes in ((1.0, 4), (5.0, 8)):
        calls = []
        options = {"sample_solver": "euler", "sampling_steps": 4, "guide_scale": guide_scale}
        video("t2v", random_models.checkpoint("t2v-tiny"), calls, loras=loras, **options)
        assert len(calls) == passes


# Bad input


def run(*arguments):
    few = ["--frame_num", "1", "--sample_steps", "1", "--base_seed", "3", "--save_file", "out.png"]
    return generate.main([str(a) for a in ["--task", "t2i-tiny", *few, *arguments]])


def write(path, **shapes):
    save_file({key.replace("/", "."): torch.ones(shape) for key, shape in shapes.items()}, path)


Q = "diffusion_model/blocks/0/self_attn/q"
BAD = {
    "not a LoRA": (
        lambda path: write(path, **{"blocks/0/self_attn/q/weight": (64, 64)}),
        "is not a LoRA: it holds no",
    ),
    "another size": (
        lambda path: write(path, **{f"{Q}/lora_A/weight": (4, 96), f"{Q}/lora_B/weight": (96, 4)}),
        r"is for another model, 2 of its 2 tensors do not fit .*: \(96, 4\) times \(4, 96\) instead of \(64, 64\)",
    ),
    "no tensors": (lambda path: save_file({}, path), "is empty"),
    "no bytes": (lambda path: path.write_bytes(b""), "cannot be read, download it again"),
    "pickle": (lambda path: torch.save({f"{Q}.alpha": torch.ones(1)}, path), "is a pickle file"),
    "missing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_one_line(tmp_path, monkeypatch, capfd, case):
    monkeypatch.chdir(tmp_path)
    make, message = BAD[case]
    path = tmp_path / "bad.safetensors"
    make(path)
    for flags in ([], ["--lora_skip_unknown"]):
        assert run("--lora", path, *flags) == 2
        [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("generate.py")]
        assert re.search(rf"^generate.py: --lora {re.escape(str(path))}: {message}", line), line


def spoilt(path, key="lora_B", value=None, metadata=None, **more):
    """A file that fits, but for the values of one of its tensors, its settings, or more tensors."""
    write_pairs(path, weights_of("t2v"), "diffusers", metadata=metadata)
    tensors = load_file(path)
    [*_, name] = [name for name in tensors if key in name]
    if value is not None:
        tensors[name].view(-1)[-1] = value
    save_file(tensors | more, path, metadata)


def peft(settings):
    return {"lora_adapter_metadata": settings}


UNKNOWN = {f"\x1b[2J{i}.lora_A.weight": torch.zeros(1, 1) for i in range(3000)}
SPOILT = {
    "not a number": (lambda path: spoilt(path, value=torch.nan), "infinite or not numbers"),
    "infinite": (lambda path: spoilt(path, "lora_A", torch.inf), "infinite or not numbers"),
    "alpha of text": (
        lambda path: spoilt(path, metadata=peft('{"lora_alpha": "8"}')),
        "lora_alpha is 8, not",
    ),
    "alpha of a list": (lambda path: spoilt(path, metadata=peft('{"lora_alpha": [8]}')), "lora_alpha is"),
    "alpha that is true": (lambda path: spoilt(path, metadata=peft('{"lora_alpha": true}')), "lora_alpha is"),
    "alpha of 400 digits": (
        lambda path: spoilt(path, metadata=peft(f'{{"lora_alpha": {10**400}}}')),
        "no number that can be used",
    ),
    "alpha that is too large": (
        lambda path: spoilt(path, metadata=peft('{"lora_alpha": 1e300}')),
        "strength times alpha / rank is",
    ),
    "deep settings": (lambda path: spoilt(path, metadata=peft("[" * 10**5)), "nested too deep"),
    "settings that are none": (lambda path: spoilt(path, metadata=peft("[5]")), "cannot be read"),
    "many unknown keys": (lambda path: spoilt(path, **UNKNOWN), r"and 2990 more; go on without"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_merged_is_refused_before_any_work(case, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    make, message = SPOILT[case]
    make(tmp_path / "bad.safetensors")
    assert run("--lora", "bad.safetensors") == 2
    out, err = capfd.readouterr()
    [line] = [line for line in err.splitlines() if line.startswith("generate.py")]
    assert line.startswith("generate.py: --lora bad.safetensors: ") and message in line, line
    assert len(line) < 5000 and "\x1b" not in out + err and "Traceback" not in err
    assert "Stage" not in out and os.listdir() == ["bad.safetensors"]


@pytest.mark.parametrize("kind, size", [("F4", 8), ("F6_E2M3", 12), ("C64", 128)])
def test_types_that_are_no_numbers_here(kind, size, tmp_path):
    """Of LoRA files and of checkpoints."""
    path = tmp_path / "a.safetensors"
    entry = {"dtype": kind, "shape": [4, 4], "data_offsets": [0, size]}
    text = json.dumps({"blocks.0.lora_A.weight": entry}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(InputError, match=rf"^lora .*a.safetensors: .* is of type {kind}, which cannot"):
        _LoraFile(path).check_finite(["blocks.0.lora_A.weight"])
    ((_, read),) = read_tensors(path)
    with pytest.raises(InputError, match=f"is of type {kind}, which cannot be read"):
        read()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64, torch.bfloat16])
def test_types_that_are_numbers(dtype, tmp_path):
    path = tmp_path / "a.safetensors"
    changes = write_pairs(path, weights_of("t2v"), dtype=dtype)
    assert_weights(load("t2v", [(path, 1)]), by_hand(weights_of("t2v"), (changes, 1.0)))


def test_a_damaged_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lora.safetensors"
    write_pairs(path, weights_of("t2v"))
    path.write_bytes(path.read_bytes()[:-100])
    assert run("--lora", path) == 2
    assert "cannot be read, download it again" in capfd.readouterr().err


def test_what_does_not_fit_is_named_and_can_be_left_out(tmp_path, monkeypatch, capfd, caplog):
    """A LoRA of another task beside a good one, halves of pairs, ranks that differ, keys of no known kind."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lora.safetensors"
    changes = write_pairs(path, weights_of("i2v"))
    tensors = load_file(path)
    del tensors["diffusion_model.blocks.0.ffn.0.lora_A.weight"], changes["blocks.0.ffn.0.weight"]
    tensors["diffusion_model.blocks.1.ffn.0.lora_A.weight"] = torch.ones(5, 64)
    tensors["diffusion_model.blocks.2.ffn.0.alpha"] = torch.ones(2)
    tensors["diffusion_model.blocks.1.self_attn.q.dora_scale"] = torch.ones(64, 1)
    tensors["diffusion_model.head.diff_m"] = torch.ones(1, 3, 64)
    tensors["diffusion_model.blocks.0.self_attn.q.lora_down.weight"] = torch.ones(4, 64)
    save_file(tensors, path)
    assert run("--lora", path) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("generate.py")]
    named = [
        "no such layer: diffusion_model.blocks.N.cross_attn.k_img.lora_A.weight (N = 0-2)",
        "without its other half: diffusion_model.blocks.N.ffn.0.lora_B.weight (N = 0)",
        "(128, 4) times (5, 64) instead of (128, 64): diffusion_model.blocks.N.ffn.0.lora_A.weight (N = 1), "
        "diffusion_model.blocks.N.ffn.0.lora_B.weight (N = 1)",
        "an alpha that is not one number: diffusion_model.blocks.N.ffn.0.alpha (N = 2)",
        "no change of a known kind: diffusion_model.blocks.N.self_attn.q.dora_scale (N = 1)",
        "(1, 3, 64) instead of (1, 2, 64): diffusion_model.head.diff_m",
        "a second one for its layer: diffusion_model.blocks.N.self_attn.q.lora_",
        "instead of (64, 16, 1, 2, 2): diffusion_model.patch_embedding.lora_",
        "--lora_skip_unknown",
    ]
    assert all(text in line for text in named), line
    assert run("--lora", path, "--lora_skip_unknown") == 0
    assert "left out" in caplog.text and "k_img.lora_A.weight (N = 0-2)" in caplog.text
    weights = weights_of("t2v")
    fitting = {
        name: change
        for name, change in changes.items()
        if name in weights and not re.search(r"patch_embedding|blocks.[12].ffn.0", name)
    }
    second = "blocks.0.self_attn.q.weight"
    expected = by_hand(weights, (fitting, 1.0))
    found = load("t2v", [(path, 1)], skip_unknown=True).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected if name != second)


@pytest.mark.parametrize("text", ["strong", "nan", "inf", ""])
def test_a_strength_that_is_no_number(tmp_path, monkeypatch, capfd, text):
    monkeypatch.chdir(tmp_path)
    assert run("--lora", f"a.safetensors:{text}") == 2
    assert f"--lora a.safetensors:{text}: give FILE, or FILE:STRENGTH" in capfd.readouterr().err
    with pytest.raises(InputError, match="is not a number"):
        Loras([(tmp_path, text)], {})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1e-1", ("a.safetensors", -0.1)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0)),
        (r"C:\loras\a.safetensors:0.8", (r"C:\loras\a.safetensors", 0.8)),
        ("C:a.safetensors", ("C:a.safetensors", 1.0)),
        ("D:/loras/a.safetensors:2", ("D:/loras/a.safetensors", 2.0)),
        ("/odd:name/a.safetensors", ("/odd:name/a.safetensors", 1.0)),
    ],
)
def test_files_and_strengths(text, expected):
    assert parse_lora(text) == expected


def test_the_command_line_merges_several(tmp_path, monkeypatch):
    """The flag repeats; what it makes is what the Python interface makes."""
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for number, path in enumerate(paths):
        write_pairs(path, weights_of("t2v"), seed=1000 * number)
    latents = {}
    for name, flags in {
        "none": [],
        "two": [f"{paths[0]}:0.7", f"{paths[1]}"],
        "one": [f"{paths[0]}:0.7"],
    }.items():
        repeated = [word for flag in flags for word in ("--lora", flag)]
        assert run(*repeated, "--overwrite", "--save_latents", f"{name}.safetensors") == 0
        latents[name] = read_state(f"{name}.safetensors").latent
    assert not torch.equal(latents["none"], latents["one"]) and not torch.equal(
        latents["one"], latents["two"]
    )
    seen = []
    pipeline = wan.WanT2V(
        WAN_CONFIGS["t2i-tiny"],
        random_models.checkpoint("t2i-tiny"),
        device="cpu",
        loras=[(paths[0], 0.7), (paths[1], 1)],
    )
    request = generate.parse_arguments(["--task", "t2i-tiny"])
    call = {"frame_num": 1, "sampling_steps": 1, "seed": 3, "shift": request.sample_shift}
    pipeline.generate(request.prompt, size=request.pixels, on_latents=seen.append, **call)
    assert torch.equal(seen[0], latents["two"])
