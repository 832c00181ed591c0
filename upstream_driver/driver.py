"""Runs upstream's code, unpatched or patched, on a machine without a GPU.

Upstream's package has the name of ours, so a tree runs in a process of its own:

    python upstream_driver/driver.py --tree UPSTREAM --task t2v --checkpoint DIR --out FILE [--device vgpu ...]

`run()` starts that process and reads back what it wrote; several trees can be compared that way in one test run.
record_goldens.py uses the other functions inside such a process.

What is replaced, all of it from outside:

- missing libraries, by the stand-ins of stand_ins.py;
- `cuda:N`, by the CPU or by the virtual GPU (`vgpu`); noise is drawn on the CPU for both. With `--device cuda` it is
  what it says;
- flash attention, by scaled-dot-product attention over the valid keys, in the type of the values;
- `torch.cuda.amp.autocast`, by the autocast of the device in use for bfloat16 and float16; float32 turns it off;
- the sizes of T5, the VAE and CLIP, by those of the checkpoint, which upstream has built in;
- the mask of first-last-frame, which upstream builds for 81 frames only, by one of the right length.

With `--meta` (virtual GPU only) the full-size models are built without storage, nothing is read from a checkpoint
and nothing is computed: bytes are counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[1]
STAGES = ("load", "text", "image", "encode", "denoise", "decode")
CONFIGS = {"t2v": "t2v-1.3B", "i2v": "i2v-14B", "flf2v": "flf2v-14B", "vace": "vace-1.3B"}
PIPELINES = {"t2v": "WanT2V", "i2v": "WanI2V", "flf2v": "WanFLF2V", "vace": "WanVace"}
DIT_SIZES = ("dim", "ffn_dim", "freq_dim", "num_heads", "num_layers", "eps")
TOKENS = 120  # of a prompt in meta mode


# Called from tests


@dataclass
class Result:
    """What a run of upstream gave.

    video: [3, F, H, W] fp32 in [-1, 1], latents: [16, F', H', W'] fp32; None if it ran out of memory or counted.
    report: {"peak_bytes", "stages": {name: peak bytes}, "peak_reserved", "reserved": {name: peak bytes},
        "out_of_memory": None or {"stage", "requested"}, "live_bytes"} on the virtual GPU and on CUDA, else {};
        "least_capacity" if find_least.
    """

    video: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    report: dict = field(default_factory=dict)


def run(tree, task, checkpoint=None, *, init=None, call=None, inputs=None, device="cpu", dtype="float32", config=None,
        capacity=None, expandable_segments=False, granularity=None, find_least=False, meta=False,
        timeout=600) -> Result:  # fmt: skip
    """Runs one pipeline of the upstream tree in a process of its own.

    Args:
        tree: upstream's checkout, patched or not.
        task: t2v, i2v, flf2v or vace.
        checkpoint: checkpoint directory; None in meta mode.
        init: further arguments of the pipeline's constructor, e.g. {"t5_cpu": True}.
        call: arguments of its generate(). Images (img, first_frame, last_frame) are paths, or [width, height] for
            black ones.
        inputs: VACE: {"frames": [3, F, H, W], "mask": [1, F, H, W], "ref_0": [3, 1, H, W], ...}; None for a blank
            video that is all to be made.
        device: cpu, vgpu or cuda.
        dtype: of the DiT's autocast and of T5: float32 (CLIP's too) or bfloat16 (CLIP's is float16).
        config: upstream's config to start from, a key of its WAN_CONFIGS.
        capacity, expandable_segments, granularity: of the virtual GPU; None: its defaults.
        find_least: tell the least capacity that serves all that the run requests.
        meta: count at full size.
        timeout: seconds.

    Raises RuntimeError with the end of its error output if the process fails.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.safetensors"
        command = [sys.executable, __file__, "--tree", str(tree), "--task", task, "--out", str(out)]
        command += ["--device", device, "--dtype", dtype]
        command += ["--init", json.dumps(init or {}), "--call", json.dumps(call or {})]
        if checkpoint is not None:
            command += ["--checkpoint", str(checkpoint)]
        if config is not None:
            command += ["--config", config]
        if capacity is not None:
            command += ["--capacity", str(capacity)]
        if granularity is not None:
            command += ["--granularity", str(granularity)]
        if find_least:
            command += ["--find_least"]
        if expandable_segments:
            command += ["--expandable_segments"]
        if meta:
            command += ["--meta"]
        if inputs is not None:
            save_file(
                {name: t.contiguous() for name, t in inputs.items()}, Path(folder) / "inputs.safetensors"
            )
            command += ["--inputs", str(Path(folder) / "inputs.safetensors")]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=timeout, cwd=folder
        )
        if done.returncode:
            raise RuntimeError(f"upstream's run failed:\n{done.stderr[-4000:]}")
        tensors = load_file(out)
        report = json.loads((Path(folder) / "out.json").read_text())
    return Result(tensors.get("video"), tensors.get("latents"), report)


