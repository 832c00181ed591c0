"""The trained toys: that what they were trained through is what pipelines run, and that videos show what was asked.

By default a few samples of each task; all of them with WAN_TOY_SAMPLES=60, say, which prints the shares.
"""

import math
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import wan
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import LATENT_MEAN, LATENT_STD, VAE
from wan.modules.vae_forward import decode, encode
from wan.tasks import EXAMPLES, TASKS
from wan.toy import checkpoints, lessons, steps, vae_training
from wan.toy.clips import COLOURS, FRAMES, GROUNDS, HEIGHT, MOTIONS, SHAPES, WIDTH, random_clip
from wan.toy.dit_training import flow, start, train_dit
from wan.toy.measure import seen
from wan.toy.vae_training import decoded, encoded, new_vae, standardise

SAMPLES = int(os.environ.get("WAN_TOY_SAMPLES", 3))
SETTINGS = {"shift": 3.0, "sampling_steps": 20}
SIZE = (WIDTH, HEIGHT)


@pytest.mark.parametrize("name", ["t2v-toy", "i2v-toy", "vace-toy"])
def test_dit_is_trained_through_what_the_pipelines_run(name):
    config, kind = WAN_CONFIGS[name], VaceWanModel if name == "vace-toy" else WanModel
    model = kind(**{key: value for key, value in config.dit_config.items() if not key.startswith("_")})
    model.load_state_dict(checkpoints.untrained(config))
    torch.manual_seed(0)
    x, context, t = torch.randn(2, 16, 2, 4, 6), torch.randn(2, 5, 64), torch.tensor([300.0, 800.0])
    batched, listed = {}, {}
    if name == "i2v-toy":
        batched["y"] = torch.randn(2, 20, 2, 4, 6)
        listed = {"y": list(batched["y"]), "clip_fea": torch.randn(2, 257, 1280)}
    if name == "vace-toy":
        batched["vace_context"] = torch.randn(2, 96, 2, 4, 6)
        listed["vace_context"] = list(batched["vace_context"])
    with torch.no_grad():
        padded = torch.nn.functional.pad(context, (0, 0, 0, config.text_len - 5))
        ours = flow(model, x, t, padded, **batched)
        theirs = torch.stack(model(list(x), t=t, context=list(context), seq_len=12, **listed))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert theirs.std() > 0.1


def test_vae_is_trained_through_what_the_pipelines_run():
    torch.manual_seed(0)
    vae, scale = VAE(8), [torch.zeros(16), torch.ones(16)]
    video, latents = torch.rand(1, 3, 9, 16, 24) * 2 - 1, torch.randn(1, 16, 3, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(encoded(vae, video)[0], encode(vae, video[0], scale), rtol=0, atol=1e-5)
        ours = decoded(vae, latents)[0].clamp(-1, 1)
    torch.testing.assert_close(ours, decode(vae, latents[0], scale), rtol=0, atol=2e-5)


def test_latents_get_the_published_statistics_and_videos_stay():
    torch.manual_seed(0)
    vae, video = new_vae(8), torch.rand(2, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        before = decoded(vae, encoded(vae, video))
        standardise(vae, encoded(vae, video))
        latents = encoded(vae, video)
        after = decoded(vae, latents)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.tensor(LATENT_MEAN), rtol=0, atol=1e-3)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.tensor(LATENT_STD), rtol=1e-3, atol=0)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-3)


def test_encoder_that_learns_from_stills_codes_every_fourth_frame(tmp_path):
    vae, video = new_vae(8), torch.rand(1, 3, 9, 24, 24) * 2 - 1
    vae_training.train_vae(vae, 2, 1, 1, 1e-2, 0, lambda *told: None, tmp_path / "kept.pt")
    coded = vae_training.encoded_by_frames(vae.requires_grad_(False), video)[0]
    assert coded.shape == (16, 3, 3, 3)
    scale = [torch.zeros(16), torch.ones(16)]
    torch.testing.assert_close(coded, encode(vae, video[0], scale), rtol=0, atol=1e-5)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("part", ["dit", "vae"])
