"""The page attacked: a server in a process of its own, as it is started, and clients that keep to no rule."""

import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

pytestmark = pytest.mark.skipif(
    not find_spec("gradio"), reason='the page is not installed: pip install ".[web]"'
)

ROOT = Path(__file__).parents[1]
EVERY = bool(os.environ.get("WAN_EVERY_PAGE"))
TOKEN = b"a5c1-never-to-be-told-77e2"


class Server:
    """`python -m wan.web` over a folder, and a client of it.

    Attributes:
        out: its folder.
        heard: all that it ever answered.
    """

    def __init__(self, out, *arguments, **environment):
        import httpx

        self.out, self.heard = out, []
        command = [sys.executable, "-m", "wan.web", "--port", "0", "--out", str(out), *arguments]
        env = {**os.environ, **environment}
        self.complaints = out.with_name("complaints.txt")
        with open(self.complaints, "w") as complaints:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=complaints, text=True
            )
        self.url = re.search(r"http://\S+:\d+", self.process.stdout.readline())[0]
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def ask(self, method, path, **sent):
        answer = self.client.request(method, path, **sent)
        self.heard.append(answer.content)
        return answer

    def events(self, *events, **more):
        """Starts events of the page, (number, values of its fields), and returns for each whether it was done."""
        session, names = f"s{len(self.heard)}", []
        for number, data in events:
            sent = {"fn_index": number, "data": data, "session_hash": session} | more
            joined = self.ask("POST", "/gradio_api/queue/join", json=sent)
            names.append(joined.json().get("event_id"))
        told = self.ask("GET", "/gradio_api/queue/data", params={"session_hash": session}).text
        messages = [json.loads(line.removeprefix("data: ")) for line in told.splitlines() if line]
        ended = {one["event_id"]: one["success"] for one in messages if one["msg"] == "process_completed"}
        assert set(names) == set(ended), told
        return [ended[name] for name in names]

    def stop(self):
        """Ends it, and returns what it said on standard error."""
        self.client.close()
        self.process.terminate()
        self.process.wait()
        return self.complaints.read_text("utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("page") / "out")
    yield started
    started.stop()


@pytest.fixture
def secrets(tmp_path):
    """A text and a picture outside of all folders of the page, with TOKEN in them."""
    text, picture = tmp_path / "secret.txt", tmp_path / "secret.png"
    text.write_bytes(TOKEN)
    told = PngInfo()
    told.add_text("Comment", TOKEN.decode())
    Image.new("RGB", (8, 8)).save(picture, pnginfo=told)
    return text, picture


def forged(path, address, **more):
    """Values that name a file, or an address, in every way that Gradio knows."""
    meta = {"meta": {"_type": "gradio.FileData"}}
    file = {"path": str(path)} | meta | more
    return [
        file,
        {"path": str(path)},
        file | {"url": address},
        file | {"is_stream": True},
        file | {"path": address},
        file | {"path": address, "url": address, "is_stream": True},
        file | {"path": f"file://{path}"},
        file | {"path": os.path.relpath(path)},
        file | {"orig_name": file},
        [file],
        [[file]],
        [file, {"path": address} | meta],
        {"value": file},
        {"root": [file]},
        {"__type__": "update", "value": file},
        {"deep": [{"deeper": file}]},
    ]


def test_no_event_reads_a_file_or_an_address(server, secrets):
    """Every event of the page, as it tells of them itself, with forged values in place of each one of its own.

    Each place gets 4 of them, every one if WAN_EVERY_PAGE is set.
    """
    out = server.out
    cache = out / ".wan" / "gradio" / "x"
    cache.mkdir(parents=True)
    link = cache / "link.png"
    link.symlink_to(secrets[1])
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/x.png"
    config = server.ask("GET", "/config").json()
    held = {one["id"]: one["props"].get("value") for one in config["components"]}
    named = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
    events = [event for event in config["dependencies"] if event["backend_fn"]]
    values = [value for path in (*secrets, link) for value in forged(path, address)]
    bare = [(event["id"], []) for event in events if not event["inputs"]]
    for turn in range(len(values) if EVERY else 4):
        sent = []
        for event in events:
            inputs = event["inputs"]
            usual = [6 if named[field] == "frames" else held[field] for field in inputs]  # 6 are no job
            for at in range(len(inputs)):
                value = values[(turn + len(sent)) % len(values)]
                sent.append((event["id"], [*usual[:at], value, *usual[at + 1 :]]))
        assert not any(server.events(*sent, event_data=values[turn]))
        assert all(server.events(*bare, event_data=values[turn]))
    print(f"{len(events)} events, {len(sent) * (turn + 1)} forged values")
    assert len(sent) > len(values)  # so every turn sends them all
    for path in (*secrets, link, *out.rglob("*"), address):
        server.ask("HEAD", f"/gradio_api/file={path}")
        for before in (
            "/gradio_api/file=",
            "/gradio_api/file/",
            "/gradio_api/proxy=",
            "/static/",
            "/uploads/",
        ):
            server.ask("GET", before + str(path))
            server.ask("GET", before + Path(path).name)
    for path in ("/jobs", "/results", "/live?known=0", "/config"):
        server.ask("GET", path)
    with pytest.raises(BlockingIOError):
        listening.accept()
    assert not [answer for answer in server.heard if TOKEN in answer]
    copies = [path for path in out.rglob("*") if path.is_file() and path != link]
    assert not [path for path in copies if TOKEN in path.read_bytes()]
    assert server.ask("GET", "/jobs").json() == {"jobs": [], "trouble": None}


def test_gradio_checks_paths_too(json_client, secrets, monkeypatch):
    """Without the page's own check."""
    import asyncio

    from gradio.context import LocalContext
    from gradio.exceptions import InvalidPathError

    from wan.web import gate

    monkeypatch.setattr(gate, "checked", lambda field, value: value)
    blocks = json_client.app._app.routes[-1].app.get_blocks()
    event = next(fn for fn in blocks.fns.values() if fn.name == "choose_task")

    async def attack():
        LocalContext.blocks.set(blocks)
        await blocks.preprocess_data(event, [forged(secrets[0], "x")[0], ""], None)

    with pytest.raises(InvalidPathError):
        asyncio.run(attack())


def test_files_are_served_as_files(server, tmp_path):
    """Whatever an upload is called, and wherever it is asked for, it is no page; and no link leads out."""
    told = PngInfo()
    told.add_text("Comment", "<script>alert(1)</script>")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=told)
    picture = (tmp_path / "x.png").read_bytes()
    for name in ("x.html", "x.svg", "x.png.HTML", "x", ".html", "x.xhtml", "x.js", "x.png"):
        answer = server.ask("POST", "/uploads", params={"field": "image", "name": name}, content=picture)
        path = answer.json()["path"]
        assert path.endswith(".png")
        sent = {"files": (name, picture, "text/html")}
        (kept,) = server.ask("POST", "/gradio_api/upload", files=sent).json()
        for address, kind in ((f"/{path}", "image/png"), (f"/gradio_api/file={kept}", None)):
            served = server.ask("GET", address)
            assert served.status_code == 200 and served.content == picture
            assert served.headers["content-disposition"].startswith("attachment")
            assert served.headers["content-type"] == (kind or served.headers["content-type"])
            assert served.headers["content-type"] in ("image/png", "application/octet-stream")
            assert served.headers["x-content-type-options"] == "nosniff"
    secret = tmp_path / "secret.png"
    secret.write_bytes(TOKEN)
    uploads = server.out / "uploads"
    (uploads / "link.png").symlink_to(secret)
    (uploads / "folder.png").mkdir()
    (server.out / ".wan" / "gradio" / "out").symlink_to(tmp_path)
    links = [uploads / "link.png", server.out / ".wan" / "gradio" / "out" / "secret.png", secret]
    asked = [f"/gradio_api/file={path}" for path in links]
    for path in (
        *asked,
        "/uploads/link.png",
        "/uploads/folder.png",
        "/uploads/none.png",
        "/gradio_api/file=%00",
    ):
        answer = server.ask("GET", path)
        assert answer.status_code == 404 and set(answer.json()) == {"error"}


