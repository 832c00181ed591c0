"""Encoded prompts are kept: another run with the same words has the same bits without a text encoder."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from test_resume import command

import wan
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.modules.t5 import T5EncoderModel
from wan.run import Request, Runner
from wan.run.batch import Entry, run_entries
from wan.utils.events import StageStarted
from wan.weights.prompts import PromptCache

FEW = {"frame_num": 1, "sample_steps": 1, "base_seed": 3}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def kept(folder="cache"):
    return sorted(Path(folder).glob("*.safetensors"))


def without_encoder(monkeypatch):
    monkeypatch.setattr("wan.pipeline.T5EncoderModel", None)


def test_another_run_needs_no_text_encoder(monkeypatch):
    few = ["--frame_num", "1", "--sample_steps", "1", "--base_seed", "3"]
    line = ["--task", "t2i-tiny", *few, "--prompt", "a red ball"]
    assert command(*line, "--save_file", "a.png") == 0
    assert command(*line, "--save_file", "b.png", "--prompt_cache", "cache") == 0 and len(kept()) == 2
    with monkeypatch.context() as patch:
        without_encoder(patch)
        assert command(*line, "--save_file", "c.png", "--prompt_cache", "cache", "--low_vram") == 0
        seed = ["--base_seed", "4"]
        assert command(*line, *seed, "--save_file", "d.png", "--prompt_cache", "cache") == 0
    assert command(*line, *seed, "--save_file", "e.png", "--prompt_cache", "off") == 0
    results = [Path(f"{name}.png").read_bytes() for name in "abcde"]
    assert results[0] == results[1] == results[2] != results[3] == results[4]


def pipeline(checkpoint, **options):
    return wan.WanT2V(
        WAN_CONFIGS["t2v-tiny"],
        checkpoint,
        device="cpu",
        on_event=lambda event: None,
        prompt_cache=PromptCache("cache"),
        **options,
    )


@pytest.mark.parametrize("other", ["prompt", "weights", "tokenizer", "damaged", "cut", "empty", "of another"])
def test_only_what_can_be_trusted_is_taken(other, monkeypatch):
    checkpoint = random_models.write_checkpoint("toy", "t2v-tiny")
    pipeline(checkpoint).encode_ahead("a red ball")
    assert len(kept()) == 2
    if other == "weights":
        path = checkpoint / WAN_CONFIGS["t2v-tiny"].t5_checkpoint
        weights = torch.load(path)
        next(iter(weights.values()))[0] += 1
        torch.save(weights, path)
    elif other == "tokenizer":
        path = checkpoint / WAN_CONFIGS["t2v-tiny"].t5_tokenizer / "tokenizer.json"
        path.write_text(path.read_text() + "\n")
    elif other == "of another":
        shutil.copy(kept()[0], "spare")
        shutil.copy(kept()[1], kept()[0])
        shutil.copy("spare", kept()[1])
    elif other != "prompt":
        for path in kept():
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes({"damaged": data, "cut": data[:100], "empty": b""}[other])
    called, encode = [], T5EncoderModel.__call__
    monkeypatch.setattr(
        T5EncoderModel, "__call__", lambda self, *args: called.append(args) or encode(self, *args)
    )
    pipeline(checkpoint).encode_ahead("a blue ball" if other == "prompt" else "a red ball")
    assert len(called) == (1 if other == "prompt" else 2)  # the negative prompt is the same
    called.clear()
    pipeline(checkpoint).encode_ahead("a blue ball" if other == "prompt" else "a red ball")
    assert not called


def test_a_folder_has_a_limit_and_what_was_not_used_goes_first():
    size = torch.zeros(64, 64).nbytes
    cache = PromptCache("cache", limit=4 * size)  # heads of the files take some of it
    for number in range(3):
        cache.put({"text": number}, torch.full((64, 64), float(number)))
        os.utime(kept()[-1])
    for path, time in zip(kept(), (1, 2, 3)):
        os.utime(path, (time, time))
    texts = {PromptCache("cache").get({"text": number}).sum().item() / 4096: number for number in range(3)}
    assert texts == {0: 0, 1: 1, 2: 2}
    for path in kept():
        os.utime(path, (1, 1))
    assert PromptCache("cache").get({"text": 1}) is not None  # used just now
    cache.put({"text": 3}, torch.ones(64, 64))
    fresh = PromptCache("cache")
    there = [fresh.get({"text": number}) is not None for number in range(4)]
    assert there[1] and there[3] and sum(there) == 3
    assert sum(tensor.nbytes for tensor in cache._here.values()) <= 4 * size


def test_a_folder_that_takes_nothing_is_no_reason_to_stop(caplog):
    Path("file").write_text("")
    cache = PromptCache("file")
    cache.put({"text": "a"}, torch.ones(2, 3))
    assert "could not be kept in file" in caplog.text and torch.equal(
        cache.get({"text": "a"}), torch.ones(2, 3)
    )


def test_toys_keep_nothing_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Request(task="t2v-tiny").prompt_folder is None
    real = Request(task="t2v-1.3B", ckpt_dir=str(tmp_path))
    assert real.prompt_folder == tmp_path / "wan-prompts"
    assert Request(task="t2v-1.3B", ckpt_dir=str(tmp_path), prompt_cache="off").prompt_folder is None


def test_texts_of_many_are_encoded_first():
    stages = []
    runner = Runner(lambda event: stages.append(event.name) if isinstance(event, StageStarted) else None)
    entries = [
        Entry(text, Request(task="t2i-tiny", prompt=text, save_file=f"{text}.png", **FEW))
        for text in ("a", "b")
    ]
    assert run_entries(entries, runner) == 0
    rest = ["text", "denoise", "decode", "save"]  # of nothing that is left to encode
    assert stages == ["text", "text", *rest, *rest]
