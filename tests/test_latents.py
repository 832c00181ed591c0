"""Latents in files: what comes back, what is refused, what a failure leaves."""

import resource

import pytest
import safetensors.torch
import torch

from wan.modules.vae import VAE
from wan.utils.errors import InputError
from wan.utils.files import check_target
from wan.utils.latents import load_latents, save_latents
from wan.weights.fingerprints import vae_fingerprint

METADATA = {
    "task": "t2v-tiny",
    "size": "128*96",
    "frame_num": 9,
    "seed": 3,
    "prompt": "a »ball«\n",
    "vae": "ab",
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "clip.safetensors"
    latents = torch.randn(16, 3, 12, 16)
    save_latents(path, latents, METADATA)
    return path, latents


def test_round_trip(saved):
    path, latents = saved
    loaded, metadata = load_latents(path, {"task": "t2v-tiny", "size": "128*96", "vae": "ab"})
    assert torch.equal(loaded, latents)
    assert metadata == {"format": "wan-latents-1"} | {name: str(value) for name, value in METADATA.items()}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_strided_latents_of_another_type(tmp_path):
    latents = torch.randn(3, 16, 12, 16).transpose(0, 1).to(torch.bfloat16)
    save_latents(tmp_path / "clip", latents, {})
    assert torch.equal(load_latents(tmp_path / "clip", {})[0], latents.float())


@pytest.mark.parametrize(
    "expected, words",
    [
        ({"task": "t2v-14B"}, ["task t2v-tiny", "not t2v-14B"]),
        ({"size": "96*128"}, ["size 128*96", "not 96*128"]),
        ({"vae": "cd"}, ["another VAE", "ckpt_dir"]),
    ],
)
def test_latents_of_another_run(saved, expected, words):
    with pytest.raises(InputError) as error:
        load_latents(saved[0], expected)
    message = str(error.value)
    assert message.startswith(f"decode_latents {saved[0]}: ") and "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated(saved, length):
    path, _ = saved
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="damaged or not a file of latents"):
        load_latents(path, {})


def test_other_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_latents(tmp_path / "none", {})
    text = tmp_path / "notes.txt"
    text.write_text("not latents at all")
    with pytest.raises(InputError, match="damaged or not a file of latents"):
        load_latents(text, {})
    weights = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"latents": torch.zeros(16, 1, 2, 2)}, weights)
    with pytest.raises(InputError, match="not latents that save_latents wrote"):
        load_latents(weights, {})


def test_no_room_keeps_what_was_there(saved):
    path, latents = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot be written"):
            save_latents(path, torch.zeros(16, 3, 12, 16), METADATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_latents(path, {})[0], latents)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_paths_are_checked_before_the_work(tmp_path):
    check_target(tmp_path / "clip.safetensors", "save_latents")
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="is a directory"):
        check_target(tmp_path, "save_latents")
    with pytest.raises(InputError, match="no folder"):
        check_target(tmp_path / "none" / "clip", "save_latents")
    with pytest.raises(InputError, match="save_latents"):
        check_target(tmp_path / ("x" * 300), "save_latents")


def test_fingerprint(tmp_path):
    model = VAE(8)
    torch.save(model.state_dict(), tmp_path / "vae.pth")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "vae.safetensors")
    fingerprint = vae_fingerprint(tmp_path / "vae.pth")
    assert fingerprint == vae_fingerprint(tmp_path / "vae.safetensors")
    with torch.no_grad():
        model.decoder.upsamples[3].resample[1].bias[0] += 1e-3
    torch.save(model.state_dict(), tmp_path / "vae.pth")
    assert fingerprint != vae_fingerprint(tmp_path / "vae.pth")
    with pytest.raises(InputError, match="no such"):
        vae_fingerprint(tmp_path / "none.pth")
