"""The toys' training: through what pipelines run, and on from where it was interrupted."""

import math

import pytest
import torch

from leanwan.vae.passes import decode, encode
from toys import dit_training, places, training_steps, vae_training
from toys.dit_training import flow, start, train_dit
from toys.vae_training import decoded, encoded, new_vae, standardise
from wan.configs.toy import TOY_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import LATENT_MEAN, LATENT_STD, VAE
from wan.trained_toys import checkpoints


@pytest.mark.parametrize("name", ["t2v-toy", "i2v-toy", "vace-toy"])
def test_dit_is_trained_through_what_the_pipelines_run(name):
    config, kind = TOY_CONFIGS[name], VaceWanModel if name == "vace-toy" else WanModel
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


def test_heads_begin_with_the_neighbour_that_is_theirs(monkeypatch):
    sizes = {
        key: value for key, value in TOY_CONFIGS["t2v-toy"].dit_config.items() if not key.startswith("_")
    }
    model, seen = WanModel(**sizes).requires_grad_(False), []
    start(model, 0)
    monkeypatch.setattr(
        dit_training.F,
        "scaled_dot_product_attention",
        lambda q, k, v: seen.append((q, k)) or torch.zeros_like(q),
    )
    torch.manual_seed(0)
    flow(model, torch.randn(8, 16, 5, 10, 10), torch.full((8,), 999.0), torch.zeros(8, 32, 64))
    q, k = seen[0]
    weights = (q @ k.mT / q.size(-1) ** 0.5).softmax(-1).mean(0).unflatten(2, (5, 5, 5))
    for head, (axis, way) in enumerate(places.LOOKS):
        there = weights[head, 62]  # of the token in the middle
        along = there.sum([other for other in range(3) if other != axis])
        assert along.argmax() == 2 + way and along[2 + way] > 0.5, (head, along)


def test_places_are_asked_for_in_their_order():
    grid, asked = (5, 3, 5), places.Places(14).requires_grad_(False)
    asked.weight.zero_()
    asked.bias.zero_()
    there = torch.cartesian_prod(*map(torch.arange, grid)).unbind(1)
    right = torch.cat([torch.nn.functional.one_hot(*each) for each in zip(there, places.MOST)], 1)[
        None
    ].float()
    torch.testing.assert_close(asked.loss(right, grid), torch.tensor(math.log(6 * 3 * 5)))
    asked.weight.copy_(20 * torch.eye(14))
    assert asked.loss(right, grid) < 1e-3 < asked.loss(right.flip(1), grid)


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
    monkeypatch.setattr(training_steps, "KEEP_EVERY", 2)

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
            model = WanModel(dim=24, ffn_dim=16, freq_dim=8, num_heads=2, num_layers=2, text_dim=64)
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
    monkeypatch.setattr(training_steps, "KEEP_EVERY", 2)
    resumed = trained(tmp_path / "kept.pt", 5)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert (tmp_path / "kept.pt").is_file()
