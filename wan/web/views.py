"""Jobs, memory and results as pieces of HTML, each sent to the page when it changes."""

from __future__ import annotations

import secrets
import threading
import time
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..planning.plan import time_text
from ..tasks import TASKS
from .chart import GIB, chart
from .gallery import FinishedFile
from .jobs import CANCELLED, DONE, FAILED, PAUSED, PAUSING, QUEUED, RUNNING, Job
from .plan_html import short_time
from .run_progress import Progress
from .service import Service

PARTS = ("device", "now", "memory", "queue", "gallery")
SHOWN_RESULTS = 24
_FRESH = 0.3  # seconds for which the pieces are not made anew


class Views:
    """The pieces of HTML, each with the version at which it last changed. Any thread may call."""

    def __init__(self, service: Service):
        self._service = service
        self._lock = threading.Lock()
        self._made_at = 0.0
        self._run = secrets.token_hex(4)  # tells this server's versions from an earlier one's
        self._version = 0
        self._pieces: dict[str, tuple[int, str]] = {}

    def since(self, known: str) -> dict[str, Any]:
        """{"version", "parts": {name: HTML}}: the pieces changed since a version; all if it is another server's."""
        run, _, number = known.partition("-")
        with self._lock:
            if time.monotonic() - self._made_at > _FRESH:
                self._make()
            seen = int(number[:18]) if run == self._run and number.isdecimal() else 0
            parts = {name: html for name, (changed, html) in self._pieces.items() if changed > seen}
            return {"version": f"{self._run}-{self._version}", "parts": parts}

    def _make(self) -> None:
        queue = self._service.queue
        jobs, results = queue.jobs(), self._service.gallery.results()
        current = next((job for job in jobs if job.status in (RUNNING, PAUSING)), None)
        progress = queue.progress.get(current.id) if current else None
        shown = queue.progress.get(queue.latest) or Progress()
        pieces = {
            "device": device_html(queue.device),
            "now": now_html(current, progress) if current else _idle_html(jobs, results),
            "memory": chart(shown.series),
            "queue": _trouble(queue.trouble)
            + (
                "".join(job_html(job) for job in jobs if job is not current and job.status != DONE)
                or '<p class="quiet">Nothing waits.</p>'
            ),
            "gallery": "".join(result_html(result) for result in results[:SHOWN_RESULTS])
            or '<p class="quiet">Finished videos are kept here.</p>',
        }
        self._version += 1
        for name, html in pieces.items():
            if name not in self._pieces or self._pieces[name][1] != html:
                self._pieces[name] = self._version, html
        self._made_at = time.monotonic()


def _trouble(line: str | None) -> str:
    return f'<p class="bad" role="alert" data-key="trouble">{escape(line)}</p>' if line else ""


def device_html(device: dict[str, Any] | None) -> str:
    """The card and its driver."""
    if device is None:
        return '<span class="chip">Looking for a GPU…</span>'
    if "error" in device:
        return f'<span class="chip bad">{escape(device["error"])}</span>'
    ram = f"{device['ram_bytes'] / GIB:.0f} GiB RAM"
    if not device["name"]:
        return f'<span class="chip">No GPU here</span><span class="chip">{ram}</span>'
    size = f" · {device['total_bytes'] / GIB:.0f} GiB" if "total_bytes" in device else ""
    driver = f'<span class="chip">{escape(device["driver"])}</span>' if device.get("driver") else ""
    name = escape(device["name"])
    return f'<span class="chip good">{name}{size}</span>{driver}<span class="chip">{ram}</span>'


