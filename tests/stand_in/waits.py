"""Leaves out, one after the other, the waits of the files that order copies and kernels; which does a run show?

    python -m stand_in_driver --late copies|kernels python tests/stand_in/waits.py

Prints as JSON {"file:line function": whether the video differs} for each place that makes a stream or the host wait.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import wan
from wan import tiny
from wan.configs import WAN_CONFIGS

FILES = ("streaming", "activation_offload")  # by their names alone, wherever they are
MEMORY: dict[str, Any] = {"dit_stream": 0.0, "dit_chunk": 64, "activation_offload": True, "t5_stream": True}
CALL: dict[str, Any] = {"size": (128, 96), "frame_num": 9, "sampling_steps": 1, "seed": 5}
WAITING = [(torch.cuda.Stream, "wait_event"), (torch.cuda.Event, "synchronize")]


class Waits:
    """Stands between the program and PyTorch's waits.

    places: those that were come by. left_out: the one that does not wait.
    """

    def __init__(self) -> None:
        self.places: dict[str, None] = {}
        self.left_out: str | None = None
        for owner, name in WAITING:
            setattr(owner, name, self._seen(getattr(owner, name), name))

    def _seen(self, wait: Callable[..., Any], name: str) -> Callable[..., Any]:
        def seen(*args: Any) -> Any:
            caller = sys._getframe(1)
            file = Path(caller.f_code.co_filename).stem
            place = f"{file}:{caller.f_lineno} {caller.f_code.co_name}"
            if file in FILES:
                self.places[place] = None
            return None if place == self.left_out else wait(*args)

        return seen


def small_stages() -> None:
    """Makes the staging buffers so small that a layer goes through them several times."""
    (streaming,) = (module for name, module in sys.modules.items() if name.endswith(".streaming"))
    streaming.STAGE_BYTES, streaming.PINNED_BYTES = 1 << 16, 2 << 16


def video() -> torch.Tensor:
    pipeline = wan.WanT2V(WAN_CONFIGS["t2v-tiny"], tiny.checkpoint("t2v-tiny"), device="cuda", **MEMORY)
    pipeline.generate("a red ball", **CALL)
    return pipeline.generate("a red ball", **CALL)  # in memory that the first has used


def main() -> None:
    waits = Waits()
    video()  # imports
    small_stages()
    expected = video()
    assert torch.equal(video(), expected)
    told = {}
    for place in list(waits.places):
        waits.left_out = place
        told[place] = not torch.equal(video(), expected)
        print(place, told[place], file=sys.stderr)
    print(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
