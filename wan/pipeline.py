"""The base class of the four pipelines: components, prompt encoding, denoising, decoding."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leanwan.accelerator import initialise
from leanwan.encoder_layers import image_encoder_groups
from leanwan.errors import InputError
from leanwan.methods import layer_methods
from leanwan.options import MemoryOptions
from leanwan.placement import place_dit, place_image_encoder, place_text_encoder, place_vae
from leanwan.residency import Component
from leanwan.vae.passes import Stored

from .denoising import NEGATIVE_PROMPT, PROMPT, Conditioning, Flows, passes
from .kernels import apply_speed, check_able, check_speed
from .modules.clip import CLIPModel
from .modules.model import WanModel, weights_path
from .modules.t5 import T5EncoderModel
from .modules.vae import WanVAE
from .sampling import OnStep, Solver, denoise, guided_together
from .utils.events import Listener
from .utils.progress import ProgressBars
from .utils.stages import Stages
from .weights.converted import OffloadFolder
from .weights.fingerprints import FileSizes
from .weights.lora import Loras
from .weights.prompts import EncodedPrompts, PromptCache
from .weights.reading import checkpoint_files

if TYPE_CHECKING:
    from .distributed.ranks import Ranks

__all__ = ["Conditioning", "WanPipeline", "check_frame_num"]


def _configured(name: str) -> Any:
    """A property that reads the entry `name` of the pipeline's config."""
    return property(lambda pipeline: pipeline.config[name])