def kind_of(task) -> str:
    """The name here of one of this project's tasks: pictures from text are videos of one frame."""
    kind = task.split("-")[0]
    return kind if kind in PIPELINES else "t2v"


def read_configs(tree) -> dict:
    """Upstream's WAN_CONFIGS as JSON gives it: tuples are lists, types are their names."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import driver; wan = driver.load_tree(sys.argv[2]); "
        "print(json.dumps(wan.configs.WAN_CONFIGS, default=str))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tree)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# The tree and its surroundings


def load_tree(tree, device="cpu", meta=False):
    """Imports upstream's package, once per process, and returns it.

    device: cpu or vgpu, what its cuda:N becomes; or cuda, which leaves it.
    """
    sys.path.insert(0, str(Path(__file__).parent))
    import stand_ins

    stand_ins.install()
    if device == "vgpu":
        sys.path.append(str(REPOSITORY))  # behind upstream's tree, whose package has the name of ours
        import virtual_gpu  # noqa: F401  registers the device type
    if device != "cuda":
        torch.cuda.current_device = lambda: 0
        torch.cuda.synchronize = lambda device=None: None
        torch.cuda.empty_cache = torch.vgpu.empty_cache if device == "vgpu" else lambda: None
    torch.cuda.amp.autocast = partial(_Autocast, device)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    os.environ["DIFFUSERS_VERBOSITY"] = "error"
    import wan

    if Path(wan.__file__).parents[1].resolve() != Path(tree).resolve():
        raise RuntimeError(f"{tree}: not a tree of upstream, its package came from {wan.__file__}")
    wan.modules.model.flash_attention = wan.modules.clip.flash_attention = attention
    if device == "cuda":
        return wan
    facade = _Torch(device, meta)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "wan" and getattr(module, "torch", None) is torch:
            module.torch = facade
    wan.first_last_frame2video.torch = _FirstLastTorch(device, meta)
    return wan


class _Autocast(torch.autocast):
    """torch.cuda.amp.autocast for the device in use."""

    def __init__(self, device, enabled=True, dtype=torch.float16, cache_enabled=True):
        narrow = dtype in (torch.bfloat16, torch.float16)
        super().__init__(
            device,
            dtype=dtype if narrow else torch.bfloat16,
            enabled=enabled and narrow,
            cache_enabled=cache_enabled,
        )


class _DeviceType(type):
    def __instancecheck__(cls, value):
        return isinstance(value, torch.device)


class _Torch:
    """The torch module as upstream's modules see it: cuda is another device, the rest is the same."""

    def __init__(self, device, meta):
        def mapped(value):
            return torch.device(device) if torch.device(value).type == "cuda" else torch.device(value)

        self.device = _DeviceType("device", (), {"__new__": lambda cls, *args: mapped(*args)})
        self._meta = meta

    def __getattr__(self, name):
        return getattr(torch, name)

    def Generator(self, device="cpu"):
        return torch.Generator()

    def randn(self, *shape, device=None, **options):
        noise = torch.randn(*shape, **options)
        return noise if device is None else noise.to(device)

    def load(self, *args, **options):
        return None if self._meta else torch.load(*args, **options)


class _FirstLastTorch(_Torch):
    frame_num = 81

    def ones(self, *shape, **options):
        if shape[:2] == (1, 81):
            shape = (1, self.frame_num, *shape[2:])
        return torch.ones(*shape, **options)


