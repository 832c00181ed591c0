"""Wan2.1 in less memory: makes videos and images from text, images and videos."""

import argparse
import logging
import random
import shlex
import sys
from datetime import datetime
from pathlib import Path

import torch

import wan
from wan import tiny
from wan.configs import MAX_AREA_CONFIGS, SIZE_CONFIGS, SUPPORTED_SIZES, WAN_CONFIGS
from wan.memory.options import add_memory_arguments, memory_options
from wan.pipeline import compute_device, load_vae
from wan.utils.errors import InputError
from wan.utils.files import check_target
from wan.utils.latents import load_latents, save_latents
from wan.utils.prompt_extend import extend_prompt
from wan.utils.vace_source import check_source
from wan.utils.video import check_writable, open_image, save_image, save_video
from wan.weights.fingerprints import vae_fingerprint

log = logging.getLogger("generate")
EXAMPLES = Path(__file__).parent / "examples"
EXAMPLE_INPUTS = {
    "t2v": {"prompt": "A red paper boat sails down a rainy street at dusk, lamps mirrored in the water."},
    "t2i": {"prompt": "A lighthouse above a calm sea in the first light of the morning, soft colours."},
    "i2v": {
        "prompt": "A white paper boat drifts across a calm lake at sunset, small waves lap around it.",
        "image": "i2v_input.png",
    },
    "flf2v": {
        "prompt": "Noon turns to dusk over a little house with a red roof; the sun sinks, stars come out, "
        "the windows light up.",
        "first_frame": "flf2v_first_frame.png",
        "last_frame": "flf2v_last_frame.png",
    },
    "vace": {
        "prompt": "A red paper boat sails past a red and white striped lighthouse on a bright day.",
        "src_ref_images": "vace_ref_1.png,vace_ref_2.png",
    },
}
PIPELINES = {
    "t2v": wan.WanT2V,
    "t2i": wan.WanT2V,
    "i2v": wan.WanI2V,
    "flf2v": wan.WanFLF2V,
    "vace": wan.WanVace,
}
INPUT_FLAGS = {
    "i2v": ("image",),
    "flf2v": ("first_frame", "last_frame"),
    "vace": ("src_video", "src_mask", "src_ref_images"),
}


def main(argv=None):
    """Runs the command line.

    Returns the exit code: 0; 2 for bad input and 1 for a device, disk or program that fails, each told in one line;
    130 for an interrupt.
    """
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", stream=sys.stdout)
    try:
        generate(parse_arguments(argv))
    except InputError as error:
        return _complain(error, 2)
    except torch.OutOfMemoryError as error:
        return _complain(f"out of memory, try --low_vram ({str(error).splitlines()[0]})", 1)
    except OSError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    return 0


def generate(args):
    """Does what parsed arguments say: makes the video, or finishes one from its latents, and saves it.

    Raises InputError before any long work where it can.
    """
    config = WAN_CONFIGS[args.task]
    check_writable(args.save_file, image=args.kind == "t2i")
    checkpoint_dir = Path(args.ckpt_dir) if args.ckpt_dir else tiny.checkpoint(args.task)
    if args.decode_latents:
        save(decode(args, config, checkpoint_dir), args, config)
        return

    latents_path = args.save_latents or f"{args.save_file}.latents.safetensors"
    check_target(latents_path, "--save_latents")
    images = []
    if args.kind in ("i2v", "flf2v"):
        images = [open_image(getattr(args, flag), f"--{flag}") for flag in INPUT_FLAGS[args.kind]]
    if args.kind == "vace":
        check_source(args.src_video, args.src_mask, args.src_references)
    log.info(f"Task {args.task}, {args.size}, {args.frame_num} frames, seed {args.base_seed}")
    log.info(f"Prompt: {args.prompt}")
    if args.use_prompt_extend:
        args.prompt = extended_prompt(args, images)
    pipeline = PIPELINES[args.kind](config, checkpoint_dir, **vars(args.memory))

    # Latents are on disk before they are decoded: hours of denoising survive whatever happens then.
    kept = False

    def keep(latent):
        nonlocal kept
        metadata = {"prompt": args.prompt, "seed": args.base_seed, "frame_num": args.frame_num}
        try:
            save_latents(latents_path, latent, _identity(args, config, checkpoint_dir) | metadata)
            kept = True
        except InputError as error:
            log.warning(f"The latents could not be kept: {error}")

    try:
        save(run(pipeline, args, images, keep), args, config)
    except BaseException:
        if kept:
            command = ["python", "generate.py", "--task", args.task, "--size", args.size]
            command += ["--ckpt_dir", args.ckpt_dir] if args.ckpt_dir else []
            command += ["--decode_latents", str(latents_path), "--save_file", args.save_file]
            log.error(f"The latents are safe; finish with: {shlex.join(command)}")
        raise
    if not args.save_latents:
        Path(latents_path).unlink(missing_ok=True)