class WanPipeline:
    """A task's components and the steps between a prompt and a video: prepare, denoise, decode.

    A component is loaded when it is first needed. Its home is the CPU, from where it visits the device; with
    `offload_model=False` it stays on the device after its first visit. The VAE's home is the device unless `vae_cpu`.

    Attributes:
        text_encoder, clip, model, vae: the components; clip only where `uses_clip`.
        stages: seconds and peak memory of each stage so far.
    """

    model_class: type[WanModel] = WanModel
    uses_clip = False

    def __init__(
        self,
        config: Any,
        checkpoint_dir: str | Path,
        device_id: int = 0,
        rank: int = 0,
        t5_fsdp: bool = False,
        dit_fsdp: bool = False,
        use_usp: bool = False,
        t5_cpu: bool = False,
        *,
        device: torch.device | str | None = None,
        on_event: Listener | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        lora_skip_unknown: bool = False,
        attention: str = "auto",
        compile: bool = False,
        prompt_cache: PromptCache | None = None,
        ranks: Ranks | None = None,
        **memory: Any,
    ):
        """
        Args:
            config: an entry of wan.configs.WAN_CONFIGS.
            checkpoint_dir: directory as published.
            device_id: number of the CUDA device; without CUDA everything computes on the CPU.
            rank: 0 unless there are ranks.
            t5_fsdp, dit_fsdp: whether the weights are sharded, each rank keeping one part on its device.
            use_usp: accepted for call compatibility; ranks share every pass.
            t5_cpu: encode the prompt on the CPU.
            device: where to compute, instead of cuda:device_id.
            on_event: is told of stages and steps (wan.utils.events); default: progress bars.
            loras: (file, strength) of LoRAs to merge into the DiT, in this order.
            lora_skip_unknown: whether to ignore tensors of the LoRAs that do not fit the model.
            attention, compile: kernels that round differently, as the fields of wan.run.Request.
            prompt_cache: stores the embeddings of prompts for later runs.
            ranks: the processes that share the work, each with an equal pipeline. The first rank's is called; the
                others call `follow`.
            memory: the other fields of leanwan.options.MemoryOptions.

        Raises:
            InputError: missing files, LoRAs that do not fit, or options that cannot work. Damaged and unfitting
                checkpoint files are found only when they are loaded.
        """
        if ranks is None and (rank or t5_fsdp or dit_fsdp or use_usp):
            raise InputError("several GPUs: run generate.py by torchrun, or give ranks")
        self.config = config
        self.options = MemoryOptions(t5_cpu=t5_cpu, **memory)
        if device is None:
            device = f"cuda:{device_id}" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        initialise(self.device)
        check_speed(attention, compile, self.options)
        check_able(attention, compile, self.device, config.param_dtype)
        self._speed = attention, compile
        self.stages = Stages(self.device, on_event or ProgressBars())
        self._ranks, self._t5_fsdp, self._dit_fsdp = ranks, t5_fsdp, dit_fsdp
        self._together = self._shared_passes(ranks) if ranks else None
        self.checkpoint_dir = Path(checkpoint_dir)
        self._check_files()
        self._prompts = EncodedPrompts(
            prompt_cache,
            self.checkpoint_dir / config.t5_checkpoint,
            self.checkpoint_dir / config.t5_tokenizer,
            torch.device("cpu") if t5_cpu else self.device,
            text_len=config.text_len,
            dtype=str(config.t5_dtype),
        )
        self._sizes = FileSizes()
        self._loras = self._fitted(loras, lora_skip_unknown) if loras else None

    # Attributes that programs written for Wan2.1 read from a pipeline.
    num_train_timesteps = _configured("num_train_timesteps")
    param_dtype = _configured("param_dtype")
    vae_stride = _configured("vae_stride")
    patch_size = _configured("patch_size")
    sample_neg_prompt = _configured("sample_neg_prompt")

    # Components

    @cached_property
    def text_encoder(self) -> T5EncoderModel:
        return T5EncoderModel(
            text_len=self.config.text_len,
            dtype=self.config.t5_dtype,
            device="cpu",
            checkpoint_path=self.checkpoint_dir / self.config.t5_checkpoint,
            tokenizer_path=self.checkpoint_dir / self.config.t5_tokenizer,
            config=self.config.get("t5_config"),
        )

    @cached_property
    def clip(self) -> CLIPModel:
        return CLIPModel(
            dtype=self.config.clip_dtype,
            device="cpu",
            checkpoint_path=self.checkpoint_dir / self.config.clip_checkpoint,
            tokenizer_path=self.checkpoint_dir / self.config.clip_tokenizer,
            config=self.config.get("clip_config"),
        )

    @cached_property
    def model(self) -> WanModel:
        folder = OffloadFolder(self.options.offload_folder) if self.options.offload_folder else None
        model = self.model_class.from_pretrained(
            self.checkpoint_dir, dtype=self.config.param_dtype, offload_folder=folder, loras=self._loras
        )
        apply_speed(model, *self._speed)
        self._sizes.remember(folder.mapped if folder else self.weight_files("denoise"))
        place_dit(model, self.device, self.options)
        return model

    @cached_property
    def vae(self) -> WanVAE:
        vae = WanVAE(
            vae_pth=self.checkpoint_dir / self.config.vae_checkpoint,
            device="cpu" if self.options.vae_cpu else self.device,
            dim=self.config.get("vae_dim", 96),
        )
        share = None
        if self._ranks:
            from .distributed.together import SharedTiles, lead_vae

            share = SharedTiles(self._ranks)
        place_vae(vae, self.device, self.options.vae_tile, on_frame=self.stages.counter(), share=share)
        if self._ranks and self._ranks.leads:
            layers: dict[str, Any] = dict(lead_vae(self._ranks))
            layer_methods(vae, "ranks", **layers)
        return vae

    def load(self, encoders: bool = True, prompts: Sequence[str] | None = None) -> None:
        """Loads the components that are not loaded yet, so that a damaged file is found before hours of work.

        Args:
            encoders: also load the text and image encoders, which denoising does not need.
            prompts: the texts to be encoded; the text encoder is not loaded if the cache has the embeddings of all.

        Raises InputError, naming the file, if a file is damaged or does not fit.
        """
        loading = self._ranks.step("load") if self._ranks and self._ranks.leads else nullcontext()
        with self.stages.loading(), loading:
            if encoders and (prompts is None or any(self._prompts.get(prompt) is None for prompt in prompts)):
                assert self._text is not None
                self._sizes.remember([self.checkpoint_dir / self.config.t5_checkpoint])
            if encoders and self.uses_clip:
                assert self._image is not None
            assert self.model is not None and self.vae is not None

    def follow(self) -> None:
        """On every rank but the first: computes this rank's share of the first one's work, until the first ends it."""
        from .distributed.together import vae_handlers

        assert self._ranks and self._together
        handlers = {
            "load": lambda: self.load(encoders=False),
            "text": self._encoded,
            "denoise": self._together.follow,
        }
        with torch.no_grad():
            self._ranks.serve(handlers | vae_handlers(self._ranks, lambda: self.vae))

    def _shared_passes(self, ranks: Ranks) -> Any:
        from .distributed.together import SharedPasses

        return SharedPasses(ranks, lambda: self.model, self._passes)

    def _check_files(self) -> None:
        folder, config = self.checkpoint_dir, self.config
        if not folder.is_dir():
            raise InputError(
                "no such directory, give the folder with the Wan2.1 checkpoint", "ckpt_dir", folder
            )
        names = [config.t5_checkpoint, config.vae_checkpoint]
        if self.uses_clip:
            names.append(config.clip_checkpoint)
        for path in (folder / "config.json", weights_path(folder), *(folder / name for name in names)):
            if not path.is_file():
                raise InputError(f"{path}: no such file, the checkpoint is not complete", "ckpt_dir")

    def weight_files(self, stage: str = "text") -> list[Path]:
        """The files whose weights a run needs that starts with `stage`: text, denoise or decode."""
        folder, config = self.checkpoint_dir, self.config
        files = [folder / config.vae_checkpoint]
        if stage != "decode":
            files += [folder / "config.json", *checkpoint_files(weights_path(folder))]
        if stage == "text":
            files.append(folder / config.t5_checkpoint)
            files += [folder / config.clip_checkpoint] if self.uses_clip else []
        return files

    def _fitted(self, loras: Sequence[tuple[str | Path, float]], skip_unknown: bool) -> Loras:
        parameters = self.model_class.from_config(self.checkpoint_dir).state_dict()
        return Loras(loras, {name: tensor.shape for name, tensor in parameters.items()}, skip_unknown)

    @cached_property
    def _text(self) -> Component:
        share = self._sharded if self._t5_fsdp else None
        return place_text_encoder(self.text_encoder.model, self.device, self.options, share)

    @cached_property
    def _image(self) -> Component:
        return place_image_encoder(self.clip.model, self.device, self.options)

    @cached_property
    def _dit(self) -> Component:
        if not self._dit_fsdp:
            return Component([self.model], self.device)
        groups = self.model.layer_groups()
        return Component([self.model], self.device, groups, self._sharded(groups))

    def _sharded(self, groups: Sequence[torch.nn.Module]) -> Any:
        from .distributed.sharding import ShardedGroups

        assert self._ranks
        return ShardedGroups(groups, self.device, self._ranks.size)

    # Steps

    def arguments(self, request: Any) -> dict[str, Any]:
        """This task's own arguments of prepare(), read from the inputs that a wan.run.Request names.

        Raises InputError, naming the field and the file, for inputs that cannot be read.
        """
        raise NotImplementedError

    def prepare(self, *args: Any, **kwargs: Any) -> Conditioning:
        """Encodes the prompts and inputs: takes those arguments of generate() that describe the video's content."""
        raise NotImplementedError

    def _stay(self, offload_model: bool | None) -> bool:
        """Whether components stay on the device: generate()'s argument decides or, if that is None, the option."""
        return not (self.options.offload_model if offload_model is None else offload_model)

    def prompts(self, prompt: str, negative_prompt: str = "") -> tuple[str, str]:
        """The two texts to encode: the prompt, and the negative prompt or, if that is empty, the config's."""
        return prompt, negative_prompt or self.sample_neg_prompt

    def encode_ahead(self, prompt: str, negative_prompt: str = "") -> None:
        """Puts the embeddings of both prompts into the cache for a later run; loads nothing but the text encoder."""
        texts = self.prompts(prompt, negative_prompt)
        if any(self._prompts.get(text) is None for text in texts):
            with self.stages.loading():
                assert self._text is not None
            with self.stages("text"), torch.no_grad():
                self._embeddings(texts, self._stay(None))

    def _encode_prompts(
        self, prompt: str, negative_prompt: str, offload_model: bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings of both prompts, [L, text_dim] each, on the device."""
        texts = self.prompts(prompt, negative_prompt)
        self.load(prompts=texts)
        stay = self._stay(offload_model)
        with self.stages("text"), torch.no_grad():
            if not stay:  # makes room: an earlier run may have left these on the device
                self._dit.leave()
                if self.uses_clip:
                    self._image.leave()
            context, context_null = self._embeddings(texts, stay)
            return context, context_null

    def _embeddings(self, texts: Sequence[str], stay: bool) -> list[torch.Tensor]:
        """The embedding of each text, [L, text_dim] on the device: from the cache, or encoded and added to it."""
        found = {text: self._prompts.get(text) for text in texts}
        missing = [text for text in found if found[text] is None]
        if missing:
            self._sizes.check()
            together = self._t5_fsdp and self._ranks
            with self._ranks.step("text", missing, stay) if together else nullcontext():
                found |= self._encoded(missing, stay)
        for text in missing:
            self._prompts.put(text, found[text])
        return [found[text].to(self.device) for text in texts]

    def _encoded(self, texts: Sequence[str], stay: bool) -> dict[str, torch.Tensor]:
        layers = list(self.text_encoder.model.block)
        with self._text.on_device(stay), self.stages.calls(layers, len(texts)):
            return {text: self.text_encoder([text], self._text.device)[0].to(self.device) for text in texts}

    def _encode_images(self, videos: Sequence[torch.Tensor], offload_model: bool | None) -> torch.Tensor:
        """CLIP features, [frames, 257, 1280] on the device, of all frames of `videos`, [3, T, H, W] in [-1, 1] each."""
        stay, layers = self._stay(offload_model), image_encoder_groups(self.clip.model)
        with (
            self.stages("image"),
            torch.no_grad(),
            self._image.on_device(stay),
            self.stages.calls(layers, 1),
        ):
            return self.clip.visual([video.to(self.device) for video in videos])

    def _passes(
        self, prompts: Sequence[int], conditioning: Conditioning, timesteps: torch.Tensor, stay: bool
    ) -> AbstractContextManager[Flows]:
        """See wan.denoising.passes."""
        return passes(self._dit, self.options, conditioning, timesteps, prompts, stay, self._sizes.check)

    def denoise(
        self,
        conditioning: Conditioning,
        *,
        shift: float,
        sample_solver: str,
        sampling_steps: int,
        guide_scale: float,
        seed: int = -1,
        offload_model: bool | None = None,
        start: tuple[torch.Tensor, Mapping[str, Any]] | None = None,
        on_step: OnStep | None = None,
    ) -> torch.Tensor:
        """Samples a latent video, from noise or from where an earlier run stopped.

        Args:
            conditioning: from prepare(), its tensors on any device.
            shift, sample_solver, sampling_steps, guide_scale, seed, offload_model: as generate()'s.
            start: (latent, solver state) of an earlier run, to continue from instead of from noise.
            on_step: called with the latent and the solver after every step.

        Returns:
            [C, F, H, W] fp32 on the device, without the frames of reference images.
        """
        shape = conditioning.shape
        solver = Solver(
            sample_solver,
            sampling_steps,
            shift,
            self.device,
            self.num_train_timesteps,
            self.param_dtype,
            self.options.activation_offload,
        )
        generator = self._generator(seed)
        if start:
            solver.load_state_dict(start[1])
        prompts = [PROMPT] if guide_scale == 1 else [PROMPT, NEGATIVE_PROMPT]
        opened = self._together.opened if self._together else self._passes
        with (
            self.stages("denoise"),
            opened(prompts, conditioning, solver.timesteps, self._stay(offload_model)) as flows,
        ):
            # No variable holds the first latent: it would keep the noise on the device until the last step.
            latent = denoise(
                guided_together(flows, guide_scale),
                solver,
                start[0].to(self.device) if start else self._noise(shape, generator),
                self.stages.steps,
                on_step,
            )
        return latent[:, conditioning.references :]

    def _finish(
        self,
        conditioning: Conditioning,
        on_latents: Callable[[torch.Tensor], None] | None,
        **settings: Any,
    ) -> torch.Tensor:
        """Denoises and decodes: the second half of generate(), which returns the same video.

        Args:
            on_latents: called with the latents before they are decoded.
            settings: arguments of denoise().
        """
        latent = self.denoise(conditioning, **settings)
        if on_latents:
            on_latents(latent)
        return self.decode(latent)

    def decode(self, latent: torch.Tensor, stored: Stored | None = None) -> torch.Tensor:
        """Decodes [C, F, H, W] to a video [3, 4 F - 3, 8 H, 8 W] on the CPU: in [-1, 1], or as `stored` converts it."""
        with self.stages("decode"):
            return self.vae.decode([latent], stored=stored)[0]

    def _generator(self, seed: int) -> torch.Generator:
        """The source of noise: on the device if that is CUDA, as for published results; negative seeds are random."""
        on_gpu = self.device.type == "cuda"
        generator = torch.Generator(device=self.device if on_gpu else "cpu")
        return generator.manual_seed(seed if seed >= 0 else random.randint(0, sys.maxsize))

    def _noise(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=generator.device).to(self.device)

    def _latent_shape(self, size: tuple[int, int], frame_num: int) -> tuple[int, int, int, int]:
        """(channels, frames, height, width) of the latents of a video of `size` = (width, height) pixels."""
        width, height = size
        step = self.vae_stride[1] * self.patch_size[1]
        if width % step or height % step or min(size) < step:
            raise InputError(f"width and height must be multiples of {step}", "size", f"{width}*{height}")
        time, vertical, horizontal = self.vae_stride
        return (self.vae.model.z_dim, (frame_num - 1) // time + 1, height // vertical, width // horizontal)


def check_frame_num(frame_num: int, at_least: int = 1) -> None:
    """Raises InputError unless frame_num is 4n+1, as the VAE's temporal stride requires, and large enough."""
    if frame_num < at_least or frame_num % 4 != 1:
        raise InputError(f"give 4n+1 frames, {at_least} or more, such as 81", "frame_num", frame_num)
