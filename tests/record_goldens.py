"""Records upstream's results on the toy checkpoints into tests/goldens/.

    WAN_UPSTREAM=<checkout of upstream at BASE> python tests/record_goldens.py [task ...]

Each task runs in a process of its own, in which `wan` is upstream's package.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import goldens
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind upstream's tree, whose package has the name of ours
from upstream_driver import models, process, surroundings  # noqa: E402
from upstream_driver.driver import PIPELINES  # noqa: E402
from upstream_driver.watch import Watch  # noqa: E402

BASE = "9737cba9c1c3c4d04b33fcad41c111989865d315"


def main():
    tree = os.environ.get("WAN_UPSTREAM")
    if not tree:
        sys.exit("WAN_UPSTREAM is not set: name a checkout of Wan-Video/Wan2.1")
    head = subprocess.run(
        ["git", "-C", tree, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    changes = subprocess.run(
        ["git", "-C", tree, "status", "--porcelain", "-uno"], check=True, capture_output=True
    )
    if head.stdout.strip() != BASE or changes.stdout:
        sys.exit(f"{tree}: must be an unchanged checkout of {BASE}")
    from wan import random_models

    goldens.FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for task in sys.argv[1:] or PIPELINES:
            checkpoint = random_models.write_checkpoint(Path(folder) / task, f"{task}-tiny")
            command = [
                sys.executable,
                __file__,
                "--record",
                task,
                tree,
                str(checkpoint),
                str(random_models.VERSION),
            ]
            subprocess.run(command, check=True)


def record(task, tree, checkpoint, version):
    """Runs every case of a task and writes its files. In this process `wan` is upstream's."""
    torch.set_num_threads(1)
    wan = surroundings.load_tree(tree)
    config = models.task_config(wan, task)
    models.fit_sizes(wan, checkpoint, config)
    groups = {"generate": {}, "dit": {}}
    for precision, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        models.task_config(wan, task, dtype)
        pipeline = process.build(wan, task, config, checkpoint)
        watch = Watch()
        watch.attach(pipeline)
        groups["dit"] |= {f"{precision}, {name}": flow for name, flow in dit(wan, pipeline, task, dtype)}
        for name, call in goldens.GENERATE_CASES[task].items():
            if precision == "fp32" or name in goldens.BF16_CASES:
                video = generate(wan, pipeline, task, call)
                groups["generate"][f"{precision}, {name}, latents"] = watch.latents
                groups["generate"][f"{precision}, {name}, video"] = video
        if task == "t2v":
            for i, prompt in enumerate(goldens.PROMPTS):
                [embedding] = pipeline.text_encoder([prompt], torch.device("cpu"))
                groups.setdefault("t5", {})[f"{precision}, {i}"] = embedding
        if task == "t2v" and precision == "fp32":
            groups["vae"] = dict(vae(pipeline.vae))
            groups["solvers"] = dict(solvers(wan))
        if task == "i2v" and precision == "fp32":
            groups["clip"] = dict(clip(pipeline.clip))
    for group, results in groups.items():
        name = f"{group}-{task}" if group in ("generate", "dit") else group
        write(name, results, version)


def dit(wan, pipeline, task, dtype):
    for name, case in goldens.DIT_CASES.items():
        with torch.no_grad(), torch.cuda.amp.autocast(dtype=dtype):
            flows = pipeline.model(**goldens.dit_inputs(task, case))
        for i, flow in enumerate(flows):
            yield f"{name}, {i}", flow


def generate(wan, pipeline, task, call):
    call = dict(call)
    inputs = None
    if task == "vace":
        inputs = goldens.vace_source(call.pop("source"), call["frame_num"], *call["size"])
    with tempfile.TemporaryDirectory() as folder:
        for key, value in call.items():
            if key in ("img", "first_frame", "last_frame"):
                call[key] = Path(folder) / f"{key}.png"
                goldens.picture(*value).save(call[key])
        return process.generate(wan, pipeline, task, call, inputs)


def vae(model):
    for frames in goldens.VAE_FRAMES:
        with torch.no_grad():
            yield f"encode, {frames}", model.encode([goldens.smooth("video", 3, frames, 64, 80)])[0]
            yield (
                f"decode, {frames}",
                model.decode([goldens.normal("latents", 16, 1 + frames // 4, 8, 10)])[0],
            )


def solvers(wan):
    """Every step's latents, and the timesteps."""
    for solver, shift, steps in goldens.SOLVER_CASES:
        if solver == "unipc":
            scheduler = wan.utils.FlowUniPCMultistepScheduler(
                num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
            )
            scheduler.set_timesteps(steps, device="cpu", shift=shift)
        else:
            scheduler = wan.utils.FlowDPMSolverMultistepScheduler(
                num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
            )
            wan.utils.retrieve_timesteps(
                scheduler, device="cpu", sigmas=wan.utils.get_sampling_sigmas(steps, shift)
            )
        latents, walk = goldens.solver_start(), []
        for t in scheduler.timesteps:
            latents = scheduler.step(goldens.pseudo_model(latents, t), t, latents, return_dict=False)[0]
            walk.append(latents)
        case = f"{solver}, shift {shift:g}, {steps} steps"
        yield case, torch.stack(walk)
        yield f"{case}, timesteps", scheduler.timesteps


def clip(model):
    for width, height in goldens.CLIP_SIZES:
        with torch.no_grad():
            yield f"{width}*{height}", model.visual([goldens.smooth("image", 3, 1, height, width)])


def write(name, results, version):
    from safetensors.torch import save_file

    metadata = {
        "base": BASE,
        "toy_version": version,
        "torch": torch.__version__,
        "sizes": json.dumps({case: tuple(tensor.shape) for case, tensor in results.items()}),
    }
    path = goldens.FOLDER / f"{name}.safetensors"
    save_file({case: goldens.sample(tensor) for case, tensor in results.items()}, path, metadata=metadata)
    print(f"{path.name}: {len(results)} results, {path.stat().st_size} bytes")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--record"]:
        record(*sys.argv[2:])
    else:
        main()