def now_html(job: Job, progress: Progress | None) -> str:
    """The job that runs."""
    progress = progress or Progress()
    pausing = job.status == PAUSING
    pause = _button(job, "pause", "Pause", "pauses after this step") if not pausing else ""
    head = (
        f'<div class="job-head" data-key="head"><p class="prompt">{_prompt(job)}</p>'
        f'<p class="quiet">{_facts(job.request)}</p>'
        f'<div class="buttons">{pause}{_button(job, "cancel", "Cancel", "ends it for good", "stop")}</div></div>'
    )
    said = "Pausing after this step…" if pausing else _doing(progress)
    end = f"done at about {datetime.fromtimestamp(progress.end):%H:%M}" if progress.end else ""
    left = f"{time_text(progress.seconds_left)} left in this stage" if progress.seconds_left else ""
    when = " · ".join(filter(None, (left, end)))
    share = f'value="{progress.done}" max="{progress.total}"' if progress.total else ""
    bar = (
        f'<div data-key="bar"><ol class="stages">{_stages(job, progress)}</ol>'
        f'<progress {share} aria-label="{escape(said)}"></progress>'
        f'<p class="row"><span>{escape(said)}</span><span class="quiet">{when}</span></p></div>'
    )
    picture = (
        f'<div data-key="preview">{_picture(job, progress)}</div>'
        if progress.preview
        else '<div data-key="preview" class="preview empty"><span>The preview appears with the first step</span></div>'
    )
    plan = f'<p class="quiet" data-key="plan">{escape(progress.plan)}</p>' if progress.plan else ""
    return head + picture + bar + plan + _notes(job)


def _picture(job: Job, progress: Progress) -> str:
    width, height = (int(side) for side in job.request["size"].split("*"))
    _, step = progress.preview
    sharp = max(0.0, 1 - step / max(1, job.request["sample_steps"]))
    return (
        f'<figure class="preview"><img src="/jobs/{job.id}/preview?step={step}" width="{width}" height="{height}" '
        f'style="filter:blur({2 * sharp:.1f}px)" alt="what the video is about to show, after step {step}">'
        f"<figcaption>Preview, step {step}</figcaption></figure>"
    )


def _stages(job: Job, progress: Progress) -> str:
    """Every stage of the run: done with its time, under way, or to come."""
    task = TASKS[job.request["task"]]
    there = {"image": "clip_checkpoint" in task.config, "encode": bool(task.inputs)}
    names = [
        name for name in ("text", "image", "encode", "denoise", "decode", "save") if there.get(name, True)
    ]
    items = []
    last_done = max((names.index(name) for name in progress.stages if name in names), default=-1)
    for number, name in enumerate(names):
        if name == progress.stage:
            items.append(f'<li class="on" aria-current="step">{name}</li>')
        elif name in progress.stages:
            items.append(f'<li class="done">{name} <small>{short_time(progress.stages[name])}</small></li>')
        else:  # a resumed run did its first stages before it stopped
            items.append(f'<li class="{"done" if number < last_done else ""}">{name}</li>')
    return "".join(items)


def _doing(progress: Progress) -> str:
    if progress.doing is None:
        return "Starting…"
    what = progress.doing[:1].upper() + progress.doing[1:]
    return f"{what}, {progress.done} of {progress.total}" if progress.total else f"{what}…"


def _idle_html(jobs: list[Job], results: list[FinishedFile]) -> str:
    done = next((job for job in jobs if job.status == DONE), None)
    shown = done and next((result for result in results if result.name == Path(done.result).name), None)
    if not shown:
        return '<div class="preview empty" data-key="none"><span>Your video appears here while it is made</span></div>'
    seconds = done.ended - done.started if done.started else -1
    took = f" · made in {time_text(seconds)}" if seconds >= 0 else ""  # negative if the clock went back
    return (
        f'<div data-key="{escape(shown.name)}">{_media(shown, large=True)}'
        f'<p class="prompt">{_prompt(done)}</p><p class="quiet">{_facts(done.request)}{took}</p>'
        f'<div class="buttons">{_reuse(shown)}</div></div>' + _notes(done)
    )


