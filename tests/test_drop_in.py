"""Programs written for Wan2.1 run on this package: modules, names, signatures, and upstream's own programs."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from goldens import picture

import wan
from leanwan.dit.forward import embed_patches
from leanwan.dit.tokens import ON_DEVICE
from leanwan.errors import InputError
from wan import cli, random_models
from wan.configs import WAN_CONFIGS
from wan.modules import VaceWanModel, WanModel, WanVAE
from wan.modules.model import sinusoidal_embedding_1d
from wan.utils import prompt_extend
from wan.utils.fm_solvers import FlowDPMSolverMultistepScheduler, get_sampling_sigmas, retrieve_timesteps
from wan.utils.fm_solvers_unipc import FlowUniPCMultistepScheduler
from wan.utils.utils import cache_image, cache_video, rand_name, str2bool
from wan.utils.video import save_image, save_video

ROOT = Path(__file__).parent.parent
UPSTREAM = os.environ.get("WAN_UPSTREAM")
needs_upstream = pytest.mark.skipif(not UPSTREAM, reason="WAN_UPSTREAM names no checkout of upstream")

LIBRARY = "transformers' class does it, under its own names"
INSIDE = "a step of the method that calls it, which is there"
TRAINING = "for training"

# What upstream has and this package has not, or otherwise: "file", "file:name", "file:Class.method", with what follows
# an "=" being one argument whose default differs. Every entry says why.
LEFT_OUT = {
    # whole files
    "distributed/*": "built on torch.distributed as it is, without xfuser and FSDP1",
    "modules/xlm_roberta.py": "CLIP's text tower, which no pipeline calls",
    "utils/qwen_vl_utils.py": "transformers' image processor does it",
    # text and image encoder
    "modules/t5.py:T5EncoderModel.__init__=device": "upstream asks for the current CUDA device at import; here cpu",
    "modules/t5.py:[!T]*": LIBRARY,
    "modules/t5.py:T5LayerNorm": LIBRARY,
    "modules/t5.py:T5Attention": LIBRARY,
    "modules/t5.py:T5FeedForward": LIBRARY,
    "modules/t5.py:T5SelfAttention": LIBRARY,
    "modules/t5.py:T5RelativeEmbedding": LIBRARY,
    "modules/t5.py:T5Encoder": LIBRARY,
    "modules/t5.py:T5CrossAttention": "the decoder's, which no pipeline builds",
    "modules/t5.py:T5Decoder": "no pipeline builds it",
    "modules/t5.py:T5Model": "encoder and decoder, which no pipeline builds",
    "modules/clip.py:[!C]*": LIBRARY,
    "modules/tokenizers.py:[!H]*": "an entry of CLEANERS",
    # DiT
    "modules/attention.py:attention": "flash_attention falls back by itself",
    "modules/attention.py:flash_attention=dtype": "None keeps fp32; upstream's kernel has no fp32",
    "modules/model.py:rope_params": "rope_frequencies makes the table of all three axes at once",
    "modules/model.py:rope_apply": "Rope in forward.py turns any span of the tokens",
    "modules/model.py:WanSelfAttention.forward": "runs inside its block, which holds no whole-sequence copies",
    "modules/model.py:WanT2VCrossAttention.forward": "as self attention's",
    "modules/model.py:WanI2VCrossAttention.forward": "as self attention's",
    "modules/model.py:WanAttentionBlock.forward=context_lens": "it may be left out here",
    "modules/model.py:WanModel.init_weights": TRAINING,
    "modules/vace_model.py:VaceWanAttentionBlock": "blocks are of one class; the model adds the projections",
    "modules/vace_model.py:BaseWanAttentionBlock": "as above",
    "modules/vace_model.py:VaceWanModel.forward_vace": "hints are made when they are needed, not kept",
    # VAE
    "modules/vae.py:CausalConv3d": "an operation of vae_operations.py",
    "modules/vae.py:RMS_norm": "RMSNorm, without what the checkpoint has not",
    "modules/vae.py:Resample": "Upsample and Downsample",
    "modules/vae.py:Upsample": "torch's own",
    "modules/vae.py:ResidualBlock": "without dropout; it runs as an operation",
    "modules/vae.py:AttentionBlock": "it runs as an operation",
    "modules/vae.py:Encoder3d": "Encoder, of the one shape that is published",
    "modules/vae.py:Decoder3d": "Decoder, of the one shape that is published",
    "modules/vae.py:count_conv3d": "the temporal cache is not indexed by a count",
    "modules/vae.py:WanVAE_": "VAE, with encode and decode",
    # solvers
    "utils/fm_solvers*.py:*.step_index": "diffusers' own",
    "utils/fm_solvers*.py:*.begin_index": "diffusers' own",
    "utils/fm_solvers*.py:*.time_shift": "dynamic shifting is refused",
    "utils/fm_solvers*.py:*.convert_model_output": "diffusers' own, called by step",
    "utils/fm_solvers*.py:*.*_update": "diffusers' own, called by step",
    "utils/fm_solvers*.py:*.add_noise": "diffusers' own",
    "utils/fm_solvers*.py:*.scale_model_input": "diffusers' own",
    "utils/fm_solvers*.py:FlowUniPCMultistepScheduler.__init__=disable_corrector": "() for [], which could be changed",
    # source material
    "utils/vace_processor.py:VaceImageProcessor": "no pipeline uses it",
    "utils/vace_processor.py:prepare_source": "of tensors; WanVace.prepare_source does all of it",
    "utils/vace_processor.py:VaceVideoProcessor.resize_crop": INSIDE,
    "utils/vace_processor.py:VaceVideoProcessor.load_video_batch": "load_video, load_video_pair do it for one and two",
    # prompt extension
    "utils/prompt_extend.py:*.extend": "an expander is called; extend_prompt has the steps",
    "utils/prompt_extend.py:*.extend_with_img": "as extend",
    "utils/prompt_extend.py:*.decide_system_prompt": "as extend; the instructions are this project's own",
    "utils/prompt_extend.py:PromptOutput.add_custom_field": "results are frozen",
    "utils/prompt_extend.py:PromptExpander.__init__=model_name": "it may be left out here",
    # pipelines
    "*.py:*.generate=offload_model": "None here means the option of the pipeline, which is True by default",
    "vace.py:WanVaceMP.[!_]*": "steps of its own processes; they are called as WanVace is",
}  # fmt: skip
EXPORTS_LEFT_OUT = {"T5Model", "T5Encoder", "T5Decoder"}  # see above


def signatures(path):
    """{"name" or "Class.method": ast.arguments} of a source file, without names that start with an underscore."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node.args
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
            methods = [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]
            found |= {f"{node.name}.{method.name}": method.args for method in methods}
    return {
        name: args
        for name, args in found.items()
        if all(not part.startswith("_") or part in ("__init__", "__call__") for part in name.split("."))
    }


