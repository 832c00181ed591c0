"""Trained toys' checkpoints: the real layout, made of the shipped weights; and the inputs that are drawn for them."""

import json

import numpy as np
import pytest
import torch
from test_tiny import COMMON, IMAGE, files, tensors

from leanwan.errors import InputError
from toys import examples
from wan.configs.toy import TOY_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import VAE
from wan.tasks import EXAMPLES, TASKS
from wan.trained_toys import checkpoints
from wan.trained_toys.checkpoints import checkpoint, save_weights, untrained
from wan.utils.video import VideoFile, open_image

PATCHES = "patch_embedding.weight"


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Weights that nobody trained, in the place of those that are shipped."""
    folder = tmp_path / "weights"
    folder.mkdir()
    image, vace = untrained(TOY_CONFIGS["i2v-toy"]), untrained(TOY_CONFIGS["vace-toy"])
    text = untrained(TOY_CONFIGS["t2v-toy"])
    save_weights(folder, "t2v", text)
    save_weights(folder, "image", {PATCHES: image[PATCHES]})
    save_weights(folder, "vace", vace)
    save_weights(folder, "vae", VAE(TOY_CONFIGS["t2v-toy"].vae_dim).state_dict())
    monkeypatch.setattr(checkpoints, "SHIPPED", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.mark.parametrize("task", TOY_CONFIGS)
def test_layout_and_tensors(task, shipped):
    directory, config = checkpoint(task), TOY_CONFIGS[task]
    assert files(directory) == COMMON | (IMAGE if "clip_config" in config else set())
    assert json.loads((directory / "config.json").read_text()) == config.dit_config
    found = tensors(directory)
    assert all(tensor.isfinite().all() for tensor in found.values())
    kind = VaceWanModel if task == "vace-toy" else WanModel
    weights = kind.from_pretrained(directory).state_dict()
    text = untrained(TOY_CONFIGS["t2v-toy"])
    assert all(torch.equal(weights[name], text[name].half().float()) for name in text if name != PATCHES)
    assert weights[PATCHES].shape[1] == (
        36 if config is TOY_CONFIGS["i2v-toy"] or "clip_config" in config else 16
    )
    said = [name for name in weights if "v_img" in name]
    assert all(not weights[name].any() for name in said) and bool(said) == ("clip_config" in config)
    VAE(config.vae_dim).load_state_dict(torch.load(directory / config.vae_checkpoint))


def test_written_once_for_the_same_weights(shipped):
    first = checkpoint("t2v-toy")
    (first / "config.json").touch()
    assert checkpoint("t2v-toy") == first
    save_weights(shipped, "t2v", untrained(TOY_CONFIGS["t2v-toy"]) | {"head.head.bias": torch.ones(64)})
    other = checkpoint("t2v-toy")
    assert other != first and first.is_dir()
    assert (WanModel.from_pretrained(other).head.head.bias == 1).all()


@pytest.mark.parametrize("task, name", [("t2v-toy", "vae"), ("i2v-toy", "image"), ("vace-toy", "vace")])
def test_weights_that_cannot_be_used_are_told_in_a_line(task, name, shipped):
    path = shipped / f"{name}.safetensors"
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"version 1", b""):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="are damaged, install") as error:
            checkpoint(task)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(InputError, match="are missing, install") as error:
        checkpoint(task)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    if name != "vae":
        assert checkpoint("t2v-toy").is_dir()  # needs no more than its own


def test_unknown_task():
    with pytest.raises(InputError, match="task t2v-tiny"):
        checkpoint("t2v-tiny")


def test_examples_are_those_that_are_drawn(tmp_path):
    examples.draw(tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in EXAMPLES.glob("toy_*"))
    for name in drawn:
        if name.endswith(".png"):
            ours, theirs = (np.asarray(open_image(folder / name, "image")) for folder in (tmp_path, EXAMPLES))
            assert ours.shape == (48, 80, 3)
        else:
            ours, theirs = (
                np.stack(list(VideoFile(folder / name).frames())) for folder in (tmp_path, EXAMPLES)
            )
            assert ours.shape == (17, 48, 80, 3)
        assert np.abs(ours.astype(int) - theirs).mean() < 0.5  # another encoder rounds otherwise


def test_inputs_by_default_are_drawn():
    given = {name for task in TOY_CONFIGS for name in TASKS[task].inputs.values() if name}
    assert given == {path.name for path in EXAMPLES.glob("toy_*")} - {"toy_ref.png"}
