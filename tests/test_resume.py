"""Runs that are killed go on to the same bytes; what cannot be trusted is refused; nothing is left behind."""

import builtins
import dataclasses
import os
import re
import shlex
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import wan
from wan import random_models
from wan.run import Request, execute, keeper, outputs, run
from wan.run.interrupts import Interrupted, Interrupts
from wan.run.state import read_state, write_state
from wan.utils import files, progress
from wan.utils.events import Finished, StageDone, StageStarted, Step

SETTINGS = ["--frame_num", "5", "--sample_steps", "4", "--base_seed", "3"]
OFTEN = ["--save_every", "0"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def command(*arguments):
    return generate.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes that an uninterrupted run of a task gives."""
    files = {}

    def get(task, *arguments):
        if (task, arguments) not in files:
            path = tmp_path_factory.mktemp("whole") / "out.mp4"
            assert command("--task", task, *SETTINGS, *arguments, "--save_file", path) == 0
            files[task, arguments] = path.read_bytes()
        return files[task, arguments]

    return get


def in_a_child(arguments, disturb=lambda: None):
    """Runs the command line in a child process, after `disturb` there; its exit code, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            disturb()
            code = command(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counts(event):
    """Whether an event is the edge of a stage, a step of denoising or the end; others tell how far a stage is."""
    if isinstance(event, Step):
        return event.stage == "denoise"
    return isinstance(event, (StageStarted, StageDone, Finished))


def at_event(number, kind):
    """Sends this process a signal when that event is told, of those that count."""

    def disturb():
        tell, told = progress.ProgressBars.__call__, []

        def listener(bars, event):
            tell(bars, event)
            if counts(event):
                told.append(event)
            if counts(event) and len(told) == number:
                os.kill(os.getpid(), kind)

        progress.ProgressBars.__call__ = listener

    return disturb


def at_replacement(number, before):
    """Kills this process before or after it gives its file number so and so its name."""

    def disturb():
        done = []

        def killing(place):
            def placing(source, target):
                done.append(target)
                if before and len(done) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                place(source, target)
                if len(done) == number:
                    os.kill(os.getpid(), signal.SIGKILL)

            return placing

        os.replace, os.link = killing(os.replace), killing(os.link)

    return disturb


def states():
    return sorted(Path().glob("out.mp4.*.state"))


def finish(arguments):
    """What a user does after a run was stopped: --resume where there is a state, else the same again."""
    found = states()
    if found:
        assert command("--resume", found[0]) == 0
    elif not Path("out.mp4").exists():
        assert command(*arguments) == 0


# Events of a run of text to video: text 1 2, denoise 3 (steps 4 to 7) 8, decode 9 10, save 11 12, finished 13. Those
# of images have image 3 4 (not VACE) and encode before denoise.
KILL, INT, TERM = signal.SIGKILL, signal.SIGINT, signal.SIGTERM
STOPS = [("t2v-tiny", number, KILL) for number in (1, 5, 10, 12)]
STOPS += [("t2v-tiny", 4, TERM), ("t2v-tiny", 7, INT)]
STOPS += [("i2v-tiny", 6, KILL), ("flf2v-tiny", 9, INT), ("vace-tiny", 7, TERM)]
if os.environ.get("WAN_EVERY_KILL"):  # for an hour when nothing else is to be done
    tasks = ("t2v-tiny", "i2v-tiny", "flf2v-tiny", "vace-tiny")
    STOPS = [(task, number, kind) for task in tasks for number in range(1, 18) for kind in (KILL, INT, TERM)]


@pytest.mark.parametrize("task, number, kind", STOPS)
def test_a_run_stopped_at_an_event_goes_on_to_the_same_bytes(task, number, kind, whole):
    arguments = ["--task", task, *SETTINGS, *OFTEN, "--save_file", "out.mp4"]
    code = in_a_child(arguments, at_event(number, kind))
    assert code == (-kind if kind == KILL else 128 + kind) or Path("out.mp4").exists()
    assert states() or Path("out.mp4").exists()
    finish(arguments)
    assert Path("out.mp4").read_bytes() == whole(task)
    assert os.listdir() == ["out.mp4"]


@pytest.mark.parametrize("number, before", [(2, False), (4, True), (8, False)])
def test_a_run_killed_about_a_rename_leaves_nothing_half_written(number, before, whole):
    """Files of the run: the state at the start, encoded, after four steps, finished; the video is the eighth."""
    arguments = ["--task", "t2v-tiny", *SETTINGS, *OFTEN, "--save_file", "out.mp4"]
    assert in_a_child(arguments, at_replacement(number, before)) == -signal.SIGKILL
    for state in states():
        read_state(state)
    assert Path("out.mp4").exists() == (number == 8 and not before)
    finish(arguments)
    assert Path("out.mp4").read_bytes() == whole("t2v-tiny")
    assert os.listdir() == ["out.mp4"]


def stopped(task="t2v-tiny", step=2, *arguments):
    """The state of a run that was told to stop in that step of denoising."""
    line = ["--task", task, *SETTINGS, "--save_file", "out.mp4", *arguments]
    first = {"t2v-tiny": 3, "vace-tiny": 5}.get(task, 7)
    assert in_a_child(line, at_event(first + step, signal.SIGTERM)) == 143
    (state,) = states()
    return state


@pytest.mark.parametrize(
    "options",
    [
        ["--low_vram", "--dit_chunk", "64"],
        ["--offload_folder", "folder", "--offload_model", "False"],
    ],
)
def test_other_memory_options_change_nothing(options, whole):
    solver = "dpm++" if "--low_vram" in options else "unipc"
    state = stopped("t2v-tiny", 2, "--sample_solver", solver)
    assert read_state(state).latent is not None
    assert command("--resume", state, *options) == 0
    assert Path("out.mp4").read_bytes() == whole("t2v-tiny", "--sample_solver", solver)


@pytest.mark.parametrize("task", ["i2v-tiny", "vace-tiny"])
def test_resuming_loads_no_encoder_and_reads_no_input(task, whole, monkeypatch, tmp_path):
    inputs = {"i2v-tiny": ("--image", "i2v_input.png"), "vace-tiny": ("--src_ref_images", "vace_ref_1.png")}
    flag, example = inputs[task]
    picture = tmp_path / "picture.png"
    shutil.copy(Path(generate.__file__).parent / "examples" / example, picture)
    expected = whole(task, flag, str(picture))
    state = stopped(task, 1, flag, str(picture))
    picture.unlink()
    for name in ("T5EncoderModel", "CLIPModel"):
        monkeypatch.setattr(f"wan.pipeline.{name}", None)
    assert command("--resume", state) == 0
    assert Path("out.mp4").read_bytes() == expected


def test_a_state_goes_on_from_another_folder_and_after_a_move(whole, tmp_path, monkeypatch):
    stopped()
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (state,) = (tmp_path / "there").glob("*.state")
    assert command("--resume", f"../there/{state.name}") == 0
    assert os.listdir() == [] and os.listdir(tmp_path / "there") == ["out.mp4"]
    assert (tmp_path / "there" / "out.mp4").read_bytes() == whole("t2v-tiny")


def test_the_way_back_works_when_pasted_anywhere(whole, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "it's a folder; $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def full(*_, **__):
        raise OSError("out.mp4: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(execute, "save_video", full)
        assert command("--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4") == 1
    line = caplog.messages[-1].partition("go on with: ")[2]
    assert os.system(f"cd / && {line} 2>&1 >/dev/null") == 0
    assert (folder / "out.mp4").read_bytes() == whole("t2v-tiny")
    assert os.listdir(folder) == ["out.mp4"]


def test_the_way_back_is_the_command_that_was_used(monkeypatch, tmp_path, capsys):
    state = Path("a b.state").absolute()
    script = Path(generate.__file__).resolve()
    assert shlex.split(keeper.way_back(state)) == [sys.executable, str(script), "--resume", str(state)]
    installed = tmp_path / "bin" / "wan-generate"
    installed.parent.mkdir()
    installed.write_text("#!/bin/sh")
    installed.chmod(0o755)
    monkeypatch.setenv("PATH", str(installed.parent))
    for started in (str(installed), "wan-generate"):  # by its path, or found by the shell
        monkeypatch.setattr(sys, "argv", [started])
        assert shlex.split(keeper.way_back(state)) == [str(installed), "--resume", str(state)]
    assert command("--frame_num", "8") == 2
    assert capsys.readouterr().err.startswith("wan-generate: --frame_num 8")


def test_the_installed_command_is_interrupted_in_imports(monkeypatch, capsys):
    def stopped(name, *rest, **more):
        if "cli" in name:
            raise KeyboardInterrupt
        return real(name, *rest, **more)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", stopped)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/wan-generate"])
    from wan.__main__ import main

    assert main() == 130 and capsys.readouterr().err == "wan-generate: interrupted\n"


def test_a_run_with_a_lora_goes_on_to_the_same_bytes(whole, tmp_path, capsys):
    file, generator = tmp_path / "l.safetensors", torch.Generator().manual_seed(0)
    weight = tiny_weights()["blocks.0.self_attn.q.weight"]
    pair = {"lora_A": (4, weight.shape[1]), "lora_B": (weight.shape[0], 4)}
    key = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{key}.{name}.weight": torch.randn(*s, generator=generator) for name, s in pair.items()}
    save_file(tensors, file)
    flags = ("--lora", f"{file}:0.7")
    expected = whole("t2v-tiny", *flags)
    assert expected != whole("t2v-tiny")
    state = stopped("t2v-tiny", 2, *flags)
    assert "--lora: settled by the state" in refused(capsys, "--resume", state, "--lora", str(file))
    original = file.read_bytes()
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, file)
    assert "--lora: is not what the run started with" in refused(capsys, "--resume", state)
    file.unlink()
    assert "no such file" in refused(capsys, "--resume", state)
    file.write_bytes(original)
    assert command("--resume", state, "--low_vram", "--dit_chunk", "64") == 0
    assert Path("out.mp4").read_bytes() == expected


def tiny_weights():
    return load_file(random_models.checkpoint("t2v-tiny") / "diffusion_pytorch_model.safetensors")


def test_two_runs_of_one_name_have_states_of_their_own():
    first = stopped()
    assert (
        in_a_child(
            ["--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4", "--base_seed", "4"],
            at_event(5, signal.SIGTERM),
        )
        == 143
    )
    assert len(states()) == 2
    assert command("--resume", first) == 0 and len(states()) == 1


def refused(capsys, *arguments):
    """The one line that refuses a command, which changes nothing."""
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    capsys.readouterr()
    assert command(*arguments) == 2
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before
    error = capsys.readouterr().err
    return error.splitlines()[-1]


def test_what_cannot_be_trusted_is_refused(capsys, tmp_path):
    state = stopped()
    data = state.read_bytes()
    for place in (0, 20, len(data) // 2, len(data) - 1):
        for damaged in (data[:place], data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]):
            Path("bad.state").write_bytes(damaged)
            assert re.search(
                r"--resume bad.state: (damaged|not a state)", refused(capsys, "--resume", "bad.state")
            )
    assert "no such file" in refused(capsys, "--resume", "none.state")
    assert "no such file" in refused(capsys, "--resume", "")
    assert "--prompt: settled by the state" in refused(capsys, "--resume", state, "--prompt", "a")
    other = random_models.write_checkpoint(tmp_path / "other", "t2v-tiny", seed=1)
    assert "is not the file that the run started with" in refused(
        capsys, "--resume", state, "--ckpt_dir", other
    )


def test_another_version_is_refused(capsys, monkeypatch):
    state = stopped()
    monkeypatch.setattr("wan.run.state.__version__", "9.9")
    assert "was written by version" in refused(capsys, "--resume", state)


def test_weights_of_what_is_done_are_not_asked_for(tmp_path, whole):
    checkpoint = random_models.write_checkpoint(tmp_path / "weights", "t2v-tiny")
    state = stopped("t2v-tiny", 2, "--ckpt_dir", str(checkpoint))
    shutil.move(checkpoint, tmp_path / "moved")
    encoder = tmp_path / "moved" / "models_t5_umt5-xxl-enc-bf16.pth"
    encoder.write_bytes(b"")
    assert command("--resume", state, "--ckpt_dir", tmp_path / "moved") == 0


def test_a_full_disk_keeps_the_state_elsewhere(whole, monkeypatch, tmp_path, caplog):
    caplog.set_level("INFO")
    other = tmp_path / "temporary"
    other.mkdir()
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(other))
    write = write_state

    def full(path, state):
        if Path(path).parent != other and state.finished:
            raise OSError("No space left on device")
        write(path, state)

    def nothing(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(keeper, "write_state", full)
        patch.setattr(execute, "save_video", nothing)
        assert command("--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4") == 1
    assert os.listdir() == []
    (state,) = other.iterdir()
    assert str(state) in caplog.messages[-1]
    assert command("--resume", state) == 0
    assert Path("out.mp4").read_bytes() == whole("t2v-tiny") and not list(other.iterdir())


@pytest.mark.parametrize("stage", ["encoding the prompt", "denoising, step 2", "decoding"])
def test_values_that_are_not_numbers_stop_the_run(stage, monkeypatch, capsys):
    from wan.sampling import Solver
    from wan.utils.video import EightBitFrames

    def poisoned(owner, name, when=lambda call: True):
        function, calls = getattr(owner, name), []

        def poison(*args, **kwargs):
            calls.append(args)
            result = function(*args, **kwargs)
            tensor = result[0] if isinstance(result, (list, tuple)) else result
            if when(len(calls)):
                tensor.view(-1)[5] = float("nan")
            return result

        monkeypatch.setattr(owner, name, poison)

    if stage.startswith("enc"):
        poisoned(wan.WanT2V, "_encode_prompts")
    elif stage.startswith("den"):
        poisoned(Solver, "step", lambda call: call == 2)
    else:
        convert = EightBitFrames.__call__

        def poison(frames, frame):
            frame[0, 0] = float("nan")
            return convert(frames, frame)

        monkeypatch.setattr(EightBitFrames, "__call__", poison)
    assert command("--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4") == 2
    assert f"{stage} gave values that are infinite or not numbers" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("out.mp4").exists()


def test_latents_that_were_saved_are_the_last_state(whole):
    line = ["--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4", "--save_latents", "latents"]
    assert command(*line) == 0 and sorted(os.listdir()) == ["latents", "out.mp4"]
    decode = ["--task", "t2v-tiny", "--decode_latents", "latents", "--save_file"]
    assert command(*decode, "again.mp4") == 0
    assert Path("again.mp4").read_bytes() == whole("t2v-tiny") == Path("out.mp4").read_bytes()


def test_a_state_comes_back_as_it_was(tmp_path):
    from wan.pipeline import Conditioning
    from wan.run.state import State

    tensors = [torch.randn(2, 3).to(torch.bfloat16), torch.tensor(7), torch.zeros(0, 4)]
    conditioning = Conditioning(
        (16, 1, 2, 2), torch.randn(3, 4), torch.randn(2, 4), {"y": [tensors[0]]}, {"scale": 0.1 + 0.2}, 1
    )
    request = Request(
        task="t2v-tiny", save_file=str(tmp_path / "a.mp4"), prompt="a »b«\n", base_seed=2**62 + 1
    )
    solver = {"model_outputs": [None, tensors[1]], "last_sample": tensors[2], "_step_index": 3}
    state = State(request, {"a": "b"}, conditioning, torch.randn(16, 1, 2, 2).transpose(0, 1), solver)
    write_state(tmp_path / "s", state)
    found = read_state(tmp_path / "s")
    assert (
        torch.equal(found.latent, state.latent) and found.stage == "denoise" and found.weights == {"a": "b"}
    )
    assert found.request == dataclasses.replace(request, resume=str(tmp_path / "s"))
    assert torch.equal(found.solver["model_outputs"][1], tensors[1]) and found.solver["_step_index"] == 3
    assert found.conditioning.inputs["y"][0].dtype is torch.bfloat16
    assert found.conditioning.host_inputs == {"scale": 0.1 + 0.2} and found.conditioning.references == 1


def test_two_runs_at_once_on_one_name_both_keep_their_result(monkeypatch, whole):
    expected, decode = whole("t2v-tiny"), wan.WanT2V.decode

    def meanwhile(self, latent, frames):
        Path("out.mp4").write_bytes(b"of another run")
        return decode(self, latent, frames)

    monkeypatch.setattr(wan.WanT2V, "decode", meanwhile)
    assert command("--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4") == 0
    assert sorted(os.listdir()) == ["out.mp4", "out_2.mp4"]
    assert Path("out.mp4").read_bytes() == b"of another run"
    assert Path("out_2.mp4").read_bytes() == expected


def test_a_disk_without_room_is_told_before_the_start(monkeypatch, capsys):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: usage)
    line = ["--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4"]
    assert "--save_file out.mp4: the disk has only 0 MB left" in refused(capsys, *line)


def test_a_run_is_asked_to_stop_by_a_script(whole):
    interrupts = Interrupts()

    def listener(event):
        if event == Step("denoise", 2, 4):
            interrupts.ask()

    request = generate.parse_arguments(["--task", "t2v-tiny", *SETTINGS, "--save_file", "out.mp4"])
    with pytest.raises(Interrupted):
        run(request, listener, interrupts)
    (state,) = states()
    assert read_state(state).solver["_step_index"] == 3
    assert command("--resume", state) == 0 and Path("out.mp4").read_bytes() == whole("t2v-tiny")
