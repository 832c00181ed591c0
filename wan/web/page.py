"""The page: the form in Gradio, the live parts beside it as containers that static/page.js fills."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from leanwan.errors import InputError

from .api import HANDLERS, build_app
from .form import UNPLANNED, Form, told, wan
from .gate import GatedBlocks
from .jobs import FILES
from .plan_html import error_html, plan_html, planning_html
from .service import Service

HEAD = '<link rel="stylesheet" href="/own/page.css"><script src="/own/page.js" defer></script>'


def theme() -> gr.themes.Base:
    """Gradio's base theme with the system's fonts, so that none is fetched."""
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


def build_site(service: Service) -> Any:
    """The page and the JSON interface of a service, as an ASGI application to be put behind a Guard."""
    os.environ["GRADIO_TEMP_DIR"] = str(service.rules.gradio_folder)
    return gr.mount_gradio_app(
        build_app(service),
        Page(service).blocks,
        path="/",
        app_kwargs={"exception_handlers": HANDLERS},
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        allowed_paths=[str(path) for path in service.rules.readable],
        theme=theme(),
        head=HEAD,
    )


class Page:
    """The form, and the functions of its controls.

    Attributes:
        blocks: the page, for Gradio to mount.

    Args:
        service: of the page.
    """

    def __init__(self, service: Service):
        self._service = service
        self._form = Form(service)
        with GatedBlocks(
            title="Wan2.1 in less memory", analytics_enabled=False, delete_cache=(3600, 86400)
        ) as self.blocks:
            gr.HTML(_HEADING)
            with gr.Row(elem_classes="columns"):
                with gr.Column(scale=6, elem_classes="column"):
                    with gr.Column(elem_classes="card form-card"):
                        gr.HTML(wan("<h2>Make</h2>"))
                        self._form.build_job()
                        self._make_button = gr.Button(
                            "Make video", variant="primary", elem_classes="make", elem_id="make"
                        )
                        self._needs = gr.HTML('<div class="wan" aria-live="polite"></div>', elem_id="needs")
                        self._again = gr.Button(
                            "Take the last seed again", size="sm", elem_classes="plain", elem_id="again"
                        )
                        self._message = gr.HTML(
                            '<div class="wan" aria-live="polite"></div>', elem_id="message"
                        )
                    with gr.Column(elem_classes="card plan-card"):
                        gr.HTML(wan("<h2>Plan</h2>"))
                        self._form.build_memory()
                        self._plan = gr.HTML(wan(planning_html(True)), elem_id="plan")
                with gr.Column(scale=5, elem_classes="column"):
                    for name in ("now", "memory", "queue"):
                        with gr.Column(elem_classes=f"card {name}-card"):
                            gr.HTML(_live(name))
            with gr.Column(elem_classes="card gallery-card"):
                gr.HTML(_live("gallery"))
            self._connect()

    def _connect(self) -> None:
        form, fields = self._form, self._form.fields
        every, hidden = list(fields.values()), {"api_visibility": "private", "show_progress": "hidden"}
        planned = [fields[name] for name in fields if name not in UNPLANNED]
        fields["task"].input(form.choose_task, [fields["task"], fields["prompt"]], form.by_task, **hidden)
        for key in FILES:
            fields[key].upload(form.file_check(key), fields[key], [fields[key], form.shown[key]], **hidden)
            fields[key].clear(lambda: "", None, form.shown[key], **hidden)
        sent = self._make_button.click(self._make, every, self._message, concurrency_limit=4, **hidden)
        sent.then(None, None, None, js="() => window.wanLook()", **hidden)
        self._again.click(self._last_seed, None, fields["base_seed"], **hidden)
        filled = self.blocks.load(
            self._fill, None, [*every, *(form.shown[key] for key in FILES), self._message], **hidden
        )
        filled.then(self._planned, planned, self._plan, concurrency_limit=None, **hidden)
        may_make = [self._make_button, self._needs]
        filled.then(self._may_make, every, may_make, concurrency_limit=None, **hidden)
        gr.on(
            [component.change for component in every],
            self._may_make,
            every,
            may_make,
            trigger_mode="always_last",
            concurrency_limit=None,
            **hidden,
        )
        gr.on(
            [component.change for component in planned],
            self._planned,
            planned,
            self._plan,
            trigger_mode="always_last",
            concurrency_limit=None,
            **hidden,
        )

    def _settings(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The settings of the job that the controls describe. Raises InputError, or OSError."""
        settings = self._form.settings(dict(zip(self._form.fields, values)))
        if not self._service.has_card:  # there is nothing to limit: the plan was only for display
            for key in ("vram_limit", "vram_fraction", "memory_mode"):
                settings.pop(key, None)
        return self._service.settings(settings)

    def _may_make(self, *values: Any) -> tuple[Any, str]:
        """Enables the button if the settings can work, or disables it and says why they cannot."""
        try:
            self._service.rules.request(self._settings(values))
        except (InputError, OSError) as error:
            return gr.update(interactive=False), wan(error_html(told(error)))
        return gr.update(interactive=True), ""

    def _make(self, *values: Any) -> str:
        """Puts a job into the queue."""
        try:
            job = self._service.queue.add(self._settings(values))
        except (InputError, OSError) as error:
            return wan(error_html(told(error)))
        ahead = sum(
            other.place < job.place and other.status in ("queued", "running")
            for other in self._service.queue.jobs()
        )
        line = f"In the queue, {ahead} before it." if ahead else "It starts."
        return wan(f'<p role="status">{line} Seed {job.request["base_seed"]}.</p>')

    async def _planned(self, *values: Any) -> AsyncIterator[str]:
        """The plan for the values of the controls, as HTML."""
        named = dict(zip((name for name in self._form.fields if name not in UNPLANNED), values))
        try:
            settings = await asyncio.to_thread(self._form.settings, named)
            card, limit = self._service.has_card, self._service.planned_limit(settings.get("vram_limit"))
            found = self._service.plan(settings)
        except (InputError, OSError) as error:
            yield wan(error_html(told(error)))
            return
        if not found.done():
            yield wan(planning_html(card))
        message = await asyncio.shield(asyncio.wrap_future(found))  # other tabs may wait for the same plan
        if "plan" in message:
            yield wan(plan_html(message["plan"], card, limit))
        else:
            yield wan(error_html(message["error"]))

    def _last_seed(self) -> Any:
        """The seed of the newest job."""
        newest = max(self._service.queue.jobs(), key=lambda job: (job.number, job.created), default=None)
        return str(newest.request["base_seed"]) if newest else gr.skip()

    def _fill(self, request: gr.Request) -> list[Any]:
        """Fills the controls as the page opens: with defaults, or the settings of the result that its address names."""
        name = request.query_params.get("like")
        nothing: list[Any] = [gr.skip()] * (len(self._form.fields) + len(FILES))
        if not name:
            return [*nothing, gr.skip()]
        try:
            settings = self._service.gallery.get(name).settings
        except KeyError:
            return [*nothing, wan(error_html(f"there is no result {name}"))]
        if not settings:
            return [*nothing, wan(error_html(f"{name} has no settings in it"))]
        return self._form.filled(settings, same_seed=request.query_params.get("seed") == "same")


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
