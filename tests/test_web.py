"""The page's queue, jobs, chart, plans and JSON interface, without a browser."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from leanwan.errors import InputError
from wan.tasks import TASKS
from wan.web import queue as web_queue
from wan.web.chart import chart
from wan.web.guard import Guard
from wan.web.jobs import Rules, read_job, request_from, settings_of
from wan.web.memory_samples import KEPT, Series
from wan.web.queue import Queue, WrongStatus

ROOT = Path(__file__).parents[1]
TOY = {"task": "t2v-tiny", "base_seed": 7, "prompt": "a red ball", "frame_num": 5, "sample_steps": 2}


class FakeChild:
    """Stands for the worker's process: keeps what it is sent, and says what the test says."""

    made: list["FakeChild"] = []

    def __init__(self, module, arguments, on_message, on_exit):
        self.sent, self.killed, self.say, self.on_exit = [], False, on_message, on_exit
        FakeChild.made.append(self)

    def send(self, message):
        self.sent.append(message)

    def kill(self):
        self.killed = True
        self.on_exit(-9)

    def finish(self, seconds=None):
        self.finished = True

    @property
    def runs(self):
        return [message["run"] for message in self.sent if "run" in message]


@pytest.fixture
def fake(monkeypatch):
    FakeChild.made = []
    monkeypatch.setattr(web_queue, "Child", FakeChild)
    return FakeChild.made


@pytest.fixture
def queue(fake, tmp_path):
    (tmp_path / "out" / "uploads").mkdir(parents=True)
    queue = Queue(Rules(tmp_path / "out"))
    yield queue
    queue.close()


def statuses(queue):
    return {job.id: job.status for job in queue.jobs()}


def test_jobs_run_one_after_the_other_in_their_order(queue, fake):
    first, second, third = (queue.add(TOY) for _ in range(3))
    (child,) = fake
    assert child.runs == [first.id]
    queue.move(third.id, -1)
    assert [job.id for job in queue.jobs()] == [first.id, third.id, second.id]
    child.say({"ended": first.id, "how": "done", "path": "x.mp4"})
    assert child.runs == [first.id, third.id] and queue.get(first.id).status == "done"
    child.say({"ended": third.id, "how": "failed", "error": "a line"})
    assert child.runs[-1] == second.id and queue.get(third.id).error == "a line"


def test_a_paused_job_waits_and_goes_on_before_those_behind_it(queue, fake):
    first, second, third = (queue.add(TOY) for _ in range(3))
    (child,) = fake
    assert queue.pause(first.id).status == "pausing" and child.sent[-1] == {"pause": first.id}
    child.say({"ended": first.id, "how": "paused"})
    assert statuses(queue) == {first.id: "paused", second.id: "running", third.id: "queued"}
    queue.resume(first.id)
    assert child.runs == [first.id, second.id]
    child.say({"ended": second.id, "how": "done", "path": "x.mp4"})
    assert child.runs == [first.id, second.id, first.id]
    assert queue.pause(third.id).status == "paused"


def test_a_cancelled_job_ends_at_once_and_leaves_nothing(queue, fake):
    first, second = queue.add(TOY), queue.add(TOY)
    state = Path(first.request["save_file"] + ".1a2b3c4d.state")
    state.write_text("on its way")
    preview = queue.rules.folder / ".wan" / "previews" / (state.stem + ".webp")
    preview.write_text("seen")
    queue.cancel(first.id)
    assert fake[0].killed and not state.exists() and not preview.exists()
    assert len(fake) == 2 and fake[1].runs == [second.id]  # another process, with the next job
    fake[0].say({"ended": first.id, "how": "done", "path": "x"})  # what the dead one said is late
    assert statuses(queue) == {first.id: "cancelled", second.id: "running"}


def test_a_process_that_dies_fails_its_job_alone(queue, fake):
    first, second = queue.add(TOY), queue.add(TOY)
    fake[0].on_exit(-11)
    assert queue.get(first.id).status == "failed" and "signal 11" in queue.get(first.id).error
    assert fake[1].runs == [second.id]
    queue.resume(first.id)
    assert queue.get(first.id).status == "queued"


