"""The queue as JSON over HTTP: for scripts, and for the buttons of the page. docs/page.md describes it."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from ..utils.errors import InputError
from .jobs import MANY_PICTURES, PICTURES, UPLOADS, VIDEOS, Job, settings_of
from .queue import WrongStatus
from .service import Service
from .views import Views

MOST_UPLOADED = 4 * 2**30  # bytes of a file
_HERE = Path(__file__).parent / "static"
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}


def build_app(service: Service) -> FastAPI:
    """The application that answers for a service."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    views = Views(service)

    @app.exception_handler(InputError)
    async def bad_input(_: Request, error: InputError) -> Response:
        return _line(422, error.told())

    @app.exception_handler(KeyError)
    async def unknown(_: Request, error: KeyError) -> Response:
        return _line(404, f"there is no {error.args[0]}")

    @app.exception_handler(WrongStatus)
    async def wrong_status(_: Request, error: WrongStatus) -> Response:
        return _line(409, str(error))

    @app.exception_handler(_BadBody)
    async def bad_body(_: Request, error: _BadBody) -> Response:
        return _line(400, str(error))

    @app.exception_handler(OSError)
    async def failed(_: Request, error: OSError) -> Response:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return _line(507 if full else 500, error.strerror or str(error))

    @app.post("/jobs")
    async def add(request: Request) -> Response:
        settings = service.settings(await _object(request))
        job = await asyncio.to_thread(service.queue.add, settings)
        return JSONResponse(_told(service, job), 201, {"location": f"/jobs/{job.id}"})

    @app.get("/jobs")
    async def jobs() -> Response:
        told = [_told(service, job) for job in service.queue.jobs()]
        return JSONResponse({"jobs": told, "trouble": service.queue.trouble})

    @app.get("/jobs/{name}")
    async def job(name: str) -> Response:
        return JSONResponse(_told(service, service.queue.get(name)))

    @app.delete("/jobs/{name}")
    async def forget(name: str) -> Response:
        await asyncio.to_thread(service.queue.remove, name)
        return Response(status_code=204)

    def action(verb: str, do: Callable[[str], Job]) -> None:
        @app.post(f"/jobs/{{name}}/{verb}", name=verb)
        async def act(name: str) -> Response:
            return JSONResponse(_told(service, await asyncio.to_thread(do, name)))

    for verb in ("cancel", "pause", "resume"):
        action(verb, getattr(service.queue, verb))
    action("sooner", lambda name: service.queue.move(name, -1))
    action("later", lambda name: service.queue.move(name, 1))

    @app.get("/jobs/{name}/preview")
    async def preview(name: str) -> Response:
        progress = service.queue.progress.get(service.queue.get(name).id)
        if not progress or not progress.preview:
            raise KeyError("preview")
        path = Path(progress.preview[0])
        try:
            picture = path.read_bytes()  # at once: the next one takes its place at any time
        except FileNotFoundError:
            raise KeyError("preview") from None
        kind = f"image/{path.suffix.removeprefix('.')}"
        return Response(picture, media_type=kind, headers={"cache-control": "no-store"})

    @app.post("/plan")
    async def plan(request: Request) -> Response:
        found = await asyncio.shield(asyncio.wrap_future(service.plan(await _object(request))))
        return JSONResponse(found["plan"]) if "plan" in found else _line(422, found["error"])

    @app.post("/uploads")
    async def upload(request: Request) -> Response:
        field, name = request.query_params.get("field", ""), request.query_params.get("name", "")
        if field not in (*PICTURES, *VIDEOS, MANY_PICTURES, "lora") or not name:
            raise _BadBody("say ?field=FIELD&name=FILE of what is uploaded")
        if int(request.headers.get("content-length") or MOST_UPLOADED + 1) > MOST_UPLOADED:
            return _line(413, "too large, or of no stated length")
        with tempfile.TemporaryFile(dir=service.rules.folder / UPLOADS) as file:
            async for piece in request.stream():
                file.write(piece)
            file.seek(0)
            return JSONResponse({"path": await asyncio.to_thread(service.upload, file, name, field)}, 201)

    @app.get(f"/{UPLOADS}/{{name}}")
    async def uploaded(name: str) -> Response:
        return _inside(service.rules.folder / UPLOADS, name)

    @app.get("/results")
    async def results() -> Response:
        found = await asyncio.to_thread(service.gallery.results)
        return JSONResponse({"results": [vars(result) for result in found]})

    @app.get("/results/{name}")
    async def result(name: str) -> Response:
        return FileResponse(await asyncio.to_thread(service.gallery.path, name))

    @app.get("/results/{name}/poster")
    async def poster(name: str) -> Response:
        return Response(await asyncio.to_thread(service.gallery.poster, name), media_type="image/jpeg")

    @app.delete("/results/{name}")
    async def delete(name: str) -> Response:
        await asyncio.to_thread(service.gallery.delete, name)
        return Response(status_code=204)

    @app.get("/live")
    async def live(known: str = "") -> Response:
        return JSONResponse(await asyncio.to_thread(views.since, known))

    for name, kind in _FILES.items():
        _serve(app, name, kind)
    return app


def _serve(app: FastAPI, name: str, kind: str) -> None:
    @app.get(f"/own/{name}", name=name)
    async def own() -> Response:
        return FileResponse(_HERE / name, media_type=kind, headers={"cache-control": "no-cache"})


def _told(service: Service, job: Job) -> dict[str, Any]:
    """A job as it is told to the outside."""
    names = ("id", "status", "created", "started", "ended", "error", "notes")
    values = {name: getattr(job, name) for name in names} | {"settings": settings_of(job.request)}
    result = Path(job.result) if job.result else None
    inside = result is not None and result.parent == service.rules.folder
    values |= {"result": job.result, "url": f"/results/{result.name}" if inside else None}
    progress = service.queue.progress.get(job.id)
    values["progress"] = progress.to_json() if progress else None
    return values


def _inside(folder: Path, name: str) -> Response:
    """A file of a folder, not below it."""
    if name not in {path.name for path in folder.iterdir() if path.is_file()}:
        raise KeyError(name)
    return FileResponse(folder / name)


class _BadBody(Exception):
    """What was sent is not what is expected."""


async def _object(request: Request) -> dict[str, Any]:
    """The JSON object that was sent."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise _BadBody("send a JSON object, as application/json")
    try:
        values = await request.json()
    except ValueError as error:
        raise _BadBody(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise _BadBody("not a JSON object")
    return values


def _line(status: int, line: str) -> Response:
    return JSONResponse({"error": line}, status)
