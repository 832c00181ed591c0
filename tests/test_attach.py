"""leanwan as a library: put on models of other trees and taken off again, on the virtual GPU."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_retrofit import IDS, dit_inputs, make_pipeline
from torch import nn

import leanwan
from leanwan import attach
from leanwan.dit.known import check_known
from leanwan.errors import InputError
from virtual_gpu import DEVICE as GPU
from virtual_gpu import VirtualGPU
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import WanVAE


@pytest.fixture
def gpu():
    with VirtualGPU() as gpu:
        yield gpu


def state(*objects):
    """What undoing must bring back: methods, hooks, places and values."""
    found = []
    for module in (inner for each in objects if isinstance(each, nn.Module) for inner in each.modules()):
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        own = sorted(key for key in vars(module) if not key.startswith("_"))
        found.append((own, hooks, [id(p) for p in module.parameters(recurse=False)]))
    return found + [sorted(vars(each)) for each in objects if not isinstance(each, nn.Module)]


class Foreign(WanModel):
    """A DiT of another tree: its blocks have a layer more, its forward is called with more."""

    def __init__(self, **config):
        super().__init__(**config)
        for block in self.blocks:
            block.audio = nn.Linear(self.dim, self.dim)

    def forward(self, x, t, context, seq_len, audio=None):
        hooks = [block.ffn.register_forward_hook(add_audio(block)) for block in self.blocks]
        try:
            return super().forward(x, t, context, seq_len)
        finally:
            for hook in hooks:
                hook.remove()


def add_audio(block):
    return lambda module, inputs, output: output + block.audio(inputs[0])


def test_two_experts(gpu):
    """Each comes when it is called, and goes when it is sent to the CPU by either name."""
    pipeline = make_pipeline()
    low, high = pipeline.model, copy.deepcopy(pipeline.model)
    del pipeline.model
    nn.init.zeros_(high.head.head.bias)
    pipeline.low_noise_model, pipeline.high_noise_model = low, high
    expected = [model(**dit_inputs("cpu"))[0] for model in (low, high)]
    before = state(low, high)
    undo = attach(pipeline, dit_stream=0.0)
    for model, other, flow in zip((low, high), (high, low), expected):
        other.to("cpu")
        assert next(other.parameters()).device.type == "cpu" and gpu.live == 0
        model.to(GPU)
        assert gpu.live == 0
        assert torch.equal(model(**dit_inputs(GPU))[0].cpu(), flow)
        assert next(model.parameters()).device.type == "vgpu"
    undo()
    assert gpu.live == 0 and state(low, high) == before


def test_modules_come_from_the_device_and_return_to_it(gpu):
    pipeline = make_pipeline()
    model, text = pipeline.model, pipeline.text_encoder.model
    expected, embedded = model(**dit_inputs("cpu"))[0], text(IDS)
    model.to(GPU), text.to(GPU)
    parts = {"model": model, "text_encoder": pipeline.text_encoder}
    undo = attach(parts, device=GPU, dit_stream=0.0, t5_stream=True)
    assert gpu.live == 0
    assert torch.equal(model(**dit_inputs(GPU))[0].cpu(), expected)
    assert torch.equal(text(IDS.to(GPU)).cpu(), embedded)
    undo()
    assert {p.device.type for each in (model, text) for p in each.parameters()} == {"vgpu"}
    model.cpu(), text.cpu()
    assert torch.equal(model(**dit_inputs("cpu"))[0], expected)


def test_a_foreign_model_streams_whole_and_keeps_its_types(gpu):
    pipeline = make_pipeline(Foreign)
    pipeline.param_dtype = torch.bfloat16
    expected = pipeline.model(**dit_inputs("cpu"))[0]
    before = state(pipeline.model)
    undo = attach(pipeline, dit_stream=0.0)
    result = pipeline.model(**dit_inputs(GPU))[0]
    assert torch.equal(result.cpu(), expected)
    assert {p.dtype for p in pipeline.model.parameters()} == {torch.float32}
    del result
    undo()
    assert state(pipeline.model) == before and gpu.live == 0


def test_blocks_of_other_parts_stream_whole(gpu):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.out(x)

    model = Other().requires_grad_(False)
    x = torch.randn(3, 8)
    expected = model(x)
    undo = attach({"model": model}, device=GPU, dit_stream=0.0)
    assert torch.equal(model(x.to(GPU)).cpu(), expected)
    undo()
    assert gpu.live == 0


def test_vae(gpu, measured):
    vae = WanVAE(
        vae_pth=random_models.checkpoint("t2v-tiny") / WAN_CONFIGS["t2v-tiny"].vae_checkpoint,
        device="cpu",
        dim=8,
    )
    latent = torch.randn(16, 2, 20, 24, generator=torch.Generator().manual_seed(0))
    expected = vae.decode([latent])[0]
    vae.model.to(GPU)
    vae.scale = [part.to(GPU) for part in vae.scale]
    methods = {name for name in ("encode", "decode") if name in vars(vae)}
    undo = attach(SimpleNamespace(vae=vae, device=GPU), vae_tile=64, vae_cpu=True)
    assert {p.device.type for p in vae.model.parameters()} == {"cpu"}
    (video,) = vae.decode([latent.to(GPU)])
    measured((video - expected).abs().max(), 1e-5)
    assert gpu.peak and {p.device.type for p in vae.model.parameters()} == {"cpu"}
    with pytest.raises(RuntimeError, match="applied already"):
        attach(SimpleNamespace(vae=vae, device=GPU), vae_tile=64)
    undo()
    assert {p.device.type for p in vae.model.parameters()} == {"vgpu"}
    assert methods == {name for name in ("encode", "decode") if name in vars(vae)}


def test_another_vae_is_refused():
    vae = SimpleNamespace(model=tiny_vae_with_another_layer(), scale=None)
    with pytest.raises(InputError, match="vae_tile: Tanh is not a layer of Wan2.1's VAE"):
        attach({"vae": vae}, device="cpu", vae_tile=64)
    assert not {"encode", "decode"} & set(vars(vae))


def tiny_vae_with_another_layer():
    vae = WanVAE(
        vae_pth=random_models.checkpoint("t2v-tiny") / WAN_CONFIGS["t2v-tiny"].vae_checkpoint,
        device="cpu",
        dim=8,
    )
    vae.model.decoder.upsamples.append(nn.Tanh())
    return vae.model


@pytest.mark.parametrize(
    "option", [{"vae_tile": 64}, {"t5_stream": True}, {"dit_stream": 0.0}, {"dit_chunk": 64}]
)
def test_an_option_that_nothing_takes_is_refused(option):
    with pytest.raises(InputError, match=f"{next(iter(option))}: there is no "):
        attach({}, device="cpu", **option)


# What chunks refuse


def a_layer_more(model):
    model.blocks[3].adapter = nn.Linear(4, 4)
    return "blocks.3.adapter is not a part"


def a_layer_more_in_attention(model):
    model.blocks[1].cross_attn.k_img = nn.Linear(4, 4)
    return "blocks.1.cross_attn.k_img is not a part"


def a_parameter_more(model):
    model.blocks[0].scale = nn.Parameter(torch.ones(1))
    return "blocks.0.scale is not a part"


def a_buffer_more(model):
    model.blocks[0].self_attn.register_buffer("bias", torch.ones(1))
    return "blocks.0.self_attn.bias is not a part"


def a_module_more(model):
    model.audio_proj = nn.Linear(4, 4)
    return "audio_proj is not a part"


def a_part_less(model):
    del model.blocks[2].ffn
    return "blocks.2.ffn is missing"


def replaced_forward(model):
    model.blocks[2].forward = lambda *args: None
    return "forward of blocks.2 is replaced"


def replaced_forward_of_the_model(model):
    model.forward = model.forward
    return "forward of the model is replaced"


def replaced_forward_of_attention(model):
    model.blocks[0].self_attn.forward = lambda x: x
    return "forward of blocks.0.self_attn is replaced"


def hooks(model):
    model.blocks[0].register_forward_hook(lambda *args: None)
    return "blocks.0 has hooks"


def another_signature(model):
    class Block(type(model.blocks[0])):
        def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens, audio):
            pass

    model.blocks[1].__class__ = Block
    return "blocks.1 is called with audio too"


@pytest.mark.parametrize(
    "change",
    [
        a_layer_more, a_layer_more_in_attention, a_parameter_more, a_buffer_more, a_module_more, a_part_less,
        replaced_forward, replaced_forward_of_the_model, replaced_forward_of_attention, hooks, another_signature,
    ],
)  # fmt: skip
def test_chunks_refuse_what_they_do_not_know(change):
    pipeline = make_pipeline()
    model = pipeline.model
    check_known(model, "dit_chunk")
    named = change(model)
    before = state(model)
    with pytest.raises(InputError, match=f"dit_chunk: {named}") as caught:
        attach(pipeline, dit_chunk=64)
    assert "stream the layers without it" in str(caught.value)
    assert state(model) == before


def test_every_model_of_this_package_is_known():
    sizes = {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4}
    for kind in ("t2v", "i2v", "flf2v"):
        check_known(WanModel(model_type=kind, **sizes), "dit_chunk")
    check_known(VaceWanModel(**sizes), "dit_chunk")
    check_known(WanModel(**sizes, qk_norm=False, cross_attn_norm=False), "dit_chunk")


def test_an_image_model_without_clip():
    """As Wan2.2's: the image comes through the latents alone."""
    pipeline = make_pipeline(in_dim=20, qk_norm=True)
    pipeline.model.model_type = "i2v"
    inputs = dit_inputs("cpu")
    inputs["y"] = [torch.ones(4, 3, 8, 6)]
    expected = pipeline.model(**inputs)[0]
    undo = attach(pipeline, device="cpu", dit_chunk=64)
    assert torch.equal(pipeline.model(**inputs)[0], expected)
    undo()


def test_it_works_copied_under_another_name(tmp_path):
    """The files alone, without the rest of the package."""
    shutil.copytree(Path(leanwan.__file__).parent, tmp_path / "lean")
    code = (
        "import sys, torch; sys.modules['wan'] = sys.modules['leanwan'] = None; import lean; from lean import attach;"
        "model = torch.nn.Module(); model.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)]);"
        "attach({'model': model}, device='cpu', dit_stream=0.0)();"
        "[getattr(lean, name) for name in lean.__all__];"
        "found = {name.split('.')[0] for name in sys.modules};"
        "print(*found & {'transformers', 'diffusers', 'wan', 'leanwan', 'easydict'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.split()) == ["leanwan", "wan"], "these are the blocked names"
