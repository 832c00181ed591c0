"""Out of memory anywhere on the device: the same picture, or a state that goes on to it on the same pipeline."""

import gc
import os
from pathlib import Path

import pytest
import torch

import wan.run.execute
from leanwan.options import LOW_VRAM, MemoryOptions
from virtual_gpu import VirtualGPU
from wan.configs.tiny import TINY_CONFIGS
from wan.run import Request, Runner
from wan.tasks import TASKS
from wan.utils.video import to_uint8

OPTIONS = {
    "no flags": MemoryOptions(),
    "low_vram": MemoryOptions(**LOW_VRAM | {"dit_chunk": 64}),
    "all stay": MemoryOptions(offload_model=False),
}
# Which of a run's allocations fail, as shares of them; the last are the decoder's.
CASES = [("t2v-tiny", "low_vram", (0.02, 0.6)), ("t2v-tiny", "all stay", (0.6, 0.97))]
CASES += [("t2i-tiny", "no flags", (0.3,)), ("i2v-tiny", "all stay", (0.2,))]
CASES += [("vace-tiny", "low_vram", (0.4,))]
if os.environ.get("WAN_EVERY_KILL"):  # for an hour when nothing else is to be done
    CASES = [(task, options, [n / 12 for n in range(12)]) for task in TINY_CONFIGS for options in OPTIONS]


class Full:
    """Counts a device's allocations and refuses one, or none."""

    def __init__(self, gpu, refused=None):
        self.count, self.refused, self._allocate = 0, refused, gpu.allocator.alloc
        gpu.allocator.alloc = self.allocate

    def allocate(self, *args, **kwargs):
        self.count += 1
        if self.count == self.refused:
            raise torch.OutOfMemoryError("out of memory, as asked for")
        return self._allocate(*args, **kwargs)


def request(name, options, task, **more):
    few = {"frame_num": 1 if TASKS[task].still else 5, "sample_steps": 1, "base_seed": 3, "prompt": "a ball"}
    if task == "vace-tiny":
        few["src_ref_images"] = Request(task=task).src_ref_images
    return Request(task=task, device="vgpu", save_file=name, memory=OPTIONS[options], **few | more)


@pytest.fixture
def saved(monkeypatch):
    """The 8-bit frames of each result in turn, as they are before H.264 makes much of little."""
    found = []

    def seen(save):
        def saves(video, *rest):
            found.append(to_uint8(video).cpu().int())
            save(video, *rest)

        return saves

    for name in ("save_video", "save_image"):
        monkeypatch.setattr(wan.run.execute, name, seen(getattr(wan.run.execute, name)))
    return found


@pytest.mark.parametrize("task, options, moments", CASES, ids=lambda value: str(value).split(",")[0])
def test_out_of_memory_loses_nothing(task, options, moments, tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    whole_name, name = ("whole.png", "a.png") if TASKS[task].still else ("whole.mp4", "a.mp4")
    with VirtualGPU() as gpu:
        whole = Full(gpu)
        Runner().run(request(whole_name, options, task))
    kept = 0
    for moment in moments:
        with VirtualGPU() as gpu:
            Full(gpu, int(whole.count * moment) + 1)
            runner, failed = Runner(), False
            try:
                runner.run(request(name, options, task))
            except torch.OutOfMemoryError:
                failed = True
            if failed:
                gc.collect()
                left_on_device(runner)
                states = [
                    str(path) for path in Path().glob(f"{name}.*.state")
                ]  # none while weights are loaded
                runner.run(request(name, options, task, resume=states[0] if states else None))
                kept += len(states)
                assert Path(name).read_bytes() == Path(whole_name).read_bytes()
            else:  # the VAE went on in smaller tiles
                difference = (saved[-1] - saved[0]).abs()
                assert difference.max() <= 1 and difference.float().mean() < 1e-3
            assert sorted(os.listdir()) == [name, whole_name]
            os.unlink(name)
    assert kept


def left_on_device(runner):
    """Nothing is but what stays there by the options: then the component that failed is home all the same."""
    pipeline = runner._pipeline
    if pipeline is None:  # it failed while it was built
        return
    parts = [pipeline.__dict__.get(name) for name in ("_dit", "_text", "_image")]
    if pipeline.options.offload_model:
        assert not any(part and part._here for part in parts)
        vae = pipeline.__dict__.get("vae")
        at_home = sum(p.nbytes for p in vae.model.parameters() if p.device.type == "vgpu") if vae else 0
        allocated = torch.get_device_module("vgpu").memory_allocated()
        assert allocated <= at_home + 2**16, (allocated, at_home)
