"""Plans as HTML: whether it fits, what each stage takes, what to change."""

from __future__ import annotations

from html import escape
from typing import Any

from leanwan.options import MemoryOptions

from ..planning.plan import GIB, time_text

_OPTION_WORDS = {
    "t5_stream": "text encoder layer by layer",
    "t5_cpu": "text encoder on the CPU",
    "vae_cpu": "VAE waits in RAM",
    "vae_tile": "frames in tiles of {}, exactly",
    "dit_stream": "{:g} GiB of the model stay, the rest visits in turn",
    "dit_chunk": "{} tokens at a time",
    "activation_offload": "activations in RAM",
    "guidance_together": "both guidance passes per visit",
}


def plan_html(plan: dict[str, Any], card: bool, limit: float) -> str:
    """A plan, as wan.run.plan_request.report tells it.

    Args:
        card: whether the card is this machine's own.
        limit: GiB that the plan is for.
    """
    fits, most = plan["fits"], plan["peak_bytes"]
    whose = f"{limit:g} GiB" if card else f"No GPU here: planned for a card of {limit:g} GiB"
    if fits:
        verdict = f'<span class="chip good">Fits</span> {short_time(plan["seconds"])}'
    else:
        verdict = f'<span class="chip bad">Does not fit</span> needs {plan["least_bytes"] / GIB:.2f} GiB'
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        f'<td><div class="bar"><i style="width:{_percent(stage["reserved"], most, plan)}%"></i></div></td>'
        f"<td>{stage['reserved'] / GIB:.2f}</td><td>{short_time(stage['seconds'])}</td></tr>"
        for name, stage in plan["stages"].items()
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Stage", "of the card", "GiB", "Time"))
    told = []
    if fits:
        told.append(_chosen(plan["options"]))
        if plan["longest_frame_num"]:
            told.append(f"Longest that fits: {plan['longest_frame_num']} frames.")
        more = plan["seconds_with_one_gib_more"]
        if more is not None and more < 0.98 * plan["seconds"]:
            told.append(f"One GiB more: {short_time(more)}.")
    else:
        told.append(
            f"Give it {plan['least_bytes'] / GIB:.2f} GiB or more, or choose a smaller size or fewer frames; "
            "this is the leanest way there is."
        )
    told.append(
        f"RAM {plan['ram_bytes'] / GIB:.2f} GiB. Times are modelled with the rates of {escape(plan['rates'])}."
    )
    return (
        f'<div class="plan"><p class="row"><span class="verdict">{verdict}</span><span class="quiet">{whose}</span></p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        + "".join(f'<p class="quiet">{line}</p>' for line in told)
        + "</div>"
    )


def short_time(seconds: float) -> str:
    """A length of time; short ones by tenths of a second."""
    return time_text(seconds) if seconds >= 9.5 else f"{seconds:.1f} s"


def _percent(nbytes: float, most: float, plan: dict[str, Any]) -> float:
    return round(100 * nbytes / max(most, plan["room"], 1), 1)


def _chosen(options: dict[str, Any]) -> str:
    """The options of a plan in words."""
    defaults = vars(MemoryOptions())
    words = [
        text.format(options[name])
        for name, text in _OPTION_WORDS.items()
        if options[name] != defaults[name] and not (name == "vae_tile" and not options[name])
    ]
    line = ", ".join(words) or "everything on the GPU"
    return f"{line[:1].upper()}{line[1:]}."


def planning_html(card: bool) -> str:
    """The text shown until the plan is made."""
    text = "Planning…" if card else "No GPU here: planning for a card…"
    return f'<div class="plan"><p class="quiet">{text}</p></div>'


def error_html(line: str) -> str:
    """A line that says what is wrong."""
    return f'<p class="bad" role="alert">{escape(line)}</p>'
