import contextlib
import os
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from leanwan.errors import InputError
from wan.utils import files
from wan.utils import video as video_module
from wan.utils.files import replacing
from wan.utils.video import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    EightBitFrames,
    VideoFile,
    check_writable,
    open_image,
    save_image,
    save_video,
    to_uint8,
)

with contextlib.suppress(ImportError):
    import resource  # where there are limits

EVERY = bool(os.environ.get("WAN_EVERY_KILL"))


def clip(frames=9, height=96, width=128, seed=0):
    """A smooth random video [3, F, H, W] in about [-1.1, 1.1]."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, max(2, frames // 3), 6, 8, generator=generator) * 2.2 - 1.1
    return torch.nn.functional.interpolate(small, size=(frames, height, width), mode="trilinear")[0]


def read(path):
    return np.stack(list(VideoFile(path).frames()))


def ffmpeg(*arguments):
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *map(str, arguments)], check=True)


def test_frames_in_8_bits_where_they_are():
    values = torch.linspace(-1, 1, 2401).reshape(1, 1, 49, 49)
    frames = EightBitFrames()
    assert torch.equal(frames(values.clone()), to_uint8(values)) and frames.finite
    values[0, 0, 3, 3] = torch.nan
    frames(values)
    frames(torch.zeros(1, 3, 2, 2))
    assert not frames.finite


def test_to_uint8_cuts_instead_of_rounding():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 3.0])
    expected = [int(min(max((v + 1) / 2, 0), 1) * 255) for v in values.tolist()]
    assert to_uint8(values).tolist() == expected
    assert to_uint8(values).dtype == torch.uint8
    assert values[0] == -2, "the input must not change"
    already = torch.tensor([0, 7, 255], dtype=torch.uint8)
    assert to_uint8(already) is already


@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES)
def test_save_video_can_be_read_back(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    video = clip(17)
    save_video(video, path)
    file = VideoFile(path)
    frames = np.stack(list(file.frames()))
    assert frames.shape == (17, 96, 128, 3) == (len(file), file.height, file.width, 3)
    assert file.fps == 16
    wanted = to_uint8(video).permute(1, 2, 3, 0).numpy()
    assert np.abs(frames.astype(int) - wanted).mean() < 4
    assert os.listdir(tmp_path) == [path.name]


def test_file_properties(tmp_path):
    import av

    save_video(clip(5), tmp_path / "out.mp4", fps=24)
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 24


def test_same_bytes_each_time_and_as_imageio(tmp_path):
    imageio = pytest.importorskip("imageio")
    video = clip()
    save_video(video, tmp_path / "a.mp4")
    save_video(to_uint8(video), tmp_path / "b.mp4")
    writer = imageio.get_writer(tmp_path / "c.mp4", fps=16, codec="libx264", quality=8)
    for frame in video.unbind(1):
        grid = frame.clamp(-1, 1).sub(-1).div(2)
        writer.append_data((grid * 255).type(torch.uint8).permute(1, 2, 0).numpy())
    writer.close()
    first = (tmp_path / "a.mp4").read_bytes()
    assert first == (tmp_path / "b.mp4").read_bytes() == (tmp_path / "c.mp4").read_bytes()


def test_sizes_that_are_not_multiples_of_16_stay(tmp_path):
    save_video(clip(3, 50, 70), tmp_path / "out.mp4")
    assert read(tmp_path / "out.mp4").shape == (3, 50, 70, 3)


@pytest.mark.parametrize(
    "shape", [(3, 0, 16, 16), (3, 2, 15, 16), (3, 2, 16, 15), (1, 2, 16, 16), (3, 16, 16)]
)
def test_other_shapes_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="3, F, H, W"):
        save_video(torch.zeros(shape), tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_nothing_half_written_remains(tmp_path, monkeypatch, error):
    path = tmp_path / "out.mp4"
    path.write_bytes(b"the previous one")
    real, calls = to_uint8, []

    def interrupted(frame):
        calls.append(frame)
        if len(calls) == 4:
            raise error
        return real(frame)

    monkeypatch.setattr(video_module, "to_uint8", interrupted)
    with pytest.raises(error):
        save_video(clip(), path)
    assert os.listdir(tmp_path) == ["out.mp4"]
    assert path.read_bytes() == b"the previous one"


def test_nothing_remains_of_an_interrupted_image(tmp_path, monkeypatch):
    def interrupted(self, data):
        with open(self, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_image(torch.zeros(3, 16, 16), tmp_path / "out.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kept", [0, 2])
def test_an_encoder_that_loses_frames_is_noticed(kept, tmp_path, monkeypatch):
    real = video_module._encode
    monkeypatch.setattr(video_module, "_encode", lambda video, *rest: real(video[:, :kept], *rest))
    with pytest.raises(OSError, match=r"out\.mp4"):
        save_video(clip(9), tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "full")
    (tmp_path / f".wan-{files._HOST}-{os.getpid()}-full.mp4").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"out\.mp4"):
        save_video(clip(9), tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == []


def takes(size, tmp_path, monkeypatch):
    """From now on the encoder finds a disk that takes so many bytes of its file."""
    script = tmp_path / "encoder"
    script.write_text(
        f"#!{sys.executable} -IS\n"
        "import os, resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        f"os.execv({imageio_ffmpeg.get_ffmpeg_exe()!r}, sys.argv)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of a process")
@pytest.mark.parametrize("suffix", VIDEO_SUFFIXES if EVERY else (".mp4", ".mkv"))
def test_a_disk_that_fills_at_any_byte(suffix, tmp_path, monkeypatch):
    """At the head, among the frames, or in the trailer, where all frames can be counted although the end is missing."""
    whole = tmp_path / f"whole{suffix}"
    save_video(clip(9, 32, 32), whole, comment="c" * 500)
    size = whole.stat().st_size
    sizes = {*range(0, size, 400), *range(max(0, size - 2000), size, 1 if EVERY else 97), size - 1}
    for some in sorted(sizes):
        with monkeypatch.context() as patch:
            takes(some, tmp_path, patch)
            with pytest.raises(OSError, match=rf"out\{suffix}: .*disk full"):
                save_video(clip(9, 32, 32), tmp_path / f"out{suffix}", comment="c" * 500)
        assert sorted(os.listdir(tmp_path)) == ["encoder", whole.name]
    with monkeypatch.context() as patch:
        takes(size, tmp_path, patch)
        save_video(clip(9, 32, 32), tmp_path / f"out{suffix}", comment="c" * 500)


@pytest.mark.skipif(sys.platform == "win32", reason="needs an executable script")
@pytest.mark.parametrize("code", [1, 255])
def test_what_the_encoder_says_at_its_end_counts(code, tmp_path, monkeypatch):
    """Also where all frames are there."""
    script = tmp_path / "encoder"
    script.write_text(f'#!/bin/sh\n"{imageio_ffmpeg.get_ffmpeg_exe()}" "$@"\nexit {code}\n')
    script.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(script))
    with pytest.raises(OSError, match=rf"out\.mp4: .*{code}"):
        save_video(clip(9), tmp_path / "out.mp4")
    assert os.listdir(tmp_path) == ["encoder"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs limits of a process")
@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_a_disk_that_fills_under_an_image(suffix, tmp_path):
    image, whole = clip(1, 64, 64)[:, 0], tmp_path / f"whole{suffix}"
    save_image(image, whole, "c" * 50)
    size = whole.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for some in range(0, size, 1 if EVERY else max(1, size // 20)):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (some, before[1]))
            with pytest.raises(OSError):
                save_image(image, tmp_path / f"out{suffix}", "c" * 50)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert os.listdir(tmp_path) == [whole.name]


def test_save_image_rounds(tmp_path):
    image = torch.linspace(-1.2, 1.2, 3 * 16 * 20).reshape(3, 16, 20)
    save_image(image, tmp_path / "a.png")
    save_image(image[:, None], tmp_path / "b.png")
    expected = ((image.clamp(-1, 1) + 1) / 2 * 255 + 0.5).clamp(0, 255).to(torch.uint8)
    save_image(expected, tmp_path / "c.png")
    for name in "abc":
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert np.array_equal(pixels, expected.permute(1, 2, 0).numpy())


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_image_suffixes(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    save_image(clip(1), path)
    assert open_image(path, "image").size == (128, 96)
    assert os.listdir(tmp_path) == [path.name]


def test_check_writable_accepts_and_leaves_nothing(tmp_path, monkeypatch):
    check_writable(tmp_path / "out.mp4")
    check_writable(str(tmp_path / "OUT.PNG"), image=True)
    (tmp_path / "old.mp4").write_bytes(b"old")
    check_writable(tmp_path / "old.mp4")
    assert (tmp_path / "old.mp4").read_bytes() == b"old"
    monkeypatch.chdir(tmp_path)
    check_writable("here.mp4")
    assert os.listdir(tmp_path) == ["old.mp4"]


def test_check_writable_refuses(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").write_bytes(b"")
    for name, image in [
        ("folder.mp4", False),
        ("missing/out.mp4", False),
        ("file/out.mp4", False),
        ("out", False),
        ("out.png", False),
        ("out.mp4", True),
        ("x" * 300 + ".mp4", False),
    ]:
        with pytest.raises(InputError, match="save_file") as error:
            check_writable(tmp_path / name, image=image)
        assert "\n" not in str(error.value)


def test_check_writable_refuses_a_folder_without_permission(tmp_path, monkeypatch):
    def denied(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(video_module.Path, "touch", denied)
    with pytest.raises(InputError, match="save_file .*Permission denied"):
        check_writable(tmp_path / "out.mp4")


def test_replacing_keeps_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "out.bin") as temporary:
        temporary.write_bytes(b"x")
        assert temporary.parent == tmp_path and temporary.suffix == ".bin"
    assert (tmp_path / "out.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_open_image_converts(tmp_path):
    Image.new("RGBA", (5, 4), (10, 20, 30, 128)).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png", "image")
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 4), (10, 20, 30))


@pytest.fixture
def bad_files(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("not a picture")
    (tmp_path / "folder").mkdir()
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1000])
    return {name: tmp_path / name for name in ("empty", "text", "folder", "cut.png", "missing")}


@pytest.mark.parametrize("name", ["empty", "text", "folder", "cut.png", "missing"])
def test_open_image_names_flag_and_file(bad_files, name):
    with pytest.raises(InputError) as error:
        open_image(bad_files[name], "--first_frame")
    assert str(error.value).startswith(f"--first_frame {bad_files[name]}: ")
    assert "\n" not in str(error.value)


def test_open_image_without_pixels(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: Image.new(mode, (0, 4)))
    with pytest.raises(InputError, match="image .*0x4"):
        open_image(tmp_path / "a.png", "image")


@pytest.mark.parametrize("name", ["empty", "text", "folder", "missing"])
def test_video_file_names_flag_and_file(bad_files, name):
    with pytest.raises(InputError) as error:
        VideoFile(bad_files[name], "src_video")
    assert str(error.value).startswith(f"src_video {bad_files[name]}: ")
    assert "\n" not in str(error.value)


def test_sound_without_video_is_refused(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=duration=0.2", tmp_path / "sound.wav")
    with pytest.raises(InputError, match="src_video .*no video"):
        VideoFile(tmp_path / "sound.wav", "src_video")


def test_video_cut_short(tmp_path):
    save_video(torch.rand(3, 17, 96, 128) * 2 - 1, tmp_path / "whole.mp4")
    ffmpeg("-i", tmp_path / "whole.mp4", "-c", "copy", "-movflags", "faststart", tmp_path / "index_first.mp4")
    data = (tmp_path / "index_first.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(InputError, match="src_video .*cut.mp4"):
        list(VideoFile(tmp_path / "cut.mp4", "src_video").frames([0, 16]))


def test_timestamps_and_chosen_frames(tmp_path):
    save_video(clip(17), tmp_path / "a.mp4")
    file = VideoFile(tmp_path / "a.mp4")
    starts = np.arange(17, dtype=np.float32) / 16
    assert file.timestamps.dtype == np.float32
    assert np.array_equal(file.timestamps, np.stack([starts, starts + np.float32(1 / 16)], axis=1))
    everything = np.stack(list(file.frames()))
    ids = [0, 0, 3, 9, 9, 16]
    assert np.array_equal(np.stack(list(file.frames(ids))), everything[ids])


def test_milliseconds_leave_gaps(tmp_path):
    save_video(clip(5), tmp_path / "a.mp4")
    ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "a.mkv")
    file = VideoFile(tmp_path / "a.mkv")
    expected = np.array([[0, 62], [63, 125], [125, 187], [188, 250], [250, 312]], dtype=np.float32)
    assert np.allclose(file.timestamps, expected / 1000, atol=1e-7)


def test_frames_cut_off_by_an_edit_list_do_not_count(tmp_path):
    save_video(clip(17), tmp_path / "a.mp4")
    ffmpeg("-ss", "0.3", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "cut.mp4")
    file = VideoFile(tmp_path / "cut.mp4")
    assert len(file) == len(list(file.frames())) < 17
    assert np.array_equal(np.stack(list(file.frames())), read(tmp_path / "a.mp4")[-len(file) :])


def test_rotation_is_applied(tmp_path):
    save_video(clip(3), tmp_path / "a.mp4")
    ffmpeg("-display_rotation", "90", "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4")
    file = VideoFile(tmp_path / "turned.mp4")
    assert (file.height, file.width) == (128, 96)
    assert np.array_equal(read(tmp_path / "turned.mp4"), np.rot90(read(tmp_path / "a.mp4"), axes=(1, 2)))
