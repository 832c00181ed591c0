"""The page: the form in Gradio, the live parts beside it as containers that static/page.js fills."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..memory.plan import MODES
from ..run.request import Request
from ..tasks import EXAMPLES, TASKS
from ..utils.errors import InputError
from ..weights.lora import parse_lora
from .jobs import MANY_PICTURES, PICTURES, UPLOADS, VIDEOS
from .plans import error_html, plan_html, planning_html
from .service import CARDS, Service

HEAD = '<link rel="stylesheet" href="/own/page.css"><script src="/own/page.js" defer></script>'
AUTO = "auto"
_TITLES = {
    "image": "First frame",
    "first_frame": "First frame",
    "last_frame": "Last frame",
    "src_video": "Source video",
    "src_mask": "Mask video, white where it is made anew",
    MANY_PICTURES: "Reference pictures",
}
_SWITCHES = {
    "exact": "Exact arithmetic (slower)",
    "compile": "Compile (rounds otherwise)",
    "lora_skip_unknown": "Leave out what a LoRA has beyond the model",
}
_FILES = (*PICTURES, *VIDEOS, MANY_PICTURES, "lora")
_SEVERAL = (MANY_PICTURES, "lora")
_WHOLE = ("frame_num", "sample_steps")
# What a plan does not depend on: it is not made anew when these change.
_UNPLANNED = ("prompt", "negative_prompt", "base_seed", "sample_shift", "lora", "lora_strengths")


def theme() -> gr.themes.Base:
    """Gradio's, with the system's fonts: none is fetched."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="lg",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        body_background_fill="#f6f7f9",
        block_border_width="0px",
        block_padding="0px",
        layout_gap="14px",
        form_gap_width="14px",
        block_shadow="none",
        block_label_background_fill="transparent",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_text_color="white",
    )


