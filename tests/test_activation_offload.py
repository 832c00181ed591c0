"""Activations in RAM: the bits of the pass on the device, and copies that streams and events order."""

import pytest
import torch
from test_chunking import SIZES, make_inputs, make_model

from virtual_gpu import VirtualGPU
from wan.memory.activation_offload import apply_activation_offload

KINDS = ("t2v", "i2v", "vace")
HEADS = SIZES["num_heads"]


def on(device, value):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [on(device, v) for v in value] if isinstance(value, list) else value


def run(model, inputs, gpu=None, **options):
    """The flows, of the device if there is one."""
    if gpu is None:
        return model(**inputs, **options)
    flows = model(**{name: on(gpu.device, value) for name, value in inputs.items()}, **options)
    return [flow.cpu() for flow in flows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bits(kind, dtype):
    for heads, chunk, length, pin_limit in [
        (1, 64, 150, None),
        (2, 64, 150, 0),
        (3, 97, 210, 50_000),
        (4, 70, 105, None),
        (None, 64, 40, None),
    ]:
        model, inputs = make_model(kind, dtype), make_inputs(kind, length)
        expected = run(model, inputs, chunk=chunk)[0]
        with VirtualGPU(pin_limit=pin_limit) as gpu:
            undo = apply_activation_offload(model, gpu.device, chunk, heads)
            model.to(gpu.device)
            live = gpu.live
            for _ in range(2):
                assert torch.equal(run(model, inputs, gpu, chunk=chunk)[0], expected), (heads, chunk)
            assert gpu.live == live
            undo()
            assert torch.equal(run(model, inputs, gpu, chunk=chunk)[0], expected)
