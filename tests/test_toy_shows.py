"""Trained toys show what is asked for, measured from pixels: held-out prompts, inputs and noise for every task.

WAN_WIDE_SWEEP=1 asks for six times as many.
"""

import dataclasses
import functools
import math
import os

import numpy as np
import pytest

from leanwan.options import LOW_VRAM
from toys.seen import seen
from toys.shown import KINDS, Toy, asked
from wan.configs.toy import TOY_CONFIGS
from wan.run import Request, run
from wan.tasks import TASKS
from wan.trained_toys.captions import MOTIONS, VERBS
from wan.utils.events import Step
from wan.utils.video import VideoFile, open_image

TIMES = 6 if os.environ.get("WAN_WIDE_SWEEP") else 1
COUNT, CONTROLS, FEW = 10 * TIMES, 6 * TIMES, 4 * TIMES
NEAR = 0.1  # mean difference of values in [-1, 1], of what is given and kept
PIXELS = 3  # of a shape from where it is to be

toy = functools.cache(Toy)


@functools.cache
def shown(kind, number, prompt=None, **settings):
    """A request and its video; prompt: another than the request's."""
    request = asked(kind, number)
    if prompt is not None:
        request = dataclasses.replace(request, prompt=prompt)
    return request, toy(KINDS[kind][0]).show(request, number, **settings)


def check(share, what, right):
    """At least so large a share is right, of pairs of a prompt and whether its video is."""
    wrong = [prompt for prompt, good in right if not good]
    print(f"{what}: {len(right) - len(wrong)} of {len(right)}")
    assert len(right) - len(wrong) >= math.ceil(share * len(right)), f"{what}: wrong for {wrong}"


def check_names(kind, **shares):
    """Videos show what the prompt names: so large a share of them, for each of Seen's names."""
    made = [shown(kind, number) for number in range(COUNT)]
    found = [(request, seen(video)) for request, video in made]
    for name, share in shares.items():
        right = [
            (request.prompt, getattr(there, name) == getattr(request.clip, name)) for request, there in found
        ]
        check(share, f"{kind}, {name}", right)
    return made


def test_text():
    check_names("text", colour=0.9, motion=0.9, shape=0.8, ground=0.8)


def test_still():
    check_names("still", colour=0.9, shape=0.8, ground=0.8)


def check_places(made, end):
    """The shape of the first or last frame (0, -1) is where the given one is."""
    right = []
    for request, video in made:
        place, given = (seen(frames).places[end] for frames in (video, request.clip.video()))
        right.append((request.prompt, math.dist(place, given) < PIXELS))
    check(0.9, f"places in frame {end}", right)


def test_what_an_image_shows_moves_on():
    made = check_names("image", colour=0.9, motion=0.9)
    check_places(made, 0)
    first = [
        (request.prompt, np.abs(video[:, 0] - request.pictures[0]).mean() < NEAR) for request, video in made
    ]
    check(0.9, "first frames", first)


def test_from_the_first_frame_to_the_last():
    made = check_names("first-last", colour=0.9)
    for end in (0, -1):
        check_places(made, end)


def test_a_hole_is_filled_and_the_rest_is_kept():
    made = check_names("fill", colour=0.9, motion=0.9, shape=0.8)
    right = []
    for request, video in made:
        kept = 1 - request.mask
        error = (np.abs(video - request.source) * kept).sum() / max(1, 3 * kept.sum())
        right.append((request.prompt, error < NEAR))
    check(1, "kept", right)


def test_what_a_reference_shows_moves_as_said():
    check_names("reference", colour=0.9, motion=0.9, shape=0.8)


def test_guidance_pulls_to_the_prompt():
    """Away from what the same noise becomes without a prompt, which shows the prompt no more often than chance."""
    scales, right = (
        {"unsaid": {"prompt": ""}} | {scale: {"guide_scale": scale} for scale in (0.25, 1.0, 5.0)},
        {},
    )
    apart = dict.fromkeys(scales, 0.0)
    for name, settings in scales.items():
        for number in range(CONTROLS):
            request, video = shown("text", number, **settings)
            there, clip = seen(video), request.clip
            good = (there.colour, there.motion) == (clip.colour, clip.motion)
            right.setdefault(name, []).append((request.prompt, good))
            apart[name] += np.abs(video - shown("text", number, prompt="")[1]).mean() / CONTROLS
    print(f"from no prompt: {apart}")
    assert NEAR < apart[0.25] < min(apart[1.0], apart[5.0])
    for scale in (1.0, 5.0):
        check(0.8, f"guidance {scale}", right[scale])
    assert sum(good for _, good in right["unsaid"]) <= CONTROLS // 4  # one in 42 by chance


def test_memory_options_give_the_same_video():
    request, plain = shown("text", 0)
    lean = Toy("t2v-toy", **LOW_VRAM | {"dit_chunk": 64, "vae_tile": 64}).show(request, 0)
    np.testing.assert_allclose(lean, plain, rtol=0, atol=1e-4)
    _, whole = shown("fill", 0)
    placed = Toy("vace-toy", vae_cpu=True, t5_stream=True, dit_stream=0.0).show(asked("fill", 0), 0)
    assert np.array_equal(placed, whole)


@pytest.mark.parametrize("solver", ["dpm++", "euler"])
def test_other_solvers_mean_the_same(solver):
    right = []
    for number in range(FEW):
        request, video = shown("text", number, sample_solver=solver)
        there = seen(video)
        right.append(
            (request.prompt, (there.colour, there.motion) == (request.clip.colour, request.clip.motion))
        )
    check(0.75, solver, right)


def test_a_run_that_stops_goes_on_to_the_same_video(tmp_path):
    def stop(event):
        if isinstance(event, Step) and (event.stage, event.done) == ("denoise", 7):
            raise KeyboardInterrupt

    request = Request("t2v-toy", base_seed=0, save_every=0, save_file=str(tmp_path / "out.mp4"))
    whole = run(dataclasses.replace(request, save_file=str(tmp_path / "whole.mp4")))
    with pytest.raises(KeyboardInterrupt):
        run(request, stop)
    (state,) = tmp_path.glob("*.state")
    path = run(dataclasses.replace(request, resume=str(state)))
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("task", TOY_CONFIGS)
def test_a_first_try_shows_what_its_prompt_says(task, tmp_path):
    """With the task's own prompt and inputs, from the file that is made."""
    still, prompt = TASKS[task].still, TASKS[task].prompt
    path = run(Request(task, base_seed=0, save_file=str(tmp_path / ("out.png" if still else "out.mp4"))))
    frames = [np.asarray(open_image(path, "image"))] if still else list(VideoFile(path).frames())
    there = seen(np.stack(frames).transpose(3, 0, 1, 2) / np.float32(127.5) - 1)
    assert f"a {there.colour} {there.shape}" in prompt and f"on a {there.ground} ground" in prompt, there
    if not still:
        said = [wording.format(go=VERBS[there.shape]) for wording in MOTIONS.get(there.motion, ())]
        assert any(wording in prompt for wording in said), there