def test_interrupted_training_goes_on_to_the_same_weights(part, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "KEEP_EVERY", 2)

    def batch(step):
        drawn = torch.Generator().manual_seed(step)
        return {
            "latents": torch.randn(2, 16, 1, 2, 2, generator=drawn),
            "context": torch.randn(2, 3, 64, generator=drawn),
        }

    def trained(kept, count, stop_at=None):
        torch.manual_seed(0)
        if part == "vae":
            model = new_vae(8)
            crops = vae_training.crops

            def drawn(rng, *sizes):
                if len(steps_taken) == stop_at:
                    raise Stopped
                steps_taken.append(1)
                return crops(rng, 1, 1, 24, 24)

            monkeypatch.setattr(vae_training, "crops", drawn)
            steps_taken = []
            vae_training.train_vae(model, count, 1, 1, 1e-3, 0, lambda *told: None, kept)
            monkeypatch.setattr(vae_training, "crops", crops)
        else:
            model = WanModel(dim=24, ffn_dim=16, freq_dim=8, num_heads=2, num_layers=1, text_dim=64)
            start(model, 0)

            def draw(step):
                if step == stop_at:
                    raise Stopped
                return batch(step)

            train_dit(model, draw, count, 1e-2, 0, lambda *told: None, kept)
        return model.state_dict()

    whole = trained(tmp_path / "whole.pt", 5)
    with pytest.raises(Stopped):
        trained(tmp_path / "kept.pt", 5, stop_at=3)
    monkeypatch.undo()
    monkeypatch.setattr(steps, "KEEP_EVERY", 2)
    resumed = trained(tmp_path / "kept.pt", 5)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert (tmp_path / "kept.pt").is_file()


def test_measure_reads_the_clips_themselves():
    rng = np.random.default_rng(1)
    clips = [random_clip(rng) for _ in range(40)]
    for clip in clips:
        found = seen(clip.video())
        assert (found.colour, found.shape, found.motion, found.ground) == (
            clip.colour,
            clip.shape,
            clip.motion,
            clip.ground,
        )
    assert {clip.motion for clip in clips} == set(MOTIONS)


def test_package_ships_little():
    assert sum(file.stat().st_size for file in checkpoints.SHIPPED.iterdir()) < 12 * 10**6


def held_out(count, **fixed):
    """Clips that no training has seen: positions by another seed."""
    rng = np.random.default_rng(20_000 + count)
    clips = [random_clip(rng, **fixed) for _ in range(count)]
    return clips, rng


@pytest.fixture(scope="module")
def pipeline():
    """Gives a toy's pipeline by its task's name."""
    built = {}

    def of(name):
        if name not in built:
            quiet = {"device": "cpu", "on_event": lambda event: None}
            built[name] = TASKS[name].pipeline_class(WAN_CONFIGS[name], checkpoints.checkpoint(name), **quiet)
        return built[name]

    return of


def judged(videos, clips, *wanted):
    """Fails unless at least 90% of the videos show what their clips do, for each attribute wanted."""
    found = [seen(video.numpy()) for video in videos]
    right = {
        name: sum(getattr(one, name) == getattr(clip, name) for one, clip in zip(found, clips))
        for name in wanted
    }
    print({name: f"{count} of {len(clips)}" for name, count in right.items()})
    missed = Counter(
        (getattr(clip, name), getattr(one, name))
        for name in wanted
        for one, clip in zip(found, clips)
        if getattr(one, name) != getattr(clip, name)
    )
    assert min(right.values()) >= math.floor(0.9 * len(clips)), missed
    return found


def image_of(video, frame):
    pixels = (video[:, frame].transpose(1, 2, 0) + 1) * 127.5
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def test_text_says_what_is_seen(pipeline):
    clips, rng = held_out(SAMPLES)
    videos = [
        pipeline("t2v-toy").generate(clip.caption(rng), SIZE, FRAMES, seed=seed, **SETTINGS)
        for seed, clip in enumerate(clips)
    ]
    judged(videos, clips, "colour", "shape", "motion")


def test_text_says_what_a_still_shows(pipeline):
    clips, rng = held_out(SAMPLES)
    videos = [
        pipeline("t2i-toy").generate(clip.caption(rng, still=True), SIZE, 1, seed=seed, **SETTINGS)
        for seed, clip in enumerate(clips)
    ]
    judged(videos, clips, "colour", "shape")


def test_what_an_image_shows_moves_on(pipeline):
    clips, rng = held_out(SAMPLES)
    videos = []
    for seed, clip in enumerate(clips):
        first = image_of(clip.video(), 0)
        made = pipeline("i2v-toy").generate(
            clip.caption(rng), first, WIDTH * HEIGHT, FRAMES, seed=seed, **SETTINGS
        )
        videos.append(made)
    found = judged(videos, clips, "colour", "shape", "motion", "ground")
    near = [np.abs(one.centres[0] - (clip.x, clip.y)).max() < 3 for one, clip in zip(found, clips)]
    assert sum(near) >= math.floor(0.9 * len(clips)), near


