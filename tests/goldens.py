"""Recordings of upstream's results at BASE on the toy checkpoints, and the inputs that they were made from.

Made by record_goldens.py. A recording holds up to SAMPLES values of each result, spread over it evenly, in
fp32. Inputs are not stored: they follow from names.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import safetensors
import torch
from PIL import Image

FOLDER = Path(__file__).parent / "goldens"
SAMPLES = 2048
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}

PROMPTS = (
    "a red ball rolls to the right",
    "两只猫坐在窗边 & two cats sit at the window, they look up at the rain",
)
NEGATIVE_PROMPT = "blurred picture, low quality, 文字"
AREA = 96 * 64


# Inputs


def _numbers(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def normal(name, *shape):
    """Normal fp32 numbers that depend on the name alone."""
    return torch.from_numpy(_numbers(name).standard_normal(shape, dtype=np.float32))


def smooth(name, *shape):
    """[..., F, H, W] fp32 in [-1, 1] that varies over some eight pixels, as pictures do."""
    frames, height, width = shape[-3:]
    coarse = (*shape[:-3], frames, height // 8 + 1, width // 8 + 1)
    values = torch.from_numpy(_numbers(name).uniform(-1, 1, coarse).astype(np.float32))
    values = values.reshape(-1, 1, *coarse[-3:])
    return torch.nn.functional.interpolate(values, size=shape[-3:], mode="trilinear").reshape(shape)


def picture(name, width, height):
    """RGB PIL image."""
    values = smooth(name, 3, 1, height, width)[:, 0].permute(1, 2, 0)
    return Image.fromarray(((values + 1) * 127.5).round().to(torch.uint8).numpy())


# Cases: name -> what to run. Recorder and tests walk the same tables.

# Latent grids (frames, height, width) of the samples, prompt lengths, tokens beyond the longest sample, timesteps
DIT_CASES = {
    "whole": {"grids": [(3, 8, 12)], "lengths": [7], "spare": 0, "t": [999]},
    "padded": {"grids": [(3, 8, 12)], "lengths": [7], "spare": 37, "t": [999]},
    "one frame, full prompt": {"grids": [(1, 16, 10)], "lengths": [512], "spare": 0, "t": [420]},
    "long prompt, padded": {"grids": [(4, 6, 14)], "lengths": [140], "spare": 5, "t": [3]},
    "two samples": {"grids": [(2, 6, 8), (3, 8, 12)], "lengths": [9, 33], "spare": 0, "t": [700, 55]},
}


def dit_inputs(task, case):
    """Keyword arguments of the DiT's forward."""
    grids = case["grids"]
    inputs = {
        "x": [normal(f"x {i}", 16, *grid) for i, grid in enumerate(grids)],
        "t": torch.tensor(case["t"]),
        "context": [normal(f"context {i}", length, 4096) for i, length in enumerate(case["lengths"])],
        "seq_len": max(f * h * w // 4 for f, h, w in grids) + case["spare"],
    }
    if task in ("i2v", "flf2v"):
        images = len(grids) * (2 if task == "flf2v" else 1)
        inputs["clip_fea"] = normal("image features", images, 257, 1280)
        inputs["y"] = [normal(f"known {i}", 20, *grid) for i, grid in enumerate(grids)]
    if task == "vace":
        inputs["vace_context"] = [normal(f"source {i}", 96, *grid) for i, grid in enumerate(grids)]
        inputs["vace_context_scale"] = 0.8
    return inputs


VAE_FRAMES = (1, 5, 9)
CLIP_SIZES = ((224, 224), (150, 100), (90, 321))  # width, height
SOLVER_CASES = [
    (solver, shift, steps) for solver in ("unipc", "dpm++") for shift in (3.0, 5.0, 16.0) for steps in (20, 7)
]


def pseudo_model(latents, t):
    """A flow that depends on everything, smoothly, and costs nothing."""
    return torch.sin(3 * latents) + latents.roll(1, dims=-1) * (0.5 + t / 2000)


def at_steps(flow, solver):
    """A flow of a latent and a time as one of the latent and a number among the times that a solver has left."""
    times = solver.timesteps
    return lambda latents, step: flow(latents, times[step])


def solver_start():
    return normal("solver", 1, 4, 2, 4, 5)


def _calls(task):
    """Arguments of generate() by case name."""
    common = {"sampling_steps": 4, "seed": 11, "n_prompt": NEGATIVE_PROMPT, "input_prompt": PROMPTS[0]}
    calls = {}
    for solver in ("unipc", "dpm++"):
        for frames in (9, 13):
            call = common | {"sample_solver": solver, "frame_num": frames}
            case = f"{solver}, {frames} frames"
            if task == "t2v":
                calls[case] = call | {"size": (96, 64), "guide_scale": 5.0, "shift": 5.0}
            elif task == "i2v":
                calls[case] = call | {"img": ("first", 150, 100), "max_area": AREA, "shift": 3.0}
            elif task == "flf2v":
                last = ("last", 90, 120) if frames == 9 else ("last", 150, 100)
                calls[case] = call | {
                    "first_frame": ("first", 150, 100),
                    "last_frame": last,
                    "max_area": AREA,
                }
            else:
                for source in VACE_SOURCES:
                    calls[f"{source}, {case}"] = call | {"size": (96, 64), "source": source, "shift": 16.0}
        if task == "t2v":
            gentle = {"size": (96, 64), "frame_num": 9, "sample_solver": solver, "guide_scale": 1.2}
            calls[f"gentle guidance, {solver}"] = common | gentle
    if task == "t2v":
        calls["one frame"] = common | {"size": (64, 96), "frame_num": 1, "input_prompt": PROMPTS[1]}
        calls["20 steps"] = common | {"size": (64, 64), "frame_num": 5, "sampling_steps": 20}
    if task == "vace":
        calls["weak source"] = common | {
            "size": (96, 64), "frame_num": 9, "source": "video, mask and references", "context_scale": 0.3
        }  # fmt: skip
    return calls


VACE_SOURCES = ("video and mask", "references", "video, mask and references")
# T2V in bf16 too. Strong guidance multiplies the rounding of one kind of processor against another's.
BF16_CASES = ("gentle guidance, unipc", "gentle guidance, dpm++")
GENERATE_CASES = {task: _calls(task) for task in ("t2v", "i2v", "flf2v", "vace")}


def vace_source(source, frames, width=96, height=64):
    """{"frames": [3, F, H, W], "mask": [3 or 1, F, H, W], "ref_0": [3, 1, H, W], ...} as prepare_source gives them."""
    if source == "references":
        inputs = {
            "frames": torch.zeros(3, frames, height, width),
            "mask": torch.ones(3, frames, height, width),
        }
    else:
        inputs = {"frames": smooth("source video", 3, frames, height, width)}
        inputs["mask"] = (smooth("source mask", 1, frames, height, width) + 1) / 2
    if "references" in source:
        for i in range(2 if "video" in source else 1):
            inputs[f"ref_{i}"] = smooth(f"reference {i}", 3, 1, height, width)
    return inputs


# Recordings


def sample(tensor):
    """Up to SAMPLES values of a tensor, [N] fp32, spread over it."""
    flat = tensor.detach().float().flatten()
    if flat.numel() <= SAMPLES:
        return flat.clone()
    # A prime step that shares no factor with the size visits different places, no row or frame more than another.
    return flat[torch.arange(SAMPLES) * 1000003 % flat.numel()].clone()


class Goldens:
    """One file of recordings: `sizes` maps names to the full results' shapes, `values` to samples of them."""

    def __init__(self, group):
        with safetensors.safe_open(FOLDER / f"{group}.safetensors", "pt") as file:
            self.values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.metadata = file.metadata()
        self.sizes = {name: tuple(shape) for name, shape in json.loads(self.metadata["sizes"]).items()}

    def difference(self, name, result):
        """Largest difference relative to the recording's largest value; AssertionError for another shape."""
        assert tuple(result.shape) == self.sizes[name], (
            f"{name}: {tuple(result.shape)}, not {self.sizes[name]}"
        )
        expected = self.values[name]
        return ((sample(result.cpu()) - expected).abs().max() / expected.abs().max()).item()
