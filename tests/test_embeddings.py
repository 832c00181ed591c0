"""Time and text embedded ahead: the same bits, each layer on the device once, alone, before the pass."""

import pytest
import torch
from torch import nn

from virtual_gpu import VirtualGPU
from wan.memory.embeddings import embedded_ahead, remember
from wan.memory.residency import Component, visit_when_called
from wan.memory.streaming import Streamer
from wan.modules.model import WanModel

SIZES = {
    "dim": 48,
    "ffn_dim": 64,
    "num_heads": 4,
    "num_layers": 2,
    "freq_dim": 16,
    "text_dim": 16,
    "text_len": 8,
}


def make_model(dtype):
    torch.manual_seed(0)
    model = WanModel(model_type="i2v", in_dim=36, **SIZES)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(model.storage_dtype(name, dtype))
    model.compute_dtype = dtype
    return model.eval().requires_grad_(False)


def passes(model, device):
    """Two steps of two prompts."""
    generator = torch.Generator().manual_seed(1)
    latent, y, clip, *prompts = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in [(16, 3, 4, 6), (20, 3, 4, 6), (1, 257, 1280), (5, 16), (8, 16)]
    )
    times = [torch.tensor([t], device=device) for t in (999, 500)]
    prompts = [[prompt] for prompt in prompts]

    def results():
        return [
            model([latent], t, prompt, 36, clip_fea=clip, y=[y])[0].cpu() for t in times for prompt in prompts
        ]

    return times, prompts, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_and_copies(dtype):
    model = make_model(dtype)
    expected = passes(model, "cpu")[2]()
    layers = model.embedding_layers()
    with VirtualGPU() as gpu:
        times, prompts, results = passes(model, gpu.device)
        for layer in layers:
            visit_when_called(layer, gpu.device)
        streamer = Streamer(model.layer_groups(), gpu.device)
        visit = Component([model], gpu.device, [*model.layer_groups(), *layers], streamer)
        before, start, largest = (
            gpu.live,
            len(gpu.record),
            sum(p.nbytes for p in model.time_projection.parameters()),
        )
        gpu.reset_peak()
        with embedded_ahead(model, gpu.device, times, prompts, dtype):
            assert gpu.live == before and gpu.peak - before < largest + 2**16
            copied = sum(r.nbytes for r in gpu.record[start:] if r.kind == "copy_in")
            weights = sum(p.nbytes for layer in layers[:3] for p in layer.parameters())
            assert weights <= copied < weights + 2**12
            with visit.on_device():
                for layer in layers[:3]:  # their weights are not asked for again
                    for parameter in layer.parameters():
                        parameter.data.fill_(torch.nan)
                assert all(map(torch.equal, results(), expected))
        assert gpu.live == before
        assert all(r.isnan().all() for r in results_on(visit, results))


def results_on(visit, results):
    with visit.on_device():
        return results()


def test_remembers_by_contents():
    layer = nn.Linear(3, 2).requires_grad_(False)
    x = torch.randn(2, 3)
    forward, counted = layer.forward, []
    layer.forward = lambda x: counted.append(1) or forward(x)
    undo = remember(layer)
    first = layer(x)
    assert torch.equal(layer(x.clone()), first) and len(counted) == 1
    x[0, 0] += 1  # what was seen is kept apart from the caller's tensor
    assert not torch.equal(layer(x), first) and len(counted) == 2
    layer(x.double().float())
    with pytest.raises(RuntimeError, match="remember"):
        remember(layer)
    undo()
    layer(x)
    assert len(counted) == 3
