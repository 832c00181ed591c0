"""Pictures and clips in and out of files.

Writers work on a temporary name beside the target and rename it when the file is whole, so that a target is
either complete or untouched. Readers turn whatever is wrong with a file into an `InputError` that names it.
"""

import io
import logging
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from leanwan.errors import InputError

from .events import counted
from .files import check_target, replacing

log = logging.getLogger(__name__)

ORIENTATION = 0x0112  # EXIF's tag
RATE_FACTOR = 10  # of H.264: constant quality, the smaller the better
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")
COMMENT = "Comment"  # the key of a file's comment in the metadata of pictures and videos
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def check_writable(path: str | os.PathLike[str], image: bool = False) -> None:
    """Fail now rather than after hours of work if `path` cannot become a video (or, with `image`, a picture).

    Raises InputError, naming --save_file, if the suffix is not one that can be written or `check_target` objects.
    """
    suffixes = IMAGE_SUFFIXES if image else VIDEO_SUFFIXES
    if not os.path.isdir(path) and Path(path).suffix.lower() not in suffixes:
        kind = "image" if image else "video"
        raise InputError(
            f"cannot write this kind of {kind}; end it in {', '.join(suffixes)}", "save_file", path
        )
    check_target(path, "save_file")


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1], any shape, as the 8-bit values of a video's frames: clamped, scaled and cut, not rounded.

    A uint8 tensor is returned as it is.
    """
    if video.dtype == torch.uint8:
        return video
    return video.float().clamp(-1, 1).add_(1).div_(2).mul_(255).to(torch.uint8)


class EightBitFrames:
    """Converts frames in [-1, 1] as `to_uint8` does, overwriting them; `finite` tells whether all values were finite.

    So from the decoder on a video takes a quarter of the RAM that it takes in fp32.
    """

    dtype = torch.uint8

    def __init__(self) -> None:
        self._finite: torch.Tensor | None = None

    @property
    def finite(self) -> bool:
        return self._finite is None or bool(self._finite)

    @finite.setter
    def finite(self, value: bool) -> None:
        self._finite = torch.tensor(value)

    def __call__(self, frame: torch.Tensor) -> torch.Tensor:
        finite = torch.isfinite(frame).all()
        self._finite = finite if self._finite is None else self._finite & finite
        return frame.add_(1).div_(2).mul_(255).to(torch.uint8)


def save_video(
    video: torch.Tensor,
    path: str | os.PathLike[str],
    fps: float = 16,
    comment: str | None = None,
    over: bool = True,
) -> None:
    """Write `video` as H.264 (constant rate factor 10, 4:2:0), frame by frame. The same input gives the same bytes.

    Args:
        video: [3, F, H, W], float in [-1, 1] or uint8, on any device; F at least 1, H and W even. The frames are
            encoded at their own size: none is scaled to a multiple of 16 as imageio does by default, which for the
            multiples of 16 that the models make is the same thing.
        path: the target, ending in one of VIDEO_SUFFIXES.
        fps: frames per second.
        comment: text without line breaks for the file's metadata.
        over: whether a file that is at `path` by then is replaced.

    Raises:
        ValueError: another shape.
        FileExistsError: `path` exists, and `over` is false.
        OSError: the encoder could not write the whole file (a full disk, for example).
    """
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape or video.shape[2] % 2 or video.shape[3] % 2:
        raise ValueError(f"expected a video [3, F, H, W] with even H and W, got {list(video.shape)}")
    with replacing(path, over=over) as temporary:
        try:
            ended = _encode(video, temporary, fps, comment)
        except OSError as error:
            raise OSError(f"{path}: the video encoder stopped early; is the disk full?") from error
        if ended:
            raise OSError(f"{path}: the video encoder ended with exit code {ended}; is the disk full?")
        written = _count_frames(temporary)
        if written != video.shape[1]:
            raise OSError(f"{path}: it has {written} of {video.shape[1]} frames; is the disk full?")


def _encode(video: torch.Tensor, path: Path, fps: float, comment: str | None) -> int:
    """Has ffmpeg write the file that save_video describes; returns ffmpeg's exit code.

    Raises OSError: ffmpeg ended before it had all frames.
    """
    _, frame_num, height, width = video.shape
    rate = str(Fraction(fps).limit_denominator())
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-", "-an"]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", str(RATE_FACTOR)]
    target += ["-metadata", f"comment={comment}"] if comment else []
    encoder = subprocess.Popen(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *source, *target, os.fspath(path)],
        stdin=subprocess.PIPE,
        # Ctrl-C reaches this process alone, which ends the encoder or lets it finish.
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    assert encoder.stdin
    try:
        for frame in counted(video.unbind(1), frame_num, "save"):
            encoder.stdin.write(to_uint8(frame).permute(1, 2, 0).cpu().contiguous().numpy())
        encoder.stdin.close()
        return encoder.wait()
    finally:
        encoder.kill()  # unless it has ended
        with suppress(OSError):
            encoder.stdin.close()
        encoder.wait()


def _count_frames(path: str | os.PathLike[str]) -> int:
    """Frames in a file, without decoding; 0 if it cannot be read."""
    try:
        with av.open(str(path)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.FFmpegError, IndexError):
        return 0


def save_image(
    image: torch.Tensor, path: str | os.PathLike[str], comment: str | None = None, over: bool = True
) -> None:
    """Write a picture [3, H, W] or [3, 1, H, W], float in [-1, 1] (rounded to 8 bits) or uint8, by `path`'s suffix.

    A comment becomes part of the metadata of a .png; `over` as save_video's.
    """
    if image.ndim == 4:
        image = image.squeeze(1)
    if image.dtype != torch.uint8:
        image = image.float().clamp(-1, 1).add_(1).div_(2).mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    suffix, metadata = Path(path).suffix.lower(), PngInfo()
    if comment:
        metadata.add_text(COMMENT, comment)
    # Encoded in RAM first: PIL does not notice that a full disk took only a part of a file.
    data = io.BytesIO()
    picture.save(
        data, Image.registered_extensions()[suffix], **{"pnginfo": metadata} if suffix == ".png" else {}
    )
    with replacing(path, over=over) as temporary:
        temporary.write_bytes(data.getbuffer())


def read_comment(path: str | os.PathLike[str], field: str) -> str | None:
    """The comment in the metadata of a picture or video, or None.

    Raises InputError, naming `field` and the file, if the file cannot be read.
    """
    _check_file(path, field)
    try:
        with Image.open(path) as file:
            comment = file.info.get(COMMENT)
    except UnidentifiedImageError:
        comment = _video_comment(path, field)
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise InputError("not a readable image", field, path) from error
    return comment if isinstance(comment, str) else None


def _video_comment(path: str | os.PathLike[str], field: str) -> str | None:
    try:
        with av.open(os.fspath(path), metadata_errors="replace") as container:
            tags = {name.lower(): value for name, value in container.metadata.items()}
            return tags.get(COMMENT.lower())
    except Exception as error:  # FFmpeg's errors, and those of names that are not UTF-8
        why = getattr(error, "strerror", None) or error
        raise InputError(f"not a readable video ({why})", field, path) from error


def open_image(path: str | os.PathLike[str], field: str, most_pixels: float = math.inf) -> Image.Image:
    """The picture at `path` as PIL RGB, read completely.

    Raises InputError, naming `field` and the file, if it is missing, empty or not a picture that can be read, or if its
    header says that it has more than `most_pixels`.
    """
    _check_file(path, field)
    try:
        with Image.open(path) as file:
            _check_pixels(file.width, file.height, most_pixels, field, path)
            if file.getexif().get(ORIENTATION, 1) != 1:
                log.warning(
                    f"{path} is stored turned (EXIF) and is used as it is stored; turn it first if need be"
                )
            if "A" in file.getbands() or "transparency" in file.info:
                log.warning(f"{path} has transparent parts, which are used as if they were not")
            image = _to_8_bits(file).convert("RGB")
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        raise InputError("has too many pixels; make it smaller first", field, path) from error
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise InputError("not a readable image; give a PNG or JPEG file", field, path) from error
    if 0 in image.size:
        raise InputError(f"the image is {image.width}x{image.height}; give one that has pixels", field, path)
    return image


def _check_pixels(width: int, height: int, most: float, field: str, path: str | os.PathLike[str]) -> None:
    if width * height > most:
        raise InputError(
            f"is {width}x{height}; make it smaller first, at most {most:,} pixels are taken", field, path
        )


def _to_8_bits(image: Image.Image) -> Image.Image:
    """A PIL image of 16-bit grey scaled to 8 bits, where PIL would clip at 255; other images as they are."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))


