"""A second, independent check: diffusers' networks and pipelines with the same toy weights.

diffusers converts the checkpoint's tensor names itself. Its time embedding computes in fp32 where upstream's does in
fp64; that is most of what differs.
"""

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_wan_transformer_to_diffusers,
    convert_wan_vae_to_diffusers,
)
from goldens import DIT_CASES, NEGATIVE_PROMPT, PROMPTS, dit_inputs, normal, picture, smooth, vace_source
from transformers import UMT5Config, UMT5EncoderModel

import wan
from wan import random_models
from wan.configs import WAN_CONFIGS
from wan.modules.model import WanModel
from wan.modules.vace_model import VaceWanModel
from wan.modules.vae import WanVAE
from wan.sampling import Solver

LIMIT = 1e-4
WIDTH, HEIGHT = 96, 64


def difference(result, expected):
    assert result.shape == expected.shape
    return ((result - expected).abs().max() / expected.abs().max()).item()


def their_dit(task):
    config = WAN_CONFIGS[f"{task}-tiny"]
    sizes = config.dit_config
    common = {
        "num_attention_heads": sizes["num_heads"],
        "attention_head_dim": sizes["dim"] // sizes["num_heads"],
        "in_channels": sizes["in_dim"],
        "ffn_dim": sizes["ffn_dim"],
        "num_layers": sizes["num_layers"],
        "eps": sizes["eps"],
    }
    weights = convert_wan_transformer_to_diffusers(random_models.dit_weights(config))
    if task == "vace":
        model = diffusers.WanVACETransformer3DModel(
            **common, vace_layers=sizes["vace_layers"], vace_in_channels=sizes["vace_in_dim"]
        )
    else:
        image = {"image_dim": 1280, "added_kv_proj_dim": sizes["dim"]} if task in ("i2v", "flf2v") else {}
        if task == "flf2v":
            image["pos_embed_seq_len"] = 514
            weights["condition_embedder.image_embedder.pos_embed"] = weights.pop("img_emb.emb_pos")
        model = diffusers.WanTransformer3DModel(**common, **image)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def their_vae():
    config = WAN_CONFIGS["t2v-tiny"]
    model = diffusers.AutoencoderKLWan(base_dim=config.vae_dim, z_dim=16)
    model.load_state_dict(convert_wan_vae_to_diffusers(random_models.vae_weights(config)))
    return model.eval().requires_grad_(False)