def raw(server, method, path, headers, body=b""):
    """The status and the JSON of an answer to a request that no library would send."""
    host, port = server.url.removeprefix("http://").split(":")
    headers = {"host": "localhost", "connection": "close", "content-type": "application/json"} | headers
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    with socket.create_connection((host, int(port)), 60) as sock:
        sock.sendall("\r\n".join(lines).encode() + body)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    head, _, told = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), told


@pytest.mark.parametrize(
    "path", ["/jobs", "/plan", "/uploads", "/gradio_api/queue/join", "/gradio_api/upload"]
)
def test_no_body_is_without_a_limit(server, path):
    """Nothing of it is read: its length alone, or that there is none, is the reason."""
    takes_files = path in ("/uploads", "/gradio_api/upload")
    for headers, status in [
        ({"content-length": str(2**33)}, 413),
        ({"content-length": str(2**21)}, 413 if not takes_files else None),
        ({"transfer-encoding": "chunked"}, 411),
    ]:
        if status:
            found, told = raw(server, "POST", path, headers)
            assert found == status and set(json.loads(told)) == {"error"}


@pytest.mark.parametrize("path", ["gradio_api/run/predict", "gradio_api/api/_make", "gradio_api/call/_make"])
def test_events_come_in_one_way(server, path):
    for address in (f"/{path}", f"//{path}", f"/x/../{path}", f"/./{path}", f"/%67{path[1:]}"):
        assert raw(server, "POST", address, {"content-length": "11"}, b'{"data":[]}')[0] == 404


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "["}, 400),
        ({"host": "evil.example"}, 403),
        ({"host": "[::1"}, 400),
        ({"origin": "http://["}, 400),
        ({"origin": "null"}, 403),
    ],
)
def test_headers_that_are_no_addresses(server, headers, status):
    found, told = raw(server, "POST", "/jobs", {"content-length": "0"} | headers)
    assert found == status and set(json.loads(told)) == {"error"}


