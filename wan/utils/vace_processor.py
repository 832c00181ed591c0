"""The inputs of VACE: a source video, its mask and reference images, read and scaled to the model's size."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from leanwan.errors import InputError

from .video import VideoFile, open_image

Source = str | os.PathLike[str]
Box = tuple[int, int, int, int]  # (x1, x2, y1, y2)
# The videos, masks and reference images, an entry for each sample.
Sources = tuple[list[torch.Tensor], list[torch.Tensor], list[list[torch.Tensor] | None]]

# Latent frames that a clip of the full area may have in any case: 21, that is 81 frames.
MAX_LATENT_FRAMES = 21


class VaceVideoProcessor:
    """Chooses size, frame rate and frames of a source clip within a token budget, and loads them.

    Args:
        downsample: (t, h, w) pixels per token: the VAE's stride times the DiT's patch, (4, 16, 16).
        min_area, max_area: of the result, in pixels; never above the clip's own area.
        min_fps, max_fps: limits on the frame rate, used when `keep_last` is false.
        zero_start: begin with the first frame rather than at a random one; used when `keep_last` is false.
        seq_len: the token budget.
        keep_last: spread the chosen frames over the whole clip, its last frame included.

    Raises ValueError if `seq_len` cannot hold one frame of `min_area`.
    """

    def __init__(
        self,
        downsample: Sequence[int],
        min_area: int,
        max_area: int,
        min_fps: float,
        max_fps: float,
        zero_start: bool,
        seq_len: int,
        keep_last: bool,
    ):
        self.downsample = tuple(downsample)
        self.min_area, self.max_area = min_area, max_area
        self.min_fps, self.max_fps = min_fps, max_fps
        self.zero_start, self.keep_last = zero_start, keep_last
        self.seq_len = seq_len
        if seq_len * self.downsample[1] * self.downsample[2] < min_area:
            raise ValueError(f"seq_len {seq_len} is less than one frame of {min_area} pixels")

    def set_area(self, area: int) -> None:
        """Make `area`, in pixels, both limits."""
        self.min_area = self.max_area = area

    def set_seq_len(self, seq_len: int) -> None:
        """Set the token budget."""
        self.seq_len = seq_len

    def set_size(self, image_size: tuple[int, int], num_frames: int) -> None:
        """Set the area to that of (width, height) pixels, the token budget to that of `num_frames`, or 81 if more."""
        stride_t, stride_h, stride_w = self.downsample
        area = image_size[0] * image_size[1]
        self.set_area(area)
        latent_frames = max(MAX_LATENT_FRAMES, (num_frames - 1) // stride_t + 1)
        self.set_seq_len(area // (stride_h * stride_w) * latent_frames)

    def shape_of(self, data_key: Source) -> tuple[int, int, int]:
        """(frames, height, width) of the clip that `load_video` would load; raises as that does."""
        (file,) = open_clips(data_key, None)
        ids, size, _ = self._choose(file, file.height, file.width, np.random.default_rng())
        return len(ids), *size

    def load_video(self, data_key: Source, crop_box: Box | None = None, seed: int = 2024) -> tuple[Any, ...]:
        """Load the chosen frames of the clip at path `data_key`, which --src_video names.

        Args:
            crop_box: (x1, x2, y1, y2), the part of the picture to use; all of it by default.
            seed: for the start, when `zero_start` and `keep_last` are false.

        Returns:
            The clip, [3, F, H, W] float32 in [-1, 1]; the numbers of its frames in the file; (H, W); its frame rate.

        Raises InputError, naming the field and the file, if the clip cannot be read or is too small or narrow.
        """
        return self._load(open_clips(data_key, None), crop_box, seed)

    def load_video_pair(
        self, data_key: Source, data_key2: Source, crop_box: Box | None = None, seed: int = 2024
    ) -> tuple[Any, ...]:
        """Load the same frames of a clip and its mask, the ones that --src_video and --src_mask name.

        As `load_video`, with the mask after the clip in the result. A mask of another size is scaled to the clip.
        Raises InputError also if the two differ in length.
        """
        return self._load(open_clips(data_key, data_key2), crop_box, seed)

    def _load(self, files: Sequence[VideoFile], crop_box: Box | None, seed: int) -> tuple[Any, ...]:
        first = files[0]
        x1, x2, y1, y2 = crop_box or (0, first.width, 0, first.height)
        ids, size, fps = self._choose(first, y2 - y1, x2 - x1, np.random.default_rng(seed))
        clips = []
        for file in files:
            clip = torch.empty(3, len(ids), *size)
            for i, frame in enumerate(file.frames(ids)):
                if crop_box:
                    frame = frame[y1:y2, x1:x2]
                clip[:, i] = _fill(torch.from_numpy(frame), *size)
            clips.append(clip.div_(127.5).sub_(1.0))
        return *clips, ids, size, fps

    def _choose(
        self, file: VideoFile, height: int, width: int, rng: np.random.Generator
    ) -> tuple[list[int], tuple[int, int], float]:
        """Frame numbers, (H, W) and frame rate for a clip of which a part of height x width pixels is used."""
        stride_t, stride_h, stride_w = self.downsample
        duration = float(file.timestamps[-1].mean())  # to the middle of the last frame
        fps = min(file.fps, self.max_fps)
        available = len(file) if self.keep_last else max(1, int(duration * fps))

        tokens = min(
            self.seq_len, self.max_area / (stride_h * stride_w), height // stride_h * (width // stride_w)
        )
        length = min((available - 1) // stride_t + 1, int(self.seq_len / tokens)) if tokens else 0
        tokens = min(tokens, int(self.seq_len / length)) if length else 0
        rows = round(np.sqrt(tokens * (height / width)))
        columns = int(tokens / rows) if rows else 0
        if columns == 0:
            raise InputError(
                f"{width}x{height} pixels are too few in one direction; "
                f"give a video of at least {stride_w}x{stride_h} that is less narrow",
                file.field,
                file.path,
            )
        frame_num = (length - 1) * stride_t + 1

        if self.keep_last:
            fps = frame_num / duration
            times = np.linspace(0.0, duration, frame_num)
        else:
            start = 0.0 if self.zero_start else rng.uniform(0, duration - frame_num / fps)
            times = np.linspace(start, start + frame_num / fps, frame_num)
        return self._frames_at(times, file.timestamps), (rows * stride_h, columns * stride_w), fps

    def _frames_at(self, times: np.ndarray, timestamps: np.ndarray) -> list[int]:
        """Numbers of the frames on screen at `times`, ascending; in a gap between two frames it is the earlier one.

        At the instant where one frame ends and the next starts, `keep_last` takes the first of the two.
        """
        times, (starts, ends) = times[:, None], timestamps.T
        inside = (times >= starts) & ((times <= ends) if self.keep_last else (times < ends))
        latest = np.searchsorted(starts, times[:, 0], side="right") - 1
        return np.where(inside.any(axis=1), inside.argmax(axis=1), latest.clip(min=0)).tolist()


def processor_of(config: Any) -> VaceVideoProcessor:
    """The processor of a task's config."""
    return VaceVideoProcessor(
        downsample=tuple(stride * patch for stride, patch in zip(config.vae_stride, config.patch_size)),
        min_area=720 * 1280,
        max_area=720 * 1280,
        min_fps=config.sample_fps,
        max_fps=config.sample_fps,
        zero_start=True,
        seq_len=75600,
        keep_last=True,
    )


