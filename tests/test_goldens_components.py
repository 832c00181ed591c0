"""Each network and solver against upstream's results on the same toy weights."""

import copy

import pytest
import torch
from goldens import (
    CLIP_SIZES,
    DIT_CASES,
    PROMPTS,
    SOLVER_CASES,
    TOLERANCE,
    VAE_FRAMES,
    Goldens,
    dit_inputs,
    normal,
    pseudo_model,
    smooth,
    solver_start,
)

from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.modules.clip import CLIPModel
from wan.modules.model import WanModel
from wan.modules.t5 import T5EncoderModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import WanVAE
from wan.sampling import Solver

TASKS = ("t2v", "i2v", "flf2v", "vace")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("group", ["clip", "solvers", "t5", "vae", *(f"dit-{task}" for task in TASKS)])
def test_recordings_are_of_these_toy_checkpoints(group):
    assert Goldens(group).metadata["toy_version"] == str(random_models.VERSION), "run tests/record_goldens.py"


@pytest.fixture(
    scope="module", params=[(task, precision) for task in TASKS for precision in DTYPES], ids="-".join
)
def dit(request):
    task, precision = request.param
    model_class = VaceWanModel if task == "vace" else WanModel
    return (
        task,
        precision,
        model_class.from_pretrained(random_models.checkpoint(f"{task}-tiny"), dtype=DTYPES[precision]),
    )


@pytest.mark.parametrize("case", DIT_CASES)
def test_dit(dit, case, measured):
    task, precision, model = dit
    with torch.no_grad():
        flows = model(**dit_inputs(task, DIT_CASES[case]))
    for i, flow in enumerate(flows):
        difference = Goldens(f"dit-{task}").difference(f"{precision}, {case}, {i}", flow)
        measured(difference, TOLERANCE[precision])


def t5(dtype):
    config = WAN_CONFIGS["t2v-tiny"]
    files = random_models.checkpoint("t2v-tiny")
    return T5EncoderModel(
        config.text_len,
        dtype,
        checkpoint_path=files / config.t5_checkpoint,
        tokenizer_path=files / config.t5_tokenizer,
        config=config.t5_config,
    )


@pytest.mark.parametrize("precision", DTYPES)
def test_t5(precision, measured):
    encoder = t5(DTYPES[precision])
    for i, prompt in enumerate(PROMPTS):
        [embedding] = encoder([prompt], torch.device("cpu"))
        measured(Goldens("t5").difference(f"{precision}, {i}", embedding), TOLERANCE[precision])


@pytest.fixture(scope="module")
def vae():
    config = WAN_CONFIGS["t2v-tiny"]
    return WanVAE(
        vae_pth=random_models.checkpoint("t2v-tiny") / config.vae_checkpoint, device="cpu", dim=config.vae_dim
    )


@pytest.mark.parametrize("frames", VAE_FRAMES)
def test_vae_encode(vae, frames, measured):
    [latents] = vae.encode([smooth("video", 3, frames, 64, 80)])
    measured(Goldens("vae").difference(f"encode, {frames}", latents), TOLERANCE["fp32"])


@pytest.mark.parametrize("frames", VAE_FRAMES)
def test_vae_decode(vae, frames, measured):
    [video] = vae.decode([normal("latents", 16, 1 + frames // 4, 8, 10)])
    measured(Goldens("vae").difference(f"decode, {frames}", video), TOLERANCE["fp32"])


@pytest.mark.parametrize("width, height", CLIP_SIZES)
def test_clip(width, height, measured):
    config = copy.deepcopy(WAN_CONFIGS["i2v-tiny"])
    path = random_models.checkpoint("i2v-tiny") / config.clip_checkpoint
    clip = CLIPModel(torch.float32, "cpu", path, None, config=config.clip_config)
    features = clip.visual([smooth("image", 3, 1, height, width)])
    measured(Goldens("clip").difference(f"{width}*{height}", features), TOLERANCE["fp32"])


@pytest.mark.parametrize("solver, shift, steps", SOLVER_CASES)
def test_solver(solver, shift, steps, measured):
    goldens = Goldens("solvers")
    ours = Solver(solver, steps, shift, "cpu")
    latents, walk, times = solver_start()[0], [], ours.timesteps
    for t in times:
        latents = ours.step(pseudo_model(latents, t), t, latents)
        walk.append(latents)
    case = f"{solver}, shift {shift:g}, {steps} steps"
    assert times.tolist() == goldens.values[f"{case}, timesteps"].tolist()
    measured(goldens.difference(case, torch.stack(walk)[:, None]), TOLERANCE["fp32"])
