"""Out of memory anywhere on the device: the same picture, or a state that goes on to it on the same pipeline."""

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from virtual_gpu import VirtualGPU
from wan.memory.options import LOW_VRAM, MemoryOptions
from wan.run import Request, Runner
from wan.utils.video import VideoFile

OPTIONS = {
    "low_vram": MemoryOptions(**LOW_VRAM | {"dit_chunk": 64}),
    "all stay": MemoryOptions(offload_model=False),
}
MOMENTS = (0.02, 0.6, 0.97)  # of a run's allocations; the last are the decoder's


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
    few = {"frame_num": 5, "sample_steps": 2, "base_seed": 3, "prompt": "a ball"}
    return Request(task=task, device="vgpu", save_file=name, memory=OPTIONS[options], **few, **more)


@pytest.mark.parametrize("options", OPTIONS)
def test_out_of_memory_loses_nothing(options, tmp_path, monkeypatch, task="t2v-tiny"):
    monkeypatch.chdir(tmp_path)
    with VirtualGPU() as gpu:
        whole = Full(gpu)
        Runner().run(request("whole.mp4", options, task))
    kept = 0
    for moment in MOMENTS:
        with VirtualGPU() as gpu:
            Full(gpu, int(whole.count * moment))
            runner = Runner()
            try:
                runner.run(request("a.mp4", options, task))
            except torch.OutOfMemoryError:
                gc.collect()
                if OPTIONS[options].offload_model:
                    assert not any(part._here for part in (runner._pipeline._dit, runner._pipeline._text))
                states = [str(path) for path in Path().glob("a.mp4.*.state")]  # none while weights are loaded
                again = vars(request("a.mp4", options, task)) | {"resume": states[0] if states else None}
                runner.run(Request(**again))  # on the same pipeline
                kept += len(states)
                assert Path("a.mp4").read_bytes() == Path("whole.mp4").read_bytes()
            else:  # the decoder went on in smaller tiles
                a, whole_frames = (
                    np.stack(list(VideoFile(name).frames())) for name in ("a.mp4", "whole.mp4")
                )
                assert np.abs(a.astype(int) - whole_frames).mean() < 0.1
            assert sorted(os.listdir()) == ["a.mp4", "whole.mp4"]
            os.unlink("a.mp4")
    assert kept
