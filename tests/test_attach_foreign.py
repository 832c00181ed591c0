"""What `attach` and `apply_tiling` say to what they do not know: one line that names it, and nothing is changed."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from test_attach import state
from test_retrofit import make_pipeline
from torch import nn

from leanwan import apply_tiling, attach, visit_by_halves
from leanwan.errors import InputError
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.modules.vae import WanVAE

OPTIONS = {
    "vae_tile": 64,
    "vae_cpu": True,
    "t5_stream": True,
    "dit_stream": 0.0,
    "dit_chunk": 64,
    "activation_offload": True,
}


def wan_vae():
    config = WAN_CONFIGS["t2v-tiny"]
    return WanVAE(vae_pth=random_models.checkpoint("t2v-tiny") / config.vae_checkpoint, device="cpu", dim=8)


def diffusers_vae():
    return AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1)


def diffusers_dit():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=8, num_layers=1
    )


def without(path):
    """A VAE of Wan2.1's, less a part."""
    vae = wan_vae()
    *owners, last = path.split(".")
    owner = vae.model
    for name in owners:
        owner = getattr(owner, name)
    delattr(owner, last)
    return vae


def half_built(**parts):
    """A pipeline of Wan2.1's, some parts of which are something else."""
    pipeline = make_pipeline()
    pipeline.device = torch.device("cpu")
    vars(pipeline).update(parts)
    return pipeline


def less_a_part(kind, path):
    """A pipeline of which one module is missing."""
    pipeline = half_built()
    owner = getattr(pipeline, kind)
    *owners, last = path.split(".")
    for name in owners:
        owner = owner[int(name)] if name.isdigit() else getattr(owner, name)
    delattr(owner, last)
    return pipeline


VAES = {
    "None": lambda: None,
    "number": lambda: 5,
    "text": lambda: "vae.pth",
    "dict": lambda: {"model": wan_vae().model, "scale": [0, 1]},
    "object": object,
    "class": lambda: WanVAE,
    "Linear": lambda: nn.Linear(2, 2),
    "Module": nn.Module,
    "of diffusers": diffusers_vae,
    "of diffusers, wrapped": lambda: SimpleNamespace(model=diffusers_vae(), scale=[0, 1]),
    "a DiT": lambda: make_pipeline().model,
    "a pipeline": half_built,
    "without modules": lambda: SimpleNamespace(model=None, scale=[0, 1]),
    "four parts": lambda: SimpleNamespace(**dict(wan_vae().model.named_children()), scale=[0, 1]),
    "empty parts": lambda: SimpleNamespace(
        model=nn.ModuleDict({name: nn.Identity() for name in ("encoder", "conv1", "conv2", "decoder")}),
        scale=[0, 1],
    ),
} | {
    path: lambda path=path: without(path)
    for path in (
        "encoder",
        "conv1",
        "conv2",
        "decoder",
        "encoder.head",
        "decoder.middle",
        "decoder.upsamples",
    )
}
FOREIGN = (
    VAES
    | {f"vae: {name}": lambda make=make: {"vae": make(), "device": "cpu"} for name, make in VAES.items()}
    | {f"{part}: {name}": lambda part=part, make=make: half_built(**{part: make()})
       for part in ("text_encoder", "clip", "model")
       for name, make in VAES.items()}
    | {
        "list": lambda: [make_pipeline()],
        "numbers as names": lambda: {1: 2},
        "empty": dict,
        "another name": lambda: {"vea": wan_vae()},
        "a pipeline of diffusers": lambda: WanPipeline(None, None, diffusers_vae(), None, diffusers_dit()),
        "a transformer of diffusers": diffusers_dit,
        "no blocks": lambda: less_a_part("model", "blocks"),
        "no blocks in the text encoder": lambda: half_built(text_encoder=SimpleNamespace(model=nn.Linear(2, 2))),
        "one block": lambda: half_built(model=nn.ModuleDict({"blocks": nn.Linear(2, 2)})),
        "empty blocks": lambda: half_built(model=nn.ModuleDict({"blocks": nn.ModuleList(), "a": nn.Linear(2, 2)})),
    }
    | {
        f"model without {path}": lambda path=path: less_a_part("model", path)
        for path in (
            "head", "head.head", "head.modulation", "patch_embedding", "text_embedding", "time_embedding",
            "time_projection", "freqs", "text_len", "blocks.1.self_attn", "blocks.1.ffn", "blocks.0.norm1",
            "blocks.0.modulation", "blocks.0.self_attn.q", "blocks.0.self_attn.num_heads", "blocks.0.cross_attn.o",
        )
    }
)  # fmt: skip


def parts(thing):
    """The objects of which the state is compared."""
    if isinstance(thing, dict):
        return [part for held in thing.values() for part in parts(held)]
    if isinstance(thing, SimpleNamespace):
        return [thing, *parts(vars(thing))]
    if isinstance(thing, WanVAE):
        return [thing, thing.model]
    return [thing] if isinstance(thing, nn.Module) else []


