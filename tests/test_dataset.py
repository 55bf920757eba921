"""The dataset's contract: shapes, ranges, polarity, and samples that are functions of (seed, epoch, index)."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

from common.errors import InputError
from dataset.finetune_dataset import Clip, FinetuneDataset, to_tensors
from dataset.images import BrokenFrame, read_frame
from dataset.loader import EpochSampler, TrainingClips
from libs.checkpoints.checkpoint import TrainerState
from libs.training.setup import make_loader


def settings(videos, **overrides):
    args = {"davis_root": videos / "DAVIS", "ytvos_root": videos / "YTBV", "nframes": 5, "resolution": 64}
    return SimpleNamespace(**{**args, **overrides})


def test_a_sample(videos, weights):
    tokenizer = CLIPTokenizer.from_pretrained(weights / "stable-diffusion-v1-5" / "tokenizer")
    dataset = FinetuneDataset(settings(videos), tokenizer)
    sample = dataset[3]
    assert sample["pixel_values"].shape == sample["conditioning_pixel_values"].shape == (5, 3, 64, 64)
    assert sample["masks"].shape == (5, 1, 64, 64) and sample["input_ids"].shape == (77,)
    assert sample["pixel_values"].min() >= -1 and sample["pixel_values"].max() <= 1
    keep = sample["masks"].expand(-1, 3, -1, -1) == 1
    assert set(sample["masks"].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(sample["conditioning_pixel_values"][keep], sample["pixel_values"][keep])
    assert (sample["conditioning_pixel_values"][~keep] == -1).all()
    assert len(list(dataset)) == len(dataset) == 4 * 10 + 4  # DAVIS ten times, YouTube-VOS once


def test_samples_follow_from_seed_epoch_and_index(videos):
    first, second = FinetuneDataset(settings(videos)), FinetuneDataset(settings(videos))
    a, b = first.clip(7, 2), second.clip(7, 2)
    assert np.array_equal(a.frames, b.frames) and np.array_equal(a.holes, b.holes) and a.noise_seed == b.noise_seed
    others = [first.clip(7, 3), first.clip(8, 2), FinetuneDataset(settings(videos, seed=1)).clip(7, 2)]
    assert all(other.noise_seed != a.noise_seed and not np.array_equal(other.holes, a.holes) for other in others)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_follow_each_other_without_a_gap(videos, workers):
    """Every batch is full, every clip comes once per epoch, and the epoch reaches the loader's workers."""
    dataset = FinetuneDataset(settings(videos))
    clips, n = TrainingClips(dataset), len(dataset)
    sampler = EpochSampler(n, seed=42, start=n - 1, stop=3 * n + 1)
    loader = DataLoader(clips, 3, sampler=sampler, collate_fn=clips.collate, num_workers=workers)
    keys = list(sampler)
    expected = [dataset.clip(index, epoch).noise_seed for epoch, index in keys]
    assert [batch["noise_seeds"] for batch in loader] == [expected[i : i + 3] for i in range(0, len(keys), 3)]
    assert len(keys) == len(sampler) == 2 * n + 2
    orders = [[index for number, index in keys if number == epoch] for epoch in (1, 2)]
    assert [sorted(order) for order in orders] == [list(range(n))] * 2 and orders[0] != orders[1]
    assert keys[1:] == list(EpochSampler(n, seed=42, start=n, stop=3 * n + 1))


def test_the_order_of_clips_follows_the_runs_seed():
    def order(seed):
        config = SimpleNamespace(seed=seed, train_batch_size=1, dataloader_num_workers=0)
        accelerator = SimpleNamespace(device=torch.device("cpu"), prepare=lambda loader: loader)
        found = SimpleNamespace(dataset=range(40), state=TrainerState(1), global_batch=1)
        return list(make_loader(config, accelerator, found, cache=None, last_step=40).sampler)

    assert order(1) == order(1) and order(1) != order(2)


