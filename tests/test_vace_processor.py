import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leanwan.errors import InputError
from wan.utils.vace_processor import VaceVideoProcessor, fit_reference, load_sources
from wan.utils.video import VideoFile, save_image, save_video

UPSTREAM = os.environ.get("WAN_UPSTREAM")


def processor(area=128 * 96, keep_last=True, seq_len=None, **options):
    settings = {
        "downsample": (4, 16, 16),
        "min_area": area,
        "max_area": area,
        "min_fps": 16,
        "max_fps": 16,
        "zero_start": True,
        "seq_len": seq_len or area // 256 * 21,
        "keep_last": keep_last,
    }
    return VaceVideoProcessor(**(settings | options))


def write_clip(path, frames=9, width=128, height=96, fps=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, max(2, frames // 3), 6, 8, generator=generator) * 2 - 1
    video = torch.nn.functional.interpolate(small, size=(frames, height, width), mode="trilinear")[0]
    save_video(video, path, fps=fps)
    return str(path)


def write_picture(path, width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 5, 5, generator=generator) * 2 - 1
    save_image(torch.nn.functional.interpolate(small, size=(height, width), mode="bicubic")[0], path)
    return str(path)


def test_frames_of_the_target_size_are_taken_as_they_are(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 9)
    video, ids, size, fps = processor().load_video(path)
    frames = np.stack(list(VideoFile(path).frames()))
    assert ids == list(range(9)) and size == (96, 128)
    assert fps == pytest.approx(9 / (8.5 / 16))
    expected = torch.from_numpy(frames).permute(3, 0, 1, 2).float().div(127.5).sub(1)
    assert torch.equal(video, expected)


@pytest.mark.parametrize(
    "frames, kept", [(1, 1), (4, 1), (5, 5), (8, 5), (17, 17), (18, 17), (81, 81), (100, 81)]
)
def test_length_is_4n_plus_1_within_the_budget(tmp_path, frames, kept):
    path = write_clip(tmp_path / "a.mp4", frames)
    video, ids, _, _ = processor().load_video(path)
    assert video.shape == (3, kept, 96, 128) and len(ids) == kept
    assert ids == sorted(ids) and ids[0] == 0 and ids[-1] == (0 if kept == 1 else frames - 1)


@pytest.mark.parametrize(
    "width, height, size",
    [
        (256, 192, (96, 128)),
        (192, 256, (128, 96)),
        (400, 100, (48, 256)),
        (64, 48, (48, 64)),
        (130, 98, (96, 128)),
    ],
)
def test_size_keeps_area_and_aspect(tmp_path, width, height, size):
    path = write_clip(tmp_path / "a.mp4", 2, width, height)
    video, _, chosen, _ = processor().load_video(path)
    assert chosen == size == tuple(video.shape[2:])
    assert chosen[0] * chosen[1] <= 128 * 96
    assert video.min() >= -1 and video.max() <= 1


def test_small_clips_may_be_longer(tmp_path):
    video, *_ = processor().load_video(write_clip(tmp_path / "a.mp4", 101, 64, 48))
    assert video.shape == (3, 101, 48, 64)


def test_a_larger_clip_is_scaled_not_cut(tmp_path):
    path = tmp_path / "a.mp4"
    ramp = torch.linspace(-1, 1, 256).expand(3, 5, 192, 256)
    save_video(ramp, path)
    video, *_ = processor().load_video(path)
    assert video.shape == (3, 5, 96, 128)
    expected = torch.linspace(-1, 1, 256).reshape(128, 2).mean(1)
    assert (video - expected).abs().max() < 0.05


def test_the_start_is_seeded(tmp_path):
    path = write_clip(tmp_path / "a.mp4", 81)
    settings = processor(keep_last=False, zero_start=False, seq_len=48 * 3)
    starts = {seed: settings.load_video(path, seed=seed)[1][0] for seed in range(8)}
    assert len(set(starts.values())) > 1
    assert starts == {seed: settings.load_video(path, seed=seed)[1][0] for seed in range(8)}


def test_gaps_between_frames_show_the_earlier_one(tmp_path):
    file = VideoFile(write_clip(tmp_path / "a.mkv", 41))
    assert file.timestamps[0, 1] < 0.0625 < file.timestamps[1, 0], "a clip with gaps is needed here"
    for keep_last in (True, False):
        settings = processor(keep_last=keep_last)
        assert settings._frames_at(np.array([0.03, 0.0625, 0.07]), file.timestamps) == [0, 0, 1]


def test_bad_budget():
    with pytest.raises(ValueError, match="seq_len 47"):
        processor(seq_len=47)


@pytest.mark.parametrize("width, height", [(14, 96), (96, 14), (4000, 16)])
def test_clips_that_are_too_small_or_narrow(tmp_path, width, height):
    path = write_clip(tmp_path / "a.mp4", 2, width, height)
    with pytest.raises(InputError, match=f"src_video .*a.mp4: {width}x{height}"):
        processor().load_video(path)


def test_pair(tmp_path):
    video_path = write_clip(tmp_path / "video.mp4", 9)
    mask_path = write_clip(tmp_path / "mask.mp4", 9, 256, 192, seed=1)
    video, mask, ids, size, _ = processor().load_video_pair(video_path, mask_path)
    assert video.shape == mask.shape == (3, 9, 96, 128) and ids == list(range(9)) and size == (96, 128)
    # The whole larger mask is used, not its corner: the same as the mask alone at that size.
    assert torch.equal(mask, processor().load_video(mask_path)[0])


def test_mask_of_another_length(tmp_path):
    video_path = write_clip(tmp_path / "video.mp4", 9)
    mask_path = write_clip(tmp_path / "mask.mp4", 7)
    with pytest.raises(
        InputError, match="src_mask .*mask.mp4: 7 frames.*src_video .*video.mp4 has 9"
    ) as error:
        load_sources(processor(), [video_path], [mask_path], [None], 9, (128, 96), "cpu")
    assert "\n" not in str(error.value)


def test_prepare_without_anything():
    videos, masks, references = load_sources(processor(), [None], [None], [None], 9, (128, 96), "cpu")
    assert torch.equal(videos[0], torch.zeros(3, 9, 96, 128))
    assert torch.equal(masks[0], torch.ones(1, 9, 96, 128))
    assert references == [None]


def test_prepare_with_everything(tmp_path):
    video_path = write_clip(tmp_path / "video.mp4", 13)
    mask_path = tmp_path / "mask.mp4"
    mask = torch.full((3, 13, 96, 128), -1.0)
    mask[..., 64:] = 1
    save_video(mask, mask_path)
    pictures = [write_picture(tmp_path / "a.png", 50, 70), write_picture(tmp_path / "b.png", 128, 96)]
    inputs = [video_path], [mask_path], [pictures]
    videos, masks, references = load_sources(processor(), *inputs, 81, (128, 96), "cpu")
    assert inputs == ([video_path], [mask_path], [pictures]), "the caller's lists must not change"
    assert videos[0].shape == (3, 13, 96, 128) and masks[0].shape == (1, 13, 96, 128)
    assert masks[0][..., :62].max() < 0.1 and masks[0][..., 66:].min() > 0.9
    assert [image.shape for image in references[0]] == [(3, 1, 96, 128)] * 2


def test_prepare_video_without_mask(tmp_path):
    video_path = write_clip(tmp_path / "video.mp4", 6, 192, 256)
    videos, masks, _ = load_sources(processor(), [video_path], [None], [None], 81, (128, 96), "cpu")
    assert videos[0].shape == (3, 5, 128, 96)
    assert torch.equal(masks[0], torch.ones(1, 5, 128, 96))


@pytest.mark.parametrize("size, seq_len", [((1280, 720), 75600), ((480, 832), 32760), ((128, 96), 1008)])
def test_budget_follows_the_size(size, seq_len):
    settings = processor()
    load_sources(settings, [None], [None], [None], 1, size, "meta")
    assert (settings.seq_len, settings.max_area) == (seq_len, size[0] * size[1])


def test_reference_is_centred_on_white():
    red = Image.new("RGB", (40, 80), (255, 0, 0))
    fitted = fit_reference(red, 96, 128)[:, 0]
    assert torch.equal(fitted[:, :, 40:88], torch.tensor([1.0, -1, -1])[:, None, None].expand(3, 96, 48))
    assert (fitted[:, :, :40] == 1).all() and (fitted[:, :, 88:] == 1).all()


def test_reference_of_the_same_size_is_untouched():
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    fitted = fit_reference(Image.fromarray(noise), 96, 128)
    assert torch.allclose(fitted[:, 0].permute(1, 2, 0), torch.from_numpy(noise) / 127.5 - 1, atol=1e-6)


def test_a_line_is_still_a_reference():
    assert fit_reference(Image.new("RGB", (1000, 1)), 96, 128).shape == (3, 1, 96, 128)


@pytest.mark.parametrize(
    "video, mask, images, flag",
    [
        ("gone.mp4", None, None, "src_video"),
        ("video.mp4", "gone.mp4", None, "src_mask"),
        (None, "gone.mp4", None, "src_mask"),
        (None, None, ["gone.png"], "src_ref_images"),
    ],
)
def test_files_that_are_missing(tmp_path, monkeypatch, video, mask, images, flag):
    monkeypatch.chdir(tmp_path)
    write_clip(Path("video.mp4"), 5)
    with pytest.raises(InputError, match=f"^{flag} gone") as error:
        load_sources(processor(), [video], [mask], [images], 5, (128, 96), "cpu")
    assert "\n" not in str(error.value)


# Runs in a process of its own, since the other checkout's package has the same name. The packages that it asks
# for and that are not needed here get stand-ins; `decord` one that reads with PyAV.
DRIVER = r"""
import sys, types
from fractions import Fraction
import av, numpy as np, torch
from diffusers.models.modeling_utils import ModelMixin  # looks for torchvision, so before the stand-ins
from transformers import AutoTokenizer

class VideoReader:
    def __init__(self, path):
        with av.open(path) as container:
            stream = container.streams.video[0]
            self.fps = float(Fraction(stream.average_rate))
            unit = float(stream.time_base)
            frames = list(container.decode(stream))
            self.frames = [frame.to_ndarray(format="rgb24") for frame in frames]
            self.times = [(frame.pts * unit, (frame.pts + frame.duration) * unit) for frame in frames]
        self.position = 0
    def __len__(self): return len(self.frames)
    def get_avg_fps(self): return self.fps
    def get_frame_timestamp(self, i): return np.array(self.times[i], dtype=np.float32)
    def next(self):
        self.position += 1
        return torch.from_numpy(self.frames[self.position - 1])
    def get_batch(self, ids): return torch.from_numpy(np.stack([self.frames[i] for i in ids]))

def module(name, **content):
    made = types.ModuleType(name)
    made.__dict__.update(content)
    sys.modules[name] = made
    return made

module("decord", VideoReader=VideoReader, bridge=types.SimpleNamespace(set_bridge=lambda name: None))
functional = module(
    "torchvision.transforms.functional",
    to_tensor=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255),
)
transforms = module("torchvision.transforms", functional=functional)
module("torchvision", transforms=transforms)
torch.cuda.current_device = lambda: 0

request = torch.load(sys.argv[1], weights_only=False)
module("wan", __path__=[request["upstream"] + "/wan"])
results = []
for case in request["cases"]:
    if case["kind"] == "load":
        from wan.utils.vace_processor import VaceVideoProcessor
        processor = VaceVideoProcessor(**case["settings"])
        method = processor.load_video_pair if len(case["paths"]) == 2 else processor.load_video
        results.append(method(*case["paths"], crop_box=case["crop_box"]))
    else:
        from wan.vace import WanVace
        pipeline = WanVace.__new__(WanVace)
        from wan.utils.vace_processor import VaceVideoProcessor
        pipeline.vid_proc = VaceVideoProcessor(**case["settings"])
        results.append(pipeline.prepare_source(*case["inputs"], case["frame_num"], case["size"], torch.device("cpu")))
torch.save(results, sys.argv[2])
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Cases with the results of the checkout at WAN_UPSTREAM."""
    if not UPSTREAM:
        pytest.skip("set WAN_UPSTREAM to a checkout of Wan2.1 to compare with it")
    folder = tmp_path_factory.mktemp("upstream")
    clips = [
        write_clip(folder / f"{i}.mp4", *shape)
        for i, shape in enumerate(
            [
                (17, 128, 96),
                (30, 256, 192, 24),
                (100, 100, 150, 30),
                (7, 64, 48, 10),
                (90, 320, 130, 60),
                (130, 66, 50, 25),
                (1, 128, 96),
            ]
        )
    ]
    masks = [
        write_clip(folder / "m0.mp4", 17, seed=5),
        write_clip(folder / "m1.mp4", 30, 128, 96, 24, seed=6),
    ]
    settings = vars(processor())
    cases = [
        {"kind": "load", "paths": [path], "settings": settings | changes, "crop_box": None}
        for path in clips
        for changes in ({}, {"seq_len": 300}, {"keep_last": False}, {"keep_last": False, "max_fps": 8})
        if path != clips[-1] or changes.get("keep_last", True)  # one frame is too few for it there
    ]
    cases.append({"kind": "load", "paths": [clips[1]], "settings": settings, "crop_box": (10, 200, 20, 180)})
    cases += [
        {"kind": "load", "paths": [clips[i], masks[i]], "settings": settings, "crop_box": None}
        for i in range(2)
    ]
    pictures = [
        write_picture(folder / "wide.png", 150, 40),
        write_picture(folder / "tall.png", 33, 200),
        write_picture(folder / "same.png", 832, 480),
    ]
    big = (
        write_clip(folder / "big.mp4", 9, 854, 480),
        write_clip(folder / "big_mask.mp4", 9, 854, 480, seed=7),
    )
    cases += [
        {"kind": "prepare", "inputs": inputs, "settings": settings, "frame_num": 5, "size": (832, 480)}
        for inputs in (
            ([None], [None], [pictures]),
            ([clips[4]], [None], [None]),
            ([big[0]], [big[1]], [pictures[:2]]),
        )
    ]
    torch.save({"upstream": UPSTREAM, "cases": cases}, folder / "request.pt")
    (folder / "driver.py").write_text(DRIVER)
    subprocess.run([sys.executable, "driver.py", "request.pt", "results.pt"], cwd=folder, check=True)
    return list(zip(cases, torch.load(folder / "results.pt", weights_only=False)))


def test_loading_equals_upstream(compared):
    seen = 0
    for case, (*clips, ids, size, fps) in compared:
        if case["kind"] == "load":
            ours = VaceVideoProcessor(**case["settings"])
            method = ours.load_video_pair if len(case["paths"]) == 2 else ours.load_video
            *our_clips, our_ids, our_size, our_fps = method(*case["paths"], crop_box=case["crop_box"])
            assert our_ids == ids and our_size == size
            assert our_fps == pytest.approx(fps, rel=1e-6)
            assert len(our_clips) == len(clips) and all(map(torch.equal, our_clips, clips))
            seen += 1
    assert seen == 29


def test_preparation_equals_upstream(compared):
    seen = 0
    for case, expected in compared:
        if case["kind"] == "prepare":
            ours = VaceVideoProcessor(**case["settings"])
            prepared = load_sources(ours, *case["inputs"], case["frame_num"], case["size"], "cpu")
            videos, masks, references = zip(prepared, expected)
            assert torch.equal(videos[0][0], videos[1][0])
            assert torch.equal(masks[0][0].expand_as(masks[1][0]), masks[1][0])
            if references[1][0] is None:
                assert references[0][0] is None
            else:
                for ours, theirs in zip(references[0][0], references[1][0], strict=True):
                    # Scaled by another kernel where the processor has one for upstream's memory layout.
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
            seen += 1
    assert seen == 3


def test_the_examples_fit_together():
    examples = Path(__file__).parent.parent / "examples"
    clip, mask = str(examples / "vace_video.mp4"), str(examples / "vace_mask.mp4")
    references = [str(examples / f"vace_ref_{i}.png") for i in (1, 2)]
    videos, masks, images = load_sources(processor(), [clip], [mask], [references], 81, (128, 96), "cpu")
    assert videos[0].shape == (3, 17, 96, 128) and masks[0].shape == (1, 17, 96, 128)
    assert 0.05 < masks[0].mean() < 0.3
    assert len(images[0]) == 2
