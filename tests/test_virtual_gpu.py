"""The virtual GPU computes what the CPU computes, counts what a GPU would hold, and runs out where it should."""

import gc

import pytest
import torch
import torch.nn.functional as F

from benchmarks.virtual_gpu import VirtualGPU, VirtualTensor


def seeded(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=dtype)


VIDEO = seeded(1, 4, 3, 8, 8)
OPERATORS = {
    "conv3d": lambda x: F.conv3d(x, seeded(5, 4, 3, 3, 3).to(x.device), padding=1),
    "conv2d": lambda x: F.conv2d(x[:, :, 0], seeded(5, 4, 3, 3).to(x.device)),
    "interpolate": lambda x: F.interpolate(x[:, :, 0], scale_factor=(2.0, 2.0), mode="nearest-exact"),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1, 2, 0)),
    "normalize": lambda x: F.normalize(x, dim=1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.double().reshape(1, 4, 96, 2)) * 2j),
    "polar": lambda x: torch.view_as_real(torch.polar(torch.ones_like(x), x)),
    "cumsum": lambda x: x.cumsum(-1),
    "einsum": lambda x: torch.einsum("bctij,bdtij->bcd", x, x),
    "softmax": lambda x: x.softmax(-1),
    "matmul": lambda x: x @ x,
    "cat": lambda x: torch.cat(x.chunk(2, dim=1), dim=2),
    "stack": lambda x: torch.stack(x.unbind(1)),
    "embedding": lambda x: F.embedding(torch.arange(3, device=x.device), x[0, 0, 0]),
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 0], device=x.device)),
    "host_index": lambda x: x[:, torch.tensor([2, 0])],
    "host_scalar": lambda x: x * torch.tensor(2.0) + 1,
    "mask": lambda x: x[x > 0],
    "bfloat16": lambda x: (x.bfloat16() * 3).float(),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention_mask": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=(x @ x.mT) > 0),
    "in_place": lambda x: x.clone().add_(1).clamp_(-1, 1).unsqueeze_(0).transpose_(1, 2),
    "out": lambda x: torch.cat([x, x], out=torch.empty(0, device=x.device)),
    "factories": lambda x: torch.linspace(0, 1, 8, device=x.device) + torch.full((8,), 3.0, device=x.device),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_values_are_those_of_the_cpu(name, inference):
    with VirtualGPU(), torch.inference_mode(inference):
        result = OPERATORS[name](VIDEO.to("vgpu"))
        assert isinstance(result, VirtualTensor) and result.device == torch.device("vgpu:0")
        assert torch.equal(result.cpu(), OPERATORS[name](VIDEO))


def test_noise_from_a_host_generator_is_the_host_noise():
    with VirtualGPU():
        noise = torch.randn(3, 5, device="vgpu", generator=torch.Generator().manual_seed(1))
        assert torch.equal(noise.cpu(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))


def test_assignment_between_host_and_device():
    source = seeded(4, 6)
    with VirtualGPU():
        x = torch.zeros(4, 6, device="vgpu")
        x[1:3] = source[:2]
        x[0] = x[2]
        back = torch.zeros(4, 6)
        back[:3].copy_(x[:3], non_blocking=True)
    assert torch.equal(back, torch.stack([source[1], source[0], source[1], torch.zeros(6)]))


def test_leaving_the_device():
    with VirtualGPU():
        x = torch.tensor([1.5, 2.5], device="vgpu")
        assert x.tolist() == [1.5, 2.5] and x[1].item() == 2.5 and x.cpu().numpy().sum() == 4
        with pytest.raises(TypeError, match=r"\.cpu\(\)"):
            x.numpy()


def test_mixed_devices_are_an_error():
    with VirtualGPU(), pytest.raises(RuntimeError, match="add.*vgpu:0 and cpu"):
        torch.ones(3, device="vgpu") + torch.ones(3)