def attention(
    q, k, v, q_lens=None, k_lens=None, softmax_scale=None, causal=False, window_size=(-1, -1), **unused
):
    """Flash attention's arguments and result: q, k, v [B, L, heads, C], k_lens [B], result in q's type."""
    if q_lens is not None or tuple(window_size) != (-1, -1):
        raise NotImplementedError("q_lens and windows are not used by upstream's models")
    out_dtype = q.dtype
    q, k = q.to(v.dtype), k.to(v.dtype)
    lengths = [k.size(1)] * k.size(0) if k_lens is None else k_lens.tolist()
    samples = [
        F.scaled_dot_product_attention(
            q[i : i + 1].transpose(1, 2),
            k[i : i + 1, :length].transpose(1, 2),
            v[i : i + 1, :length].transpose(1, 2),
            is_causal=causal,
            scale=softmax_scale,
        ).transpose(1, 2)
        for i, length in enumerate(lengths)
    ]
    return (samples[0] if len(samples) == 1 else torch.cat(samples)).to(out_dtype)


# Models and pipelines


def fit_sizes(wan, checkpoint, config):
    """Makes upstream build T5, VAE and CLIP in the sizes of the checkpoint's tensors."""

    def shapes(name):
        tensors = torch.load(Path(checkpoint) / name, map_location="meta", weights_only=True)
        return {key: tuple(tensor.shape) for key, tensor in tensors.items()}

    t5 = shapes(config.t5_checkpoint)
    vocab, dim = t5["token_embedding.weight"]
    sizes = {
        "vocab_size": vocab,
        "dim": dim,
        "dim_attn": t5["blocks.0.attn.q.weight"][0],
        "dim_ffn": t5["blocks.0.ffn.fc1.weight"][0],
        "num_heads": t5["blocks.0.pos_embedding.embedding.weight"][1],
        "encoder_layers": _count(t5, "blocks"),
    }
    wan.modules.t5.umt5_xxl = partial(wan.modules.t5.umt5_xxl, **sizes)
    vae_dim = shapes(config.vae_checkpoint)["encoder.conv1.weight"][0]
    wan.modules.vae._video_vae = partial(wan.modules.vae._video_vae, dim=vae_dim)
    if "clip_checkpoint" in config:
        clip = shapes(config.clip_checkpoint)
        vocab, text_dim = clip["textual.token_embedding.weight"]
        sizes = {
            "embed_dim": clip["visual.head"][1],
            "vision_layers": _count(clip, "visual.transformer"),
            "vision_mlp_ratio": clip["visual.transformer.0.mlp.0.weight"][0] / clip["visual.head"][0],
            "vocab_size": vocab,
            "max_text_len": clip["textual.pos_embedding.weight"][0],
            "text_dim": text_dim,
            "text_layers": _count(clip, "textual.blocks"),
        }
        wan.modules.clip.clip_xlm_roberta_vit_h_14 = partial(
            wan.modules.clip.clip_xlm_roberta_vit_h_14, **sizes
        )


def _count(shapes, prefix):
    depth = prefix.count(".") + 1
    return 1 + max(int(name.split(".")[depth]) for name in shapes if name.startswith(f"{prefix}."))


def task_config(wan, task, dtype=torch.float32, name=None):
    """Upstream's config of a task with dtype for the DiT's autocast and T5; CLIP stays fp16 beside bf16."""
    config = wan.configs.WAN_CONFIGS[name or CONFIGS[task]]
    config.param_dtype = config.t5_dtype = dtype
    if "clip_dtype" in config and dtype is torch.float32:
        config.clip_dtype = dtype
    return config


def without_storage(wan, config, task):
    """Makes upstream build full-size models that hold no numbers."""
    t5, clip, vae = wan.modules.t5, wan.modules.clip, wan.modules.vae

    build_t5 = t5.umt5_xxl
    t5.umt5_xxl = lambda device, **sizes: build_t5(device="meta", **sizes)
    for module in (t5.T5Encoder, clip.XLMRobertaCLIP, vae.WanVAE_):
        module.load_state_dict = _unless_none(module.load_state_dict)
    t5.HuggingfaceTokenizer = clip.HuggingfaceTokenizer = _Tokenizer

    def build_dit(cls, directory):
        sizes = {"model_type": task} | {key: config[key] for key in DIT_SIZES}
        if task in ("i2v", "flf2v"):
            sizes["in_dim"] = 36
        if task == "vace":
            step = 2 if config.num_layers == 30 else 5  # of the 1.3B and the 14B model
            sizes |= {"vace_layers": list(range(0, config.num_layers, step)), "vace_in_dim": 96}
        with torch.device("meta"):
            return cls(**sizes)

    wan.modules.model.WanModel.from_pretrained = classmethod(build_dit)

    def encode(encoder, texts, device):
        ids, mask = encoder.tokenizer(texts)
        if torch.device(device).type == "cpu":
            return [torch.zeros(TOKENS, 4096, dtype=encoder.dtype)]
        return [encoder.model(ids.to(device), mask.to(device))[0, :TOKENS]]

    t5.T5EncoderModel.__call__ = encode
    _let_meta_modules_be_at_home()
    for solver in (wan.utils.FlowUniPCMultistepScheduler, wan.utils.FlowDPMSolverMultistepScheduler):
        # Its table of times is searched by value: it stays where there are values.
        original = solver.set_timesteps

        def set_timesteps(self, *args, original=original, device=None, **options):
            return original(self, *args, device="cpu", **options)

        solver.set_timesteps = set_timesteps


