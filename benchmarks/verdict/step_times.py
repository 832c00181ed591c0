"""Seconds per sampling step: resident, streamed, streamed in chunks, and upstream's."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import speed

from .checks import GIB, Bench

ROUNDS, FEW_ROUNDS = 2, 1  # to time the whole model, and a model of some of its layers


def compare(bench: Bench, task: str, layers: int | None = None) -> None:
    """Times are reported, not judged; but layers that are streamed and chunked must fit the device."""
    case = speed.CASES[speed.TOY if bench.rehearse else task]
    if not bench.rehearse:
        case = replace(case, layers=layers)
    bench.needs(4, 16 if layers is None else 8)
    rows = speed.measure(case, bench.device, FEW_ROUNDS if case.layers else ROUNDS, bench.tree)
    bench.note("tokens", case.tokens)
    if case.layers:
        bench.note("layers", case.layers)
    for row in rows:
        if row.out_of_memory:
            bench.note(row.name, "does not fit")
            continue
        numbers = {"s/step": row.step, "peak GiB": row.peak_bytes / GIB}
        if not rows[0].out_of_memory:
            numbers["ratio"] = row.step / rows[0].step
        bench.note(row.name, numbers)
    for row in rows:
        if "streamed" in row.name:
            bench.expect(row.streamed_bytes > 0, f"{row.name}: nothing was streamed")
        if "chunks" in row.name:
            bench.expect(not row.out_of_memory, f"{row.name}: does not fit the device")
