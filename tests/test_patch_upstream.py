"""The patches on the real thing: needs a checkout of upstream at BASE, named by WAN_UPSTREAM.

The pipelines run at toy size on the virtual GPU, each tree in a process of its own (upstream_driver).
"""

import difflib
import functools
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from upstream_driver import driver
from virtual_gpu import DEVICE, VirtualGPU

ROOT = Path(__file__).parent.parent
PATCHES = ROOT / "patches"
SERIES = (PATCHES / "series").read_text().split()
TASKS = ["t2v", "i2v", "flf2v", "vace"]
FINE = 4096  # bytes; toys on a GPU that reserves in steps of 2 MiB would all need the same
FLAGS = [{}, {"vae_cpu": True}, {"t5_cpu": True}, {"vae_cpu": True, "t5_cpu": True}]

pytestmark = pytest.mark.skipif(
    "WAN_UPSTREAM" not in os.environ, reason="WAN_UPSTREAM names no checkout of upstream"
)


def apply(*arguments):
    command = [sys.executable, "-B", PATCHES / "apply.py", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def contents(tree):
    return {file.relative_to(tree): file.read_bytes() for file in tree.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """A copy of upstream's code, unpatched, as an unpacked download would have it."""
    tree = tmp_path_factory.mktemp("upstream") / "Wan2.1"
    ignored = shutil.ignore_patterns(".git", "assets", "examples", "__pycache__")
    shutil.copytree(os.environ["WAN_UPSTREAM"], tree, ignore=ignored)
    return tree


@pytest.fixture(scope="module")
def patched(upstream, tmp_path_factory):
    tree = Path(shutil.copytree(upstream, tmp_path_factory.mktemp("patched") / "Wan2.1"))
    apply(tree)
    return tree


def test_clone_and_back(tmp_path):
    tree = Path(shutil.copytree(os.environ["WAN_UPSTREAM"], tmp_path / "clone"))
    status = ["git", "-C", tree, "status", "--porcelain", "--untracked-files=all"]
    before = subprocess.run(status, check=True, capture_output=True).stdout
    apply(tree)
    assert subprocess.run(status, check=True, capture_output=True).stdout != before
    apply("--reverse", tree)
    assert subprocess.run(status, check=True, capture_output=True).stdout == before


def test_download_and_back(upstream, patched, tmp_path):
    tree = Path(shutil.copytree(patched, tmp_path / "Wan2.1"))
    assert contents(tree) != contents(upstream)
    apply("--reverse", tree)
    assert contents(tree) == contents(upstream)


def test_plain_git_apply_gives_the_same_tree(upstream, patched, tmp_path):
    tree = Path(shutil.copytree(upstream, tmp_path / "Wan2.1"))
    for name in SERIES:
        subprocess.run(["git", "apply", "--unidiff-zero", PATCHES / name], cwd=tree, check=True)
    assert contents(tree) == contents(patched)


def project_git(*arguments):
    done = subprocess.run(["git", "-C", PATCHES, *arguments], check=False, capture_output=True)
    return done.stdout if done.returncode == 0 else b""


EARLIER = project_git("log", "--format=%h", "--", "*.patch", "series").decode().split()[::-1]


@pytest.fixture(params=EARLIER or ["no git"])
def earlier_patches(request, tmp_path):
    """The patches folder as it was at one of the project's commits that changed it."""
    if not EARLIER:
        pytest.skip("needs the project's git")
    folder = tmp_path / "earlier"
    folder.mkdir()
    for name in project_git("ls-tree", "-r", "--name-only", request.param, "./").decode().split():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(project_git("show", f"{request.param}:./{name}"))
    return folder


@pytest.mark.parametrize("part", ["all", "first"])
def test_over_an_earlier_version(upstream, patched, tmp_path, earlier_patches, part):
    """A tree with an earlier version of the patches, all or the first, is brought up to date, or back to BASE."""
    first = ["--only", (earlier_patches / "series").read_text().split()[0]]
    for flags, expected in ([], patched), (["--reverse"], upstream):
        tree = Path(shutil.copytree(upstream, tmp_path / "-".join(["tree", *flags])))
        command = [
            sys.executable,
            "-B",
            earlier_patches / "apply.py",
            *(first if part == "first" else []),
            tree,
        ]
        subprocess.run(command, check=True, capture_output=True)
        assert contents(tree) != contents(upstream)
        apply(*flags, tree)
        assert contents(tree) == contents(expected)


def upstream_git(*arguments):
    command = ["git", "-C", os.environ["WAN_UPSTREAM"], *arguments]
    done = subprocess.run(command, check=False, capture_output=True)
    if done.returncode:
        pytest.skip("WAN_UPSTREAM has no git history of that time")
    return done.stdout


@pytest.mark.parametrize("commit", ["76e9427", "7c81b2f", "841fe52^"])
def test_an_install_of_2025_without_git(upstream, patched, tmp_path, commit):
    """From 2025-05-16 on only wan/image2video.py and the README differ from BASE."""
    tree = tmp_path / "Wan2.1"
    tree.mkdir()
    archive = upstream_git("archive", commit, "README.md", "generate.py", "wan")
    subprocess.run(["tar", "-x", "-C", tree], input=archive, check=True)
    before, base, full = contents(tree), contents(upstream), contents(patched)
    assert before[Path("wan/image2video.py")] != base[Path("wan/image2video.py")]
    said = apply(tree)
    assert "README.md: not as at BASE, left out" in said and "warning" not in said
    after = contents(tree)
    assert {path for path in before if after[path] != before[path]} == {
        path for path in base if full[path] != base[path] and path.name != "README.md"
    }
    file = Path("wan/image2video.py")
    assert inserted(before[file], after[file]) == inserted(base[file], full[file]) != []
    apply("--reverse", tree)
    assert contents(tree) == before


def inserted(old, new):
    """The lines that were inserted, each run with the line before it."""
    old, new = old.splitlines(), new.splitlines()
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    assert {kind for kind, *_ in blocks} == {"equal", "insert"}
    return [new[start - 1 : end] for kind, _, _, start, end in blocks if kind == "insert"]


def test_installed_package(upstream, patched, tmp_path):
    tree = tmp_path / "site-packages"
    shutil.copytree(upstream / "wan", tree / "wan")
    before = contents(tree)
    assert "generate.py: not there, left out" in apply(tree)
    full = contents(patched)
    assert contents(tree) == {path: full[path] for path in full if path.parts[0] in ("leanwan", "wan")}
    apply("--reverse", tree)
    assert contents(tree) == before


def test_warns_of_another_dit(upstream, tmp_path):
    tree = Path(shutil.copytree(upstream, tmp_path / "Wan2.1"))
    with (tree / "wan/modules/model.py").open("a") as stream:
        stream.write("MINE = 1\n")
    assert "warning: wan/modules/model.py is not as at BASE" in apply(tree)


def test_merged_with_other_changes(tmp_path):
    tree = Path(shutil.copytree(os.environ["WAN_UPSTREAM"], tmp_path / "clone"))
    file = tree / "wan/vace.py"
    before = file.read_bytes()
    first, rest = before.split(b"\n", 1)
    file.write_bytes(first + b"\nMINE = 1\n" + rest)
    assert "wan/vace.py: put in, merged with other changes" in apply(tree)
    with_both = file.read_bytes()
    file.write_bytes(before)
    apply(tree)
    assert with_both == file.read_bytes().replace(first + b"\n", first + b"\nMINE = 1\n", 1)


# The VAE alone


@pytest.fixture
def make_vae(patched, tmp_path):
    """make_vae() builds the patched WanVAE, narrow and with random weights, on the virtual GPU."""
    # Its relative imports lead to this project's files, which are those that the patches create.
    spec = importlib.util.spec_from_file_location("wan.modules.patched_vae", patched / "wan/modules/vae.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.WanVAE_(dim=8, z_dim=16, temperal_downsample=[False, True, True])
    torch.manual_seed(0)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    torch.save(network.state_dict(), tmp_path / "vae.pth")
    module._video_vae = functools.partial(module._video_vae, dim=8)
    return functools.partial(module.WanVAE, vae_pth=tmp_path / "vae.pth", device=DEVICE)


def places(vae):
    return {weight.device.type for weight in vae.model.parameters()}


def nbytes(*modules):
    return sum(-(-weight.nbytes // 512) * 512 for module in modules for weight in module.parameters())


CONSTANTS = 3 * 512  # bytes of the VAE's mean, std and scale, which stay on the GPU
VIDEO = torch.linspace(-1, 1, 3 * 5 * 32 * 32).reshape(3, 5, 32, 32)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", ["encode", "decode"])
def test_half_of_the_vae_visits_the_gpu(make_vae, call):
    argument = VIDEO if call == "encode" else torch.linspace(-1, 1, 16 * 2 * 4 * 4).reshape(16, 2, 4, 4)
    with VirtualGPU() as gpu:
        vae, peaks, results = make_vae(), [], []
        needed, other = (vae.model.encoder, vae.model.conv1), (vae.model.decoder, vae.model.conv2)
        if call == "decode":
            needed, other = other, needed
        assert gpu.live == nbytes(vae.model) + CONSTANTS
        for offload in False, True:
            if offload:
                vae.enable_cpu_offload()
                assert gpu.live == CONSTANTS and places(vae) == {"cpu"}
            home = [weight.data_ptr() for weight in vae.model.parameters()]
            gpu.reset_peak()
            (result,) = getattr(vae, call)([argument.to("vgpu")])
            peaks.append(gpu.peak)
            assert result.device.type == "vgpu"
            results.append(result.cpu())
            del result
        assert torch.equal(*results)
        assert peaks[0] - peaks[1] == nbytes(*other)
        assert gpu.live == CONSTANTS and places(vae) == {"cpu"}
        assert home == [weight.data_ptr() for weight in vae.model.parameters()], "nothing is copied back"
        assert not any(weight.requires_grad for weight in vae.model.parameters())


@pytest.mark.filterwarnings("ignore")
def test_nothing_stays_on_the_gpu_after_an_exception(make_vae):
    with VirtualGPU(granularity=FINE) as gpu:
        vae = make_vae()
        vae.enable_cpu_offload()
        video = VIDEO.to("vgpu")
        idle = gpu.live
        (expected,) = vae.encode([video])
        expected = expected.cpu()
        gpu.reset_peak()
        vae.encode([video])
        peak, reserved = gpu.peak, gpu.peak_reserved
        for capacity in range(idle, peak, (peak - idle) // 7):
            gpu.empty_cache()
            gpu.capacity = capacity
            with pytest.raises(torch.OutOfMemoryError) as caught:
                vae.encode([video])
            del caught
            gc.collect()  # the error and its frames hold each other
            assert gpu.live == idle and places(vae) == {"cpu"}
        gpu.capacity = reserved
        assert torch.equal(vae.encode([video])[0].cpu(), expected)


# The pipelines


@pytest.fixture(scope="module")
def run(upstream, patched, tmp_path_factory):
    """run(tree, task, **flags) runs a pipeline of "upstream", "patched" or another tree's path; results are kept.

    Flags are arguments of the pipeline's constructor, sampling is of pairs for its generate().
    """
    from wan.random_models import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    ramp = np.arange(80 * 120 * 3, dtype=np.uint32).reshape(80, 120, 3)
    for number in 1, 2:
        Image.fromarray((ramp // (100 * number) % 256).astype(np.uint8)).save(folder / f"{number}.png")
    shared = {"frame_num": 5, "sampling_steps": 2}
    area = {"max_area": 96 * 128}
    calls = {
        "t2v": {**shared, "size": (128, 96)},
        "i2v": {**shared, **area, "img": str(folder / "1.png")},
        "flf2v": {
            **shared,
            **area,
            "first_frame": str(folder / "1.png"),
            "last_frame": str(folder / "2.png"),
        },
        "vace": shared,
    }
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(3, 5, 96, 128, generator=generator) * 2 - 1
    mask = (torch.rand(1, 5, 96, 128, generator=generator) > 0.5).float()
    vace = {"frames": frames, "mask": mask, "ref_0": frames[:, :1].flip(-1)}

    @functools.cache
    def run(
        tree,
        task,
        capacity=None,
        find_least=False,
        offload_model=True,
        dtype="float32",
        sampling=None,
        **init,
    ):
        checkpoint = folder / task
        if not checkpoint.exists():
            write_checkpoint(checkpoint, f"{task}-tiny")
        return driver.run(
            {"upstream": upstream, "patched": patched}.get(tree, tree),
            task,
            checkpoint,
            init=init,
            call={**calls[task], **dict(sampling or ()), "offload_model": offload_model},
            inputs=vace if task == "vace" else None,
            device="vgpu",
            dtype=dtype,
            capacity=capacity,
            granularity=FINE,
            find_least=find_least,
        )

    run.checkpoints = folder
    return run


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags) or "none")
@pytest.mark.parametrize("task", TASKS)
def test_same_bits(run, task, flags):
    expected, result = run("upstream", task), run("patched", task, **flags)
    assert expected.video.isfinite().all() and expected.video.std() > 0.01
    assert torch.equal(result.latents, expected.latents)
    assert torch.equal(result.video, expected.video)


@pytest.mark.parametrize("task", TASKS)
def test_without_flags_and_offload_memory_is_as_before(run, task):
    expected = run("upstream", task, offload_model=False)
    result = run("patched", task, offload_model=False)
    assert torch.equal(result.video, expected.video)
    assert result.report == expected.report


@pytest.mark.parametrize("task", TASKS)
def test_memory(run, task):
    """T5 gets the room that it lacked: out of memory in the text stage becomes a finished run."""
    before = run("upstream", task).report
    none, vae_cpu, t5_cpu, both = (run("patched", task, **flags).report for flags in FLAGS)
    assert before["stages"]["text"] > none["stages"]["text"] > vae_cpu["stages"]["text"]
    assert before["peak_bytes"] >= none["peak_bytes"] > vae_cpu["peak_bytes"] >= both["peak_bytes"]
    assert none["peak_bytes"] > t5_cpu["peak_bytes"] >= both["peak_bytes"]
    assert both["live_bytes"] < both["peak_bytes"]

    capacity = run("patched", task, find_least=True, vae_cpu=True).report["least_capacity"]
    out_of_memory = run("upstream", task, capacity=capacity).report["out_of_memory"]
    assert out_of_memory is not None and out_of_memory["stage"] == "text"
    finished = run("patched", task, capacity=capacity, vae_cpu=True)
    assert finished.report["out_of_memory"] is None
    assert torch.equal(finished.video, run("upstream", task).video)


@pytest.fixture
def same_picture(measured):
    """same_picture(video, expected): regrouping's bounds hold between two videos in [-1, 1]."""

    def check(video, expected):
        measured((video - expected).abs().max().item(), 1e-5)
        bits, expected_bits = (((v + 1) / 2 * 255).to(torch.uint8).int() for v in (video, expected))
        assert (bits - expected_bits).abs().max() <= 1
        assert (bits == expected_bits).float().mean() >= 0.999

    return check


# 0001: where the solver starts

REPEATED = (("sampling_steps", 3), ("shift", 600))  # few steps of which the first two are at time 999
DIFFERENT = (("sampling_steps", 2), ("shift", 600))
WALKS = (1, 2, 3, 14, 15, 50, 67, 68, 143, 144, 250, 251)


def test_the_start_is_one_line_for_each_choice_of_solver(upstream, first_patches):
    before, after = contents(upstream), contents(first_patches(1))
    changed = {path.as_posix() for path in after if after[path] != before.get(path)}
    assert changed == {
        f"wan/{name}.py" for name in ("text2video", "image2video", "first_last_frame2video", "vace")
    }
    for path in changed:
        added = [
            line
            for line in difflib.ndiff(*(text[Path(path)].decode().splitlines() for text in (before, after)))
            if line[:1] in "+-"
        ]
        assert len(added) == after[Path(path)].count(b"retrieve_timesteps(\n")
        assert all(
            line[1:].split("  #")[0].strip() == "sample_scheduler.set_begin_index(0)" for line in added
        )


@pytest.mark.parametrize("task", TASKS)
def test_repeated_times_no_longer_fail(run, first_patches, task):
    with pytest.raises(RuntimeError, match="this_order > 0"):
        run("upstream", task, sampling=REPEATED)
    assert run(first_patches(1), task, sampling=REPEATED).latents.isfinite().all()


@pytest.mark.parametrize(
    "sampling", [DIFFERENT, (*REPEATED, ("sample_solver", "dpm++"))], ids=["unipc", "dpm++"]
)
def test_what_worked_gives_the_same_bits(run, first_patches, sampling):
    expected, result = (
        run("upstream", "t2v", sampling=sampling),
        run(first_patches(1), "t2v", sampling=sampling),
    )
    assert torch.equal(result.latents, expected.latents) and torch.equal(result.video, expected.video)


@pytest.fixture(scope="module", params=["unipc", "dpm++"])
def scheduler(request, upstream):
    """scheduler(steps, shift): one of upstream's own, its times set as the pipelines do."""
    modules = []
    for name in "fm_solvers_unipc", "fm_solvers":
        spec = importlib.util.spec_from_file_location(name, upstream / f"wan/utils/{name}.py")
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    unipc, dpm = modules
    always = {"num_train_timesteps": 1000, "shift": 1, "use_dynamic_shifting": False}

    def make(steps, shift):
        if request.param == "unipc":
            scheduler = unipc.FlowUniPCMultistepScheduler(**always)
            scheduler.set_timesteps(steps, shift=shift)
        else:
            scheduler = dpm.FlowDPMSolverMultistepScheduler(**always)
            dpm.retrieve_timesteps(scheduler, sigmas=dpm.get_sampling_sigmas(steps, shift))
        return scheduler

    return make


def walked(scheduler):
    """Where the scheduler's steps lead, the network's part taken by a function of place and time."""
    place = torch.linspace(-1, 1, 4)[None]
    for time in scheduler.timesteps:
        place = scheduler.step(torch.sin(3 * place + time), time, place, return_dict=False)[0]
    return place


@pytest.mark.parametrize("shift", [1, 3, 5, 8, 16, 20])
def test_every_number_of_steps_starts_where_those_that_worked_did(scheduler, shift):
    """All walks from the first step are whole; from the second on none is, so that the start decides."""
    for steps in range(1, 1001):
        looked_up = scheduler(steps, shift)
        looked_up._init_step_index(looked_up.timesteps[0])
        repeated = steps > 1 and looked_up.timesteps[0] == looked_up.timesteps[1]
        assert looked_up.step_index == repeated
        if steps in WALKS:
            told = scheduler(steps, shift)
            told.set_begin_index(0)
            result = walked(told)
            assert result.isfinite().all() and told.step_index == steps
            if repeated:
                with pytest.raises(AssertionError):
                    walked(scheduler(steps, shift))
            else:
                assert torch.equal(result, walked(scheduler(steps, shift)))


# Part of the series


@pytest.fixture(scope="module")
def first_patches(upstream, tmp_path_factory):
    """first_patches(count): a tree with so many of them, put in one after the other."""

    @functools.cache
    def make(count):
        tree = Path(shutil.copytree(upstream, tmp_path_factory.mktemp(f"first{count}") / "Wan2.1"))
        for name in SERIES[:count]:
            apply("--only", name, tree)
        return tree

    return make


@pytest.mark.parametrize("task", TASKS)
def test_the_order_alone(run, first_patches, task):
    """The first prompt no longer meets the DiT (or CLIP) on the GPU, without any flag, and nothing else changes."""
    before, after = run("upstream", task), run(first_patches(2), task)
    assert torch.equal(after.latents, before.latents) and torch.equal(after.video, before.video)
    saved = before.report["stages"]["text"] - after.report["stages"]["text"]
    if task in ("i2v", "flf2v"):  # their DiT is built on the CPU
        weights = torch.load(next(run.checkpoints.glob(f"{task}/models_clip*.pth")), weights_only=True)
    else:
        weights = load_file(run.checkpoints / task / "diffusion_pytorch_model.safetensors")
    # As they are on the GPU: in fp32, also where the file has halves.
    assert saved == sum(-(-weight.numel() * 4 // 512) * 512 for weight in weights.values())


@pytest.mark.parametrize("flags", [{"vae_cpu": True}, {"vae_cpu": True, "vae_tile": 64}])
def test_the_first_patches_alone(run, first_patches, patched, same_picture, tmp_path, flags):
    """One after the other put in, or those above taken out: the same tree, which runs."""
    count = 2 + len(flags)
    tree = first_patches(count)
    other = Path(shutil.copytree(patched, tmp_path / "down" / "Wan2.1"))
    for name in reversed(SERIES[count:]):
        apply("--reverse", "--only", name, other)
    assert contents(tree) == contents(other)
    same_picture(run(tree, "t2v", **flags).video, run("upstream", "t2v").video)


# 0004: tiles


@pytest.mark.parametrize("task", TASKS)
def test_tiles_give_the_same_picture(run, same_picture, task):
    expected, result = run("upstream", task), run("patched", task, vae_tile=64)
    assert not torch.equal(result.video, expected.video), "there were no tiles"
    same_picture(result.video, expected.video)
    assert result.report["stages"]["decode"] < run("patched", task).report["stages"]["decode"]


def test_tiles_in_fp32_inside_an_autocast_with_the_vae_on_cpu(run, same_picture):
    expected = run("upstream", "t2v", dtype="bfloat16")
    result = run("patched", "t2v", dtype="bfloat16", vae_cpu=True, vae_tile=64)
    assert torch.equal(result.latents, expected.latents)
    same_picture(result.video, expected.video)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("offload", [False, True])
def test_tiled_vae(make_vae, same_picture, measured, offload):
    """Sources and videos on the CPU, latents on the GPU; the half that works is there for the call."""
    video = torch.rand(3, 9, 208, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with VirtualGPU() as gpu:
        vae = make_vae()
        (latent,) = vae.encode([video.to("vgpu")])
        (expected,) = vae.decode([latent])
        expected_latent, expected = latent.cpu(), expected.cpu()
        if offload:
            vae.enable_cpu_offload()
        vae.enable_tiling(64)
        idle = gpu.live
        (tiled_latent,) = vae.encode([video])
        assert tiled_latent.device.type == "vgpu"
        difference = (tiled_latent.cpu() - expected_latent).abs().max() / expected_latent.abs().max()
        measured(difference.item(), 1e-5, "latents")
        (tiled,) = vae.decode([latent])
        assert tiled.device.type == "cpu"
        same_picture(tiled, expected)
        del tiled_latent
        assert gpu.live == idle and places(vae) == {"cpu" if offload else "vgpu"}


# 0005: streaming and chunks

STREAM = {"t5_stream": True, "dit_stream": 0.0}
LOW_VRAM = {"vae_cpu": True, "vae_tile": 64, "dit_chunk": 64, "activation_offload": True, **STREAM}


@pytest.mark.parametrize("task", TASKS)
def test_streaming_gives_the_same_bits(run, task):
    expected, result = run("upstream", task), run("patched", task, **STREAM)
    assert torch.equal(result.latents, expected.latents)
    assert torch.equal(result.video, expected.video)


@pytest.mark.parametrize("task", ["i2v", "vace"])
def test_streaming_gives_the_same_bits_in_bf16(run, task):
    """The weights wait in the type that autocast gives them, those of fp32 computations in fp32."""
    expected, result = (
        run("upstream", task, dtype="bfloat16"),
        run("patched", task, dtype="bfloat16", **STREAM),
    )
    assert torch.equal(result.video, expected.video)


@pytest.mark.parametrize("chunk", [64, 69])  # of 96 tokens, VACE 144
@pytest.mark.parametrize("task", TASKS)
def test_chunks_give_the_same_result(run, measured, task, chunk):
    """Within rounding: whether a kernel's rows depend on the rows beside them is the processor's affair."""
    expected = run("upstream", task)
    result = run("patched", task, dit_chunk=chunk, **({"dit_stream": 1e-4} if chunk == 69 else {}))
    for ours, theirs in (result.latents, expected.latents), (result.video, expected.video):
        measured(((ours - theirs).abs().max() / theirs.abs().max()).item(), 1e-4)


@pytest.mark.parametrize("task", ["i2v", "vace"])
def test_chunks_give_the_same_result_in_bf16(run, measured, task):
    """test_bf16.py has every rounding; here the autocast of a whole run is on."""
    expected, result = (
        run("upstream", task, dtype="bfloat16"),
        run("patched", task, dtype="bfloat16", dit_chunk=64),
    )
    difference = (result.latents - expected.latents).abs().max() / expected.latents.abs().max()
    measured(difference.item(), 2e-2)


@pytest.mark.parametrize("task", TASKS)
def test_low_vram_gives_the_same_picture_in_less_memory(run, same_picture, task):
    expected, result = run("upstream", task), run("patched", task, **LOW_VRAM)
    same_picture(result.video, expected.video)
    before, offloaded, after = (
        r.report["stages"] for r in (expected, run("patched", task, vae_cpu=True), result)
    )
    for stage in after:
        assert after[stage] < before[stage], stage
        assert after[stage] < offloaded[stage] or stage == "load", stage
    assert result.report["live_bytes"] == CONSTANTS, "everything is at home again"

    capacity = result.report["peak_reserved"]
    assert run("upstream", task, capacity=capacity).report["out_of_memory"] is not None
    finished = run("patched", task, capacity=capacity, **LOW_VRAM)
    assert torch.equal(finished.video, result.video)


# The command line

FAKE_PIPELINES = """
import json, runpy, sys

sys.path[:0] = sys.argv[1:2]
from upstream_driver import stand_ins

stand_ins.install()
import torch

torch.cuda.current_device = lambda: 0
import wan


class Pipeline:
    def __init__(self, config, **options):
        self.options = options

    def prepare_source(self, *arguments):
        self.options["source_device"] = arguments[-1]
        return None, None, None

    def generate(self, *arguments, **options):
        print("RESULT", json.dumps({**self.options, "offload_model": options["offload_model"]}))
        sys.exit()


wan.WanT2V = wan.WanI2V = wan.WanFLF2V = wan.WanVace = Pipeline
del sys.argv[1]
sys.argv[0] = "generate.py"
runpy.run_path(wan.__path__[0] + "/../generate.py", run_name="__main__")
"""
DEFAULTS = {
    "vae_cpu": False,
    "vae_tile": 0,
    "t5_stream": False,
    "dit_stream": None,
    "dit_chunk": 0,
    "activation_offload": False,
    "offload_model": True,
}


@pytest.fixture
def command(patched, tmp_path):
    """command(task, *flags): (exit code, what the pipeline's constructor got, stderr) of the patched generate.py."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (32, 16)).save(picture)
    pictures = {"i2v-14B": ["--image"], "flf2v-14B": ["--first_frame", "--last_frame"]}

    def run(task, *flags):
        arguments = ["--task", task, "--ckpt_dir", "x", "--prompt", "a ball"]
        arguments += ["--size", "1280*720" if task == "flf2v-14B" else "832*480"]
        arguments += [word for flag in pictures.get(task, []) for word in (flag, str(picture))]
        done = subprocess.run(
            [sys.executable, "-c", FAKE_PIPELINES, patched, *arguments, *flags],
            check=False,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=driver.environment(),
        )
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        return done.returncode, line and json.loads(line[7:]), done.stderr

    return run


@pytest.mark.parametrize("task", ["t2v-1.3B", "i2v-14B", "flf2v-14B", "vace-1.3B"])
@pytest.mark.parametrize(
    "flags, changed",
    [
        ([], {}),
        (
            ["--low_vram"],
            {
                "vae_cpu": True,
                "vae_tile": 128,
                "t5_stream": True,
                "dit_stream": 0.0,
                "dit_chunk": 1024,
                "activation_offload": True,
            },
        ),
    ],
    ids=["none", "low_vram"],
)
def test_options_reach_the_pipelines(command, task, flags, changed):
    code, options, _ = command(task, *flags)
    assert code == 0
    assert DEFAULTS | changed == {name: options[name] for name in DEFAULTS}
    if task == "vace-1.3B":
        assert options["source_device"] == ("cpu" if changed else 0)


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--vae_tile", "auto"], {"vae_tile": "auto"}),
        (["--dit_stream", "--dit_chunk"], {"dit_stream": 0.0, "dit_chunk": 2048}),
        (["--dit_stream", "1.5", "--dit_chunk", "512"], {"dit_stream": 1.5, "dit_chunk": 512}),
        (
            ["--low_vram", "--vae_tile", "0", "--dit_chunk", "0", "--t5_cpu", "--offload_model", "False"],
            {"vae_tile": 0, "dit_chunk": 0, "t5_stream": False, "dit_stream": 0.0, "offload_model": False},
        ),
        (
            ["--low_vram", "--activation_offload", "False"],
            {"dit_chunk": 1024, "dit_stream": 0.0, "activation_offload": False},
        ),
    ],
)
def test_values_of_options(command, flags, expected):
    code, options, _ = command("t2v-1.3B", *flags)
    assert code == 0
    assert expected.items() <= options.items()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--vae_tile", "70"], "--vae_tile 70: "),
        (["--vae_tile", "large"], "--vae_tile large: "),
        (["--dit_chunk", "10"], "--dit_chunk 10: "),
        (["--dit_stream", "-1"], "--dit_stream -1.0: "),
        (["--t5_cpu", "--t5_stream"], "--t5_stream and --t5_cpu: "),
    ],
)
def test_bad_options(command, flags, message):
    code, options, said = command("t2v-1.3B", *flags)
    assert code == 2 and options is None
    assert message in said.splitlines()[-1] and "Traceback" not in said