@pytest.mark.parametrize("name", FOREIGN)
def test_each_option_goes_on_or_names_what_is_wrong(name):
    """With every option by itself, and with a tile before it that would have to be undone."""
    thing = FOREIGN[name]()
    refused = 0
    for option, tiled in itertools.product(OPTIONS, (False, True)):
        before = state(*parts(thing))
        given = {option: OPTIONS[option]} | ({"vae_tile": 64} if tiled else {})
        try:
            undo = attach(thing, device="cpu", **given)
        except InputError as error:
            line = str(error)
            assert "\n" not in line and line.partition(":")[0] in {*given, "pipeline"}
            refused += 1
        else:
            undo()
        assert state(*parts(thing)) == before
    assert refused


@pytest.mark.parametrize("name", VAES)
def test_tiles_are_refused_by_name(name):
    vae = VAES[name]()
    before = state(*parts(vae))
    with pytest.raises(InputError, match="^vae_tile: "):
        apply_tiling(vae, 64)
    assert state(*parts(vae)) == before


@pytest.mark.parametrize(
    ("thing", "options", "said"),
    [
        (diffusers_vae, {"vae_tile": 64}, "AutoencoderKLWan is not Wan2.1's VAE, it has no conv1, conv2"),
        (diffusers_vae, {"vae_cpu": True}, "AutoencoderKLWan is not Wan2.1's VAE, it has no conv1, conv2"),
        (FOREIGN["a pipeline of diffusers"], {"vae_tile": 64}, "AutoencoderKLWan is not Wan2.1's VAE"),
        (FOREIGN["a pipeline of diffusers"], {"dit_stream": 0.0}, "no model or .* in WanPipeline"),
        (FOREIGN["another name"], {"vae_tile": 64}, "there is no vae, but vea"),
        (lambda: without("conv2"), {"vae_tile": 64}, "VAE is not Wan2.1's VAE, it has no conv2"),
        (lambda: without("decoder.middle"), {"vae_tile": 64}, "Decoder of the VAE has no middle"),
        (
            FOREIGN["vae: empty parts"],
            {"vae_tile": 64},
            "ModuleDict is not Wan2.1's VAE, it has no parameters",
        ),
        (
            lambda: half_built(clip=SimpleNamespace()),
            {"t5_stream": True},
            "clip.model is NoneType, not a module",
        ),
        (FOREIGN["model without freqs"], {"dit_chunk": 64}, "freqs is missing"),
        (lambda: None, {}, "pipeline: give a pipeline, a mapping of its parts or a VAE, not NoneType"),
    ],
)
def test_what_is_said(thing, options, said):
    with pytest.raises(InputError, match=said):
        attach(thing(), device="cpu", **options)


def test_the_device_and_the_type_are_named():
    for parts_, options, said in [
        ({"vae": wan_vae()}, {"vae_cpu": True}, "device: the pipeline has none"),
        (make_pipeline(), {"dit_stream": 0.0, "device": "card"}, "device card: no such device"),
        (
            make_pipeline(),
            {"dit_stream": 0.0, "device": "cpu", "dtype": "bf16"},
            "dtype bf16: give a torch.dtype",
        ),
    ]:
        with pytest.raises(InputError, match=said):
            attach(parts_, **options)


def test_nothing_is_changed_by_what_is_refused_later():
    """Parts are looked at before the first of them is touched."""
    moved, vae = [], wan_vae()
    vae.model.cpu = lambda: moved.append("cpu")
    pipeline = half_built(vae=vae, model=nn.Linear(2, 2))
    with pytest.raises(InputError, match="dit_stream: model, Linear, has no blocks"):
        attach(pipeline, vae_tile=64, vae_cpu=True, dit_stream=0.0)
    assert not moved and not {"encode", "decode"} & set(vars(vae))


@pytest.mark.parametrize("option", [{"vae_tile": 64}, {"vae_cpu": True}])
@pytest.mark.parametrize("held", [False, True])
def test_a_vae_alone(option, held, measured):
    """As what codes, or as its bare tree, which is called with batches and the scale."""
    vae = wan_vae()
    generator = torch.Generator().manual_seed(0)
    video, latent = torch.rand(3, 5, 96, 128, generator=generator) * 2 - 1, torch.randn(16, 2, 12, 16)
    expected = [vae.encode([video])[0], vae.decode([latent])[0]]
    bare, before = copy.deepcopy(vae.model), state(vae, vae.model)
    for alone in (vae, bare):
        undo = attach({"vae": alone} if held else alone, device="cpu", **option)
        assert {"encode", "decode"} <= set(vars(alone))
        if alone is vae:
            found = [alone.encode([video])[0], alone.decode([latent])[0]]
        else:
            found = [alone.encode(video[None], vae.scale)[0], alone.decode(latent[None], vae.scale)[0]]
        for mine, other in zip(found, expected):
            measured((mine - other).abs().max(), 1e-5)
        undo()
        assert not {"encode", "decode"} & set(vars(alone))
    assert state(vae, vae.model) == before


def test_the_parts_of_a_bare_vae_by_themselves(measured):
    vae, latent = wan_vae(), torch.randn(1, 16, 2, 12, 16)
    expected = vae.model.decode(latent, vae.scale)
    undo = [apply_tiling(vae.model, 64), visit_by_halves(vae.model, "cpu")]
    measured((vae.model.decode(latent, vae.scale) - expected).abs().max(), 1e-5)
    for each in undo:
        each()
    for foreign in (diffusers_vae(), None, nn.Linear(2, 2)):
        with pytest.raises(InputError, match="vae_cpu: "):
            visit_by_halves(foreign, "cpu")
