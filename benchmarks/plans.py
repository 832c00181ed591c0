"""The table of plans by card in the README: `python -m benchmarks.plans`. Times are modelled, nothing runs."""

from __future__ import annotations

import math

from leanwan.budget import Budget
from wan.planning.plan import GIB, Plan, time_text
from wan.run import Request
from wan.run.plan_request import planner_within

CARDS = (4, 6, 8, 12, 16, 24, 32, 48, 80)  # GiB
WORK = (
    ("t2v-1.3B", "832*480"),
    ("t2v-14B", "832*480"),
    ("t2v-14B", "1280*720"),
    ("i2v-14B", "1280*720"),
)
RAM = 40 * GIB  # bytes that activations may take


def main() -> None:
    titles = [f"{task} {size.replace('*', 'x')}" for task, size in WORK]
    print(_row("card, GiB", titles), _row("---", ["---"] * len(WORK)), sep="\n")
    requests = [Request(task=task, size=size, ckpt_dir="Wan-AI/any") for task, size in WORK]
    for card in CARDS:
        cells = []
        for request in requests:
            planner = planner_within(request, card * GIB, RAM)
            plan, whole = (planner.plan(room) for room in (Budget(card * GIB).room, math.inf))
            cells.append(f"{_chosen(plan)}; {time_text(plan.seconds)} ({plan.seconds / whole.seconds:.3f})")
        print(_row(str(card), cells), flush=True)
    least = (Budget(0).limit_for(planner_within(request, 0, RAM).least()) for request in requests)
    print(_row("least", [f"{nbytes / GIB:.2f}" for nbytes in least]))


def _chosen(plan: Plan) -> str:
    options = plan.options
    stays = "all" if options.dit_stream is None else f"{options.dit_stream:.1f}"
    cuts = [f"chunks of {options.dit_chunk}"] * bool(options.dit_chunk)
    return ", ".join([stays, *cuts, *["activations in RAM"] * options.activation_offload])


def _row(first: str, cells: list[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


if __name__ == "__main__":
    main()
