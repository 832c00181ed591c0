"""Whatever lies in the folder of results: a file's settings are valid or none, and the page goes on."""

import json
import math
import os
import random
import shutil

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from leanwan.errors import InputError
from wan.cli import main
from wan.run.settings import checked, read_plan, read_settings, settings, settings_text
from wan.web.gallery import Gallery
from wan.web.jobs import Rules

TOY = {"task": "t2v-tiny", "base_seed": 7, "prompt": "a red ball", "frame_num": 5, "sample_steps": 2}
DEEP = "[" * 100_000 + "]" * 100_000
# As JSON: all that a field may hold in place of what belongs there.
WRONG = [
    *(
        "null",
        "true",
        "[]",
        "{}",
        '""',
        '"x"',
        "-1",
        "0",
        "1",
        "1.5",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e400",
    ),
    *('["x"]', "[1]", '{"a": 1}', "9" * 400, "9" * 5000, '"\\ud800"', '"a\\u0000b"', '"\\u001b[31m"', DEEP),
    *('"../../etc/passwd"', '"<script>"', json.dumps("x" * 100_000), '["\\ud800"]', '[["x"]]', '"a:b:nan"'),
]


def request(folder, **changes):
    return Rules(folder).request(TOY | changes, "made")


def write(path, text):
    """A picture with a text as its metadata."""
    info = PngInfo()
    info.add_text("Comment", text)
    Image.new("RGB", (2, 2)).save(path, pnginfo=info)


def damaged(folder):
    """Texts as `settings_text` makes them, each wrong in one place."""
    told = json.loads(settings_text(request(folder)))
    mark = "a mark"
    for part in ("settings", "memory", None):
        for name in (
            told["settings"] if part == "settings" else ("dit_chunk", "vae_cpu", "x") if part else told
        ):
            there = json.loads(json.dumps(told | {"memory": {}}))
            (there if part is None else there[part])[name] = mark
            for value in WRONG:
                yield json.dumps(there).replace(json.dumps(mark), value, 1)
    for name in told["settings"]:
        yield json.dumps(told | {"settings": {key: v for key, v in told["settings"].items() if key != name}})
    yield from (*WRONG, "", "{", json.dumps(told)[:-1], json.dumps(told).encode("utf-16").decode("latin-1"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of all kinds of damage, and how many files there are."""
    import torch

    from wan.utils.video import save_video

    out, chance = tmp_path_factory.mktemp("out"), random.Random(0)
    (out / "uploads").mkdir()
    for number, text in enumerate(damaged(out)):
        write(out / f"text{number}.png", text)
    made = request(out)
    save_video(torch.zeros(3, 5, 16, 16), made.save_file, comment=settings_text(made))
    for number, comment in enumerate((DEEP[:1000], '{"program": NaN}', "\x1b[31m", "ü" * 999)):
        save_video(torch.zeros(3, 1, 16, 16), out / f"tag{number}.mp4", comment=comment)
    write(out / "whole.png", settings_text(made))
    for source in ("made.mp4", "whole.png"):
        whole = (out / source).read_bytes()
        suffix = source[-4:]
        for number in range(120):
            flipped = bytearray(whole)
            for _ in range(chance.choice((1, 1, 8))):
                flipped[chance.randrange(len(whole))] = chance.randrange(256)
            (out / f"flip{number}{suffix}").write_bytes(flipped)
            (out / f"cut{number}{suffix}").write_bytes(whole[: chance.randrange(len(whole))])
    at = (out / "made.mp4").read_bytes().index(b'"settings"')
    for number, bad in enumerate((b"\xff\xfe", b"\xed\xa0\x80", b"\0")):
        whole = bytearray((out / "made.mp4").read_bytes())
        whole[at : at + len(bad)] = bad
        (out / f"bytes{number}.mp4").write_bytes(whole)
    (out / "empty.png").touch()
    (out / "folder.mp4").mkdir()
    (out / "link.png").symlink_to("whole.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(out / "pipe.mp4")
    if os.name != "nt":
        shutil.copy(out / "whole.png", os.fsencode(out) + b"/name\xff.png")
    shutil.copy(out / "whole.png", out / "odd ' \n\x1b#?%2f&<b>.png")
    shutil.copy(out / "whole.png", out / "locked.png")
    os.chmod(out / "locked.png", 0)
    for number, seconds in enumerate((-(10**9), 10**11, 0)):
        shutil.copy(out / "whole.png", out / f"time{number}.png")
        os.utime(out / f"time{number}.png", (seconds, seconds))
    write(
        out / "any_bytes.png", settings_text(request(out)).replace('"a red ball"', '"x", "image": "\\udcff"')
    )
    return out


def test_settings_of_a_file_are_valid_or_none(folder):
    found = {result.name: result.settings for result in Gallery(folder).results()}
    for values in filter(None, found.values()):
        assert checked(values) == values
        assert all(math.isfinite(value) for value in values.values() if isinstance(value, float))
    assert found["made.mp4"] == found["whole.png"] == settings(request(folder))
    without = {name for name, values in found.items() if not values}
    assert {"bytes0.mp4", "bytes1.mp4", "tag0.mp4", "tag1.mp4", "empty.png"} <= without
    assert not found.keys() & {"folder.mp4", "link.png", "pipe.mp4"}
    assert not any("name" in name and "\udcff" in name for name in found)
    print(f"{len(found)} files, {len(without)} without settings")
    assert len(found) > 1000 and len(without) > 700


def test_the_page_shows_whatever_is_there(folder, monkeypatch):
    pytest.importorskip("gradio", reason="the page's extra is not installed")
    from starlette.testclient import TestClient

    from wan.web import views
    from wan.web.api import build_app
    from wan.web.page import Page
    from wan.web.service import Service

    monkeypatch.setattr(views, "SHOWN_RESULTS", 10**6)
    service = Service(Rules(folder))
    try:
        client = TestClient(build_app(service))
        told = client.get("/results").json()["results"]
        assert len(told) > 1000
        live = client.get("/live").json()["parts"]["gallery"]
        assert live.count("<article") == len(told) and "<script>" not in live
        form = Page(service)._form
        for result in told:
            if result["settings"]:
                form.filled(result["settings"], same_seed=True)
        for result in told[::20]:
            assert client.get("/results/" + result["name"].replace("%", "%25")).status_code in (200, 404)
            assert client.get(f"/results/{result['name']}/poster").status_code in (200, 404, 422)
    finally:
        service.close()


def test_like_takes_one_line(folder, capsys, tmp_path):
    """The same reader behind the command line."""
    read = 0
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.suffix not in (".mp4", ".png"):
            continue
        try:
            read_settings(path), read_plan(path)
            read += 1
        except InputError as error:
            line = error.told("--")
            assert line.startswith("--like ") and "\n" not in line.replace(str(path), ""), line
    assert read > 100
    for name in ("folder.mp4", "pipe.mp4", "text0.png", "empty.png", "bytes0.mp4"):
        if (folder / name).exists():
            assert main(["--like", str(folder / name), "--save_file", str(tmp_path / "x.mp4")]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and f"--like {folder / name}: " in error
    assert not list(tmp_path.iterdir())