def test_what_does_not_fit_a_status_is_refused(queue, fake):
    first, second = queue.add(TOY), queue.add(TOY)
    for act in (queue.resume, queue.remove, lambda name: queue.move(name, 1)):
        with pytest.raises(WrongStatus):
            act(first.id)
    queue.cancel(second.id)
    for act in (queue.cancel, queue.pause, queue.resume):
        with pytest.raises(WrongStatus):
            act(second.id)
    queue.remove(second.id)
    with pytest.raises(KeyError):
        queue.get(second.id)


def test_jobs_outlive_the_server(queue, fake):
    first, second, third = (queue.add(TOY) for _ in range(3))
    queue.pause(third.id)
    with pytest.raises(InputError, match="another server uses it"):
        Queue(queue.rules)
    (queue.rules.folder / ".wan" / "jobs" / "broken.json").write_text("{")
    queue._owner.release()  # as when it is killed
    again = Queue(queue.rules)
    try:
        assert fake[-1].runs == [first.id]
        assert statuses(again) == {first.id: "running", second.id: "queued", third.id: "paused"}
        assert again.get(second.id).request == second.request
    finally:
        again.close()


@pytest.mark.parametrize(
    "part, name, value",
    [
        ("", "status", "flying"),
        ("", "id", "other"),
        ("", "place", None),
        ("", "place", float("nan")),
        ("", "place", 10**400),
        ("", "ended", "now"),
        ("", "notes", [1]),
        ("", "notes", None),
        ("", "error", "\ud800"),
        ("", "request", []),
        ("request", "task", "t3v"),
        ("request", "size", 7),
        ("request", "save_file", None),
        ("request", "base_seed", -1),
        ("request", "memory", {"vae_cpu": "yes"}),
    ],
)
def test_a_damaged_job_is_put_aside(queue, fake, part, name, value):
    """The others go on."""
    damaged, whole = queue.add(TOY), queue.add(TOY)
    path = queue.rules.folder / ".wan" / "jobs" / f"{damaged.id}.json"
    values = json.loads(path.read_text())
    (values[part] if part else values)[name] = value
    path.write_text(json.dumps(values))
    queue._owner.release()
    again = Queue(queue.rules)
    try:
        assert statuses(again) == {whole.id: "running"} and path.with_suffix(".damaged").exists()
    finally:
        again.close()