class Page:
    """The form, and what its controls do.

    Attributes:
        blocks: for Gradio.

    Args:
        service: behind it.
    """

    def __init__(self, service: Service):
        self._service = service
        self._kept: dict[str, str] = {}  # names of uploads, by where Gradio has put them
        self._fields: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}  # what is shown of the files of a field
        with gr.Blocks(
            title="Wan2.1 in less memory", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as self.blocks:
            gr.HTML(_HEADING)
            with gr.Row(elem_classes="columns"):
                with gr.Column(scale=6, elem_classes="column"):
                    with gr.Column(elem_classes="card form-card"):
                        make, message = self._build_form()
                    with gr.Column(elem_classes="card plan-card"):
                        self._build_memory()
                with gr.Column(scale=5, elem_classes="column"):
                    for name in ("now", "memory", "queue"):
                        with gr.Column(elem_classes=f"card {name}-card"):
                            gr.HTML(_live(name))
            with gr.Column(elem_classes="card gallery-card"):
                gr.HTML(_live("gallery"))
            self._connect(make, message)

    # What is there

    def _build_form(self) -> tuple[gr.Button, gr.HTML]:
        fields, tasks = self._fields, self._service.tasks
        first = TASKS[tasks[0]]
        gr.HTML('<div class="wan"><h2>Make</h2></div>')
        fields["task"] = gr.Dropdown(
            [(self._task_name(task), task) for task in tasks], value=tasks[0], label="Task", elem_id="task"
        )
        fields["prompt"] = gr.Textbox(first.prompt, label="Prompt", lines=3, elem_id="prompt")
        for key, title in _TITLES.items():
            self._file(key, title, visible=key in first.inputs)
        with gr.Row():
            fields["size"] = gr.Dropdown(
                list(first.sizes), value=first.size, label="Size", allow_custom_value=True, elem_id="size"
            )
            fields["frame_num"] = gr.Number(
                first.frame_num, label="Frames (4n+1, 16 a second)", precision=0, minimum=1, elem_id="frames"
            )
        with gr.Row():
            fields["sample_steps"] = gr.Number(
                first.sample_steps, label="Steps", precision=0, minimum=1, elem_id="steps"
            )
            fields["base_seed"] = gr.Textbox(
                "", label="Seed", placeholder="random", max_lines=1, elem_id="seed"
            )
        with gr.Accordion("More settings", open=False):
            fields["negative_prompt"] = gr.Textbox(
                "",
                label="Negative prompt",
                placeholder="what the model was published with",
                lines=2,
                elem_id="negative",
            )
            with gr.Row():
                fields["sample_solver"] = gr.Dropdown(
                    list(_choices("sample_solver")), value="unipc", label="Solver", elem_id="solver"
                )
                fields["sample_guide_scale"] = gr.Number(
                    5.0, label="Guidance (1 is none)", elem_id="guidance"
                )
                fields["sample_shift"] = gr.Number(first.sample_shift, label="Shift", elem_id="shift")
            self._file("lora", "LoRA files (.safetensors)", visible=True)
            with gr.Row():
                fields["lora_strengths"] = gr.Textbox(
                    "", label="Their strengths", placeholder="1, 0.8", max_lines=1, elem_id="strengths"
                )
                fields["attention"] = gr.Dropdown(
                    list(_choices("attention")), value="auto", label="Attention", elem_id="attention"
                )
            with gr.Row():
                for key, label in _SWITCHES.items():
                    fields[key] = gr.Checkbox(False, label=label, elem_id=key)
        make = gr.Button("Make video", variant="primary", elem_classes="make", elem_id="make")
        self._again = gr.Button("Take the last seed again", size="sm", elem_classes="plain", elem_id="again")
        message = gr.HTML('<div class="wan" aria-live="polite"></div>', elem_id="message")
        return make, message

    def _build_memory(self) -> None:
        fields = self._fields
        gr.HTML('<div class="wan"><h2>Plan</h2></div>')
        with gr.Row():
            fields["vram_limit"] = gr.Dropdown(
                [("What is free", AUTO), *((f"{card} GiB", str(card)) for card in CARDS)],
                value=AUTO,
                label="GPU memory (a card, or GiB)",
                allow_custom_value=True,
                elem_id="limit",
            )
            fields["memory_mode"] = gr.Dropdown(
                list(MODES), value="hybrid", label="Memory mode", elem_id="mode"
            )
        fields["vram_fraction"] = gr.Slider(
            0.5, 1.0, value=1.0, step=0.05, label="Share of it to use", elem_id="fraction"
        )
        self._plan = gr.HTML(_wan(planning_html(True)), elem_id="plan")

    def _file(self, key: str, title: str, visible: bool) -> None:
        several = key in _SEVERAL
        self._fields[key] = gr.File(
            label=title,
            visible=visible,
            file_count="multiple" if several else "single",
            elem_id=key,
            height=120,
        )
        self._shown[key] = gr.HTML("", elem_classes="thumb", visible=visible)

    def _task_name(self, task: str) -> str:
        facts = TASKS[task]
        if facts.toy:
            return f"{facts.title} · toy, no checkpoint needed"
        missing = "" if task in self._service.checkpoints else " (no checkpoint here)"
        return f"{facts.title} · {task.split('-')[-1]}{missing}"

    # What it does

    def _connect(self, make: gr.Button, message: gr.HTML) -> None:
        fields = self._fields
        every, hidden = list(fields.values()), {"api_visibility": "private", "show_progress": "hidden"}
        planned = [fields[name] for name in fields if name not in _UNPLANNED]
        by_task = [
            fields[name] for name in (*_TITLES, "size", "frame_num", "sample_steps", "sample_shift", "prompt")
        ]
        by_task += [self._shown[name] for name in _TITLES]
        fields["task"].input(self._choose_task, [fields["task"], fields["prompt"]], by_task, **hidden)
        for key in _FILES:
            fields[key].upload(self._check_file(key), fields[key], [fields[key], self._shown[key]], **hidden)
            fields[key].clear(lambda: "", None, self._shown[key], **hidden)
        sent = make.click(self._make, every, message, concurrency_limit=4, **hidden)
        sent.then(None, None, None, js="() => window.wanLook()", **hidden)
        self._again.click(self._last_seed, None, fields["base_seed"], **hidden)
        filled = self.blocks.load(
            self._fill, None, [*every, *(self._shown[key] for key in _FILES), message], **hidden
        )
        filled.then(self._planned, planned, self._plan, concurrency_limit=None, **hidden)
        gr.on(
            [component.change for component in planned],
            self._planned,
            planned,
            self._plan,
            trigger_mode="always_last",
            concurrency_limit=None,
            **hidden,
        )

    def _choose_task(self, task: str, prompt: str) -> list[Any]:
        """The defaults of a task, and the inputs that it has."""
        facts = TASKS[task]
        example = any(prompt == other.prompt for other in TASKS.values())
        return [
            *(gr.update(visible=key in facts.inputs) for key in _TITLES),
            gr.update(choices=list(facts.sizes), value=facts.size, allow_custom_value=facts.free_size),
            gr.update(value=facts.frame_num, interactive=not facts.still),
            facts.sample_steps,
            facts.shift(facts.size),
            facts.prompt if example or not prompt else gr.skip(),
            *(gr.update(visible=key in facts.inputs) for key in _TITLES),
        ]

    def _check_file(self, key: str) -> Any:
        def check(value: str | list[str] | None) -> tuple[Any, str]:
            """Keeps what was uploaded, or says why it can't be used."""
            try:
                names = [self._keep(path, key) for path in _several(value)]
            except InputError as error:
                return None, _wan(error_html(error.told()))
            return gr.skip(), _wan(_thumbs(names))

        return check

    def _keep(self, path: str, key: str) -> str:
        """The name of an upload in the folder. Raises InputError for one that the field cannot be."""
        if path not in self._kept:
            if Path(path).resolve().is_relative_to(EXAMPLES.resolve()):
                return path
            with open(path, "rb") as file:
                self._kept[path] = self._service.upload(file, Path(path).name, key)
        return self._kept[path]

    def _settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a job, from what the controls hold. Raises InputError for what cannot be."""
        facts = TASKS[values["task"]]
        given = {key: value for key, value in values.items() if value not in (None, "", [])}
        strengths = [text.strip() for text in str(given.pop("lora_strengths", "")).split(",")]
        for key in _FILES:
            if key in given and (key == "lora" or key in facts.inputs):
                names = [self._keep(path, key) for path in _several(given[key])]
                given[key] = names if key == "lora" else ",".join(names)
            else:
                given.pop(key, None)
        if "lora" in given:
            strengths += ["1"] * (len(given["lora"]) - len(strengths))
            given["lora"] = [f"{name}:{strength or 1}" for name, strength in zip(given["lora"], strengths)]
            for text in given["lora"]:
                parse_lora(text)
        for key in ("base_seed", *_WHOLE):
            if key in given:
                given[key] = _whole(given[key], key)
        if given.get("vram_limit", AUTO) != AUTO:
            try:
                given["vram_limit"] = float(given["vram_limit"])
            except ValueError:
                raise InputError(
                    "give a number of GiB, such as 8", "vram_limit", given["vram_limit"]
                ) from None
        return given

    def _make(self, *values: Any) -> str:
        """Puts a job into the queue."""
        try:
            settings = self._settings(dict(zip(self._fields, values)))
            if (
                not self._service.has_card
            ):  # there is nothing to be limited: the plan was only to be looked at
                for key in ("vram_limit", "vram_fraction", "memory_mode"):
                    settings.pop(key, None)
            job = self._service.queue.add(self._service.settings(settings))
        except (InputError, OSError) as error:
            return _wan(error_html(error.told() if isinstance(error, InputError) else str(error)))
        ahead = sum(
            other.place < job.place and other.status in ("queued", "running")
            for other in self._service.queue.jobs()
        )
        told = f"In the queue, {ahead} before it." if ahead else "It starts."
        return _wan(f'<p role="status">{told} Seed {job.request["base_seed"]}.</p>')

    async def _planned(self, *values: Any) -> AsyncIterator[str]:
        """The plan of what the controls hold."""
        named = dict(zip((name for name in self._fields if name not in _UNPLANNED), values))
        try:
            settings = await asyncio.to_thread(self._settings, named)
            card, limit = self._service.has_card, self._service.planned_limit(settings.get("vram_limit"))
            found = self._service.plan(settings)
        except InputError as error:
            yield _wan(error_html(error.told()))
            return
        if not found.done():
            yield _wan(planning_html(card))
        message = await asyncio.wrap_future(found)
        if "plan" in message:
            yield _wan(plan_html(message["plan"], card, limit))
        else:
            yield _wan(error_html(message["error"]))

    def _last_seed(self) -> Any:
        """The seed of the newest job."""
        newest = max(self._service.queue.jobs(), key=lambda job: job.created, default=None)
        return str(newest.request["base_seed"]) if newest else gr.skip()

    def _fill(self, request: gr.Request) -> list[Any]:
        """What the controls hold at first: defaults, or the settings of the result that the address names."""
        name = request.query_params.get("like")
        nothing: list[Any] = [gr.skip()] * (len(self._fields) + len(_FILES))
        if not name:
            return [*nothing, gr.skip()]
        try:
            settings = self._service.gallery.get(name).settings
        except KeyError:
            return [*nothing, _wan(error_html(f"there is no result {name}"))]
        if not settings:
            return [*nothing, _wan(error_html(f"{name} has no settings in it"))]
        return self._filled(settings, same_seed=request.query_params.get("seed") == "same")

    def _filled(self, settings: Mapping[str, Any], same_seed: bool) -> list[Any]:
        facts = TASKS[settings["task"]]
        values: list[Any] = []
        missing = []
        files: dict[str, list[str]] = {}
        for key in _FILES:
            texts = settings.get(key) or []
            texts = [parse_lora(text)[0] for text in texts] if key == "lora" else str(texts or "").split(",")
            files[key] = [text for text in texts if text and self._service.rules.may_read(text)]
            missing += [text for text in texts if text and text not in files[key]]
        for key in self._fields:
            if key in _FILES:
                there = files[key] if key in _SEVERAL else next(iter(files[key]), None)
                values.append(gr.update(value=there or None, visible=key == "lora" or key in facts.inputs))
            elif key == "lora_strengths":
                values.append(", ".join(f"{parse_lora(text)[1]:g}" for text in settings.get("lora", ())))
            elif key == "base_seed":
                values.append(str(settings[key]) if same_seed else "")
            elif key == "size":
                values.append(
                    gr.update(
                        choices=list(facts.sizes), value=settings[key], allow_custom_value=facts.free_size
                    )
                )
            elif key in ("vram_limit", "vram_fraction", "memory_mode"):
                values.append(gr.skip())
            else:
                values.append(settings.get(key, False if key in _SWITCHES else ""))
        thumbs = [gr.update(value=_wan(_thumbs(files[key])), visible=True) for key in _FILES]
        told = f"Upload these again: {', '.join(missing)}" if missing else ""
        return [*values, *thumbs, _wan(error_html(told)) if told else _wan("<p>Settings are taken over.</p>")]


_HEADING = (
    '<div class="wan wan-head"><div><h1>Wan2.1</h1><p>in less memory, with the same picture</p></div>'
    '<div data-live="device"></div></div>'
    '<div class="wan"><p class="bad" data-said role="alert"></p>'
    '<p class="bad lost-note" role="alert">The server does not answer; what it was making goes on when it is back.'
    "</p></div>"
)


def _live(name: str) -> str:
    """A part that page.js fills."""
    title = name.capitalize()
    return (
        f'<section class="wan" aria-label="{title}"><h2>{title}</h2><div data-live="{name}"></div></section>'
    )


def _wan(html: str) -> str:
    return f'<div class="wan">{html}</div>'


def _choices(name: str) -> Any:
    return Request.__dataclass_fields__[name].metadata["choices"]


def _several(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _whole(value: Any, key: str) -> int:
    try:
        return int(str(value).strip())
    except ValueError:
        raise InputError("give a whole number", key, value) from None


def _thumbs(names: list[str]) -> str:
    """What is shown of uploads: pictures and videos; of others and of examples the name."""
    shown = []
    for name in names:
        path = Path(name)
        kept, suffix = path.parent.name == UPLOADS, path.suffix.lower()
        if kept and suffix in (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"):
            shown.append(f'<img src="/{UPLOADS}/{escape(path.name)}" alt="what was uploaded">')
        elif kept and suffix in (".mp4", ".mov", ".webm"):
            shown.append(
                f'<video src="/{UPLOADS}/{escape(path.name)}" controls muted aria-label="what was uploaded"></video>'
            )
        else:
            shown.append(f'<span class="quiet">{escape(path.name)}</span>')
    return " ".join(shown)
