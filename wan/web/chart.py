"""The series of a run's memory as a picture: GPU memory against its plan, and RAM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from .memory_samples import Series

GIB = 2**30
WIDTH, HEIGHT = 600, 150  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 18, 24  # margins
_SHORT = 46  # a stage narrower than this has no room for its name


def chart(series: Series) -> str:
    """The charts as HTML, with text for screen readers."""
    if not series.points:
        return '<p class="quiet">Memory is drawn here while a video is made.</p>'
    last = series.points[-1][2]
    drawn = []
    if any("reserved" in values or "allocated" in values for _, _, values in series.points):
        lines = [("reserved", "reserved", "gpu"), ("in tensors", "allocated", "gpu-live")]
        levels = [("limit", last.get("limit") or series.room, "limit")]
        drawn.append(_chart("GPU memory", series, lines, levels, plan=True))
    drawn.append(_chart("RAM", series, [("this run", "ram", "ram")], [], plan=False))
    return "".join(drawn)


def _chart(
    title: str,
    series: Series,
    lines: Sequence[tuple[str, str, str]],
    levels: Sequence[tuple[str, float | None, str]],
    plan: bool,
) -> str:
    points = series.points
    span = max(points[-1][0], 1.0)
    highest: list[float] = [values.get(key, 0) for _, _, values in points for _, key, _ in lines]
    highest += [level for _, level, _ in levels if level]
    highest += series.plan.values() if plan else []
    top = _round_up(max(highest, default=0) / GIB) * GIB

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / span

    def y(nbytes: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * nbytes / top

    parts, legend, words = _stages(points, x) + _axis(top, y), [], []
    for name, key, kind in lines:
        known = [(x(at), y(values[key])) for at, _, values in points if key in values]
        if not known:
            continue
        path = "M" + "L".join(f"{across:.1f},{up:.1f}" for across, up in known)
        if kind != "gpu-live":
            floor = f"L{known[-1][0]:.1f},{y(0):.1f}L{known[0][0]:.1f},{y(0):.1f}Z"
            parts.append(f'<path class="{kind} area" d="{path}{floor}"/>')
        parts.append(f'<path class="{kind}" d="{path}"/>')
        now = points[-1][2].get(key, 0) / GIB
        peak = max(values.get(key, 0) for _, _, values in points) / GIB
        legend.append(f'<span class="{kind}">{name} <b>{now:.2f}</b>, at most {peak:.2f} GiB</span>')
        words.append(f"{name} {now:.2f} GiB, at most {peak:.2f}")
    if plan and series.plan:
        parts += [
            f'<path class="planned" d="M{x(start):.1f},{y(series.plan[stage]):.1f}H{x(end):.1f}"/>'
            for stage, start, end in _spans(points)
            if stage in series.plan
        ]
        most = max(series.plan.values()) / GIB
        legend.append(f'<span class="planned">plan, at most {most:.2f} GiB</span>')
        words.append(f"planned at most {most:.2f} GiB")
    for name, level, kind in levels:
        if level:
            parts.append(f'<path class="{kind}" d="M{LEFT},{y(level):.1f}H{WIDTH - RIGHT}"/>')
            legend.append(f'<span class="{kind}">{name} {level / GIB:.2f} GiB</span>')
    label = escape(f"{title}: " + "; ".join(words))
    return (
        f'<figure class="chart"><figcaption><b>{title}</b> {" ".join(legend)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _axis(top: float, y: Callable[[float], float]) -> list[str]:
    return [
        f'<path class="grid" d="M{LEFT},{y(part):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y(part) + 4:.1f}" text-anchor="end">{part / GIB:g}</text>'
        for part in (0, top / 2, top)
    ]


def _stages(points: Sequence[tuple[float, str, object]], x: Callable[[float], float]) -> list[str]:
    """A band for each stage, with its name where there is room."""
    drawn = []
    for number, (stage, start, end) in enumerate(_spans(points)):
        width = x(end) - x(start)
        drawn.append(
            f'<rect class="band{number % 2}" x="{x(start):.1f}" y="{TOP}" width="{width:.1f}" '
            f'height="{HEIGHT - TOP - BOTTOM}"/>'
        )
        if width >= _SHORT:
            drawn.append(
                f'<text x="{x(start) + width / 2:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(stage)}</text>'
            )
    return drawn


def _spans(points: Sequence[tuple[float, str, object]]) -> list[tuple[str, float, float]]:
    """(stage, start, end) of each stretch of one stage."""
    spans: list[tuple[str, float, float]] = []
    for at, stage, _ in points:
        if spans and spans[-1][0] == stage:
            spans[-1] = (stage, spans[-1][1], at)
        else:
            spans.append((stage, spans[-1][2] if spans else at, at))
    return spans


def _round_up(gib: float) -> float:
    """The next round value of at least `gib` whose half is a round number, too."""
    step = 0.25
    while True:
        for value in (step, 2 * step, 4 * step):
            if value >= gib:
                return value
        step *= 8 if step == 0.25 else 2
