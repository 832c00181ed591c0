"""What is missing is never made up for in silence: the page refuses, the command line says first what it takes."""

import json
import logging
import os
from pathlib import Path

import pytest

from leanwan.errors import InputError
from wan.cli import main
from wan.tasks import EXAMPLES, TASKS
from wan.web import queue as web_queue
from wan.web.jobs import Rules


class Worker:
    """Stands for the worker's process."""

    def __init__(self, *args):
        self.send = self.finish = lambda *args: None


@pytest.mark.parametrize("task", TASKS)
def test_a_server_takes_no_example(task, tmp_path):
    facts = TASKS[task]
    rules = Rules(tmp_path, ("org/name",))
    given = {"task": task} | ({} if facts.toy else {"ckpt_dir": "org/name"})
    inputs = {name: str(EXAMPLES / "toy_image.png") for name in facts.inputs if facts.all_inputs}
    whole = given | inputs | {"prompt": "a ball"}
    assert rules.request(whole).prompt == "a ball"
    for name in ("prompt", *inputs):
        for value in (None, "", "  "):
            with pytest.raises(InputError) as error:
                rules.request(whole | {name: value})
            assert name in error.value.fields and "\n" not in str(error.value)
    with pytest.raises(InputError, match="missing"):
        rules.request(given)
    planned = rules.request(given, planning=True)
    taken = [str(getattr(planned, name) or "") for name in ("prompt", *facts.inputs)]
    assert not any(str(EXAMPLES) in value or value == facts.prompt for value in taken)


