"""Operators of a run that run out of memory, one in each try: the next video is that of a run without.

    python -m stand_in_driver python tests/stand_in/out_of_memory.py TRIES

Prints as JSON {"operators": how many a run has, "different": numbers of those after which the next video differs,
"unnoticed": of those that the run did not tell, "bytes left": the most that stayed behind}.
"""

import gc
import json
import sys
from typing import Any

import torch

import wan
from leanwan.options import LOW_VRAM
from stand_in_driver.values import Values
from wan import tiny
from wan.configs import WAN_CONFIGS

CALL: dict[str, Any] = {"size": (96, 64), "frame_num": 5, "sampling_steps": 1, "seed": 5}


def allocated() -> int:
    gc.collect()
    return torch.cuda.memory_allocated()


def main(tries: int) -> None:
    pipeline = wan.WanT2V(
        WAN_CONFIGS["t2v-tiny"], tiny.checkpoint("t2v-tiny"), device="cuda", **LOW_VRAM | {"dit_chunk": 64}
    )
    expected = pipeline.generate("a red ball", **CALL)
    first, before = Values.operators, allocated()
    pipeline.generate("a red ball", **CALL)
    operators = Values.operators - first
    different, unnoticed, left = [], [], 0
    for number in sorted({1 + n * (operators - 1) // max(1, tries - 1) for n in range(tries)}):
        Values.out_of_memory_at = Values.operators + number
        try:
            pipeline.generate("a red ball", **CALL)
            unnoticed.append(number)
        except torch.OutOfMemoryError:
            pass
        left = max(left, allocated() - before)
        if not torch.equal(pipeline.generate("a red ball", **CALL), expected):
            different.append(number)
    told = {"operators": operators, "different": different, "unnoticed": unnoticed, "bytes left": left}
    print(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]))