def job_html(job: Job) -> str:
    """A job that waits, failed or was cancelled."""
    buttons = []
    if job.status in (QUEUED, PAUSED):
        buttons += [_button(job, "sooner", "↑", "moves up"), _button(job, "later", "↓", "moves down")]
    if job.status == QUEUED:
        buttons.append(_button(job, "pause", "Pause", "keeps it for later"))
    if job.status in (PAUSED, FAILED):
        buttons.append(_button(job, "resume", "Resume" if job.status == PAUSED else "Try again", "goes on"))
    if job.status in (QUEUED, PAUSED):
        buttons.append(_button(job, "cancel", "Cancel", "ends it for good", "stop"))
    if job.status in (FAILED, CANCELLED):
        buttons.append(
            f'<button type="button" data-delete="/jobs/{job.id}" data-key="{job.id}-forget" '
            f'aria-label="Remove from the list: {_prompt(job)}">Remove</button>'
        )
    error = f'<p class="bad" role="alert">{escape(job.error)}</p>' if job.error else ""
    return (
        f'<article class="job {job.status}" data-key="{job.id}"><div class="row"><p class="prompt">{_prompt(job)}</p>'
        f'<span class="chip {job.status}">{job.status}</span></div><p class="quiet">{_facts(job.request)}</p>{error}'
        f'<div class="buttons">{"".join(buttons)}</div></article>'
    )


def result_html(result: FinishedFile) -> str:
    """A finished file."""
    settings, name = result.settings, quote(result.name)
    prompt = _title(result)
    when = datetime.fromtimestamp(result.made)
    facts = _facts(settings) if settings else "made elsewhere"
    return (
        f'<article class="result" data-key="{escape(result.name)}">{_media(result)}<p class="prompt">{prompt}</p>'
        f'<p class="quiet">{facts} · {when:%d %b %H:%M}</p><div class="buttons">{_reuse(result)}'
        f'<a class="button" href="/results/{name}" download>Save</a>'
        f'<button type="button" data-delete="/results/{name}" data-confirm="Delete this for good?" '
        f'data-key="{name}-delete" aria-label="Delete: {prompt}">Delete</button></div></article>'
    )


def _media(result: FinishedFile, large: bool = False) -> str:
    name, prompt = quote(result.name), _title(result)
    if not result.is_video:
        return f'<img class="media" src="/results/{name}" alt="{prompt}" loading="lazy">'
    loading = 'preload="auto" autoplay' if large else 'preload="none"'
    return (
        f'<video class="media" src="/results/{name}" poster="/results/{name}/poster" aria-label="{prompt}" '
        f"controls loop muted playsinline {loading}></video>"
    )


def _reuse(result: FinishedFile) -> str:
    if not result.settings:
        return ""
    name = quote(result.name)
    return (
        f'<a class="button" href="/?like={name}">Use settings</a>'
        f'<a class="button" href="/?like={name}&amp;seed=same" title="again with this seed">Same seed</a>'
    )


def _button(job: Job, verb: str, text: str, does: str, kind: str = "") -> str:
    return (
        f'<button type="button" class="{kind}" data-post="/jobs/{job.id}/{verb}" data-key="{job.id}-{verb}" '
        f'aria-label="{text}: {_prompt(job)} ({does})" title="{does}">{text}</button>'
    )


def _prompt(job: Job) -> str:
    return _short(job.request["prompt"] or job.id)


def _title(result: FinishedFile) -> str:
    return _short(result.settings.get("prompt") or result.name)


def _short(text: str) -> str:
    return escape(" ".join(text.split())[:200])


def _facts(values: dict[str, Any]) -> str:
    """Task, size, length and seed of a request or of settings."""
    size, frames = str(values.get("size", "")).replace("*", "×"), values.get("frame_num")
    length = f"{frames} frames" if frames and frames > 1 else "picture"
    told = (
        values.get("task", ""),
        size,
        length,
        f"{values.get('sample_steps')} steps",
        f"seed {values.get('base_seed')}",
    )
    return escape(" · ".join(told))


def _notes(job: Job) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in job.notes)
    return f'<ul class="notes" data-key="notes">{notes}</ul>' if notes else ""