def _fill(frame: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Scale a frame [H, W, 3], uint8, until it covers height x width, and crop its centre: [3, height, width], uint8.

    Bicubic with antialiasing, rounded to 8 bits as interpolation of uint8 tensors does.
    """
    frame = frame.permute(2, 0, 1)[None]
    source_height, source_width = frame.shape[2:]
    if (source_height, source_width) != (height, width):
        scale = max(width / source_width, height / source_height)
        size = round(scale * source_height), round(scale * source_width)
        frame = F.interpolate(frame, size=size, mode="bicubic", antialias=True)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        frame = frame[:, :, top : top + height, left : left + width]
    return frame[0]


def fit_reference(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """A reference picture, PIL RGB, as [3, 1, height, width] in [-1, 1]: scaled to fit and centred on white."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div_(255).sub_(0.5).div_(0.5)
    if pixels.shape[2:] == (height, width):
        return pixels[0][:, None]
    scale = min(height / image.height, width / image.width)
    rows, columns = max(1, int(image.height * scale)), max(1, int(image.width * scale))
    canvas = torch.ones(3, 1, height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas[:, 0, top : top + rows, left : left + columns] = F.interpolate(
        pixels, size=(rows, columns), mode="bilinear", align_corners=False
    )[0]
    return canvas


def open_clips(video_path: Source | None, mask_path: Source | None) -> list[VideoFile]:
    """The source video and its mask, if there are paths for them, as a list of VideoFile.

    Raises InputError, naming field and file, for a file that cannot be read, or a mask without a video or of another
    length.
    """
    if video_path is None and mask_path is not None:
        raise InputError("there is no video to mask; give --src_video too", "src_mask", mask_path)
    named = ((video_path, "src_video"), (mask_path, "src_mask"))
    clips = [VideoFile(path, field) for path, field in named if path is not None]
    if len({len(clip) for clip in clips}) > 1:
        video, mask = clips
        raise InputError(
            f"{len(mask)} frames, but --src_video {video_path} has {len(video)}; "
            "give a mask as long as the video",
            "src_mask",
            mask_path,
        )
    return clips


def check_source(
    video_path: Source | None, mask_path: Source | None, image_paths: Iterable[Source] | None
) -> None:
    """Raises the InputError that `load_sources` would raise for these files, before any long work."""
    open_clips(video_path, mask_path)
    for path in image_paths or ():
        open_image(path, "src_ref_images")


def load_sources(
    processor: VaceVideoProcessor,
    src_video: Sequence[str | None],
    src_mask: Sequence[str | None],
    src_ref_images: Sequence[Sequence[str] | None],
    num_frames: int,
    image_size: tuple[int, int],
    device: torch.device | str,
) -> Sources:
    """Load each sample's source video, mask and reference images as tensors on `device`.

    Args:
        processor: a VaceVideoProcessor; its area and token budget are set to those of `image_size`.
        src_video, src_mask: per sample a path or None. Without a video the sample is `num_frames` grey frames of
            `image_size`; without a mask, all of it is to be made. A video keeps its own length (as far as the
            token budget allows) and aspect.
        src_ref_images: per sample a list of paths, or None.
        image_size: (width, height) in pixels.

    Returns:
        Three lists with an entry per sample: videos [3, F, H, W] in [-1, 1]; masks [1, F, H, W] in [0, 1], 1 where
        the picture is to be made; references, each a list of [3, 1, H, W] in [-1, 1], or None.

    Raises InputError, naming field and file, for a file that cannot be read, a mask of another length than its
    video, or a mask without a video.
    """
    width, height = image_size
    processor.set_size(image_size, num_frames)
    videos, masks, references = [], [], []
    for video_path, mask_path, image_paths in zip(src_video, src_mask, src_ref_images):
        if video_path is None:
            open_clips(None, mask_path)
            video = torch.zeros(3, num_frames, height, width, device=device)
        elif mask_path is None:
            video = processor.load_video(video_path)[0].to(device)
        else:
            video, mask = (clip.to(device) for clip in processor.load_video_pair(video_path, mask_path)[:2])
        mask = torch.ones_like(video[:1]) if mask_path is None else mask[:1].add(1).div_(2).clamp_(0, 1)
        images = None
        if image_paths is not None:
            opened = (open_image(path, "src_ref_images") for path in image_paths)
            images = [fit_reference(image, *video.shape[2:]).to(device) for image in opened]
        videos.append(video)
        masks.append(mask)
        references.append(images)
    return videos, masks, references
