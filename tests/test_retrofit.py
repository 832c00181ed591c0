"""Streaming and chunking put on a pipeline that moves its models by hand, on the virtual GPU.

The pipeline is a stand-in, its modules named as the checkpoints name them; test_patch_upstream.py has the real ones.
"""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from leanwan.activations import ActivationOffload
from leanwan.errors import InputError
from leanwan.foreign import check_memory_options, save_memory
from leanwan.streaming import Streamer
from virtual_gpu import DEVICE, VirtualGPU
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel

WIDTH = 16


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return x * self.weight


class TextBlock(nn.Module):
    """Its position bias asks where its weights are before it calls the module that has them, as upstream's does."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn = Norm(), nn.Linear(WIDTH, WIDTH)
        self.norm2, self.ffn = Norm(), nn.Linear(WIDTH, WIDTH)
        self.pos_embedding = nn.Embedding(8, WIDTH)

    def forward(self, x):
        positions = torch.arange(x.size(1), device=self.pos_embedding.weight.device)
        x = x + self.attn(self.norm1(x)) + self.pos_embedding(positions)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(500, WIDTH)
        self.blocks = nn.ModuleList(TextBlock() for _ in range(3))
        self.norm = Norm()

    def forward(self, ids):
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ImageTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.pre_norm, self.post_norm = Norm(), Norm()
        self.transformer = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x):
        return self.transformer[:-1](self.pre_norm(x))


class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.textual = ImageTower(), nn.Linear(WIDTH, WIDTH)


def make_pipeline(dit=None, **config):
    torch.manual_seed(0)
    sizes = {"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 4, "freq_dim": 16, "text_dim": 20}
    model = (dit or WanModel)(text_len=12, **sizes, **config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return SimpleNamespace(
        device=DEVICE,
        t5_cpu=False,
        param_dtype=torch.float32,
        text_encoder=SimpleNamespace(model=TextEncoder().requires_grad_(False)),
        clip=SimpleNamespace(model=Clip().requires_grad_(False)),
        model=model.requires_grad_(False),
    )


IDS = torch.tensor([[3, 1, 4, 1, 499]])
PIXELS = torch.linspace(-1, 1, 2 * WIDTH).reshape(1, 2, WIDTH)


def dit_inputs(device):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(16, 3, 8, 6, generator=generator).to(device)
    context = [torch.randn(5, 20, generator=generator).to(device)]
    return {"x": [latent], "t": torch.tensor([500.0]).to(device), "context": context, "seq_len": 36}


def bytes_of(*modules):
    return sum(-(-p.nbytes // 512) * 512 for module in modules for p in module.parameters())


@pytest.fixture
def gpu():
    with VirtualGPU() as gpu:
        yield gpu
        assert gpu.live == 0


def home(gpu, model):
    """Sends a model home as a pipeline does, and checks that it is there whole."""
    assert model.cpu() is model
    assert gpu.live == 0
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_text_encoder(gpu):
    pipeline = make_pipeline()
    model = pipeline.text_encoder.model
    expected = model(IDS)
    save_memory(pipeline, t5_stream=True)
    assert model.to("vgpu") is model and gpu.live == 0, "it comes when it is called"
    for _ in range(2):
        gpu.reset_peak()
        result = model(IDS.to("vgpu"))
        assert result.device.type == "vgpu" and torch.equal(result.cpu(), expected)
        assert gpu.peak < bytes_of(model.token_embedding), "the table stays on the CPU"
        del result
        assert gpu.live > 0
        home(gpu, model)


def test_image_encoder(gpu):
    """Only the image tower comes."""
    pipeline = make_pipeline()
    model = pipeline.clip.model
    expected = model.visual(PIXELS)
    save_memory(pipeline, t5_stream=True)
    assert model.to("vgpu") is model and gpu.live == 0
    result = model.visual(PIXELS.to("vgpu"))
    assert torch.equal(result.cpu(), expected)
    assert {p.device.type for p in model.textual.parameters()} == {"cpu"}
    del result
    home(gpu, model)


@pytest.mark.parametrize(
    "options",
    [
        {"dit_stream": 0.0},
        {"dit_stream": 2e-5},
        {"dit_stream": 0.0, "dit_chunk": 64},
        {"dit_stream": 0.0, "dit_chunk": 64, "activation_offload": True},
        {"dit_stream": 0.0, "activation_offload": True},
    ],
)
def test_transformer(gpu, options):
    pipeline = make_pipeline()
    model = pipeline.model
    (expected,) = model(**dit_inputs("cpu"))
    save_memory(pipeline, **options)
    assert model.to("vgpu") is model and gpu.live == 0
    for _ in range(2):
        inputs = dit_inputs("vgpu")
        (result,) = model(**inputs)
        assert torch.equal(result.cpu(), expected)
        del result, inputs
        assert 0 < gpu.live < bytes_of(model)
        home(gpu, model)


def test_tokens_stay_in_ram(gpu, monkeypatch):
    """Beside weights and chunks the device holds keys and values of one group of heads at a time."""
    homes = []
    make = ActivationOffload.homes
    monkeypatch.setattr(
        ActivationOffload, "homes", lambda place, *args: homes.append(make(place, *args)) or homes[-1]
    )
    pipeline = make_pipeline()
    save_memory(pipeline, dit_chunk=64, activation_offload=True)
    pipeline.model.to("vgpu")
    pipeline.model(**dit_inputs("vgpu"))
    assert len(homes) == 1 + 4 * 4, "the residual stream; keys, values, queries and results of each block"
    assert {home.tensor.device.type for parts in homes for home in parts} == {"cpu"}
    home(gpu, pipeline.model)


def test_an_exception_sends_the_weights_home(gpu):
    pipeline = make_pipeline()
    save_memory(pipeline, dit_stream=0.0)
    inputs = dit_inputs("vgpu")
    handle = pipeline.model.blocks[2].ffn[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        pipeline.model(**inputs)
    del caught
    assert {p.device.type for p in pipeline.model.parameters()} == {"cpu"}
    handle.remove()
    assert pipeline.model(**inputs)[0].isfinite().all()
    del inputs
    home(gpu, pipeline.model)


@pytest.mark.parametrize("options", [{"dit_stream": 0.0}, {"dit_chunk": 64}])
def test_weights_wait_in_the_type_that_autocast_gives_them(options):
    pipeline = make_pipeline(model_type="i2v", in_dim=36)
    before = copy.deepcopy(pipeline.model)
    pipeline.param_dtype = torch.bfloat16
    save_memory(pipeline, **options)
    model = pipeline.model
    assert model.blocks[0].self_attn.q.weight.dtype is torch.bfloat16
    assert torch.equal(model.blocks[0].ffn[2].bias, before.blocks[0].ffn[2].bias.bfloat16())
    assert torch.equal(model.head.head.weight, before.head.head.weight)
    assert torch.equal(model.blocks[0].self_attn.norm_q.weight, before.blocks[0].self_attn.norm_q.weight)


def test_without_options_nothing_changes():
    pipeline = make_pipeline()
    pipeline.param_dtype = torch.bfloat16
    save_memory(pipeline)
    for model in (
        pipeline.text_encoder.model,
        pipeline.clip.model,
        pipeline.clip.model.visual,
        pipeline.model,
    ):
        assert not {"forward", "to", "cpu"} & set(vars(model))
    assert {p.dtype for p in pipeline.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("chunk", [0, 64])
def test_pieces_follow_the_forward_pass_in_use(gpu, monkeypatch, chunk):
    """The original forward pass runs all VACE blocks first, the one in chunks takes turns."""
    pipeline = make_pipeline(VaceWanModel, vace_layers=[0, 2], vace_in_dim=8)
    orders = []

    def recorded(pieces, *args, **options):
        orders.append(pieces)
        return Streamer(pieces, *args, **options)

    monkeypatch.setattr("leanwan.foreign.Streamer", recorded)
    undo = save_memory(pipeline, dit_stream=0.0, dit_chunk=chunk)
    source = [torch.ones(8, 3, 8, 6, device="vgpu")]
    pipeline.model(**dit_inputs("vgpu"), vace_context=source)  # after which it is known what streams
    undo()
    del source
    names = {module: name for name, module in pipeline.model.named_modules()}
    found = [names.get(piece) or names[next(piece.children())] for piece in orders[0]]
    order = list(dict.fromkeys(".".join(name.split(".")[:2]) for name in found))
    blocks, hints = [f"blocks.{i}" for i in range(4)], ["vace_blocks.0", "vace_blocks.1"]
    if chunk:
        assert order == [hints[0], blocks[0], blocks[1], hints[1], blocks[2], blocks[3]]
    else:
        assert order == hints + blocks
    of_a_block = 4 if chunk else 3  # keys and values come apart from queries and outputs
    assert len(orders[0]) == len(set(orders[0])) == 6 * of_a_block + 3


@pytest.mark.parametrize(
    "options, named",
    [
        ({"t5_cpu": True, "t5_stream": True}, "t5_stream and t5_cpu"),
        ({"dit_chunk": 10}, "dit_chunk 10"),
        ({"dit_stream": -1.0}, "dit_stream -1.0"),
    ],
)
def test_bad_options(options, named):
    with pytest.raises(InputError, match=named) as caught:
        check_memory_options(**options)
    assert "\n" not in str(caught.value)
    pipeline = make_pipeline()
    pipeline.t5_cpu = options.pop("t5_cpu", False)
    with pytest.raises(InputError, match=named):
        save_memory(pipeline, **options)


def state(*modules):
    """What `vars` says of every module below the given ones, hooks and replaced methods among it."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
        for root in modules
        for name, module in {f"{id(root)}.{n}": m for n, m in root.named_modules()}.items()
    }