@pytest.fixture
def page(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the page's extra is not installed")
    from wan.web.page import Page
    from wan.web.service import Service

    monkeypatch.setattr(web_queue, "Child", Worker)
    service = Service(Rules(tmp_path / "out"))
    yield Page(service)
    service.close()


def controls(page, **changes):
    """What the controls hold at first, changed."""
    values = {name: getattr(field, "value", None) for name, field in page._form.fields.items()}
    return tuple((values | changes).values())


def refused(page, line, **changes):
    """Make is disabled and says so, and what is posted all the same makes no job."""
    button, said = page._may_make(*controls(page, **changes))
    assert button["interactive"] is False and line in said
    assert line in page._make(*controls(page, **changes))
    assert not page._service.queue.jobs()


def test_make_waits_until_all_is_there(page, tmp_path):
    assert page._may_make(*controls(page))[0]["interactive"] is True
    for empty in ("", "  \n", None):
        refused(page, "prompt: missing, t2v-toy needs it", prompt=empty)
    for name in ("size", "frame_num", "sample_steps", "sample_guide_scale", "sample_shift", "vram_limit"):
        for empty in (None, ""):
            refused(page, f"{name}: is empty", **{name: empty})
    refused(page, "frame_num 6: give 4n+1", frame_num=6)
    refused(page, "image: missing, i2v-toy needs it", task="i2v-toy")
    refused(page, "first_frame and last_frame: missing", task="flf2v-toy")
    refused(page, "prompt and image: missing", task="i2v-toy", prompt="")
    refused(page, "last_frame: missing", task="flf2v-toy", first_frame=str(EXAMPLES / "toy_first.png"))
    refused(page, "ckpt_dir: give the directory", task="t2v-14B")
    sent = page._make(*controls(page, task="i2v-toy", image=str(EXAMPLES / "toy_image.png")))
    assert "It starts" in sent
    (job,) = page._service.queue.jobs()
    assert Path(job.request["image"]).parent == tmp_path / "out" / "uploads"


@pytest.mark.parametrize("field", ["image", "src_video", "src_mask", "src_ref_images", "lora"])
def test_a_refused_file_stays_in_the_way(page, tmp_path, field):
    """Also where the task could do without it."""
    bad = tmp_path / "bad.png"
    bad.write_text("not what is asked for")
    several = field in ("src_ref_images", "lora")
    task = {"image": "i2v-toy", "lora": "t2v-toy"}.get(field, "vace-toy")
    value = [str(bad)] if several else str(bad)
    kept, said = page._form.file_check(field)(value)
    assert kept.get("value", value) == value and field in said
    for _ in range(2):
        refused(page, f"{field} bad.png: ", task=task, **{field: value})
    assert page._may_make(*controls(page, task="t2v-toy", **{field: value}))[0]["interactive"] is (
        field != "lora"
    )


@pytest.mark.parametrize("field", ["image", "src_video", "src_mask", "src_ref_images", "lora"])
def test_a_file_that_is_gone_is_asked_for(page, field, tmp_path):
    """Settings that are used again name it; without it the job would be another."""
    task = {"image": "i2v-toy", "lora": "t2v-toy"}.get(field, "vace-toy")
    gone = str(tmp_path / "out" / "uploads" / "gone.mp4")
    settings = {"task": task, "size": "80*48", "base_seed": 7, "prompt": "a ball", "frame_num": 17}
    settings |= {"sample_steps": 2, "sample_shift": 3.0, "sample_guide_scale": 2.0, "sample_solver": "unipc"}
    settings |= {"attention": "auto", field: [gone] if field == "lora" else gone}
    filled = page._form.filled(settings, same_seed=True)
    held = {}
    for (name, field_there), update in zip(page._form.fields.items(), filled):
        skipped = isinstance(update, dict) and update.get("__type__") == "update"
        held[name] = update.get("value", field_there.value) if skipped else update
    refused(page, f"{field} {gone}: is not here; upload it again", **held)
    there = str(EXAMPLES / {"image": "toy_image.png"}.get(field, "toy_video.mp4"))
    there = str(EXAMPLES / "toy_ref.png") if field == "src_ref_images" else there
    if field != "lora":
        held[field] = [there] if field == "src_ref_images" else there
        assert page._may_make(*controls(page, **held)) == ({"interactive": True, "__type__": "update"}, "")


def first_lines(capsys, caplog, *arguments):
    with caplog.at_level(logging.INFO):
        caplog.clear()
        code = main([str(argument) for argument in arguments])
    return code, [record.getMessage() for record in caplog.records], capsys.readouterr()


def test_the_command_line_says_first_which_examples_it_takes(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    few = ("--frame_num", 5, "--sample_steps", 1, "--base_seed", 1)
    code, lines, _ = first_lines(
        capsys, caplog, "--task", "flf2v-tiny", *few, "--prompt", "a ball", "--save_file", "a.mp4"
    )
    facts = TASKS["flf2v-tiny"]
    assert code == 0 and lines[:2] == [
        f"--{name} is not given, an example is taken: {EXAMPLES / facts.inputs[name]}"
        for name in ("first_frame", "last_frame")
    ]
    code, lines, _ = first_lines(capsys, caplog, "--task", "t2i-tiny", *few[2:], "--save_file", "b.png")
    assert code == 0 and lines[0] == f"--prompt is not given, an example is taken: {TASKS['t2i-tiny'].prompt}"
    code, lines, _ = first_lines(capsys, caplog, "--like", "b.png", "--save_file", "c.png")
    assert code == 0 and not any("example" in line for line in lines)
    Path("list.jsonl").write_text(
        json.dumps({"task": "t2i-tiny", "sample_steps": 1, "save_file": "d.png"}) + "\n"
    )
    code, lines, _ = first_lines(capsys, caplog, "--prompts", "list.jsonl")
    assert code == 0 and lines[0].startswith("Line 1: --prompt is not given, an example is taken: ")


def test_a_plan_in_json_is_json_alone(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    code, lines, told = first_lines(
        capsys, caplog, "--task", "i2v-toy", "--plan", "--vram_limit", 4, "--json"
    )
    assert code == 0 and json.loads(told.out)["fits"] and not any("example" in line for line in lines)
    assert not os.listdir()
