"""RAM that a run needs: counted as it is taken, and told before the start."""

import logging
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_chunking import make_model
from test_conditions import flows, streamed
from test_vae_tiling import DIM, noise, vae

from leanwan import activations
from leanwan.activations import apply_activation_offload
from leanwan.errors import InputError
from leanwan.options import LOW_VRAM, MemoryOptions
from leanwan.vae import passes, tiles
from virtual_gpu import VirtualGPU
from wan import random_models
from wan.planning.predict.ram_needed import Ram, ram_needed
from wan.run import Request, ram_check
from wan.run.ram_check import check_ram
from wan.tasks import TASKS
from wan.utils.video import EightBitFrames
from wan.weights.reading import stored_types

GIB = 2**30


@pytest.mark.parametrize(("kind", "together"), [("t2v", False), ("i2v", True), ("vace", True)])
def test_as_much_as_is_taken(monkeypatch, kind, together):
    model, length, homes = make_model(kind, torch.bfloat16), 97, []
    init = activations._Home.__init__
    monkeypatch.setattr(
        activations._Home, "__init__", lambda home, x: homes.append(x.nbytes) or init(home, x)
    )
    options = MemoryOptions(**LOW_VRAM | {"dit_chunk": 64, "guidance_together": together})
    need = ram_needed(
        model, options, (1, 16, 16 * length), (4, 8, 8), torch.bfloat16, lambda name: torch.float32
    )
    with VirtualGPU() as gpu:
        apply_activation_offload(model, gpu.device, 64)
        with streamed(model, gpu, kind, length) as (ahead, _):
            flows(model, gpu, kind, length, ahead, 1 + together, together=together, chunk=64)
            own = {id(parameter) for parameter in model.parameters()}
            kept = [p.nbytes for group in ahead.groups for p in group.parameters() if id(p) not in own]
    assert need.activations == sum(homes)
    assert need.context == sum(kept)
    assert need.weights == sum(p.nbytes for p in model.parameters() if p.dtype is torch.bfloat16)


def test_a_video_in_8_bits_and_its_features(monkeypatch):
    made, frame_major = [], passes.frame_major
    monkeypatch.setattr(passes, "frame_major", lambda *sizes: made.append(frame_major(*sizes)) or made[-1])
    made += tiles.decode_each(vae(), [noise(16, 3, 10, 12)], 0, stored=EightBitFrames())
    model, options = make_model("t2v"), MemoryOptions()
    need = ram_needed(
        model, options, (9, 80, 96), (4, 8, 8), torch.float32, lambda name: torch.float32, vae_dim=DIM
    )
    assert need.peak == need.video == sum(tensor.nbytes for tensor in made)


def pipeline_of(**options):
    folder = random_models.checkpoint("t2v-tiny")
    task = TASKS["t2v-tiny"]
    return SimpleNamespace(
        device=torch.device("cuda"),
        checkpoint_dir=folder,
        model_class=task.pipeline_class.model_class,
        options=MemoryOptions(**options),
        vae_stride=(4, 8, 8),
        param_dtype=torch.bfloat16,
        config=task.config,
    )


@pytest.mark.parametrize(
    ("available", "total", "told"),
    [(8, 9, "INFO"), (0, 8, "WARNING"), (0, 0, None)],
    ids=["room", "little", "none"],
)
def test_told_before_the_start(monkeypatch, caplog, available, total, told):
    memory = SimpleNamespace(available=available * GIB, total=total * GIB)
    monkeypatch.setattr(ram_check.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(ram_check.psutil, "swap_memory", lambda: SimpleNamespace(total=0))
    request = Request("t2v-tiny", frame_num=9)
    with caplog.at_level(logging.INFO):
        if told:
            check_ram(request, pipeline_of())
            assert [record.levelname for record in caplog.records] == [told]
            assert "of RAM (weights 0.0, activations 0.0, context 0.0, video 0.0)" in caplog.text
        else:
            with pytest.raises(InputError, match="offload_folder, or fewer frames"):
                check_ram(request, pipeline_of())


def test_types_as_files_have_them(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert stored_types(tmp_path / "a.safetensors") == {"a": torch.bfloat16, "b": torch.float32}
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 40)
    assert stored_types(tmp_path / "b.safetensors") == {}


@pytest.mark.parametrize(("guidance", "teams"), [(5.0, 2), (1.0, 1)])
def test_ranks_of_a_machine(monkeypatch, caplog, guidance, teams):
    """Each has its own weights, context and video; of the activations its tokens'."""
    need = Ram(1 * GIB, 2 * GIB, 3 * GIB, 4 * GIB)
    monkeypatch.setattr(ram_check, "ram_needed", lambda *args, **options: need)
    ranks = SimpleNamespace(size=4, local_size=2, teams=lambda branches: [0, 2][:branches])
    with caplog.at_level(logging.INFO):
        check_ram(Request("t2v-tiny", frame_num=9, sample_guide_scale=guidance), pipeline_of(), ranks)
    assert f"(weights 2.0, activations {teams}.0, context 6.0, video 8.0)" in caplog.text
