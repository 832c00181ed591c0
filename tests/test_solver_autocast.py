"""Solver steps under CUDA's autocast, which the virtual GPU emulates: what is rounded, and as upstream does."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from goldens import pseudo_model, solver_start

from virtual_gpu import VirtualGPU
from wan.sampling import SOLVERS, Solver

SHIFT = 5.0
UPSTREAM = os.environ.get("WAN_UPSTREAM")


def walk(step, timesteps, device):
    """The latents [steps, ...] of a walk with a flow that costs nothing, itself in fp32."""
    latent, seen = solver_start()[0].to(device), []
    for t in timesteps:
        latent = step(pseudo_model(latent, t), t, latent)
        seen.append(latent.cpu())
    return torch.stack(seen)


def ours(name, steps, device, dtype):
    solver = Solver(name, steps, SHIFT, device, dtype=dtype)
    return walk(solver.step, solver.timesteps, device)


@pytest.mark.parametrize("steps", [7, 20])
def test_only_unipc_is_rounded(steps, measured):
    with VirtualGPU():
        for name in SOLVERS:
            exact, narrow = (ours(name, steps, "vgpu", dtype) for dtype in (torch.float32, torch.bfloat16))
            assert narrow.dtype == torch.float32
            assert torch.equal(exact, narrow) == (name != "unipc")
            measured(((narrow - exact).abs().max() / exact.abs().max()).item(), 1e-3, name)


def test_what_unipc_rounds(monkeypatch):
    """With solver order 2 both sums over earlier steps are of one term: its einsum rounds factor and difference to
    bf16, and the product again. The same, spelled out, gives the same bits."""

    def rounded(equation, rhos, differences):
        assert equation == "k,bkc...->bc..." and rhos.shape == (1,) and rhos.dtype == torch.float32
        return (rhos[0].bfloat16() * differences[:, 0].bfloat16()).to(torch.bfloat16)

    with VirtualGPU():
        expected = ours("unipc", 9, "vgpu", torch.bfloat16)
        monkeypatch.setattr(torch, "einsum", rounded)
        assert torch.equal(ours("unipc", 9, "vgpu", torch.float32), expected)
    assert UniPCMultistepScheduler().config.solver_order == 2


@pytest.mark.parametrize("name", SOLVERS)
def test_in_pieces_from_ram(name):
    """The same bits, what is remembered too, and nothing of it on the device between the steps."""
    start = torch.randn(4, 11, 6, 8, generator=torch.Generator().manual_seed(0))
    with VirtualGPU() as gpu:
        results = []
        for offload in (False, True):
            solver = Solver(name, 7, SHIFT, "vgpu", dtype=torch.bfloat16, offload=offload)
            latent = start.to("vgpu")
            for t in solver.timesteps:
                latent = solver.step(pseudo_model(latent, t), t, latent)
            held = [v for v in solver.state_dict().values() for v in (v if isinstance(v, list) else [v])]
            held = [v for v in held if isinstance(v, torch.Tensor) and v.dim() == 5]
            assert all((v.device.type == "cpu") is offload for v in held)
            results.append([latent.cpu(), solver.clean(latent), *(v.cpu() for v in held)])
        assert all(map(torch.equal, *results)) and len(results[0]) == 2 + (name != "euler") * len(held)
        peaks = []
        for offload in (False, True):
            solver = Solver(name, 7, SHIFT, "vgpu", offload=offload)
            latent = torch.zeros(16, 16, 40, 40, device="vgpu")
            for t in solver.timesteps[:3]:
                flow = torch.zeros_like(latent)
                gpu.reset_peak()
                latent = solver.step(flow, t, latent)
            peaks.append(gpu.peak / latent.nbytes)
        assert peaks[1] < 4.5 and (name == "euler" or peaks[0] > 6)


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_solves_its_system_once(offload):
    """However many pieces it is taken in, and nobody waits to hear that it could be solved."""
    start, solved = torch.randn(4, 11, 6, 8, generator=torch.Generator().manual_seed(0)), []
    with VirtualGPU() as gpu:
        gpu.on_op(lambda name: solved.append(name) if "linalg" in name else None)
        solver, latent = Solver("unipc", 6, SHIFT, "vgpu", offload=offload), start.to("vgpu")
        for done, t in enumerate(solver.timesteps):
            solved.clear()
            latent = solver.step(pseudo_model(latent, t), t, latent)
            assert solved == ["aten::_linalg_solve_ex"] * (done > 1)  # of two steps before


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_a_step_of_unipc_is_diffusers_own(steps, offload):
    solver = Solver("unipc", steps, SHIFT, "cpu", offload=offload)
    own = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    own.set_timesteps(steps)
    own.sigmas, own.timesteps = solver._scheduler.sigmas, solver.timesteps

    def plain(flow, t, latent):
        return own.step(flow[None], t, latent[None], return_dict=False)[0][0]

    expected = walk(plain, solver.timesteps, "cpu")
    assert torch.equal(walk(solver.step, solver.timesteps, "cpu"), expected)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_cpu_rounds_nothing(name):
    assert torch.equal(ours(name, 7, "cpu", torch.float32), ours(name, 7, "cpu", torch.bfloat16))


@pytest.mark.skipif(not UPSTREAM, reason="WAN_UPSTREAM names no checkout of upstream")
@pytest.mark.parametrize("steps", [7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstreams_steps_under_the_same_autocast(dtype, steps):
    def module(name):
        path = Path(UPSTREAM) / "wan" / "utils" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
        return found

    def stepping(scheduler):
        def step(flow, t, latent):
            with torch.autocast("vgpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                return scheduler.step(flow[None], t, latent[None], return_dict=False)[0][0]

        return step

    unipc, dpm = module("fm_solvers_unipc"), module("fm_solvers")
    with VirtualGPU():
        theirs = unipc.FlowUniPCMultistepScheduler(shift=1, use_dynamic_shifting=False)
        theirs.set_timesteps(steps, device="vgpu", shift=SHIFT)
        expected = walk(stepping(theirs), theirs.timesteps, "vgpu")
        assert torch.equal(ours("unipc", steps, "vgpu", dtype), expected)
        theirs = dpm.FlowDPMSolverMultistepScheduler(shift=1, use_dynamic_shifting=False)
        dpm.retrieve_timesteps(theirs, device="vgpu", sigmas=dpm.get_sampling_sigmas(steps, SHIFT))
        expected = walk(stepping(theirs), theirs.timesteps, "vgpu")
        assert torch.equal(ours("dpm++", steps, "vgpu", dtype), expected)