def test_replacements_of_broken_clips_follow_seed_epoch_and_index():
    class Broken:
        """Of a thousand videos the first three."""

        def __init__(self, seed):
            self.seed = seed

        def __len__(self):
            return 1000

        def clip(self, index, epoch):
            if index < 3:
                raise BrokenFrame("cut short", f"video {index}")
            return Clip(None, None, prompt=0, noise_seed=index, video="", paths=())

    def replacement(seed, epoch, index):
        return TrainingClips(Broken(seed))[epoch, index].noise_seed

    found = [replacement(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len(set(found)) == 4 and found[0] == replacement(0, 0, 0)


def test_opencv_has_no_threads():
    """Its thread pool would not survive the fork into loader workers: they hung on frames of 854x480."""
    assert cv2.getNumThreads() == 1


def test_windows_are_consecutive_and_reversed_half_the_time(videos, tmp_path):
    folder = tmp_path / "YTBV" / "JPEGImages" / "counting"
    folder.mkdir(parents=True)
    for i in range(12):
        Image.new("RGB", (80, 64), (20 * i,) * 3).save(folder / f"{i:05d}.png")
    dataset = FinetuneDataset(settings(videos, davis_root="", ytvos_root=tmp_path / "YTBV"))
    steps, starts = [], set()
    for epoch in range(80):
        numbers = dataset.clip(0, epoch).frames[:, 0, 0, 0].astype(int) // 20
        assert abs(np.diff(numbers)).tolist() == [1] * 4 and len(set(np.diff(numbers))) == 1
        steps.append(numbers[1] - numbers[0])
        starts.add(min(numbers))
    assert starts == set(range(8))
    assert 25 <= steps.count(1) <= 55


def test_centre_crop_at_the_short_side(videos, tmp_path):
    """A 100x60 frame: columns 20-79 remain; masks and frames go through the same geometry."""
    folder = tmp_path / "YTBV" / "JPEGImages" / "columns"
    folder.mkdir(parents=True)
    columns = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None] * 2, (60, 100, 3))
    for i in range(5):
        Image.fromarray(np.ascontiguousarray(columns)).save(folder / f"{i}.png")
    for resolution in (64, 32, 128):
        dataset = FinetuneDataset(settings(videos, davis_root="", ytvos_root=tmp_path / "YTBV", resolution=resolution))
        row = dataset.clip(0, 0).frames[0, 0, :, 0].astype(float) / 2
        expected = 19.5 + (np.arange(resolution) + 0.5) * 60 / resolution
        assert np.abs(row - expected).max() < 1


def test_every_frame_shows_a_hole(videos):
    """Masks of a tenth of the sides are often outside of the crop, or next to nothing: they are drawn anew."""
    dataset = FinetuneDataset(settings(videos, mask_span=(0.1, 0.2)))
    for index in range(len(dataset)):
        shares = (dataset.clip(index, 0).holes > 0).mean(axis=(1, 2))
        assert shares.min() >= 0.01


def test_masks_that_are_always_too_small(videos):
    dataset = FinetuneDataset(settings(videos, mask_span=(0.01, 0.02)))
    with pytest.raises(
        InputError, match=r"1000 masks in a row covered less than 1% .* 160x96 frame: widen --mask_span"
    ):
        dataset.clip(0, 0)


def test_empty_prompts(videos):
    prompts = [FinetuneDataset(settings(videos, proportion_empty_prompts=0.5)).clip(i, 0).prompt for i in range(44)]
    assert 10 < sum(prompts) < 34
    assert not any(FinetuneDataset(settings(videos)).clip(i, 0).prompt for i in range(10))


def test_validation_videos_and_short_ones_are_left_out(videos, tmp_path):
    held_out = videos / "DAVIS/JPEGImages/480p/kites"
    dataset = FinetuneDataset(settings(videos, validation_image=[str(held_out)]))
    assert len(dataset) == 3 * 10 + 4 and [video.name for video in dataset.validation_videos] == ["kites"]
    assert "kites" not in {video.name for video in dataset.videos}
    (tmp_path / "DAVIS").symlink_to(videos / "DAVIS")
    linked = settings(videos, davis_root=tmp_path / "DAVIS", validation_image=[str(held_out)])
    assert [video.name for video in FinetuneDataset(linked).validation_videos] == ["kites"]
    with pytest.raises(InputError, match=r"fewer than 27 frames \(the longest video has 26\)"):
        FinetuneDataset(settings(videos, nframes=27))


def test_bytes_become_the_same_tensors_anywhere(videos):
    dataset = FinetuneDataset(settings(videos))
    clip = dataset.clip(1, 0)
    batch = TrainingClips(dataset).collate([clip])
    pixel_values, conditioning_pixel_values, masks = to_tensors(batch["frames"], batch["holes"])
    assert pixel_values.shape == (1, 5, 3, 64, 64) and masks.shape == (1, 5, 1, 64, 64)
    assert pixel_values[0, 0, 0, 0, 0] == pytest.approx(clip.frames[0, 0, 0, 0] / 127.5 - 1)
    assert (masks[0, :, 0].numpy() == (clip.holes == 0)).all()
    assert (conditioning_pixel_values.amax(dim=2)[0][torch.from_numpy(clip.holes) > 0] == -1).all()