def their_statistics(model):
    mean, std = (torch.tensor(model.config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return mean, std


@pytest.mark.parametrize("case", ["whole", "one frame, full prompt", "long prompt, padded"])
@pytest.mark.parametrize("task", ["t2v", "i2v", "flf2v", "vace"])
def test_dit(task, case, measured):
    inputs = dit_inputs(task, DIT_CASES[case])
    ours = (VaceWanModel if task == "vace" else WanModel).from_pretrained(
        random_models.checkpoint(f"{task}-tiny")
    )
    with torch.no_grad():
        [flow] = ours(**inputs)
    context = inputs["context"][0]
    theirs = {
        "hidden_states": torch.cat([inputs["x"][0], *inputs.get("y", [])])[None],
        "timestep": inputs["t"],
        "encoder_hidden_states": torch.cat([context, context.new_zeros(512 - len(context), 4096)])[None],
    }
    if task == "vace":
        theirs["control_hidden_states"] = inputs["vace_context"][0][None]
        theirs["control_hidden_states_scale"] = torch.tensor([inputs["vace_context_scale"]] * 2)
    elif task != "t2v":
        theirs["encoder_hidden_states_image"] = inputs["clip_fea"]
    measured(difference(their_dit(task)(**theirs).sample[0], flow), LIMIT)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_vae(frames, measured):
    config, theirs = WAN_CONFIGS["t2v-tiny"], their_vae()
    ours = WanVAE(
        vae_pth=random_models.checkpoint("t2v-tiny") / config.vae_checkpoint, device="cpu", dim=config.vae_dim
    )
    mean, std = their_statistics(theirs)
    video = smooth("video", 3, frames, 64, 80)
    latents = (theirs.encode(video[None]).latent_dist.mode()[0] - mean) / std
    measured(difference(latents, ours.encode([video])[0]), LIMIT, "encode")
    latents = normal("latents", 16, 1 + frames // 4, 8, 10)
    decoded = theirs.decode((latents * std + mean)[None]).sample[0]
    measured(difference(decoded, ours.decode([latents])[0]), LIMIT, "decode")


def their_scheduler(solver, steps, shift):
    """Upstream's table of times in diffusers' solver; its pipelines call set_timesteps, which must keep it."""
    scheduler = Solver(solver, steps, shift, "cpu")._scheduler
    scheduler.set_timesteps = lambda count, device: None
    return scheduler


def their_pipeline(task, solver, steps, shift):
    config, files = WAN_CONFIGS[f"{task}-tiny"], random_models.checkpoint(f"{task}-tiny")
    ours = {"t2v": wan.WanT2V, "i2v": wan.WanI2V, "flf2v": wan.WanFLF2V, "vace": wan.WanVace}[task](
        config, files, device=torch.device("cpu")
    )
    sizes = UMT5Config(**ours.text_encoder.model.config.to_dict())
    text_encoder = UMT5EncoderModel(sizes).eval().requires_grad_(False)
    text_encoder.encoder.load_state_dict(ours.text_encoder.model.state_dict())
    text_encoder.shared.weight = text_encoder.encoder.embed_tokens.weight
    components = {
        "tokenizer": ours.text_encoder.tokenizer.tokenizer,
        "text_encoder": text_encoder,
        "transformer": their_dit(task),
        "vae": their_vae(),
        "scheduler": their_scheduler(solver, steps, shift),
    }
    if task in ("i2v", "flf2v"):
        components |= {"image_encoder": None, "image_processor": None}
        kind = diffusers.WanImageToVideoPipeline
    else:
        kind = diffusers.WanVACEPipeline if task == "vace" else diffusers.WanPipeline
    pipeline = kind(**components)
    pipeline.set_progress_bar_config(disable=True)
    return ours, pipeline


@pytest.mark.parametrize(
    "task, solver",
    [("t2v", "unipc"), ("t2v", "dpm++"), ("i2v", "unipc"), ("flf2v", "dpm++"), ("vace", "unipc")],
)
def test_pipeline(task, solver, measured):
    """Images have the target's size and CLIP's features are ours, where diffusers prepares its inputs otherwise."""
    frames, steps, guidance, shift, references = 9, 4, 3.0, 5.0, 0
    ours, theirs = their_pipeline(task, solver, steps, shift)
    first, last = picture("first", WIDTH, HEIGHT), picture("last", WIDTH, HEIGHT)
    mine, other = {}, {"height": HEIGHT, "width": WIDTH}
    if task == "t2v":
        mine["size"] = (WIDTH, HEIGHT)
    elif task == "vace":
        source = vace_source("video and mask", frames, WIDTH, HEIGHT)
        mine |= {
            "input_frames": [source["frames"]],
            "input_masks": [source["mask"]],
            "input_ref_images": [[wan.image2video.to_tensor(first)[:, None]]],
            "context_scale": 0.7,
        }
        other |= {
            "video": [source["frames"].transpose(0, 1)],
            "mask": [source["mask"].transpose(0, 1).expand(-1, 3, -1, -1)],
            "reference_images": [first],
            "conditioning_scale": 0.7,
        }
        references = 1
    else:
        images = [first] if task == "i2v" else [first, last]
        mine |= dict(zip(("img",) if task == "i2v" else ("first_frame", "last_frame"), images))
        mine["max_area"] = WIDTH * HEIGHT
        other |= dict(zip(("image", "last_image"), images))
        features = ours.clip.visual([wan.image2video.to_tensor(image)[:, None] for image in images])
        theirs.encode_image = lambda images, device: features
    shape = (16, references + 1 + frames // 4, HEIGHT // 8, WIDTH // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    common = {"guide_scale": guidance, "shift": shift, "sampling_steps": steps, "sample_solver": solver}
    found = []
    video = ours.generate(
        PROMPTS[0],
        n_prompt=NEGATIVE_PROMPT,
        frame_num=frames,
        seed=3,
        on_latents=found.append,
        **common,
        **mine,
    )
    expected = theirs(
        prompt=PROMPTS[0],
        negative_prompt=NEGATIVE_PROMPT,
        num_frames=frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        latents=noise[None],
        output_type="pt",
        **other,
    ).frames[0]
    measured(difference(expected.transpose(0, 1) * 2 - 1, video), LIMIT)