def left_out(name):
    return any(fnmatch(name, entry) for entry in LEFT_OUT if "=" not in entry)


def default_left_out(name, argument):
    return any(
        fnmatch(name, entry.partition("=")[0]) and entry.partition("=")[2] == argument
        for entry in LEFT_OUT
        if "=" in entry
    )


def compare(name, theirs, ours):
    """What differs between upstream's arguments and a function of ours, one line each."""
    parameters = list(inspect.signature(ours).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = [argument.arg for argument in theirs.args]
    differences = []
    if [p.name for p in positional[: len(names)]][1:] != names[1:] or len(positional) < len(names):
        differences.append(f"{name}: {[p.name for p in positional]} instead of {names}")
        return differences
    if any(p.default is p.empty for p in positional[len(names) :]):
        differences.append(f"{name}: wants more than upstream gives")
    defaults = [inspect.Parameter.empty] * (len(names) - len(theirs.defaults)) + theirs.defaults
    for parameter, default in zip(positional, defaults):
        if default_left_out(name, parameter.name):
            continue
        value = default
        if isinstance(default, ast.AST):
            value = eval(ast.unparse(default), {"torch": torch})
        if value != parameter.default:
            differences.append(f"{name}: {parameter.name}={parameter.default} instead of {value}")
    return differences


@needs_upstream
def test_signatures_are_upstreams():
    differences, used = [], set()
    root = Path(UPSTREAM) / "wan"
    for path in sorted(root.rglob("*.py")):
        file = str(path.relative_to(root))
        for name, theirs in ({"": None} | signatures(path)).items():
            full = f"{file}:{name}" if name else file
            entries = [entry for entry in LEFT_OUT if fnmatch(full, entry.partition("=")[0])]
            used |= set(entries)
            owner = f"{file}:{name.partition('.')[0]}"
            if left_out(file) or left_out(full) or left_out(owner):
                continue
            ours = importlib.import_module(
                "wan." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
            )
            for part in name.split(".") if name else ():
                ours = getattr(ours, part, None)
                if ours is None:
                    differences.append(f"{full}: missing")
                    break
            if theirs is not None and ours is not None:
                differences += compare(full, theirs, ours)
    assert not differences, "\n".join(differences)
    assert used == set(LEFT_OUT), "entries of the table that nothing of upstream's needs"


@needs_upstream
@pytest.mark.parametrize("package", ["modules", "utils", ""])
def test_exports_are_upstreams(package):
    """Whatever upstream's packages import from their modules can be imported from ours."""
    ours = importlib.import_module(f"wan.{package}".rstrip("."))
    tree = ast.parse((Path(UPSTREAM) / "wan" / package / "__init__.py").read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert names
    for name in names:
        if name not in EXPORTS_LEFT_OUT:
            assert getattr(ours, name)


# Upstream's programs


def run(code_or_script, *arguments):
    """Runs a Python program with this project on its path, and without the program's own folder."""
    command = [sys.executable, "-P", "-O", *code_or_script, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


IMAGES = {
    "t2v-tiny": [],
    "t2i-tiny": [],
    "i2v-tiny": ["--image"],
    "flf2v-tiny": ["--first_frame", "--last_frame"],
    "vace-tiny": ["--src_ref_images"],
}


def frames(path):
    """The pictures in a file, as bytes; ours has its settings in the metadata beside them."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]


@needs_upstream
@pytest.mark.parametrize("task", IMAGES)
def test_upstreams_generate(task, tmp_path):
    """Its file is ours. -P: its own package is not on the path; -O: its list of tasks, an assertion, has no toys."""
    still = task.startswith("t2i")
    flags = ["--task", task, "--size", "128*96", "--frame_num", 1 if still else 5, "--sample_steps", 2]
    flags += [
        "--sample_shift",
        5,
        "--base_seed",
        3,
        "--prompt",
        "a red boat",
        "--ckpt_dir",
        random_models.checkpoint(task),
    ]
    flags += ["--sample_solver", "dpm++" if task == "t2v-tiny" else "unipc"]
    for flag in IMAGES[task]:
        path = tmp_path / f"{flag}.png"
        picture(flag, 120, 90).save(path)
        flags += [flag, path]
    suffix = "png" if still else "mp4"
    ours, theirs = tmp_path / f"ours.{suffix}", tmp_path / f"theirs.{suffix}"
    run([str(Path(UPSTREAM) / "generate.py")], *flags, "--save_file", theirs)
    assert cli.main([*map(str, flags), "--save_file", str(ours)]) == 0
    assert frames(theirs) == frames(ours)


# Stands in for gradio: builds nothing, and as its page is launched presses the buttons that the test names.
GRADIO = """
import json, os, runpy, sys, types
from pathlib import Path

class Anything:
    def __init__(self, *args, **options):
        self.value = options.get("value")
    def __enter__(self):
        return self
    def __exit__(self, *exception):
        pass
    def queue(self, **options):
        return self
    def click(self, fn, inputs, outputs, **options):
        BUTTONS[fn.__name__] = (fn, inputs)
    change = input = click
    def launch(self, **options):
        for name, values in PRESS:
            fn, inputs = BUTTONS[name]
            assert len(inputs) == len(values), (name, len(inputs))
            values = [load(value) for value in values]
            print("RESULT", name, fn(*values))

def load(value):
    from PIL import Image
    return Image.open(value[1]) if isinstance(value, list) and value[:1] == ["image"] else value

def missing():
    raise AttributeError

BUTTONS = {}
gradio = types.ModuleType("gradio")
vars(gradio).update(Error=Exception, __getattr__=lambda name: missing() if name.startswith("__") else Anything)
sys.modules["gradio"] = gradio

script, toys, PRESS = sys.argv[1], *map(json.loads, sys.argv[2:4])
sys.argv = [script, *sys.argv[4:]]
import wan.configs as configs
for name, toy in toys.items():
    configs.WAN_CONFIGS[name] = configs.WAN_CONFIGS[toy]
for table in (configs.SIZE_CONFIGS, configs.MAX_AREA_CONFIGS):  # what the programs have built in, in toy sizes
    for name, size in table.items():
        table[name] = (128, 96) if isinstance(size, tuple) else 128 * 96
runpy.run_path(script, run_name="__main__")
import wan
assert Path(wan.__file__).parents[1] == Path(os.environ["PYTHONPATH"]), wan.__file__
"""
ENHANCE = ("prompt_enc", ["a boat", "EN"])
SCRIPTS = {
    "t2v_1.3B_singleGPU.py": (
        "t2v-1.3B", "t2v-tiny", "--ckpt_dir",
        [ENHANCE, ("t2v_generation", ["a boat", "128*96", 1, 6.0, 8.0, 1, ""])],
    ),
    "t2v_14B_singleGPU.py": (
        "t2v-14B", "t2v-tiny", "--ckpt_dir",
        [ENHANCE, ("t2v_generation", ["a boat", "96*128", 1, 5.0, 5.0, 1, "grey"])],
    ),
    "t2i_14B_singleGPU.py": (
        "t2i-14B", "t2i-tiny", "--ckpt_dir",
        [ENHANCE, ("t2i_generation", ["a boat", "128*96", 1, 5.0, 5.0, 1, ""])],
    ),
    "i2v_14B_singleGPU.py": (
        "i2v-14B", "i2v-tiny", "--ckpt_dir_720p",
        [("load_model", ["720P"]), ("prompt_enc", ["a boat", ["image", "0.png"], "EN"]),
         ("i2v_generation", ["a boat", ["image", "0.png"], "720P", 1, 5.0, 5.0, 1, ""])],
    ),
    "fl2v_14B_singleGPU.py": (
        "flf2v-14B", "flf2v-tiny", "--ckpt_dir_720p",
        [("load_model", ["720P"]), ("prompt_enc", ["a boat", ["image", "0.png"], ["image", "1.png"], "EN"]),
         ("flf2v_generation", ["a boat", ["image", "0.png"], ["image", "1.png"], "720P", 1, 5.0, 16.0, 1, ""])],
    ),
    "vace.py": (
        "vace-14B", "vace-tiny", "--ckpt_dir",
        [("generate", [[], None, None, "0.png", None, None, "a boat", "grey", 16.0, 1, 1.0, 5.0, 1, 720, 1280, 16, 9])],
    ),
}  # fmt: skip


@needs_upstream
@pytest.mark.parametrize("script", SCRIPTS)
def test_upstreams_pages(script, tmp_path, monkeypatch):
    name, toy, flag, press = SCRIPTS[script]
    for i in range(2):
        picture(str(i), 120, 90).save(tmp_path / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    done = run(
        ["-c", GRADIO], Path(UPSTREAM) / "gradio" / script, json.dumps({name: toy}), json.dumps(press),
        flag, random_models.checkpoint(toy),
    )  # fmt: skip
    results = [line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert [result[1] for result in results] == [button for button, _ in press]
    made = [*tmp_path.glob("example.*"), *tmp_path.glob("cache/*.mp4")]
    assert len(made) == 1 and made[0].stat().st_size > 1000


# The parts, without upstream


def test_saving_gives_the_bytes_of_the_command_line(tmp_path):
    video = torch.rand(3, 5, 32, 48) * 2.2 - 1.1
    save_video(video, tmp_path / "a.mp4", fps=8)
    assert cache_video(video[None], str(tmp_path / "b.mp4"), fps=8, nrow=1) == str(tmp_path / "b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    save_image(video[:, 0], tmp_path / "a.png")
    cache_image(tensor=video[None, :, 0], save_file=str(tmp_path / "b.png"), nrow=1)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    unnormalized = (video[None, :, 0].clamp(-1, 1) + 1) / 2
    cache_image(unnormalized, str(tmp_path / "c.png"), normalize=False, value_range=(0, 1))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "c.png").read_bytes()


def test_several_pictures_are_saved_as_a_grid(tmp_path):
    """As torchvision's make_grid frames them: two black pixels around each."""
    from PIL import Image

    images = torch.stack([torch.full((3, 4, 6), value) for value in (1.0, 0.0, -1.0)])
    cache_image(images, str(tmp_path / "a.png"), nrow=2)
    pixels = np.array(Image.open(tmp_path / "a.png"))[..., 0]
    expected = np.zeros((2 + 2 * 6, 2 + 2 * 8), dtype=np.uint8)
    expected[2:6, 2:8], expected[2:6, 10:16] = 255, 128
    assert np.array_equal(pixels, expected)


def test_a_video_without_a_name_goes_to_the_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = cache_video(torch.zeros(1, 3, 1, 16, 16), suffix="mkv")
    assert Path(path).parent == tmp_path and path.endswith(".mkv") and Path(path).stat().st_size
    assert len(rand_name()) == 16 and rand_name(3, ".a")[6:] == ".a" != rand_name(3, ".a")


def test_flags_of_either_spelling():
    assert [str2bool(v) for v in (True, False, "Yes", "f", "0")] == [True, False, True, False, False]


def test_solvers_forget_their_steps_with_a_new_schedule():
    for make in (FlowUniPCMultistepScheduler, FlowDPMSolverMultistepScheduler):
        solver = make(num_train_timesteps=1000, shift=1, use_dynamic_shifting=False)
        results = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(1)
            sample = torch.randn(1, 4, 4, generator=generator)
            solver.set_timesteps(5, device="cpu", shift=3.0)
            for t in solver.timesteps:
                flow = torch.randn(1, 4, 4, generator=generator)
                (sample,) = solver.step(flow, t, sample, return_dict=False, generator=generator)
            results.append(sample)
        assert torch.equal(*results)


def test_timesteps_follow_the_sigmas_given():
    solver = FlowDPMSolverMultistepScheduler()
    sigmas = get_sampling_sigmas(4, 3.0)
    times, count = retrieve_timesteps(solver, device="cpu", sigmas=sigmas)
    assert count == 4 and times.tolist() == [1000, 900, 750, 500]
    assert solver.sigmas.tolist() == pytest.approx([*sigmas, 0])
    with pytest.raises(ValueError, match="not both"):
        retrieve_timesteps(solver, timesteps=[1], sigmas=[1])
    with pytest.raises(ValueError, match="takes no timesteps"):
        retrieve_timesteps(FlowUniPCMultistepScheduler(), timesteps=[1])
    for refused in (
        {"use_dynamic_shifting": True},
        {"final_sigmas_type": "sigma_min"},
        {"invert_sigmas": True},
    ):
        with pytest.raises(ValueError, match="support"):
            FlowDPMSolverMultistepScheduler(**refused)


@pytest.mark.parametrize("task", ["t2v-tiny", "i2v-tiny", "flf2v-tiny", "vace-tiny"])
def test_a_model_is_saved_and_loaded(task, tmp_path):
    kind = VaceWanModel if task == "vace-tiny" else WanModel
    model = kind.from_pretrained(random_models.checkpoint(task))
    assert model.config.dim == model.config["dim"] == model.dim and model.config.qk_norm is True
    model.save_pretrained(tmp_path / "new" / "folder")
    again = kind.from_pretrained(tmp_path / "new" / "folder")
    assert json.dumps(again.config) == json.dumps(model.config)
    weights = model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("task, first", [("t2v-tiny", torch.float32), ("i2v-tiny", torch.bfloat16)])
def test_a_forward_pass_written_out_by_its_parts(task, first):
    """As programs do that replace WanModel.forward. Each sample is embedded alone: a batch rounds otherwise."""
    model = WanModel.from_pretrained(random_models.checkpoint(task), dtype=first)
    generator = torch.Generator().manual_seed(2)
    x = [torch.randn(model.config.in_dim, 3, 4, 6, generator=generator) for _ in range(2)]
    context = [torch.randn(9, 4096, generator=generator), torch.randn(5, 4096, generator=generator)]
    features = torch.randn(2, 257, 1280, generator=generator)
    t = torch.tensor([901.0, 17.0])
    image = {"clip_fea": features, "y": [part[16:] for part in x]} if task == "i2v-tiny" else {}
    expected = model([part[:16] for part in x] if image else x, t, context, 18, **image)

    embedded = [embed_patches(model.patch_embedding, [part], "cpu", first, ON_DEVICE, "x") for part in x]
    grid = torch.tensor([grid for _, grid in embedded])
    stream = torch.cat([tokens.whole for tokens, _ in embedded]).to(first)
    angles = sinusoidal_embedding_1d(model.freq_dim, t).float()
    time = torch.cat([model.time_embedding(row[None]) for row in angles])
    modulation = torch.cat([model.time_projection(row[None]) for row in time]).unflatten(1, (6, -1))
    padded = torch.stack([torch.cat([row, row.new_zeros(512 - len(row), 4096)]) for row in context]).to(first)
    joined = torch.cat([model.text_embedding(row[None]) for row in padded])
    if image:
        images = torch.cat([model.img_emb(row[None]) for row in features])
        joined = torch.cat([images.to(joined), joined], dim=1)
    lengths = torch.tensor([18, 18])
    with torch.no_grad():
        for block in model.blocks:
            stream = block(stream, modulation, lengths, grid, model.freqs, joined, None)
        flows = model.unpatchify(model.head(stream, time), grid)
    for flow, other in zip(flows, expected):
        assert torch.equal(flow.to(first).float(), other)


def test_the_vaes_module_codes_batches():
    vae = WanVAE(
        vae_pth=random_models.checkpoint("t2v-tiny") / WAN_CONFIGS["t2v-tiny"].vae_checkpoint,
        device="cpu",
        dim=8,
    )
    videos = torch.rand(2, 3, 5, 16, 24) * 2 - 1
    latents = vae.model.encode(videos, vae.scale)
    assert torch.equal(latents, torch.stack(vae.encode(list(videos))))
    assert torch.equal(vae.model.decode(latents, vae.scale), torch.stack(vae.decode(list(latents))))


def test_vace_is_a_text_pipeline():
    assert issubclass(wan.WanVace, wan.WanT2V) and issubclass(wan.WanVaceMP, wan.WanVace)
    checkpoint = random_models.checkpoint("vace-tiny")
    with pytest.raises(InputError, match="ulysses_size and ring_size: there are 3 processes"):
        wan.WanVaceMP(WAN_CONFIGS["vace-tiny"], checkpoint, True, 2, 1, processes=3, device="cpu")
    assert wan.WanVaceMP(WAN_CONFIGS["vace-tiny"], checkpoint, processes=1, device="cpu")._ranks is None


def test_vace_decodes_without_the_references():
    pipeline = wan.WanVace(WAN_CONFIGS["vace-tiny"], random_models.checkpoint("vace-tiny"), device="cpu")
    latent = torch.randn(16, 4, 4, 6)
    (video,) = pipeline.decode_latent([latent], [[None, None]])
    assert torch.equal(video, pipeline.vae.decode([latent[:, 2:]])[0])
    assert pipeline.decode_latent([latent])[0].shape[1] == 13


@pytest.mark.parametrize(
    "make, asked",
    [
        (partial(prompt_extend.DashScopePromptExpander, "key"), {"method": "dashscope", "api_key": "key"}),
        (partial(prompt_extend.QwenPromptExpander, "name", 0), {"method": "local_qwen", "model": "name"}),
    ],
)
def test_expanders_ask_as_the_command_line_does(make, asked, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(
        prompt_extend, "extend_prompt", lambda prompt, **options: calls.append((prompt, options))
    )
    image = picture("a", 8, 8)
    image.save(tmp_path / "a.png")
    make()("a boat", tar_lang="en", image=image, seed=7)
    make(is_vl=True)("a boat", image=str(tmp_path / "a.png"))
    make()("a boat", "instructions", image=[image, image])
    assert [len(options["images"]) for _, options in calls] == [0, 1, 2]
    assert [options["target_lang"] for _, options in calls] == ["en", "zh", "zh"]
    assert [options["seed"] for _, options in calls] == [7, -1, -1]
    assert [options["instructions"] for _, options in calls] == [None, None, "instructions"]
    for prompt, options in calls:
        assert prompt == "a boat" and asked.items() <= options.items()