def bomb(path, side):
    """A picture of side x side, in a few kilobytes."""
    Image.new("1", (side, side)).save(path)
    return path.read_bytes()


def test_pictures_are_measured_before_they_are_decoded(server, tmp_path):
    for side, line in ((13300, "is 13300x13300"), (20000, "too many pixels")):
        small = bomb(tmp_path / "bomb.png", side)
        assert len(small) < 100_000
        begun = time.monotonic()
        answer = server.ask("POST", "/uploads", params={"field": "image", "name": "bomb.png"}, content=small)
        assert answer.status_code == 422 and line in answer.json()["error"]
        assert time.monotonic() - begun < 2


@pytest.fixture
def json_client(tmp_path, monkeypatch):
    """A client of a page in this process, behind its guard; jobs, plans and events are not carried out."""
    from starlette.testclient import TestClient

    from wan.web import queue, service
    from wan.web.guard import Guard
    from wan.web.jobs import Rules
    from wan.web.page import build_site

    class Idle:
        def __init__(self, module, arguments, on_message, on_exit):
            self.on_message = on_message

        def send(self, message):
            if "plan" in message:
                threading.Thread(target=self.on_message, args=[{"error": "is not planned here"}]).start()

        def kill(self, seconds=None):
            pass

        finish = kill

    monkeypatch.setattr(queue, "Child", Idle)
    monkeypatch.setattr(service, "Child", Idle)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # and back, as build_site sets it
    made = service.Service(Rules(tmp_path / "out"))
    app = Guard(build_site(made), None, True)
    yield TestClient(app, "http://localhost", raise_server_exceptions=False, headers=JSON)
    made.close(0)


JSON = {"content-type": "application/json"}
NESTED = "[" * 900 + "]" * 900  # which can be read
DEEP = "[" * 50_000 + "]" * 50_000
NOT_JSON = [
    *("", "{", "[1]", "7", "null", DEEP, '{"task": ' + DEEP + "}", '{"prompt": "\\ud800"}', '{"\\udfff": 1}'),
    *('{"base_seed": NaN}', '{"sample_shift": Infinity}', '{"sample_shift": 1e999}'),
    *(f'{{"base_seed": {"9" * digits}}}' for digits in (310, 5000)),
]
WRONG = [
    *({"task": value} for value in (["x"], {}, {"x": []}, 5, True, "t3v", "", "\x00")),
    *({"size": value} for value in (["x"], 5, "9" * 5000, "\u0661\u0662*16")),
    *({"lora": value} for value in (5, [5], [["x"]], {"x": 1}, "x", [""], [":"], ["x:1e999"], ["\0"])),
    *({"src_ref_images": value} for value in (5, ["x"], {"x": 1}, ",", "\0")),
    *({"image": value} for value in (5, ["x"], {}, "", "\0", "x" * 5000, "uploads")),
    *({"vram_limit": value} for value in ([], {}, "", "nan", -1)),
    *({"dit_stream": value} for value in ([], "x", -1)),
    *({"vae_tile": value} for value in ([], "x")),
    *({"ckpt_dir": value} for value in ([], 5, "/etc", "")),
    *({"sample_shift": value} for value in ([], "5", 10**308, -0.0)),
    *({"frame_num": value} for value in (10**308, 5.0, "5", [5])),
    *({"base_seed": value} for value in (10**308, "5", [5], 0.5)),
    *({"memory_mode": value} for value in ([], {}, 5)),
    {"planned": ["x"]},
]


def is_line(answer):
    """Whether an answer is an error that its asker made, told in one line of JSON."""
    told = answer.json()
    return answer.status_code // 100 == 4 and set(told) == {"error"} and "\n" not in told["error"]


@pytest.mark.parametrize("path", ["/jobs", "/plan"])
def test_what_is_wrong_in_json_takes_a_line(json_client, path):
    for body in NOT_JSON:
        answer = json_client.post(path, content=body)
        assert answer.status_code == 400 and is_line(answer), body[:50]
    nested = json_client.post(path, content='{"task": ' + NESTED + "}")
    joined = f'{{"data": [], "session_hash": "x", "fn_index": 1, "event_data": {NESTED}}}'
    assert nested.status_code == 422 and is_line(nested)
    assert json_client.post("/gradio_api/queue/join", content=joined).status_code == 200
    for values in WRONG:
        answer = json_client.post(path, json={"task": "i2v-tiny", "frame_num": 5} | values)
        assert answer.status_code == 422 and is_line(answer), values
    assert json_client.get("/jobs").json() == {"jobs": [], "trouble": None}