def _unless_none(load):
    """Without storage nothing is read from a checkpoint; a VAE that goes home still puts its weights back."""
    return lambda self, weights, **options: None if weights is None else load(self, weights, **options)


def _let_meta_modules_be_at_home():
    """Weights without storage stand for weights in the CPU's memory: moving them there does nothing."""
    to, cpu = torch.nn.Module.to, torch.nn.Module.cpu

    def at_home(module):
        return next(module.parameters()).device.type == "meta"

    def checked_to(module, *args, **options):
        home = args and isinstance(args[0], (str, torch.device)) and torch.device(args[0]).type == "cpu"
        return module if home and at_home(module) else to(module, *args, **options)

    torch.nn.Module.to = checked_to
    torch.nn.Module.cpu = lambda module: module if at_home(module) else cpu(module)


class _Tokenizer:
    def __init__(self, name, seq_len=None, clean=None):
        self.seq_len = seq_len

    def __call__(self, texts, **options):
        ids = torch.zeros(1, self.seq_len, dtype=torch.long)
        return ids, (torch.arange(self.seq_len) < TOKENS).long()[None]


class Watch:
    """Notes what a pipeline decodes and, on a GPU, the peak of each stage.

    A stage begins when its model is called or moved to the device, and lasts until the next begins.
    """

    def __init__(self, gpu=None):
        self.gpu = gpu
        self.stage = "load"
        self.peaks, self.reserved = {}, {}
        self.latents = None

    def begin(self, stage):
        self.end()
        self.stage = stage

    def end(self):
        if self.gpu is not None:
            self.peaks[self.stage] = max(self.gpu.peak, self.peaks.get(self.stage, 0))
            self.reserved[self.stage] = max(self.gpu.peak_reserved, self.reserved.get(self.stage, 0))
            self.gpu.reset_peak()

    def attach(self, pipeline, meta=False):
        denoised = False

        def latent_stage():
            return "decode" if denoised else "encode"

        def on_move(module, stage):
            for name in ("to", "cuda"):
                move = getattr(module, name)

                def moved(*args, move=move, **options):
                    if args and torch.device(args[0]).type not in ("cpu", "meta"):
                        self.begin(stage() if callable(stage) else stage)
                    return move(*args, **options)

                setattr(module, name, moved)

        def on_call(owner, name, stage):
            call = getattr(owner, name)

            def called(*args, **options):
                nonlocal denoised
                denoised = denoised or stage == "denoise"
                self.begin(stage)
                if stage == "decode":
                    self.latents = args[0][0].detach().cpu().clone()
                if stage == "denoise" and meta:
                    options["t"] = options["t"].to(args[0][0].device)
                return call(*args, **options)

            setattr(owner, name, called)

        on_move(pipeline.text_encoder.model, "text")
        on_move(pipeline.vae.model, latent_stage)
        on_move(pipeline.model, "denoise")
        on_call(pipeline.model, "forward", "denoise")
        on_call(pipeline.vae, "encode", "encode")
        on_call(pipeline.vae, "decode", "decode")
        if hasattr(pipeline, "clip"):
            on_move(pipeline.clip.model, "image")
            on_call(pipeline.clip, "visual", "image")

    def report(self, out_of_memory=None):
        if self.gpu is None:
            return {}
        self.end()
        return {
            "peak_bytes": max(self.peaks.values()),
            "stages": {stage: self.peaks[stage] for stage in STAGES if stage in self.peaks},
            "peak_reserved": max(self.reserved.values()),
            "reserved": {stage: self.reserved[stage] for stage in STAGES if stage in self.reserved},
            "out_of_memory": out_of_memory,
            "live_bytes": self.gpu.live,
        }