def test_a_job_file_gives_its_request_back(queue):
    settings = TOY | {"vram_limit": 6.5, "dit_chunk": 64, "task": "vace-tiny", "negative_prompt": "noise"}
    job = queue.add(settings)
    read = read_job(queue.rules.folder / ".wan" / "jobs" / f"{job.id}.json")
    request = request_from(read.request)
    assert request.memory.dit_chunk == 64 and "dit_chunk" not in request.planned
    assert request == request_from(job.request) and request.negative_prompt == "noise"
    told = settings_of(read.request)
    assert settings.items() <= told.items()
    assert queue.rules.request({k: v for k, v in told.items() if k != "src_ref_images"}).base_seed == 7


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"task": "t3v"}, "task t3v: choose one of"),
        ({"frame_num": 6}, "frame_num 6: give 4n"),
        ({"frame_num": 5.5}, "frame_num 5.5: give a whole number"),
        ({"sample_steps": True}, "sample_steps True: give a whole number"),
        ({"sample_steps": 0}, "sample_steps 0: give 1 to 1000"),
        ({"size": [128, 96]}, "give text"),
        ({"task": "t2v-14B"}, "ckpt_dir: give the directory"),
        ({"ckpt_dir": "/etc"}, "ckpt_dir /etc: not one that this server was started with"),
        ({"save_file": "/tmp/x.mp4"}, "save_file: no such setting"),
        ({"offload_folder": "/tmp"}, "offload_folder: no such setting"),
        ({"resume": "x"}, "resume: no such setting"),
        ({"use_prompt_extend": True}, "use_prompt_extend: no such setting"),
        ({"device": "cuda"}, "device: no such setting"),
        ({"bogus": 1, "other": 2}, "bogus and other: no such setting"),
        ({"vae_cpu": "yes"}, "vae_cpu yes: of the wrong kind"),
        ({"dit_chunk": True}, "dit_chunk True: of the wrong kind"),
        ({"vram_limit": "much"}, "vram_limit much: give auto or"),
        ({"lora": "a.safetensors"}, "lora: give a list"),
        ({"lora": ["/etc/passwd"]}, "lora /etc/passwd: is outside of the uploads"),
        ({"task": "i2v-tiny", "image": "/etc/passwd"}, "image /etc/passwd: is outside of the uploads"),
        ({"task": "i2v-tiny", "image": "uploads/../../x.png"}, "is outside of the uploads"),
        ({"task": "i2v-tiny", "image": "uploads/none.png"}, "no such file"),
        ({"task": "i2v-tiny", "image": "uploads/link.png"}, "is outside of the uploads"),
        ({"task": "i2v-tiny", "image": "uploads/bad.png"}, "not a readable image"),
        ({"task": "vace-tiny", "src_video": "uploads/bad.png"}, "not a readable video"),
        ({"task": "vace-tiny", "src_ref_images": "uploads/bad.png"}, "not a readable image"),
        ({"lora": ["uploads/bad.png:0.5"]}, "lora"),
        ({"image": 7}, "image: give the name of a file"),
        ({"prompt": None}, "prompt: missing, t2v-tiny needs it"),
    ],
)
def test_settings_are_checked_as_the_command_line_checks(queue, settings, line):
    uploads = queue.rules.folder / "uploads"
    (uploads / "bad.png").write_text("no picture")
    (uploads / "link.png").symlink_to("/etc/hosts")
    with pytest.raises(InputError) as error:
        queue.add({"task": "t2v-tiny", "prompt": "a ball"} | settings)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not queue.jobs()


def test_series_stay_short_and_keep_their_stages():
    series = Series()
    for number in range(5 * KEPT):
        series.add("denoise" if number % 500 else "text", {"ram": number})
    assert len(series.points) <= KEPT + 5 and {stage for _, stage, _ in series.points} == {"denoise", "text"}