def test_frames_of_odd_names_only(videos, tmp_path):
    """Files that are no images are not frames."""
    folder = tmp_path / "YTBV" / "JPEGImages" / "mixed"
    folder.mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (64, 64)).save(folder / f"{i}.jpg")
    Path(folder, "Thumbs.db").write_text("")
    dataset = FinetuneDataset(settings(videos, davis_root="", ytvos_root=tmp_path / "YTBV"))
    assert len(dataset.videos[0].frames) == 5


@pytest.fixture
def jpeg(tmp_path):
    """Bytes of a camera's JPEG: its Exif segment holds a thumbnail, which is a whole JPEG in itself."""
    rng = np.random.default_rng(0)
    picture, thumbnail = rng.integers(0, 256, (96, 128, 3), np.uint8), rng.integers(0, 256, (12, 16, 3), np.uint8)
    whole, small = (cv2.imencode(".jpg", image)[1].tobytes() for image in (picture, thumbnail))
    exif = b"Exif\0\0" + small
    return whole[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + whole[2:]


TRAILERS = {"none": b"", "zeros": bytes(512), "phone": b"SEFT" * 100_000, "preview": b"\xff\xd8 cut short"}


@pytest.mark.parametrize("trailer", TRAILERS.values(), ids=TRAILERS)
def test_whole_jpegs_with_anything_behind_them(tmp_path, jpeg, trailer):
    Path(tmp_path, "a.jpg").write_bytes(jpeg + trailer)
    assert read_frame(tmp_path / "a.jpg").shape == (96, 128, 3)


@pytest.mark.parametrize("marker", [b"\xff\xe1", b"\xff\xc0", b"\xff\xda"], ids=["first", "size", "data"])
def test_jpegs_with_fill_bytes(tmp_path, jpeg, marker):
    """Any number of ff before a marker: decoders pass over them. A cut behind them is found all the same."""
    head, tail = jpeg.split(marker, 1) if marker == b"\xff\xe1" else jpeg.rsplit(marker, 1)
    Path(tmp_path, "a.jpg").write_bytes(filled := head + b"\xff\xff" + marker + tail)
    assert read_frame(tmp_path / "a.jpg").shape == (96, 128, 3)
    Path(tmp_path, "a.jpg").write_bytes(filled[:-100])
    with pytest.raises(BrokenFrame, match="is cut short"):
        read_frame(tmp_path / "a.jpg")
    Path(tmp_path, "a.jpg").write_bytes(head + b"\xff" * 100)
    with pytest.raises(BrokenFrame, match="is cut short"):
        read_frame(tmp_path / "a.jpg")


@pytest.mark.parametrize("kept", [0.99, 0.5, 0.15, 0.02], ids=["marker", "half", "behind_the_thumbnail", "in_it"])
@pytest.mark.parametrize("padding", [b"", bytes(512)], ids=["cut", "zero_filled"])
def test_jpegs_cut_short(tmp_path, jpeg, kept, padding):
    """Also right behind the thumbnail, whose own end marker is no end of the picture."""
    Path(tmp_path, "a.jpg").write_bytes(jpeg[: int(kept * len(jpeg))].removesuffix(b"\xff\xd9") + padding)
    with pytest.raises(BrokenFrame, match="is cut short"):
        read_frame(tmp_path / "a.jpg")


def test_progressive_jpegs(tmp_path):
    noise = Image.effect_noise((128, 96), 90).convert("RGB")
    noise.save(tmp_path / "a.jpg", progressive=True)
    assert read_frame(tmp_path / "a.jpg").shape == (96, 128, 3)
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(BrokenFrame, match="is cut short"):
        read_frame(tmp_path / "a.jpg")


def test_known_frames(videos):
    """A share of the clips has a few frames without a hole, evenly spread; nothing else of a clip changes."""
    plain = FinetuneDataset(settings(videos, nframes=22))
    dataset = FinetuneDataset(settings(videos, nframes=22, known_frames=0.5))
    emptied = []
    for index in range(44):
        before, clip = plain.clip(index, 0), dataset.clip(index, 0)
        assert np.array_equal(clip.frames, before.frames) and clip.noise_seed == before.noise_seed
        known = np.flatnonzero(~clip.holes.any(axis=(1, 2)))
        others = np.setdiff1d(np.arange(22), known)
        assert np.array_equal(clip.holes[others], before.holes[others])
        steps = np.diff(known)
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
        emptied.append(len(known))
    assert 10 < np.count_nonzero(emptied) < 34 and min(filter(None, emptied)) <= 2 and max(emptied) >= 6
