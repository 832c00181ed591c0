"""The virtual GPU computes what the CPU computes, counts what a GPU would hold, and runs out where it should."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F

from virtual_gpu import Record, VirtualGPU, VirtualTensor
from virtual_gpu.backend import DeviceModule as vgpu

MIB = 2**20


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


def test_the_record_tells_what_the_host_had_to_know():
    with VirtualGPU() as gpu:
        x = torch.tensor([[1.5, 0.0], [0.0, 2.5]], device="vgpu")
        ones = torch.ones(1, dtype=torch.int64, device="vgpu")
        told = [x[0, 0].item, x.nonzero, lambda: torch.linalg.solve(x, x), lambda: x[x > 1], x.cpu]
        counts = []
        silent = [lambda: torch.linalg.solve_ex(x, x), lambda: x[ones], lambda: x + 1]
        for tell in (*told, *silent):
            start = len(gpu.record)
            tell()
            counts.append(sum(r.kind == "copy_out" for r in gpu.record[start:]))
    assert counts == [1] * len(told) + [0] * len(silent)


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


@pytest.mark.parametrize("expandable_segments", [False, True])
def test_out_of_memory(expandable_segments):
    with VirtualGPU(capacity=4 * MIB, expandable_segments=expandable_segments) as gpu:
        kept = [torch.zeros(2**18, device="vgpu") for _ in range(3)]  # 1 MiB each, two in a segment
        assert (gpu.live, gpu.reserved) == (3 * MIB, 4 * MIB)
        with pytest.raises(torch.OutOfMemoryError, match=f"{MIB + 4} bytes") as caught:
            torch.zeros(2**18 + 1, device="vgpu")
        assert caught.value.requested == MIB + 4
        assert (gpu.live, gpu.reserved) == (3 * MIB, 4 * MIB)
        del kept[:]
        assert (gpu.live, gpu.reserved) == (0, 4 * MIB)
        kept = torch.zeros(4 * 2**18, dtype=torch.uint8, device="vgpu")
        assert (gpu.live, gpu.reserved, gpu.peak_reserved) == (MIB, 4 * MIB, 4 * MIB)
        del kept
        gpu.empty_cache()
        gpu.reset_peak()
        assert gpu.reserved == gpu.peak_reserved == 0


def test_out_of_memory_in_a_module_leaves_nothing_behind():
    layers = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 512))
    with VirtualGPU(capacity=2 * MIB) as gpu:
        with pytest.raises(torch.OutOfMemoryError):
            layers.to("vgpu")
        layers.cpu()
        assert gpu.live == 0


def test_blocks_are_those_of_the_current_stream():
    with VirtualGPU() as gpu:
        kept = torch.zeros(8, device="vgpu")
        del kept
        with vgpu.stream(vgpu.Stream()):
            torch.zeros(8, device="vgpu")
        assert gpu.reserved == 4 * MIB


def test_what_another_stream_uses_waits_until_the_host_knows_that_it_is_done():
    with VirtualGPU() as gpu:
        side = vgpu.Stream()
        shared = torch.zeros(20 * MIB, dtype=torch.uint8, device="vgpu")
        side.wait_stream(vgpu.current_stream())
        with vgpu.stream(side):
            shared + 1
        shared.record_stream(side)
        del shared
        assert gpu.live == 0 and gpu.reserved == 40 * MIB
        kept = torch.zeros(20 * MIB, dtype=torch.uint8, device="vgpu")
        assert gpu.reserved == 60 * MIB
        del kept
        side.synchronize()
        kept = [torch.zeros(20 * MIB, dtype=torch.uint8, device="vgpu") for _ in range(2)]
        assert gpu.live == 40 * MIB and gpu.reserved == 60 * MIB and kept


def test_the_scores_of_attention_take_a_block():
    q = torch.zeros(1, 1, 2048, 8)
    with VirtualGPU() as gpu:
        q = q.to("vgpu")
        F.scaled_dot_product_attention(q, q, q)
        assert gpu.reserved == 18 * MIB and gpu.live == q.nbytes  # 16 for them, 2 for the rest


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


@pytest.mark.parametrize("meta", [False, True])
def test_a_parameter_takes_data_of_another_device(meta):
    weight = torch.nn.Parameter(seeded(70, 70), requires_grad=False)
    weight.note = "kept"
    home = weight.data
    with VirtualGPU(meta=meta) as gpu:
        for columns, dtype in ((50, torch.bfloat16), (60, torch.float32)):
            weight.data = home[:, :columns].to("vgpu", dtype)
            assert weight.device.type == "vgpu" and weight.note == "kept"
            for tensor in (weight, weight + weight):
                assert tensor.shape == (70, columns) and tensor.dtype is dtype
            del tensor
        assert gpu.live == 33 * 512  # 70 * 60 * 4 bytes
        weight.data = home
        assert gpu.live == 0 and weight.data_ptr() == home.data_ptr()


def test_device_module():
    with VirtualGPU(capacity=4 * MIB) as gpu:
        x = torch.zeros(1000, device="vgpu")
        module = torch.get_device_module(torch.device("vgpu:0"))
        assert module is torch.get_device_module("vgpu")
        assert module.memory_allocated() == gpu.live == 4096
        assert module.memory_reserved() == gpu.reserved == 2 * MIB
        assert module.mem_get_info() == (2 * MIB, 4 * MIB)
        del x
        assert module.max_memory_allocated() == 4096
        module.reset_peak_memory_stats()
        module.synchronize()
        assert (module.max_memory_allocated(), module.max_memory_reserved()) == (0, 2 * MIB)
        module.empty_cache()
        assert module.mem_get_info() == (4 * MIB, 4 * MIB) and module.max_memory_reserved() == 2 * MIB


USES = {
    "init": lambda: vgpu.init(),
    "tensor": lambda: torch.zeros(1, device="vgpu"),
    "copy": lambda: torch.zeros(1).to("vgpu"),
    "module": lambda: torch.nn.Linear(1, 1).to("vgpu"),
    "stream": lambda: vgpu.Stream(),
    "current_stream": lambda: vgpu.current_stream(),
    "default_stream": lambda: vgpu.default_stream(),
    "event": lambda: vgpu.Event().record(),
    "synchronize": lambda: vgpu.synchronize(),
    "mem_get_info": lambda: vgpu.mem_get_info(),
    "current_device": lambda: vgpu.current_device(),
    "set_device": lambda: vgpu.set_device(0),
    "fraction": lambda: vgpu.set_per_process_memory_fraction(0.5),
}


@pytest.mark.parametrize("use", USES)
def test_statistics_are_refused_before_the_first_use(use):
    with VirtualGPU():
        vgpu.empty_cache()
        torch.manual_seed(0)
        vgpu.Event()
        torch.zeros(1).pin_memory()
        with torch.device("vgpu"), torch.autocast("vgpu", dtype=torch.bfloat16):
            pass
        assert vgpu.is_available() and vgpu.device_count() == 1
        assert vgpu.memory_allocated() == vgpu.max_memory_reserved() == 0
        assert not vgpu.is_initialized()
        with pytest.raises(RuntimeError, match="Invalid device argument"):
            vgpu.reset_peak_memory_stats()
        USES[use]()
        assert vgpu.is_initialized()
        vgpu.reset_peak_memory_stats()
    with VirtualGPU():
        assert not vgpu.is_initialized()
    assert not vgpu.is_initialized()


def test_a_process_can_be_held_to_a_part():
    with VirtualGPU(capacity=8 * MIB) as gpu:
        vgpu.set_per_process_memory_fraction(0.25)
        kept = torch.zeros(2 * MIB // 4, dtype=torch.uint8, device="vgpu")
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2 * MIB, dtype=torch.uint8, device="vgpu")
        assert gpu.reserved == 2 * MIB and vgpu.mem_get_info() == (6 * MIB, 8 * MIB) and kept is not None
    with VirtualGPU(), pytest.raises(ValueError, match="between 0 and 1"):
        vgpu.set_per_process_memory_fraction(1.5)


@pytest.mark.parametrize("device", ["vgpu", "meta", "cpu"])
def test_a_device_context_reaches_the_factories(device):
    with VirtualGPU(), torch.device(device):
        assert {
            t.device.type for t in (torch.empty(2), torch.zeros(2), torch.ones(2), torch.tensor([1]))
        } == {device}


def test_a_module_on_the_device_can_be_copied():
    layer = torch.nn.Linear(4, 4)
    with VirtualGPU() as gpu:
        layer.to("vgpu")
        twin = copy.deepcopy(layer)
        assert gpu.live == 4 * 512 and torch.equal(twin.weight.cpu(), layer.weight.cpu())


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


def test_the_record_tells_what_moved_when_under_which_label():
    first, second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16, bias=False)
    with VirtualGPU(record_ops=True) as gpu:
        with gpu.label("first"):
            first.to("vgpu")
            first.cpu()
        second.to("vgpu")
    moves = [(r.kind, r.label, r.nbytes) for r in gpu.record if r.kind.startswith("copy")]
    arrive, leave = ("copy_in", "first"), ("copy_out", "first")
    assert moves == [(*arrive, 1024), (*arrive, 64), (*leave, 1024), (*leave, 64), ("copy_in", None, 1024)]
    numbers = [r.allocation for r in gpu.record if r.kind == "free"]
    assert len(numbers) == 2 and numbers == [r.allocation for r in gpu.record if r.kind == "alloc"][:2]
    assert Record("op", "copy_", 0, "default stream", "first", None) in gpu.record


def test_a_callback_can_stop_any_operator():
    seen = []

    def stop(name):
        seen.append(name)
        if "softmax" in name:
            raise InterruptedError("here")

    with VirtualGPU() as gpu:
        gpu.on_op(stop)
        x = torch.ones(4).to("vgpu")
        with pytest.raises(InterruptedError):
            (x + 1).softmax(0)
    assert seen == ["copy_", "aten::add.Tensor", "aten::_softmax"]


AUTOCAST = {
    "matmul": (lambda x: x @ x, torch.bfloat16),
    "linear": (lambda x: F.linear(x, x[0]), torch.bfloat16),
    "conv2d": (lambda x: F.conv2d(x[None], x[None, :, :1, :1]), torch.bfloat16),
    "einsum": (lambda x: torch.einsum("bij,bjk->bik", x, x), torch.bfloat16),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), torch.bfloat16),
    "layer_norm": (lambda x: F.layer_norm(x.bfloat16(), (4,)), torch.float32),
    "softmax": (lambda x: x.bfloat16().softmax(-1), torch.float32),
    "pow": (lambda x: x.bfloat16().pow(2), torch.float32),
    "gelu": (lambda x: F.gelu(x.bfloat16()), torch.bfloat16),
    "add": (lambda x: x.bfloat16() + x, torch.float32),
    "float64": (lambda x: x.double() @ x.double(), torch.float64),
}


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("meta", [False, True])
def test_autocast_casts_what_cuda_casts(name, meta):
    run, dtype = AUTOCAST[name]
    with VirtualGPU(meta=meta):
        x = seeded(2, 4, 4).to("vgpu")
        with torch.autocast("vgpu", dtype=torch.bfloat16):
            assert run(x).dtype is dtype
            with torch.autocast("vgpu", enabled=False):
                assert (x @ x).dtype is torch.float32


@pytest.mark.filterwarnings("ignore:.*autocast:UserWarning")
def test_autocast_for_cuda_changes_nothing():
    with VirtualGPU(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = seeded(4, 4).to("vgpu")
        assert torch.equal((x @ x).cpu(), seeded(4, 4) @ seeded(4, 4))


def block(x):
    return (
        F.scaled_dot_product_attention(x, x, x)
        .add_(F.gelu(F.layer_norm(x @ x.mT @ x, x.shape[-1:])))
        .to(torch.float16)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counting_on_meta_tensors_counts_the_same(dtype):
    counts = []
    for meta in (False, True):
        with VirtualGPU(meta=meta) as gpu:
            layer = torch.nn.Conv3d(3, 16, 3, padding=1).requires_grad_(False).to("vgpu")
            video = torch.zeros(1, 3, 5, 32, 32, device="vgpu")
            for _ in range(2):
                x = layer(F.pad(video, (1, 1))).flatten(2)
                y = block(x.to(dtype))
            counts.append(
                (gpu.live, gpu.peak, y.shape, y.stride(), [r.nbytes for r in gpu.record if r.kind == "alloc"])
            )
            del x, y, video, layer
            assert gpu.live == 0
    assert counts[0] == counts[1]


def test_wrong_shapes_are_errors_on_meta_tensors_too():
    with VirtualGPU(meta=True):
        x = torch.zeros(100, 100, device="vgpu")
        x.add_(torch.zeros(100, device="vgpu"))
        with pytest.raises(RuntimeError):
            x.add_(torch.zeros(50, device="vgpu"))
        with pytest.raises(RuntimeError):
            x @ x[:50]


def test_full_size_takes_no_memory_and_comes_home_as_zeros():
    with torch.device("meta"):
        layer = torch.nn.Linear(100_000, 100_000, bias=False, dtype=torch.bfloat16)
    with VirtualGPU(meta=True) as gpu, torch.no_grad():
        layer.to("vgpu")
        assert gpu.live == 2 * 10**10
        out = layer(torch.ones(75_600, 100_000, dtype=torch.bfloat16, device="vgpu"))
        assert gpu.live == 2 * 10**10 + 2 * 75_600 * 100_000
        home = out.cpu()
        assert type(home) is torch.Tensor and home.shape == out.shape and not home[-1].any()
        target = torch.ones(3, 100_000, dtype=torch.bfloat16)
        assert target.copy_(out[:3])[0, 0] == 1  # there are no values to copy
        layer.cpu()
        assert layer.weight.shape == (100_000, 100_000) and type(layer.weight) is torch.nn.Parameter
        gpu.capacity = gpu.reserved
        with pytest.raises(torch.OutOfMemoryError):  # `out` is there
            torch.zeros(gpu.capacity, dtype=torch.uint8, device="vgpu")


def test_small_values_from_the_host_stay_known_on_meta_tensors_until_they_meet_others():
    with VirtualGPU(meta=True) as gpu:
        steps = torch.linspace(1, 0, 1000, device="vgpu")
        assert steps[-1].item() == 0 and (steps == 1).nonzero().tolist() == [[0]]
        big = steps.repeat(100)
        assert big.shape == (100_000,) and not big.known and big[0].item() == 0
        lengths = torch.tensor([3, 5]).to("vgpu")
        view = lengths[1:]
        assert lengths.max().item() == 5 and (lengths * 2).tolist() == [6, 10]
        before = gpu.live
        view.copy_(torch.empty(1, dtype=torch.int64, device="meta"))
        assert not view.known and not lengths.known and lengths.tolist() == [0, 0] and gpu.live == before