def build(wan, task, config, checkpoint, **init):
    """The pipeline object of a task."""
    return getattr(wan, PIPELINES[task])(config=config, checkpoint_dir=str(checkpoint), **init)


def generate(wan, pipeline, task, call, inputs=None):
    """Calls a pipeline's generate(); returns the video. call, inputs: see run()."""
    from PIL import Image

    call = {"input_prompt": "a red ball rolls to the right", "seed": 0} | call
    if "size" in call:
        call["size"] = tuple(call["size"])
    for key in ("img", "first_frame", "last_frame"):
        if key in call:
            image = call[key]
            blank = isinstance(image, (list, tuple))
            call[key] = Image.new("RGB", tuple(image)) if blank else Image.open(image).convert("RGB")
    if task == "flf2v":
        wan.first_last_frame2video.torch.frame_num = call.get("frame_num", 81)
    if task == "vace":
        if inputs is None:
            shape = (call.get("frame_num", 81), *call["size"][::-1])
            inputs = {"frames": torch.zeros(3, *shape), "mask": torch.ones(1, *shape)}
        # As generate.py has it: a VAE that works in tiles takes its sources from the CPU.
        device = torch.device("cpu") if getattr(pipeline.vae, "tile", 0) else pipeline.device
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        references = [inputs[name] for name in sorted(inputs) if name.startswith("ref_")]
        call |= {
            "input_frames": [inputs["frames"]],
            "input_masks": [inputs["mask"]],
            "input_ref_images": [references or None],
        }
    return pipeline.generate(**call)


# The process


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", required=True)
    parser.add_argument("--task", required=True, choices=PIPELINES)
    parser.add_argument("--checkpoint")
    parser.add_argument("--config")
    parser.add_argument("--device", choices=("cpu", "vgpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--granularity", type=int)
    parser.add_argument("--expandable_segments", action="store_true")
    parser.add_argument("--find_least", action="store_true")
    parser.add_argument("--meta", action="store_true")
    parser.add_argument("--init", type=json.loads, default={})
    parser.add_argument("--call", type=json.loads, default={})
    parser.add_argument("--inputs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    from safetensors.torch import load_file, save_file

    inputs = load_file(args.inputs) if args.inputs else None
    wan = load_tree(args.tree, args.device, args.meta)
    config = task_config(wan, args.task, getattr(torch, args.dtype), args.config)
    if args.meta:
        without_storage(wan, config, args.task)
    else:
        fit_sizes(wan, args.checkpoint, config)
    with ExitStack() as stack:
        gpu = stack.enter_context(_virtual_gpu(args)) if args.device == "vgpu" else None
        if args.device == "cuda":
            gpu = _CudaMemory()
        watch = Watch(gpu)
        out_of_memory = video = None
        try:
            pipeline = build(wan, args.task, config, args.checkpoint, **args.init)
            watch.attach(pipeline, args.meta)
            watch.begin("text")
            video = generate(wan, pipeline, args.task, args.call, inputs).cpu()
        except torch.OutOfMemoryError as error:
            out_of_memory = {"stage": watch.stage, "requested": getattr(error, "requested", None)}
        report = watch.report(out_of_memory)
        if args.find_least and out_of_memory is None:
            report["least_capacity"] = _least_capacity(gpu)
    tensors = {}
    if video is not None and not args.meta:
        tensors = {"video": video.contiguous(), "latents": watch.latents.contiguous()}
    save_file(tensors, args.out)
    args.out.with_suffix(".json").write_text(json.dumps(report))
    print(json.dumps(report))


class _CudaMemory:
    """What Watch asks of a virtual GPU, of the CUDA device."""

    def __init__(self):
        torch.cuda.init()
        self.reset_peak()

    @property
    def peak(self):
        return torch.cuda.max_memory_allocated()

    @property
    def peak_reserved(self):
        return torch.cuda.max_memory_reserved()

    @property
    def live(self):
        return torch.cuda.memory_allocated()

    def reset_peak(self):
        torch.cuda.reset_peak_memory_stats()


def _virtual_gpu(args):
    from virtual_gpu import VirtualGPU

    finer = {} if args.granularity is None else {"granularity": args.granularity}
    finer |= {"expandable_segments": args.expandable_segments, "record_requests": args.find_least}
    return VirtualGPU(args.capacity, args.meta, **finer)


def _least_capacity(gpu):
    from virtual_gpu import least_capacity

    return least_capacity(gpu.allocator)


if __name__ == "__main__":
    main()