def test_video_goes_from_the_first_frame_to_the_last(pipeline):
    clips, rng = held_out(SAMPLES)
    videos = []
    for seed, clip in enumerate(clips):
        video = clip.video()
        made = pipeline("flf2v-toy").generate(
            clip.caption(rng),
            image_of(video, 0),
            image_of(video, -1),
            WIDTH * HEIGHT,
            FRAMES,
            seed=seed,
            **SETTINGS,
        )
        videos.append(made)
    found = judged(videos, clips, "colour", "motion", "ground")
    near = [
        max(np.abs(one.centres[frame] - clip.at(time)[:2]).max() for frame, time in ((0, 0), (-1, 1))) < 3
        for one, clip in zip(found, clips)
    ]
    assert sum(near) >= math.floor(0.9 * len(clips)), near


def test_masked_part_is_filled_and_the_rest_kept(pipeline):
    clips, rng = held_out(SAMPLES)
    videos, outside = [], []
    for seed, clip in enumerate(clips):
        source = random_clip(rng, ground=clip.ground)
        hole = lessons.hole_about(clip, source)
        _, _, mask = lessons.masked(source.video(), hole)
        video = torch.from_numpy(source.video())
        made = pipeline("vace-toy").generate(
            clip.caption(rng), [video], [torch.from_numpy(mask)], None, seed=seed, **SETTINGS
        )
        videos.append(made)
        outside.append(((made - video).abs() * (1 - mask)).sum() / (3 * max(1, (1 - mask).sum())))
    judged(videos, clips, "colour", "shape", "motion")
    assert np.mean([float(error) < 0.08 for error in outside]) >= 0.9, outside


def test_what_a_reference_shows_appears(pipeline):
    clips, _ = held_out(SAMPLES)
    videos = []
    for seed, clip in enumerate(clips):
        picture = torch.from_numpy(lessons.reference(clip.shape, clip.colour))
        grey = torch.zeros(3, FRAMES, HEIGHT, WIDTH)
        videos.append(
            pipeline("vace-toy").generate(
                lessons.referring(clip), [grey], None, [[picture]], seed=seed, **SETTINGS
            )
        )
    judged(videos, clips, "colour", "shape", "motion")


def test_guidance_pulls_towards_the_prompt(pipeline):
    """Away from what the same noise becomes without a prompt, and further so at 5 than at 1."""
    make = pipeline("t2v-toy").generate
    prompt, settings = "a red ball rolls to the right", {"frame_num": FRAMES, "seed": 3, **SETTINGS}
    weak, strong = (make(prompt, SIZE, guide_scale=scale, **settings) for scale in (1, 5))
    unprompted = make("", SIZE, guide_scale=1, **settings)
    assert (strong - unprompted).square().mean() > (weak - unprompted).square().mean() > 0
    assert seen(strong.numpy()).colour == "red"
    assert seen(strong.numpy()).motion == "right"


def test_memory_options_make_the_same_video(pipeline):
    quiet = {"device": "cpu", "on_event": lambda event: None}
    low = wan.WanT2V(
        WAN_CONFIGS["t2v-toy"], checkpoints.checkpoint("t2v-toy"), **quiet,
        vae_cpu=True, vae_tile=32, dit_stream=0.0, dit_chunk=64, t5_stream=True,
    )  # fmt: skip
    videos = [
        made.generate("a blue square moves up", SIZE, FRAMES, seed=1, shift=3.0, sampling_steps=4)
        for made in (pipeline("t2v-toy"), low)
    ]
    torch.testing.assert_close(*videos, rtol=0, atol=1e-5)


def test_examples_are_of_the_toys_size():
    for name in (name for name in TASKS if name.endswith("-toy")):
        for example in TASKS[name].inputs.values():
            for file in (example or "").split(","):
                assert not file or Image.open(EXAMPLES / file).size == SIZE


def test_prompts_of_the_toys_are_in_their_words():
    names = {*COLOURS, *GROUNDS, *SHAPES}
    for name in (name for name in TASKS if name.endswith("-toy")):
        said = set(TASKS[name].prompt.split())
        assert said & names and said <= set(checkpoints.words())
