"""Faults put into what brings components to the card and home again; which does a run show?

    python -m stand_in_driver python tests/stand_in/residency.py

Prints as JSON {fault: how it shows}, "" for one that does not.
"""

import json
import sys
from typing import Any
from unittest import mock

import torch

import wan
from wan import tiny
from wan.configs import WAN_CONFIGS

MEMORY: dict[str, Any] = {"vae_cpu": True}
CALL: dict[str, Any] = {"size": (96, 64), "frame_num": 5, "sampling_steps": 1, "seed": 5}
Pipeline = wan.WanT2V  # brings with it, wherever it is:
(residency,) = (module for name, module in sys.modules.items() if name.endswith(".residency"))
Component = residency.Component
arrive, leave = Component.arrive, Component.leave


def stays(component: Any) -> None:
    component._here = False


def leaves_one_behind(component: Any) -> None:
    del component._home[:1]
    leave(component)


def forgets_one(component: Any) -> None:
    arrive(component)
    for entries, name, tensor in component._home[-1:]:
        entries[name] = tensor


def brings_no_values(component: Any) -> None:
    arrive(component)
    for entries, name, _ in component._home:
        entries[name].data.zero_()


FAULTS = {
    "stays": {"leave": stays},
    "leaves one behind": {"leave": leaves_one_behind},
    "forgets one": {"arrive": forgets_one},
    "brings no values": {"arrive": brings_no_values},
}


def run() -> dict[str, Any]:
    """What a run shows: its video, its memory."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pipeline = Pipeline(WAN_CONFIGS["t2v-tiny"], tiny.checkpoint("t2v-tiny"), device="cuda", **MEMORY)
    video = pipeline.generate("a red ball", **CALL)
    left = torch.cuda.memory_allocated() - before
    return {"video": video.numpy().tobytes(), "left": left, "reserved": torch.cuda.max_memory_reserved()}


def shown(fault: dict[str, Any], expected: dict[str, Any]) -> str:
    with mock.patch.multiple(Component, **fault):
        try:
            found = run()
        except RuntimeError as error:
            return str(error).partition("\n")[0]
    return ", ".join(name for name in expected if found[name] != expected[name])


def main() -> None:
    run()
    expected = run()
    told = {"none": shown({"arrive": arrive}, expected)}
    print(json.dumps(told | {name: shown(fault, expected) for name, fault in FAULTS.items()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