def decode(args, config, checkpoint_dir):
    """The video of latents from a file, made with the same task, size and VAE."""
    latent, _ = load_latents(args.decode_latents, _identity(args, config, checkpoint_dir))
    return load_vae(config, checkpoint_dir, compute_device(), args.memory).decode([latent])[0]


def _identity(args, config, checkpoint_dir):
    """What latents must have in common with a run that decodes them."""
    vae = vae_fingerprint(checkpoint_dir / config.vae_checkpoint)
    return {"task": args.task, "size": args.size, "vae": vae}


def extended_prompt(args, images):
    """The prompt as a language model writes it out, or as given if that fails."""
    log.info("Extending the prompt")
    result = extend_prompt(
        args.prompt,
        method=args.prompt_extend_method,
        model=args.prompt_extend_model,
        target_lang=args.prompt_extend_target_lang,
        images=images,
        seed=args.base_seed,
    )
    if result.status:
        log.info(f"Extended prompt: {result.prompt}")
    else:
        log.warning(f"The prompt is used as given, it could not be extended: {result.message}")
    return result.prompt


def run(pipeline, args, images, on_latents):
    """The pipeline's video for the arguments."""
    sampling = {
        "frame_num": args.frame_num,
        "shift": args.sample_shift,
        "sample_solver": args.sample_solver,
        "sampling_steps": args.sample_steps,
        "guide_scale": args.sample_guide_scale,
        "seed": args.base_seed,
        "offload_model": args.offload_model,
        "on_latents": on_latents,
    }
    if args.kind in ("i2v", "flf2v"):
        return pipeline.generate(args.prompt, *images, max_area=MAX_AREA_CONFIGS[args.size], **sampling)
    sources = ()
    if args.kind == "vace":
        sources = pipeline.prepare_source(
            [args.src_video],
            [args.src_mask],
            [args.src_references],
            args.frame_num,
            SIZE_CONFIGS[args.size],
            pipeline.device,
        )
    return pipeline.generate(args.prompt, *sources, size=SIZE_CONFIGS[args.size], **sampling)


def save(video, args, config):
    """Saves a video [3, F, H, W] in [-1, 1], or the one frame of an image."""
    if args.kind == "t2i":
        save_image(video, args.save_file)
    else:
        save_video(video, args.save_file, fps=config.sample_fps)
    log.info(f"Saved {args.save_file}")


