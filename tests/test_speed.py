"""What rounds otherwise and is faster: attention by choice, compiled blocks; and that nothing of it happens unasked."""

import os
import shutil
import sys

import pytest
import torch
from goldens import DIT_CASES, dit_inputs

import generate
import wan
from leanwan.dit.chunks import apply_chunking
from leanwan.errors import InputError
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.kernels import apply_speed, check_able
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.run.settings import read_settings

# The real compiler takes minutes: WAN_COMPILE=1 asks for it.
needs_compiler = pytest.mark.skipif(
    "WAN_COMPILE" not in os.environ, reason="takes minutes, set WAN_COMPILE=1"
)


def dit(task, dtype=torch.float32):
    model_class = VaceWanModel if task == "vace" else WanModel
    return model_class.from_pretrained(random_models.checkpoint(f"{task}-tiny"), dtype)


@torch.no_grad()
def flow(model, task, case="whole"):
    return model(**dit_inputs(task, DIT_CASES[case]))[0]


def traced():
    """A backend of torch.compile that runs what was traced as it is, and the list of graphs that it was given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@pytest.mark.parametrize("task", ["i2v", "vace"])
def test_a_block_is_one_graph_and_all_blocks_share_it(task):
    """The first block of a stack has a graph of its own, for its norm rounds; what is traced gives the same bits."""
    model = dit(task, torch.bfloat16)
    expected = flow(model, task)
    backend, graphs = traced()
    undo = apply_speed(model, compiled=True, backend=backend)
    for _ in range(2):
        assert torch.equal(flow(model, task), expected)
    assert len(graphs) == 2
    attention = [
        node for graph in graphs for node in graph.graph.nodes if "attention_auto" in str(node.target)
    ]
    assert len(attention) == 2 * (3 if task == "i2v" else 2)
    with pytest.raises(RuntimeError, match="speed is applied already"):
        apply_speed(model, "sdpa")
    undo()
    assert torch.equal(flow(model, task), expected) and len(graphs) == 2 and "forward" not in vars(model)


def test_many_models_and_lengths_are_all_compiled():
    """More than torch.compile makes of one function, after which it would go on uncompiled."""
    import torch._dynamo.config as config

    limit = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch(**{limit: 2}):
        for _ in range(2):
            model = dit("t2v")
            backend, graphs = traced()
            apply_speed(model, compiled=True, backend=backend)
            flow(model, "t2v")
            assert len(graphs) == 2


def test_a_compiler_that_fails_ends_in_one_line():
    def backend(graph, inputs):
        raise ValueError("no such\ninstruction")

    model = dit("t2v")
    apply_speed(model, compiled=True, backend=backend)
    with pytest.raises(
        InputError, match="^compile: torch.compile failed, leave it out .*no such instruction"
    ) as error:
        flow(model, "t2v")
    assert "\n" not in str(error.value)


def test_memory_that_a_compiler_lacks_is_told_as_such():
    def backend(graph, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = dit("t2v")
    apply_speed(model, compiled=True, backend=backend)
    with pytest.raises(Exception, match="out of memory") as error:
        flow(model, "t2v")
    assert not isinstance(error.value, InputError)


@needs_compiler
@pytest.mark.parametrize("task", ["t2v", "i2v", "vace"])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_compiled_within_rounding(task, dtype, limit, measured):
    model = dit(task, dtype)
    expected = flow(model, task)
    apply_speed(model, compiled=True)
    measured(((flow(model, task) - expected).abs().max() / expected.abs().max()).item(), limit, "flow")


@pytest.mark.parametrize("device, missing", [("cpu", "install g++"), ("cuda", "`pip install triton`")])
def test_a_compiler_that_is_not_there_is_named(monkeypatch, device, missing):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=f"^compile: .*{missing}"):
        check_able("sdpa", True, torch.device(device), torch.bfloat16)
    check_able("sdpa", False, torch.device(device), torch.bfloat16)


def test_chosen_attention_reaches_every_call(monkeypatch):
    """Under chunks as without; auto is handed on as it is."""
    seen = []

    def attention(q, k, v, choice="auto"):
        seen.append(choice)
        return torch.zeros_like(q)

    for module in ("wan.kernels", "wan.modules.model"):
        monkeypatch.setattr(f"{module}.flash_attention", attention)
    for chunk in (0, 64):
        for choice in ("auto", "sdpa"):
            model = dit("i2v")
            apply_speed(model, choice)
            apply_chunking(model, chunk)
            seen.clear()
            flow(model, "i2v")
            assert set(seen) == {choice} and len(seen) >= 3 * len(model.blocks)


FEW = ["--task", "t2i-tiny", "--frame_num", "1", "--sample_steps", "1", "--base_seed", "3", "--device", "cpu"]


@pytest.fixture
def counted(monkeypatch):
    """Counts what torch.compile is asked to compile, and has it run by what traces alone."""
    asked, real = [], torch.compile

    def compiling(function, backend, **options):
        asked.append(backend)
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", compiling)
    return asked


def test_the_command_line_compiles_when_asked_alone(counted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, flags, asked in (
        ("plain.png", [], []),
        ("sdpa.png", ["--attention", "sdpa"], []),
        ("compiled.png", ["--compile", "--attention", "sdpa"], ["inductor"]),
    ):
        counted.clear()
        assert generate.main([*FEW, *flags, "--save_file", name]) == 0
        assert counted == asked
        made = read_settings(name)
        assert (made["attention"], made["compile"]) == ("sdpa" if flags else "auto", "--compile" in flags)


def test_the_python_interface_refuses_likewise():
    build = lambda **options: wan.WanT2V(  # noqa: E731
        WAN_CONFIGS["t2v-tiny"], random_models.checkpoint("t2v-tiny"), device="cpu", **options
    )
    with pytest.raises(InputError, match="compile and dit_stream: compiled blocks"):
        build(compile=True, dit_stream=0.0)
    with pytest.raises(InputError, match="attention flash: computes on CUDA devices only"):
        build(attention="flash")