def test_the_chart_tells_memory_against_the_plan():
    gib = 2**30
    series = Series({"text": gib, "denoise": 3 * gib}, 4 * gib)
    for stage, reserved in (("text", gib // 2), ("denoise", 2 * gib), ("denoise", 5 * gib // 2)):
        series.add(stage, {"ram": gib, "reserved": reserved, "allocated": reserved - 1000})
    html = chart(series)
    assert "GPU memory: reserved 2.50 GiB, at most 2.50" in html and "planned at most 3.00 GiB" in html
    assert "limit 4.00 GiB" in html and html.count('class="planned" d=') == 2 and "RAM: this run 1.00" in html
    assert "GPU" not in chart(Series(points=[(0.0, "text", {"ram": gib})]))


def answered(app, **request):
    """(status, headers) of an ASGI application."""
    import asyncio

    told = {}

    async def send(message):
        if message["type"] == "http.response.start":
            told.update(status=message["status"], headers=dict(message["headers"]))

    async def plain(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    headers = [(name.encode(), value.encode()) for name, value in request.pop("headers", {}).items()]
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers} | request
    asyncio.run(Guard(plain, **app)(scope, None, send))
    return told["status"], told["headers"]


def test_the_guard():
    local = {"auth": None, "local": True}
    status, headers = answered(local, headers={"host": "127.0.0.1:7860"})
    assert status == 200 and b"default-src 'self'" in headers[b"content-security-policy"]
    assert answered(local, headers={"host": "evil.example:7860"})[0] == 403  # a name that was pointed here
    foreign = {"host": "localhost:7860", "origin": "https://evil.example"}
    assert answered(local, headers=foreign, method="POST")[0] == 403
    own = {"host": "localhost:7860", "origin": "http://localhost:7860"}
    assert answered(local, headers=own, method="POST")[0] == 200
    closed, host = {"auth": "a:b", "local": False}, {"host": "any"}
    assert answered(closed, headers=host)[0] == 401
    assert answered(closed, headers=host | {"authorization": "Basic YTpj"})[0] == 401
    assert answered(closed, headers=host | {"authorization": "Basic YTpi"})[0] == 200


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: lets other machines in"),
        (["--port", "70000"], "--port 70000: give 0 to 65535"),
        (["--auth", "me"], "--auth: give USER:PASSWORD"),
        (["--auth", ":"], "--auth: give USER:PASSWORD"),
        (["--auth", "me:x", "--auth_file", "x"], "--auth and --auth_file: give one of them"),
        (["--auth_file", "none.txt"], "--auth_file none.txt: cannot be read (No such file"),
        (["--auth_file", "/"], "--auth_file /: cannot be read ("),
        (["--auth_file", "/dev/null"], "--auth_file /dev/null: give USER:PASSWORD in its first line"),
        (["--ckpt_dir", "nowhere"], "--ckpt_dir nowhere: no such directory"),
        (["--out", "/dev/null/x"], "--out /dev/null/x: cannot be made a folder"),
    ],
)
def test_bad_arguments_take_one_line(arguments, line, capsys, tmp_path, monkeypatch):
    from wan.web.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main([*arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("wan-web: " + line) and error.count("\n") == 1


def password_of(*arguments):
    """What the command asks for: USER:PASSWORD, or None."""
    from wan.web import __main__ as command

    return command._auth(command.build_parser().parse_args(arguments))


def test_the_password_need_not_be_an_argument(tmp_path, monkeypatch, capsys):
    file = tmp_path / "auth"
    for text, found in [
        (b"me:secret", "me:secret"),
        (b"me:se:cret \r\nother:line\n", "me:se:cret "),
        (b"\xef\xbb\xbfm\xc3\xa9:x\n", "m\u00e9:x"),
    ]:
        file.write_bytes(text)
        assert password_of("--auth_file", str(file)) == found
    for text, line in [
        (b"", "give USER:PASSWORD in its first line"),
        (b"\nme:secret", "give USER:PASSWORD in its first line"),
        (b"me:\x00\n", "give USER:PASSWORD in its first line"),
        (b"\xff:x", "is not UTF-8 text"),
        (b"x" * 10**6, "give USER:PASSWORD in its first line"),
    ]:
        file.write_bytes(text)
        with pytest.raises(InputError, match=line):
            password_of("--auth_file", str(file))
    assert password_of() is None
    monkeypatch.setenv("WAN_WEB_AUTH", "you:secret")
    assert password_of() == "you:secret"
    assert "WAN_WEB_AUTH" not in os.environ  # nor for the processes that are started
    assert not capsys.readouterr().err
    for wrong in ("", "you"):
        monkeypatch.setenv("WAN_WEB_AUTH", wrong)
        with pytest.raises(InputError, match=r"give USER:PASSWORD in \$WAN_WEB_AUTH"):
            password_of()
    assert password_of("--auth", "me:x") == "me:x"
    told = capsys.readouterr().err
    assert "wan-web: --auth shows the password" in told and "me:x" not in told and told.count("\n") == 1


def test_nothing_but_the_page_imports_it():
    wants = re.compile(r"^\s*(from|import)\s+(gradio|fastapi|uvicorn|starlette|\S*\bweb\b)", re.MULTILINE)
    sources = [ROOT / "generate.py", *(ROOT / "wan").rglob("*.py")]
    found = [path for path in sources if path.parent.name != "web" and wants.search(path.read_text("utf-8"))]
    assert not found and wants.search((ROOT / "wan" / "web" / "api.py").read_text("utf-8"))


def until(true, seconds=400):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_paused_and_interrupted_jobs_go_on_to_the_same_bytes(tmp_path):
    """Really. What the end of the server does is end the worker's input: here that is done to it.

    tests/test_page.py kills a server.
    """
    out = tmp_path / "out"
    (out / "uploads").mkdir(parents=True)
    settings = TOY | {"sample_steps": 24}
    queue = Queue(Rules(out))
    whole, paused, ended = (queue.add(settings) for _ in range(3))
    until(lambda: queue.progress.get(paused.id) and queue.progress[paused.id].preview)
    assert queue.get(whole.id).status == "done"
    queue.pause(paused.id)
    until(lambda: queue.get(paused.id).status == "paused")
    assert queue.progress[paused.id].done < 24
    until(lambda: queue.progress.get(ended.id) and queue.progress[ended.id].preview)
    queue.close()
    assert queue.progress[ended.id].done < 24
    assert sorted(path.name[:24] for path in out.glob("*.state")) == sorted([paused.id, ended.id])
    jobs = out / ".wan" / "jobs"
    left = read_job(jobs / f"{ended.id}.json")
    left.status = "running"  # as a server leaves it that is killed
    left.write(jobs)
    queue = Queue(Rules(out))
    try:
        queue.resume(paused.id)
        until(lambda: all(job.status == "done" for job in queue.jobs()))
        first, *others = (Path(job.result).read_bytes() for job in queue.jobs())
        assert len(others) == 2 and all(other == first for other in others)
        previews = out / ".wan" / "previews"
        assert not list(out.glob("*.state")) and not list(out.glob(".wan-*")) and not list(previews.iterdir())
    finally:
        queue.close()


def test_first_comes_what_can_be_made_here(fake, tmp_path):
    from wan.web.service import Service

    (tmp_path / "wan").mkdir()
    (tmp_path / "wan" / "config.json").write_text(json.dumps(TASKS["t2v-1.3B"].dit_config))
    for checkpoints, first in [((), "t2v-toy"), ((str(tmp_path / "wan"),), "t2v-1.3B")]:
        service = Service(Rules(tmp_path / "out", checkpoints))
        try:
            assert service.tasks[0] == first
        finally:
            service.close()


def test_json_over_http(fake, tmp_path):
    """What docs/page.md says, asked for as scripts do."""
    pytest.importorskip("fastapi", reason="the page's extra is not installed")
    from starlette.testclient import TestClient

    from wan.web.api import build_app
    from wan.web.service import Service

    service = Service(Rules(tmp_path))
    app = Guard(build_app(service), None, True)
    client = TestClient(app, "http://localhost", raise_server_exceptions=False)
    try:
        answer = client.post("/jobs", json=TOY)
        assert answer.status_code == 201
        job = answer.json()
        assert job["status"] == "running" and job["settings"]["base_seed"] == 7
        assert client.get(answer.headers["location"]).json() == job
        waiting = client.post("/jobs", json=TOY).json()
        assert [one["id"] for one in client.get("/jobs").json()["jobs"]] == [job["id"], waiting["id"]]
        assert client.post(f"/jobs/{waiting['id']}/pause").json()["status"] == "paused"
        assert client.post(f"/jobs/{waiting['id']}/resume").json()["status"] == "queued"
        assert client.post(f"/jobs/{waiting['id']}/sooner").status_code == 200
        assert client.post(f"/jobs/{waiting['id']}/cancel").json()["status"] == "cancelled"
        refused = client.post(f"/jobs/{waiting['id']}/cancel")
        assert refused.status_code == 409 and "is cancelled" in refused.json()["error"]
        assert client.delete(f"/jobs/{waiting['id']}").status_code == 204
        assert client.get(f"/jobs/{waiting['id']}").status_code == 404
        bad = client.post("/jobs", json=TOY | {"frame_num": 6})
        assert bad.status_code == 422 and bad.json()["error"].startswith("frame_num 6: give 4n+1")
        assert (
            client.post("/jobs", content="[1]", headers={"content-type": "application/json"}).status_code
            == 400
        )
        assert (
            client.post("/jobs", content="{", headers={"content-type": "application/json"}).status_code == 400
        )
        assert (
            client.post("/jobs", content=json.dumps(TOY), headers={"content-type": "text/plain"}).status_code
            == 400
        )

        picture = (ROOT / "examples" / "i2v_input.png").read_bytes()
        where = {"field": "image", "name": "../../boat.PNG"}
        path = client.post("/uploads", params=where, content=picture).json()["path"]
        assert path.startswith("uploads/") and path.endswith(".png")
        assert client.get(f"/{path}").content == picture
        assert client.post("/uploads", params=where, content=picture).json()["path"] == path
        bad = client.post("/uploads", params=where, content=b"no picture")
        assert bad.status_code == 422 and "image boat.PNG: not a readable image" in bad.json()["error"]
        assert client.post("/uploads", params={"field": "bogus", "name": "x"}, content=b"").status_code == 400
        assert len(list((tmp_path / "uploads").iterdir())) == 1
        i2v = client.post("/jobs", json={"task": "i2v-tiny", "image": path, "prompt": "a boat"})
        assert i2v.status_code == 201
        for outside in (
            "/uploads/..%2f.wan%2fserver.lock",
            "/results/..%2f.wan%2fserver.lock",
            "/results/uploads",
        ):
            assert client.get(outside).status_code == 404

        live = client.get("/live").json()
        assert set(live["parts"]) == {"device", "now", "memory", "queue", "gallery"}
        assert client.get("/live", params={"known": live["version"]}).json()["parts"] == {}
    finally:
        service.close()


def test_a_result_is_known_by_its_file_alone(tmp_path):
    import torch

    from wan.run.settings import settings_text
    from wan.utils.video import save_video
    from wan.web.gallery import Gallery

    request = Rules(tmp_path).request(TOY | {"prompt": "<b>a & b</b>"}, "made")
    save_video(torch.zeros(3, 5, 96, 128), request.save_file, comment=settings_text(request))
    save_video(torch.zeros(3, 5, 96, 128), tmp_path / "foreign.mp4")
    (tmp_path / "broken.mp4").write_text("no video")
    (tmp_path / "link.mp4").symlink_to("/etc/hosts")
    gallery = Gallery(tmp_path)
    found = {result.name: result.settings for result in gallery.results()}
    assert set(found) == {"made.mp4", "foreign.mp4", "broken.mp4"}
    assert found["made.mp4"]["base_seed"] == 7 and not found["foreign.mp4"] and not found["broken.mp4"]
    assert gallery.poster("made.mp4")[:2] == b"\xff\xd8"
    gallery.delete("made.mp4")
    for name in ("made.mp4", "../x", ".", ""):
        with pytest.raises(KeyError):
            gallery.path(name)


def test_a_run_on_a_device_tells_its_plan_and_what_it_takes(tmp_path, monkeypatch):
    from virtual_gpu import DEVICE, VirtualGPU
    from wan.run import Request, Runner
    from wan.run.request import PLANNED
    from wan.utils.events import Planned, StageStarted
    from wan.web import memory_samples
    from wan.web.run_progress import Progress

    monkeypatch.chdir(tmp_path)
    device, progress, planned = DEVICE, Progress(), []

    def listen(event):
        if isinstance(event, Planned):
            planned.append(event)
            progress.take({"event": "Planned"} | vars(event))
        elif isinstance(event, StageStarted):
            progress.series.add(event.name, memory_samples.sample(device))

    settings = {
        "device": "vgpu",
        "planned": PLANNED,
        "save_file": "out.mp4",
        "frame_num": 5,
        "sample_steps": 1,
    }
    with VirtualGPU(2**30):
        Runner(listen).run(Request(task="t2v-tiny", **settings))
        facts = memory_samples.device_facts("vgpu")
    assert facts["total_bytes"] == 2**30 and facts["free_bytes"] <= 2**30
    (plan,) = planned
    stages = [stage for _, stage, _ in progress.series.points]
    assert set(plan.stages) == {"text", "denoise", "decode"} <= set(stages)
    for _, stage, values in progress.series.points:
        assert values["allocated"] <= values["reserved"] and values["ram"] > 2**20
        if stage in plan.stages:
            assert values["reserved"] <= plan.stages[stage]
    assert "GPU memory" in chart(progress.series) and progress.plan == plan.line