def test_live_and_peak_in_steps_of_512_bytes():
    with VirtualGPU() as gpu:
        a = torch.zeros(129, device="vgpu")  # 516 bytes
        assert gpu.live == 1024
        view = a[1:].view(2, 64).T
        assert gpu.live == 1024
        b = view + 1
        assert (gpu.live, gpu.peak) == (1536, 1536)
        del a, b
        assert gpu.live == 1024  # the view keeps its storage
        gpu.reset_peak()
        assert gpu.peak == 1024
        view.add_(1)
        assert gpu.peak == 1024
        del view
        assert (gpu.live, gpu.peak) == (0, 1024)
        grown = torch.arange(200, device="vgpu")
        assert gpu.live == 2048
        del grown
        assert gpu.live == 0


@pytest.mark.parametrize("dtype, scores", [(torch.float32, 2 * 64 * 64 * 4), (torch.bfloat16, 0)])
def test_attention_counts_scores_where_no_fused_kernel_is_sure(dtype, scores):
    with VirtualGPU() as gpu:
        q = torch.zeros(1, 2, 64, 16, dtype=dtype, device="vgpu")
        before = gpu.live
        F.scaled_dot_product_attention(q, q, q)
        assert gpu.peak - before == before + scores


def test_out_of_memory():
    with VirtualGPU(capacity=4096) as gpu:
        kept = torch.zeros(768, device="vgpu")
        with pytest.raises(torch.OutOfMemoryError, match="1100 bytes") as caught:
            torch.zeros(275, device="vgpu")
        assert caught.value.requested == 1100
        assert gpu.live == 3072
        del kept
        kept = torch.zeros(1024, device="vgpu")
        assert gpu.live == 4096 == kept.nbytes


def test_out_of_memory_in_a_module_leaves_nothing_behind():
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    with VirtualGPU(capacity=20_000) as gpu:
        with pytest.raises(torch.OutOfMemoryError):
            layers.to("vgpu")
        layers.cpu()
        assert gpu.live == 0


def test_a_module_moves_in_place_and_comes_back():
    layer = torch.nn.Linear(6, 6)
    weight, values = layer.weight, layer.weight.detach().clone()
    x = seeded(2, 6)
    expected = layer(x)
    with VirtualGPU() as gpu:
        layer.to("vgpu")
        assert (
            layer.weight is weight and isinstance(weight, torch.nn.Parameter) and weight.device.type == "vgpu"
        )
        assert torch.equal(layer(x.to("vgpu")).detach().cpu(), expected)
        layer.cpu()
        assert layer.weight is weight and type(weight) is torch.nn.Parameter and gpu.live == 0
    assert torch.equal(layer(x), expected) and torch.equal(weight, values)


def test_a_parameter_takes_data_of_another_device():
    weight = torch.nn.Parameter(seeded(6, 6), requires_grad=False)
    home = weight.data
    with VirtualGPU() as gpu:
        weight.data = home.to("vgpu", torch.bfloat16)
        assert weight.device.type == "vgpu" and weight.dtype is torch.bfloat16 and gpu.live == 512
        weight.data = home
        assert gpu.live == 0 and weight.data_ptr() == home.data_ptr()


def test_device_module():
    with VirtualGPU(capacity=2**20) as gpu:
        x = torch.zeros(1000, device="vgpu")
        module = torch.get_device_module(torch.device("vgpu:0"))
        assert module is torch.get_device_module("vgpu")
        assert module.memory_allocated() == gpu.live == 4096
        assert module.mem_get_info() == (2**20 - 4096, 2**20)
        del x
        assert module.max_memory_allocated() == 4096
        module.reset_peak_memory_stats()
        module.synchronize()
        module.empty_cache()
        assert module.max_memory_allocated() == 0


def test_each_gpu_has_its_own_ledger():
    with VirtualGPU() as first:
        kept = torch.zeros(128, device="vgpu")
    with VirtualGPU() as second:
        other = torch.zeros(256, device="vgpu")
        assert (first.live, second.live) == (512, 1024)
        del kept
        gc.collect()
        assert (first.live, second.live) == (0, 1024)
    assert other.cpu().sum() == 0
    with pytest.raises(RuntimeError, match="VirtualGPU"):
        torch.zeros(1, device="vgpu")