def build_parser():
    """The argument parser: upstream's flags under their names, types and defaults, and the memory flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.error = _fail
    add = parser.add_argument
    add("--task", default="t2v-14B", choices=list(WAN_CONFIGS), help="What to make, and with which model.")
    add(
        "--size",
        default="1280*720",
        choices=list(SIZE_CONFIGS),
        help="Width*height of the video. Image tasks take its area and keep the image's aspect.",
    )
    add("--frame_num", type=int, help="Frames, 4n+1 (default 81; 1 for t2i, 17 for toy tasks).")
    add("--ckpt_dir", help="Directory of the checkpoint. Toy tasks make their own.")
    add(
        "--offload_model",
        type=_boolean,
        help="Send each model back to the CPU when it is done (default True).",
    )
    add("--ulysses_size", type=int, default=1, help="Not supported yet: Ulysses parallelism of the DiT.")
    add("--ring_size", type=int, default=1, help="Not supported yet: ring attention of the DiT.")
    add("--t5_fsdp", action="store_true", help="Not supported yet: FSDP for the text encoder.")
    add("--dit_fsdp", action="store_true", help="Not supported yet: FSDP for the DiT.")
    add("--save_file", help="Where to save the result (.mp4, or .png for images).")
    add("--src_video", help="[vace] Source video.")
    add("--src_mask", help="[vace] Mask video, white where the source video is to be made anew.")
    add("--src_ref_images", help="[vace] Reference images, separated by commas.")
    add("--prompt", help="What to show.")
    add("--use_prompt_extend", action="store_true", help="Let a language model write the prompt out.")
    add(
        "--prompt_extend_method",
        default="local_qwen",
        choices=["dashscope", "local_qwen"],
        help="Who extends the prompt.",
    )
    add("--prompt_extend_model", help="Model that extends the prompt.")
    add(
        "--prompt_extend_target_lang",
        default="zh",
        choices=["zh", "en"],
        help="Language of the extended prompt.",
    )
    add("--base_seed", type=int, default=-1, help="Seed of the noise; negative for a random one.")
    add("--image", help="[i2v] First frame.")
    add("--first_frame", help="[flf2v] First frame.")
    add("--last_frame", help="[flf2v] Last frame.")
    add("--sample_solver", default="unipc", choices=["unipc", "dpm++"], help="Solver.")
    add("--sample_steps", type=int, help="Solver steps (default 50; 40 for i2v, 10 for toy tasks).")
    add(
        "--sample_shift",
        type=float,
        help="Shift of the noise schedule (default 5; 3 for i2v at 480p, 16 for flf2v, vace).",
    )
    add("--sample_guide_scale", type=float, default=5.0, help="Strength of classifier-free guidance.")
    add("--save_latents", metavar="FILE", help="Save the latents, too, before they are decoded.")
    add("--decode_latents", metavar="FILE", help="Only decode latents that were saved, and save the video.")
    add_memory_arguments(parser)
    return parser


def parse_arguments(argv=None):
    """Parses and checks the command line and fills in the defaults that depend on the task.

    Raises InputError for a combination that cannot work; a malformed one ends in exit code 2 as well.
    """
    task = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    task.add_argument("--task", default="")
    task.error = _fail
    parser = build_parser()
    if task.parse_known_args(argv)[0].task.endswith("-tiny"):
        parser.set_defaults(size="128*96", sample_steps=10)
    args = parser.parse_args(argv)
    args.kind = args.task.split("-")[0]
    args.memory = memory_options(args)

    if args.size not in SUPPORTED_SIZES[args.task]:
        raise InputError(f"--size {args.size}: {args.task} supports {', '.join(SUPPORTED_SIZES[args.task])}")
    _fill_defaults(args)
    if args.frame_num < 1 or args.frame_num % 4 != 1:
        raise InputError(f"--frame_num {args.frame_num}: give 4n+1 frames, such as 81")
    if args.kind == "t2i" and args.frame_num != 1:
        raise InputError(f"--frame_num {args.frame_num}: {args.task} makes one image, leave it out or give 1")
    if args.kind == "flf2v" and args.frame_num < 5:
        raise InputError(f"--frame_num {args.frame_num}: {args.task} needs at least 5")
    if not 1 <= args.sample_steps <= 1000:
        raise InputError(f"--sample_steps {args.sample_steps}: give 1 to 1000")
    if not 0 < args.sample_shift <= 100:
        raise InputError(f"--sample_shift {args.sample_shift}: give a number above 0, at most 100")
    if args.ulysses_size != 1 or args.ring_size != 1 or args.t5_fsdp or args.dit_fsdp:
        raise InputError(
            "--ulysses_size, --ring_size, --t5_fsdp, --dit_fsdp: several GPUs are not supported yet, leave them out"
        )
    for kind, flags in INPUT_FLAGS.items():
        for flag in flags:
            if getattr(args, flag) is not None and kind != args.kind:
                raise InputError(f"--{flag}: belongs to {kind} tasks, leave it out for {args.task}")
    if args.ckpt_dir is None and not args.task.endswith("-tiny"):
        raise InputError(f"--ckpt_dir: give the directory of the {args.task} checkpoint")
    if args.save_file is None:
        args.save_file = _default_name(args)
    return args


def _fill_defaults(args):
    if args.offload_model is None:
        args.offload_model = True
    if args.frame_num is None:
        args.frame_num = 1 if args.kind == "t2i" else 17 if args.task.endswith("-tiny") else 81
    if args.sample_steps is None:
        args.sample_steps = 40 if args.kind == "i2v" else 50
    if args.sample_shift is None:
        args.sample_shift = {"i2v": 3.0 if "480" in args.size else 5.0, "flf2v": 16.0, "vace": 16.0}.get(
            args.kind, 5.0
        )
    if args.base_seed < 0:
        args.base_seed = random.randint(0, sys.maxsize)
    if args.decode_latents:
        return
    examples = EXAMPLE_INPUTS[args.kind]
    flags = INPUT_FLAGS.get(args.kind, ())
    if all(getattr(args, flag) is None for flag in flags) and (args.prompt is None or args.kind != "vace"):
        for flag in flags:
            if flag in examples:
                paths = [str(EXAMPLES / name) for name in examples[flag].split(",")]
                setattr(args, flag, ",".join(paths))
    if args.prompt is None:
        args.prompt = examples["prompt"]
    args.src_references = args.src_ref_images.split(",") if args.src_ref_images else None
    if args.kind == "flf2v" and (args.first_frame is None or args.last_frame is None):
        raise InputError("--first_frame and --last_frame: give both")


def _default_name(args):
    prompt = (args.prompt or "latents").replace(" ", "_").replace("/", "_")[:50]
    size = args.size.replace("*", "x") if sys.platform == "win32" else args.size
    time = datetime.now().strftime("%Y%m%d_%H%M%S")
    return f"{args.task}_{size}_{prompt}_{time}.{'png' if args.kind == 't2i' else 'mp4'}"


def _complain(message, code):
    print(f"generate.py: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _fail(message):
    """argparse's complaint, as one line."""
    raise InputError(message)


def _boolean(text):
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    try:
        return words[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False") from None


if __name__ == "__main__":
    sys.exit(main())