OPTIONS = {"t5_stream": True, "dit_stream": 0.0, "dit_chunk": 64}


@pytest.mark.parametrize("order", itertools.permutations(OPTIONS), ids="-".join)
def test_options_come_and_go_in_any_order(gpu, order):
    pipeline = make_pipeline()
    text, image, dit = pipeline.text_encoder.model, pipeline.clip.model, pipeline.model

    def run():
        calls = text(IDS.to("vgpu")), image.visual(PIXELS.to("vgpu")), dit(**dit_inputs("vgpu"))[0]
        return [result.cpu() for result in calls]

    before = state(text, image, dit)
    expected = [text(IDS), image.visual(PIXELS), dit(**dit_inputs("cpu"))[0]]
    for undoing in itertools.permutations(OPTIONS):
        undo = {option: save_memory(pipeline, **{option: OPTIONS[option]}) for option in order}
        assert all(map(torch.equal, run(), expected))
        for option in order:
            with pytest.raises(RuntimeError, match=option):
                save_memory(pipeline, **{option: OPTIONS[option]})
        for option in undoing:
            undo[option]()
            undo[option]()
        assert gpu.live == 0 and state(text, image, dit) == before


def test_what_is_refused_changes_nothing(gpu):
    pipeline = make_pipeline()
    undo = save_memory(pipeline, dit_chunk=64)
    before = state(pipeline.text_encoder.model, pipeline.clip.model, pipeline.model)
    with pytest.raises(RuntimeError, match="dit_chunk"):
        save_memory(pipeline, t5_stream=True, dit_chunk=64, dit_stream=0.0)
    assert state(pipeline.text_encoder.model, pipeline.clip.model, pipeline.model) == before
    undo()


def test_several_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    save_memory(make_pipeline())
    for options in {"t5_stream": True}, {"dit_stream": 0.0}, {"dit_chunk": 64}:
        with pytest.raises(InputError, match="one GPU only"):
            save_memory(make_pipeline(), **options)