def test_any_json_takes_a_line_or_is_a_job(json_client):
    """Settings of any kind under the names of settings, and JSON that is none."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    from wan.web.jobs import _MEMORY, _REQUEST

    text = st.text(st.characters(exclude_categories=[]), max_size=8)
    plain = st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from([10**308, 1e308])
    values = st.recursive(
        plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)
    )
    join = {"data": [], "session_hash": "x", "fn_index": 1}
    names = st.sampled_from(sorted(_REQUEST | set(_MEMORY)) + [*join, "event_data", "trigger_id"]) | text
    statuses = Counter()

    @settings(max_examples=2000 if EVERY else 40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(names, values, max_size=3), values, text)
    def attack(wrong, other, name):
        bodies = [json.dumps({"task": "t2v-tiny", "prompt": "a"} | wrong), json.dumps(other)]
        asked = [("POST", path, {"content": body}) for path in ("/jobs", "/plan") for body in bodies]
        asked.append(("POST", "/gradio_api/queue/join", {"content": json.dumps(join | wrong)}))
        asked += [
            (method, path + quote(name, safe="", errors="surrogatepass") + verb, {})
            for path in (
                "/jobs/",
                "/results/",
                "/uploads/",
                "/live?known=",
                "/uploads?name=x&field=",
                "/gradio_api/",
            )
            for method, verb in [
                ("GET", ""),
                ("DELETE", ""),
                ("POST", ""),
                ("POST", "/cancel"),
                ("GET", "/poster"),
            ]
        ]
        for method, path, sent in asked:
            answer = json_client.request(method, path, **sent)
            statuses[answer.status_code] += 1
            assert answer.status_code in (200, 201) or is_line(answer), (method, path, sent, answer.text)

    attack()
    print(f"{sum(statuses.values())} requests: {dict(statuses)}")
    assert statuses[422] and statuses[400] and statuses[404] and statuses[201]


def test_what_the_system_refuses_takes_a_line(json_client, tmp_path, monkeypatch):
    """A full disk, files that are no files, two that delete at once."""
    from wan.web import api, gallery

    out = tmp_path / "out"
    (out / "folder.mp4").mkdir()
    os.mkfifo(out / "pipe.mp4")
    (out / "there.mp4").write_bytes(b"no video")
    for name in ("folder.mp4", "pipe.mp4", "none.mp4", "there.mp4/x"):
        for method, after in (("GET", ""), ("GET", "/poster"), ("DELETE", "")):
            answer = json_client.request(method, f"/results/{name}{after}")
            assert answer.status_code == 404 and is_line(answer)
    assert is_line(json_client.get("/results/there.mp4/poster"))
    find = gallery.Gallery.path
    with monkeypatch.context() as patched:  # the other one has just deleted it
        patched.setattr(gallery.Gallery, "path", lambda self, name: find(self, name).with_name("gone.mp4"))
        for method in ("DELETE", "GET"):
            answer = json_client.request(method, "/results/there.mp4")
            assert answer.status_code == 404 and is_line(answer)
    for code, status in ((errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EACCES, 409)):

        def refuse(*_, code=code, **__):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched:
            patched.setattr(api.tempfile, "TemporaryFile", refuse)
            answer = json_client.post("/uploads?field=image&name=x.png", content=b"x")
            assert answer.status_code == status and answer.json() == {"error": os.strerror(code)}
        with monkeypatch.context() as patched:
            patched.setattr("gradio.routes.upload_fn", refuse)
            answer = json_client.post(
                "/gradio_api/upload", files={"files": b"x"}, headers={"content-type": "x/y"}
            )
            assert answer.status_code == status and answer.json() == {"error": os.strerror(code)}
        with monkeypatch.context() as patched:
            patched.setattr("wan.web.jobs.replacing", refuse)
            answer = json_client.post("/jobs", json={"task": "t2v-tiny", "prompt": "a"})
            told = answer.json()["error"]
            assert answer.status_code == status and os.strerror(code) in told and "\n" not in told


def test_frames_are_measured_before_they_are_decoded(monkeypatch):
    from leanwan.errors import InputError
    from wan.utils.video import VideoFile
    from wan.web import jobs

    clip = ROOT / "examples" / "vace_video.mp4"
    jobs.check_file(clip, "src_video")
    monkeypatch.setattr(jobs, "MOST_PIXELS", 100)
    monkeypatch.setattr(VideoFile, "frames", None)  # none is asked for
    with pytest.raises(InputError, match="make it smaller first, at most 100 pixels are taken"):
        jobs.check_file(clip, "src_video")
