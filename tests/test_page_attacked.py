"""The page attacked: a server in a process of its own, as it is started, and clients that keep to no rule."""

import json
import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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
    for path in (*secrets, link, *out.rglob("*")):
        for before in ("/gradio_api/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/static/", "/uploads/"):
            server.ask("GET", before + str(path))
            server.ask("GET", before + path.name)
    for path in ("/jobs", "/results", "/live?known=0", "/config", "/gradio_api/file=" + address):
        server.ask("GET", path)
    with pytest.raises(BlockingIOError):
        listening.accept()
    assert not [answer for answer in server.heard if TOKEN in answer]
    copies = [path for path in out.rglob("*") if path.is_file() and path != link]
    assert not [path for path in copies if TOKEN in path.read_bytes()]
    assert server.ask("GET", "/jobs").json() == {"jobs": []}
