"""What the four pipelines share: loading, encoding the prompt, denoising, decoding."""

import random
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .memory.chunking import apply_chunking
from .memory.options import MemoryOptions
from .memory.residency import Component, visit_by_halves, visit_when_called
from .memory.streaming import Streamer, transformer_embeddings, transformer_pieces
from .memory.vae_tiling import apply_tiling
from .modules.clip import CLIPModel
from .modules.model import WanModel
from .modules.t5 import T5EncoderModel
from .modules.vae import WanVAE
from .utils.errors import InputError
from .utils.solvers import make_solver
from .utils.stages import Stages
from .weights.converted import OffloadFolder


class WanPipeline:
    """A task's components and the steps between a prompt and a video.

    Components are at home on the CPU and visit the device; with `offload_model=False` they stay there once they
    came. The VAE's home is the device unless `vae_cpu`.
    """

    model_class = WanModel
    uses_clip = False

    def __init__(
        self,
        config,
        checkpoint_dir,
        device_id=0,
        rank=0,
        t5_fsdp=False,
        dit_fsdp=False,
        use_usp=False,
        t5_cpu=False,
        *,
        device=None,
        vae_cpu=False,
        **memory,
    ):
        """Loads a checkpoint directory.

        Args:
            config: an entry of wan.configs.WAN_CONFIGS.
            checkpoint_dir: directory as published.
            device_id: number of the CUDA device; without CUDA everything computes on the CPU.
            rank: 0; several processes are not supported yet.
            t5_fsdp, dit_fsdp, use_usp: False; several GPUs are not supported yet.
            t5_cpu: encode the prompt on the CPU.
            device: torch.device to compute on, instead of cuda:device_id.
            vae_cpu: keep the VAE on the CPU except to encode and decode.
            memory: the other fields of wan.memory.options.MemoryOptions.

        Raises:
            InputError: missing, damaged or unfitting files, or options that cannot work.
        """
        if rank or t5_fsdp or dit_fsdp or use_usp:
            raise InputError("several GPUs (FSDP, Ulysses, ring attention) are not supported yet, run on one")
        self.config = config
        self.device = compute_device(device_id) if device is None else torch.device(device)
        self.options = MemoryOptions(t5_cpu=t5_cpu, vae_cpu=vae_cpu, **memory)
        self.stages = Stages(self.device)
        self.num_train_timesteps = config.num_train_timesteps
        self.param_dtype = config.param_dtype
        self.vae_stride = config.vae_stride
        self.patch_size = config.patch_size
        self.sample_neg_prompt = config.sample_neg_prompt

        files = Path(checkpoint_dir)
        if not files.is_dir():
            raise InputError(
                f"--ckpt_dir {files}: no such directory, give the folder with the Wan2.1 checkpoint"
            )
        self.text_encoder = T5EncoderModel(
            text_len=config.text_len,
            dtype=config.t5_dtype,
            device="cpu",
            checkpoint_path=files / config.t5_checkpoint,
            tokenizer_path=files / config.t5_tokenizer,
            config=config.get("t5_config"),
        )
        self._text = self._text_component()
        if self.uses_clip:
            self.clip = CLIPModel(
                dtype=config.clip_dtype,
                device="cpu",
                checkpoint_path=files / config.clip_checkpoint,
                tokenizer_path=files / config.clip_tokenizer,
                config=config.get("clip_config"),
            )
            self._image = self._image_component()
        folder = self.options.offload_folder
        self.model = self.model_class.from_pretrained(
            files, dtype=config.param_dtype, offload_folder=OffloadFolder(folder) if folder else None
        )
        apply_chunking(self.model, self.options.dit_chunk)
        self._dit = self._dit_component()
        self.vae = load_vae(config, files, self.device, self.options)

    def _text_component(self):
        encoder = self.text_encoder
        if not self.options.t5_stream:
            return Component([encoder.model], torch.device("cpu") if self.options.t5_cpu else self.device)
        streamer = Streamer(encoder.pieces, self.device, ring=self.options.stream_ring)
        apart = [encoder.model.embed_tokens, *encoder.pieces]
        return Component([encoder.model], self.device, apart, streamer)

    def _image_component(self):
        # Streamed with the text encoder: on cards that need the one, the other is too much as well.
        if not self.options.t5_stream:
            return Component([self.clip.model], self.device)
        streamer = Streamer(self.clip.pieces, self.device, ring=self.options.stream_ring)
        return Component([self.clip.model], self.device, self.clip.pieces, streamer)

    def _dit_component(self):
        if self.options.dit_stream is None:
            return Component([self.model], self.device)
        pieces, embeddings = transformer_pieces(self.model), transformer_embeddings(self.model)
        for embedding in embeddings:
            visit_when_called(embedding, self.device)
        resident_bytes = int(self.options.dit_stream * 2**30)
        streamer = Streamer(pieces, self.device, ring=self.options.stream_ring, resident_bytes=resident_bytes)
        return Component([self.model], self.device, [*pieces, *embeddings], streamer)

    def _encode_prompts(self, prompt, negative_prompt, offload_model):
        """Both prompts to embeddings: two lists with one [L, text_dim] on the device each."""
        with self.stages("text"), torch.no_grad():
            if offload_model:  # whatever an earlier run left on the device makes room
                self._dit.leave()
                if self.uses_clip:
                    self._image.leave()
            with self._text.on_device(stay=not offload_model):
                return [
                    [embedding.to(self.device) for embedding in self.text_encoder([text], self._text.device)]
                    for text in (prompt, negative_prompt or self.sample_neg_prompt)
                ]

    def _encode_images(self, videos, offload_model):
        """CLIP features of every frame of a list of [3, T, H, W] in [-1, 1]: [frames, 257, 1280] on the device."""
        with self.stages("image"), torch.no_grad(), self._image.on_device(stay=not offload_model):
            return self.clip.visual([video.to(self.device) for video in videos])

    def _denoise(
        self,
        shape,
        generator,
        cond,
        uncond,
        *,
        shift,
        sample_solver,
        sampling_steps,
        guide_scale,
        offload_model,
    ):
        """Draws noise and walks from it to a latent video.

        Args:
            shape: (C, F, H, W) of the latents.
            generator: of the noise.
            cond, uncond: keyword arguments of the model with the prompt and with the negative prompt.

        Returns:
            [C, F, H, W] fp32 on the device.
        """
        solver = make_solver(
            sample_solver, sampling_steps, shift, self.device, num_train_timesteps=self.num_train_timesteps
        )
        latent = self._noise(shape, generator)

        def guided_flow(t):
            flow = self.model([latent], t=t[None], **cond)[0]
            unconditional = self.model([latent], t=t[None], **uncond)[0]
            return unconditional + guide_scale * (flow - unconditional)

        with self.stages("denoise"), torch.no_grad(), self._dit.on_device(stay=not offload_model):
            for t in tqdm(solver.timesteps, desc="Denoising"):
                latent = solver.step(guided_flow(t)[None], t, latent[None], return_dict=False)[0][0]
        return latent

    def _decode(self, latent, on_latents=None):
        """[C, F, H, W] to a video [3, 4 F - 3, 8 H, 8 W] in [-1, 1] on the CPU; `on_latents` sees it before."""
        if on_latents:
            on_latents(latent)
        with self.stages("decode"):
            return self.vae.decode([latent])[0]

    def _generator(self, seed):
        """The source of noise: on the device if it is a GPU, as published results were made; negative is random."""
        on_gpu = self.device.type == "cuda"
        generator = torch.Generator(device=self.device if on_gpu else "cpu")
        return generator.manual_seed(seed if seed >= 0 else random.randint(0, sys.maxsize))

    def _noise(self, shape, generator):
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def _latent_shape(self, size, frame_num):
        """(channels, frames, height, width) of the latents of a video of `size` = (width, height) pixels."""
        width, height = size
        step = self.vae_stride[1] * self.patch_size[1]
        if width % step or height % step or min(size) < step:
            raise InputError(f"--size {width}*{height}: width and height must be multiples of {step}")
        time, vertical, horizontal = self.vae_stride
        return (self.vae.model.z_dim, (frame_num - 1) // time + 1, height // vertical, width // horizontal)

    def _sequence_length(self, frames, height, width):
        """Tokens of a latent video."""
        patch = self.patch_size
        return (frames // patch[0]) * (height // patch[1]) * (width // patch[2])


def compute_device(device_id=0):
    """cuda:device_id if there is CUDA, else the CPU."""
    return torch.device(f"cuda:{device_id}" if torch.cuda.is_available() else "cpu")


def load_vae(config, checkpoint_dir, device, options):
    """The VAE of a checkpoint directory, at home where `options` say, computing on `device`, tiled as they say."""
    vae = WanVAE(
        vae_pth=Path(checkpoint_dir) / config.vae_checkpoint,
        device="cpu" if options.vae_cpu else device,
        dim=config.get("vae_dim", 96),
    )
    apply_tiling(vae, options.vae_tile)
    visit_by_halves(vae, device)
    return vae


def check_frame_num(frame_num, at_least=1):
    """Raises InputError unless frame_num is 4n+1, as the VAE's temporal stride wants it."""
    if frame_num < at_least or frame_num % 4 != 1:
        raise InputError(f"--frame_num {frame_num}: give 4n+1 frames, {at_least} or more, such as 81")