def _check_file(path: str | os.PathLike[str], field: str) -> None:
    if not os.path.isfile(path):
        wrong = "is no regular file" if os.path.exists(path) else "no such file"
        wrong = "is a directory" if os.path.isdir(path) else wrong
        raise InputError(f"{wrong}; check the path", field, path)
    if os.path.getsize(path) == 0:
        raise InputError("the file is empty; give another one", field, path)


class VideoFile:
    """A clip on disk: its index is read at once, its frames when asked for.

    Attributes:
        path, field: the file's path, and the option that named it (for messages).
        fps: average frames per second.
        timestamps: [T, 2] float32, the second at which each frame, in order of showing, starts and ends, counted
            from the stream's start.
        height, width: pixels, as shown (a rotation stored in the file is applied).

    Args:
        path, field: see above.
        most_pixels: of a frame.

    Raises InputError, naming field and file, here or in `frames`, if the file cannot be read or has no frames, or if
    its header says that a frame has more than `most_pixels`.
    """

    def __init__(self, path: str | os.PathLike[str], field: str = "video", most_pixels: float = math.inf):
        self.path, self.field = path, field
        _check_file(path, field)
        with self._open() as (container, stream):
            _check_pixels(stream.width, stream.height, most_pixels, field, path)
            packets = [
                (packet.pts, packet.duration or 0)
                for packet in container.demux(stream)
                if packet.size and not packet.is_discard
            ]
            rate, unit, start = stream.average_rate or stream.base_rate, stream.time_base, stream.start_time
        if not packets or not rate:
            raise InputError("the video has no frames; give another one", field, path)
        self.fps = float(rate)
        if any(
            pts is None for pts, _ in packets
        ):  # a container without times: frames follow each other evenly
            packets, unit, start = [(i, 1) for i in range(len(packets))], 1 / rate, 0
        spans = np.array([(pts, pts + duration) for pts, duration in sorted(packets)])
        start = spans[0, 0] if start is None else start
        # Subtracted in float32, as decord does: Wan's choice of frames is built on decord's seconds.
        seconds = (spans.astype(np.float32) - np.float32(start)) * np.float64(unit)
        self.timestamps = seconds.astype(np.float32)
        self.height, self.width = next(self.frames([0])).shape[:2]

    def __len__(self) -> int:
        return len(self.timestamps)

    def frames(self, ids: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Yield frames [H, W, 3], uint8 RGB, by their numbers in ascending order (repeats allowed); all by default."""
        ids = range(len(self)) if ids is None else ids
        given = 0
        with self._open() as (container, stream):
            stream.thread_type = "AUTO"
            for number, frame in enumerate(container.decode(stream)):
                while given < len(ids) and ids[given] == number:
                    image = frame.to_ndarray(format="rgb24")
                    yield np.ascontiguousarray(np.rot90(image, frame.rotation // 90))
                    given += 1
                if given == len(ids):
                    return
        raise InputError(
            f"frame {ids[given]} of {len(self)} cannot be decoded; the file may be cut short",
            self.field,
            self.path,
        )

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        try:
            with av.open(os.fspath(self.path)) as container:
                if not container.streams.video:
                    raise InputError("the file has no video in it; give another one", self.field, self.path)
                yield container, container.streams.video[0]
        except av.FFmpegError as error:
            raise InputError(f"not a readable video ({error.strerror})", self.field, self.path) from error


def fitted_size(height: int, width: int, max_area: int, step: int) -> tuple[int, int]:
    """(height, width) with a picture's aspect: multiples of `step`, or 0 if too narrow, and at most max_area pixels."""
    aspect = height / width
    sides = np.sqrt(max_area * aspect), np.sqrt(max_area / aspect)
    tall, wide = (round(side // (step // 2) // 2) * step for side in sides)
    return tall, wide
