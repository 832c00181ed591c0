"""The form: its controls, and their values to and from the settings of a job."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from leanwan.errors import InputError

from ..planning.planner import MODES
from ..run.request import Request
from ..tasks import TASKS
from ..weights.lora import parse_lora
from .jobs import FILES, MANY_PICTURES, TYPES, UPLOADS
from .plan_html import error_html
from .service import CARDS, Service

AUTO = "auto"
TITLES = {
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
_SEVERAL = (MANY_PICTURES, "lora")
_WHOLE = ("frame_num", "sample_steps")
# Fields that the plan does not depend on: it is not made anew when they change.
UNPLANNED = ("prompt", "negative_prompt", "base_seed", "sample_shift", "lora", "lora_strengths", "owed")
# Fields that may be empty: empty has a meaning of its own, or the task decides whether the field is needed.
_EMPTY = ("prompt", "negative_prompt", "base_seed", "lora_strengths", "owed", *FILES)


class Form:
    """The controls of a job, each under the name of its setting.

    Attributes:
        fields: the controls; among them `lora_strengths` beside `lora`, and `owed`: by field, the files that a
            result's settings name but that are not here.
        shown: the HTML that shows the files of a field, by field.

    Args:
        service: of the page.
    """

    def __init__(self, service: Service):
        self._service = service
        # (Gradio's path of an upload, its field) -> its name in the folder, or the error that refused it.
        self._kept: dict[tuple[str, str], str | InputError] = {}
        self.fields: dict[str, Any] = {}
        self.shown: dict[str, Any] = {}

    # Controls

    def build_job(self) -> None:
        """Puts the controls of the content and its sampling into the open block."""
        fields, tasks = self.fields, self._service.tasks
        first = TASKS[tasks[0]]
        fields["task"] = gr.Dropdown(
            [(self._task_name(task), task) for task in tasks], value=tasks[0], label="Task", elem_id="task"
        )
        fields["owed"] = gr.State({})
        fields["prompt"] = gr.Textbox(first.prompt, label="Prompt", lines=3, elem_id="prompt")
        for key, title in TITLES.items():
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
                    first.sample_guide_scale, label="Guidance (1 is none)", elem_id="guidance"
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

    def build_memory(self) -> None:
        """Puts the controls of the memory plan into the open block."""
        fields = self.fields
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

    def _file(self, key: str, title: str, visible: bool) -> None:
        several = key in _SEVERAL
        self.fields[key] = gr.File(
            label=title,
            visible=visible,
            file_count="multiple" if several else "single",
            elem_id=key,
            height=120,
        )
        self.shown[key] = gr.HTML("", elem_classes="thumb", visible=visible)

    def _task_name(self, task: str) -> str:
        facts = TASKS[task]
        if facts.toy:
            missing = ", no checkpoint needed"
        else:
            missing = "" if task in self._service.checkpoints else " (no checkpoint here)"
        return f"{facts.title} · {task.split('-')[-1]}{missing}"

    # Values

    @property
    def by_task(self) -> list[Any]:
        """The components that `choose_task` updates."""
        names = (*TITLES, "size", "frame_num", "sample_steps", "sample_shift", "sample_guide_scale", "prompt")
        return [*(self.fields[name] for name in names), *(self.shown[name] for name in TITLES)]

    def choose_task(self, task: str, prompt: str) -> list[Any]:
        """Updates of `by_task`: a task's defaults, and only its own inputs visible."""
        facts = TASKS[task]
        example = any(prompt == other.prompt for other in TASKS.values())
        return [
            *(gr.update(visible=key in facts.inputs) for key in TITLES),
            gr.update(choices=list(facts.sizes), value=facts.size, allow_custom_value=facts.free_size),
            gr.update(value=facts.frame_num, interactive=not facts.still),
            facts.sample_steps,
            facts.shift(facts.size),
            facts.sample_guide_scale,
            facts.prompt if example or not prompt else gr.skip(),
            *(gr.update(visible=key in facts.inputs) for key in TITLES),
        ]

    def file_check(self, key: str) -> Any:
        """The function that handles uploads to a field."""

        def check(value: str | list[str] | None) -> tuple[Any, str]:
            """Keeps the uploads, or says why they are refused: a refused one stays in the field and blocks the job."""
            try:
                names = [self._keep(path, key) for path in _several(value)]
            except (InputError, OSError) as error:
                return gr.skip(), wan(error_html(told(error)))
            return gr.skip(), wan(_thumbs(names))

        return check

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of a job, from the values of the controls. Raises InputError for values that cannot work."""
        facts = TASKS[values["task"]]
        for key, value in values.items():
            if value in (None, "") and key not in _EMPTY:
                raise InputError("is empty, give a value", key)
        for key, names in (values.get("owed") or {}).items():
            if not values.get(key) and (key == "lora" or key in facts.inputs):
                wrong = "is not here; upload it again, or open the page anew without these settings"
                raise InputError(wrong, key, ", ".join(names))
        given = {key: value for key, value in values.items() if value not in (None, "", []) and key != "owed"}
        strengths = [text.strip() for text in str(given.pop("lora_strengths", "")).split(",")]
        for key in FILES:
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

    def filled(self, settings: Mapping[str, Any], same_seed: bool) -> list[Any]:
        """Updates that fill in settings: of all controls, of what is shown of files, and of the message line."""
        facts = TASKS[settings["task"]]
        values: list[Any] = []
        files: dict[str, list[str]] = {}
        owed: dict[str, list[str]] = {}
        for key in FILES:
            texts = settings.get(key) or []
            texts = [parse_lora(text)[0] for text in texts] if key == "lora" else str(texts or "").split(",")
            names = [text for text in texts if text]
            here = all(map(self._service.rules.may_read, names))
            files[key] = names if here else []
            if not here:
                owed[key] = names
        for key in self.fields:
            if key in FILES:
                there = files[key] if key in _SEVERAL else next(iter(files[key]), None)
                values.append(gr.update(value=there or None, visible=key == "lora" or key in facts.inputs))
            elif key == "owed":
                values.append(owed)
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
        thumbs = [gr.update(value=wan(_thumbs(files[key])), visible=True) for key in FILES]
        return [*values, *thumbs, wan("<p>Settings are taken over.</p>")]

    def _keep(self, path: str, key: str) -> str:
        """Keeps an upload and returns its name in the folder. Raises InputError if the field cannot take it."""
        if (path, key) not in self._kept:
            try:
                with open(path, "rb") as file:
                    self._kept[path, key] = self._service.upload(file, Path(path).name, key)
            except InputError as error:
                self._kept[path, key] = error
        kept = self._kept[path, key]
        if isinstance(kept, InputError):
            raise InputError(kept.problem, kept.fields, kept.value)
        return kept


def told(error: InputError | OSError) -> str:
    """An error as one line."""
    return error.told() if isinstance(error, InputError) else error.strerror or str(error)


def wan(html: str) -> str:
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
    """HTML that shows files: uploaded pictures and videos as such, other uploads and examples by name."""
    shown = []
    for name in names:
        path = Path(name)
        kept, kind = path.parent.name == UPLOADS, TYPES.get(path.suffix.lower(), "")
        if kept and kind.startswith("image/"):
            shown.append(f'<img src="/{UPLOADS}/{escape(path.name)}" alt="what was uploaded">')
        elif kept and kind.startswith("video/"):
            shown.append(
                f'<video src="/{UPLOADS}/{escape(path.name)}" controls muted aria-label="what was uploaded"></video>'
            )
        else:
            shown.append(f'<span class="quiet">{escape(path.name)}</span>')
    return " ".join(shown)
