"""Other videos' objects as holes, and pasted into clips; a video's own masks."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from clips import write_frames
from PIL import Image

import dataset.objects as objects
from common.errors import InputError
from dataset.finetune_dataset import FinetuneDataset
from dataset.folders import scan_video
from dataset.images import BrokenFrame, read_mask
from dataset.loader import TrainingClips
from dataset.objects import AnnotatedVideo, Objects, read_labels, window
from libs.training.checks import open_dataset
from libs.training.config import parse_args
from train_DiffuEraser_stage1 import Stage1

HEIGHT, WIDTH, LENGTH = 48, 72, 8
# Of every video the background's grey, and its objects' (label, colour, height, width).
VIDEOS = {
    "alder": (40, [(1, (200, 0, 0), 12, 18)]),
    "birch": (80, [(1, (0, 200, 0), 10, 10), (2, (0, 0, 200), 8, 24)]),
    "cedar": (120, [(3, (200, 200, 0), 20, 9)]),
    "dogwood": (160, [(1, (200, 0, 200), 14, 14)]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """DAVIS's folders: alder, birch and cedar to train on, dogwood to validate; all annotated."""
    root = tmp_path_factory.mktemp("annotated")
    for name, (grey, drawn) in VIDEOS.items():
        frames, masks = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        for t in range(LENGTH):
            frame = np.full((HEIGHT, WIDTH, 3), grey, np.uint8)
            labels = np.zeros((HEIGHT, WIDTH), np.uint8)
            for label, colour, height, width in drawn:
                top, left = 4 + 14 * (label % 3), 8 + 3 * t
                frame[top : top + height, left : left + width] = colour
                labels[top : top + height, left : left + width] = label
            labels[0, 0] = 255  # DAVIS's and YouTube-VOS's "nobody knows"
            Image.fromarray(frame).save(frames / f"{t:05d}.png")
            picture = Image.fromarray(labels, mode="P")
            picture.putpalette([0, 0, 0, *[min(255, 64 + label) for label in range(1, 256) for _ in range(3)]])
            picture.save(masks / f"{t:05d}.png")
    lists = root / "ImageSets/2017"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("alder\nbirch\ncedar\n")
    return root


def dataset(root, **settings):
    args = {"davis_root": root, "ytvos_root": "", "nframes": 4, "resolution": 48, **settings}
    return FinetuneDataset(SimpleNamespace(**args))


def clips(found, epochs=4):
    return [found.clip(index, epoch) for epoch in range(epochs) for index in range(len(found))]


def test_labels(root, tmp_path):
    path = root / "Annotations/480p/birch/00000.png"
    assert set(np.unique(read_labels(path))) == {0, 1, 2}  # and none is the unknown
    mask = np.zeros((4, 5), np.uint8)
    mask[1:3] = 7
    Image.fromarray(mask).save(tmp_path / "grey.png")
    assert set(np.unique(read_labels(tmp_path / "grey.png"))) == {0, 255}


PALETTES = {
    "white_first": lambda picture: picture.quantize(2),
    "grey": lambda picture: picture.convert("P"),  # white is at 255
    "black": lambda picture: palette_picture(np.asarray(picture) // 85, [0, 0, 0] * 256),
    "coloured": lambda picture: palette_picture(np.asarray(picture) // 255 * 4, [0, 0, 0, *range(1, 40)]),
}


def palette_picture(indices, palette):
    picture = Image.fromarray(indices, mode="P")
    picture.putpalette(palette)
    return picture


@pytest.mark.parametrize(("palette", "label"), [("white_first", 255), ("grey", 255), ("black", 3), ("coloured", 4)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_palettes_of_any_order(tmp_path, palette, label, orientation):
    """Their background is black or, where everything is, at 0; labels and masks agree, turned as EXIF says."""
    mask, path, exif = np.zeros((32, 48), np.uint8), tmp_path / "a.png", Image.Exif()
    mask[:8, :20] = 255
    exif[0x0112] = orientation
    PALETTES[palette](Image.fromarray(mask)).save(path, exif=exif)
    expected = np.rot90(mask, -1) if orientation == 6 else mask
    assert np.array_equal(read_mask(path), expected)
    assert np.array_equal(read_labels(path), expected // 255 * label)


def test_palettes_without_black(tmp_path):
    """As of labels drawn in colours of a plot: index 0 is the background, unless it is all that there is."""
    for colours, expected in (([31, 119, 180, 255, 127, 14], [0, 1]), ([255, 255, 255], [255, 255])):
        image = Image.fromarray(np.array([[0, 1 if len(colours) > 3 else 0]], np.uint8))
        image.putpalette(colours)
        image.save(tmp_path / "a.png")
        assert read_labels(tmp_path / "a.png").tolist() == [expected]
        assert (read_mask(tmp_path / "a.png") > 0).tolist() == [[value > 0 for value in expected]]


def test_damaged_palette_masks(tmp_path):
    """Pillow does not look at checksums, and would read another mask."""
    mask, path = np.random.default_rng(0).integers(0, 3, (64, 64), np.uint8), tmp_path / "a.png"
    image = Image.fromarray(mask)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + b"\0\0\0\1abCdx\0\0\0\0" + whole[-12:])  # a piece that nobody has to know
    assert np.array_equal(read_labels(path), mask)
    for place in (whole.index(b"PLTE") + 8, whole.index(b"IDAT") + 9, len(whole) - 30, len(whole) - 14):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        for read in (read_mask, read_labels):
            with pytest.raises(BrokenFrame, match="readable"):
                read(path)


def test_palettes_without_an_object(tmp_path):
    """A background that is not at 0 is none either where a frame shows nothing else; transparent pixels are none."""
    path, indices = tmp_path / "a.png", np.ones((4, 4), np.uint8)
    palette_picture(indices, [255, 255, 255, 0, 0, 0]).save(path)
    assert not read_mask(path).any() and not read_labels(path).any()
    palette_picture(indices, [0, 0, 0, 255, 255, 255]).save(path, transparency=1)
    assert not read_mask(path).any() and not read_labels(path).any()


def test_windows_are_consecutive_and_turn_at_a_short_videos_ends():
    names = list("abcdefgh")
    found = {"".join(window(np.random.default_rng(seed), names, 4)) for seed in range(200)}
    assert found == {text for i in range(5) for text in ("abcdefgh"[i : i + 4], "abcdefgh"[i : i + 4][::-1])}
    assert "".join(window(np.random.default_rng(0), list("abc"), 7)) in ("abcbabc", "cbabcba")
    assert "".join(window(np.random.default_rng(0), ["a"], 3)) == "aaa"


@pytest.mark.parametrize("settings", [{"mask_mix": "object=1"}, {"paste": 1.0}], ids=["holes", "pasted"])
def test_nothing_of_the_clips_own_or_of_validation_videos_enters(root, monkeypatch, settings):
    read = []
    for name in ("read_labels", "read_frames"):
        reader = getattr(objects, name)
        monkeypatch.setattr(objects, name, lambda what, *how, reader=reader: read.append(what) or reader(what, *how))
    found, lenders = dataset(root, validation_image=[str(root / "JPEGImages/480p/cedar")], **settings), {}
    for index in range(len(found)):
        clip = found.clip(index, 0)
        names = {path.parent.name for what in read for path in (what if isinstance(what, (list, tuple)) else [what])}
        lenders.setdefault(clip.video, set()).update(names)
        read.clear()
    assert lenders == {"alder": {"birch"}, "birch": {"alder"}}  # not cedar, which is held out, nor dogwood


@pytest.mark.parametrize("settings", [{"mask_mix": "object=1"}, {"mask_mix": "blob=0.5,object=0.5", "paste": 0.5,
                         "mask_growth": "-2,4", "mask_border": 0.5}], ids=["object", "all"])  # fmt: skip
def test_samples_follow_from_seed_epoch_and_index(root, settings):
    one, other, guide = dataset(root, **settings), dataset(root, **settings), dataset(root)
    for index in reversed(range(len(one))):
        clip, again = one.clip(index, 3), other.clip(index, 3)
        assert np.array_equal(clip.holes, again.holes) and np.array_equal(clip.shown_frames, again.shown_frames)
        assert np.array_equal(clip.frames, guide.clip(index, 3).frames)  # the windows are the guide's own
    assert not np.array_equal(one.clip(0, 3).holes, one.clip(0, 4).holes)
    assert not np.array_equal(one.clip(0, 3).holes, dataset(root, seed=7, **settings).clip(0, 3).holes)


def test_holes_have_the_objects_shapes(root):
    """Alder's clips borrow birch's square or bar, or cedar's pillar: mirrored or not, sides keep their ratio."""
    ratios = []
    for clip in clips(dataset(root, mask_mix="object=1")):
        if clip.video != "alder":
            continue
        rows, columns = (np.flatnonzero(clip.holes[0].any(axis=axis)).size for axis in (1, 0))
        assert clip.holes[0].all() or np.count_nonzero(clip.holes[0]) == rows * columns
        ratios.append(rows / columns)
        for hole in clip.holes[1:]:
            assert np.count_nonzero(hole.any(axis=1)) == rows  # it moves sideways and keeps its height
    near = {name: np.isclose(ratios, ratio, rtol=0.25).mean() for name, ratio in (("bar", 8 / 24), ("square", 1),
                                                                                ("pillar", 20 / 9))}  # fmt: skip
    assert sum(near.values()) == pytest.approx(1) and min(near.values()) > 0.1, near


def test_pasted_clips(root):
    """The target is clean, the condition shows the object, and the hole reaches from short of it to beyond it."""
    uncovered, covered = 0, 0
    for clip in clips(dataset(root, paste=1.0)):
        grey = VIDEOS[clip.video][0]
        clean, shown = clip.frames.astype(int), clip.conditioning_frames.astype(int)
        assert np.isin(clean[..., 0], (grey, 0, 200)).all()
        differs = np.abs(clean - shown).max(axis=-1) > 24
        assert 0 < differs.mean() < 0.8
        outside = (differs & (clip.holes == 0)).mean() / differs.mean()
        uncovered += outside > 0.05
        covered += outside < 0.005
    assert uncovered > 10 and covered > 10
    assert all(clip.conditioning_frames is None for clip in clips(dataset(root, paste=0.0)))


def test_an_edge_is_as_soft_as_in_a_whole_frame(root, monkeypatch):
    """Work on the part of a frame around the object is faster, and the same; what is far from it stays as it is."""
    found = dataset(root, paste=1.0)
    parts = clips(found, epochs=1)
    monkeypatch.setattr(objects, "around", lambda mask, margin: (np.s_[:, :], (0, 0)))
    for clip, whole in zip(parts, clips(found, epochs=1), strict=True):
        assert np.abs(clip.conditioning_frames.astype(int) - whole.conditioning_frames).max() <= 1


def one_object(folder, mask, grey):
    """Objects of a video of one frame, all of one grey, whose object is where the mask (h, w) uint8 is 255."""
    write_frames(folder / "masks", np.repeat(mask[None, ..., None], 3, axis=3))
    write_frames(folder / "frames", np.full((1, *mask.shape, 3), grey, np.uint8))
    return Objects([AnnotatedVideo("a", folder / "masks", folder / "frames")])


def test_a_thin_object_keeps_its_hole(tmp_path):
    """A pole of 8 pixels, of which holes that fall short of it by 4 or 5 would leave nothing."""
    mask = np.zeros((480, 854), np.uint8)
    mask[100:300, 400:408] = 255
    pole = one_object(tmp_path, mask, grey=90)
    clean = np.full((1, 512, 512, 3), 200, np.uint8)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        track = pole.draw_track(rng, 1, 512, 512, "b", with_frames=True)
        _, holes = objects.paste_object(rng, clean, track)
        assert np.count_nonzero(holes) >= 0.25 * np.count_nonzero(track.masks(512, 512))


def test_shadows_only_darken(root):
    frame = np.full((40, 40, 3), 200, np.uint8)
    alpha = np.zeros((40, 40), np.uint8)
    objects.Shadow(0, 0.5, 0.5, 1.0).cast(frame, alpha)
    assert (frame == 200).all()  # nothing, no shadow
    alpha[10:20, 15:25] = 255
    objects.Shadow(lean=0.5, length=-0.5, darkness=0.5, blur=1.0).cast(frame, alpha)
    assert frame.max() == 200 and frame.min() == pytest.approx(100, abs=8)
    assert frame[22, 16:22].mean() < 150 and (frame[:14] == 200).all()  # it lies before the object's foot


def test_half_of_the_pasted_clips_have_a_shadow(tmp_path):
    """A white object on a paler ground: only a shadow makes anything darker."""
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, 20:40] = 255
    lender = one_object(tmp_path, mask, grey=255)
    ground, shadows = np.full((1, 64, 64, 3), 200, np.uint8), 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        pasted, _ = objects.paste_object(rng, ground, lender.draw_track(rng, 1, 64, 64, "b", with_frames=True))
        shadows += pasted.min() < 190
    assert 20 <= shadows <= 40


def test_known_frames_of_pasted_clips_are_clean(root):
    known = 0
    for clip in clips(dataset(root, paste=1.0, known_frames=1.0), epochs=1):
        for frame, shown, hole in zip(clip.frames, clip.conditioning_frames, clip.holes, strict=True):
            if not hole.any():
                known += 1
                assert np.array_equal(frame, shown)
    assert known > len(VIDEOS)


def test_masks_and_objects_are_counted(root, tmp_path):
    """So that a misnamed folder is noticed."""
    (tmp_path / "alder").symlink_to(root / "Annotations/480p/alder")
    args = SimpleNamespace(davis_root=root, ytvos_root="", nframes=4, resolution=48, scan_data=False, paired_root=None)
    assert "own masks" not in open_dataset(args)[1]
    args.masks_of_videos = tmp_path
    assert ", own masks of 1 video(s)" in open_dataset(args)[1]
    args.mask_mix = "object=1"
    assert ", objects of 3 annotated video(s), own masks of 1 video(s)" in open_dataset(args)[1]


def test_own_masks_follow_their_frames(root, tmp_path):
    """Alder has a folder of masks, which are its object's place; the other videos' holes are drawn."""
    (tmp_path / "alder").symlink_to(root / "Annotations/480p/alder")
    found = dataset(root, masks_of_videos=tmp_path)
    for clip in clips(found, epochs=2):
        is_object = (clip.frames == (200, 0, 0)).all(axis=-1)
        assert np.array_equal(clip.holes > 0, is_object) == (clip.video == "alder")
    grown = dataset(root, masks_of_videos=tmp_path, mask_growth="2,2")
    assert all(np.count_nonzero(grown.clip(i, 0).holes) > np.count_nonzero(found.clip(i, 0).holes) for i in range(10))


def test_own_masks_are_not_those_of_a_validation_video_of_that_name(root, tmp_path):
    """The held-out loss draws its holes with the training's dataset."""
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/alder").symlink_to(root / "Annotations/480p/alder")
    shutil.copytree(root / "JPEGImages/480p/dogwood", tmp_path / "alder")
    found = dataset(root, masks_of_videos=tmp_path / "masks")
    trained = found.clip(0, 0)
    found.videos = [scan_video(tmp_path / "alder")]
    validated = found.clip(0, 0)
    assert trained.video == validated.video == "alder" and found.holes.sources() == ["masks of alder"]
    assert not np.array_equal(trained.holes, validated.holes)


def test_objects_of_any_folder_of_masks(root, tmp_path):
    mask = np.zeros((30, 30), np.uint8)
    mask[5:25, 5:25] = 255
    (tmp_path / "logo").mkdir()
    Image.fromarray(mask).save(tmp_path / "logo/0.png")
    found = dataset(root, mask_mix="object=1", mask_root=tmp_path)
    assert [video.name for video in found.holes.objects.videos] == ["alder", "birch", "cedar", "logo"]
    assert clips(found, epochs=1)


def test_no_objects_of_validation_videos_in_a_folder_of_masks(root, tmp_path):
    """Neither of those that the run validates with, nor of DAVIS's others, whose masks may lie there too."""
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy/ImageSets/2017/val.txt").write_text("dogwood\n")
    masks = tmp_path / "copy/Annotations/480p"
    found = dataset(tmp_path / "copy", mask_mix="object=1", mask_root=masks)
    assert {video.name for video in found.holes.objects.videos} == {"alder", "birch", "cedar"}
    found = dataset(root, mask_mix="object=1", mask_root=masks, validation_image=[str(root / "JPEGImages/480p/cedar")])
    assert {video.name for video in found.holes.objects.videos} == {"alder", "birch", "dogwood"}


def test_a_folder_of_masks_without_use():
    """Else a run would go on without what was asked for."""
    with pytest.raises(InputError, match="--mask_root=masks: no hole takes its shapes from there; add object"):
        parse_args(Stage1, ["--mask_root=masks", "--paste=0.5"])
    assert parse_args(Stage1, ["--mask_root=masks", "--mask_mix=object=1"]).mask_root == "masks"


@pytest.mark.parametrize("settings", [{"mask_mix": "object=1"}, {"paste": 1.0}])
def test_a_broken_annotation_is_named_by_its_own_video(root, tmp_path, settings):
    """Not by the clip's that would have borrowed its object."""
    shutil.copytree(root, tmp_path / "copy")
    for path in (tmp_path / "copy/Annotations/480p/birch").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    found = TrainingClips(dataset(tmp_path / "copy", **settings))
    broken = [line for index in range(len(found)) for line in found[0, index].broken]
    assert broken and all(line.startswith("annotations of birch: ") and "cut short" in line for line in broken)


def test_frames_of_another_size_than_their_masks(root, tmp_path):
    """Of a video behind the first, which alone is looked at before training: its objects stay out, and it is said."""
    shutil.copytree(root, tmp_path / "copy")
    for path in (tmp_path / "copy/JPEGImages/480p/birch").iterdir():
        with Image.open(path) as frame:
            frame.resize((WIDTH // 2, HEIGHT // 2)).save(path)
    found = TrainingClips(dataset(tmp_path / "copy", paste=1.0))
    broken = [line for index in range(len(found)) for line in found[0, index].broken]
    sizes = r"annotations of birch: .*/(\d+\.png) is 36x24, its mask .*/Annotations/480p/birch/\1 72x48"
    assert broken and all(re.fullmatch(sizes, line) for line in broken), broken


@pytest.mark.parametrize("with_frames", [False, True])
def test_a_video_needs_anothers_object(root, with_frames):
    """One annotated video is enough for the clips of others, not for its own."""
    alder = AnnotatedVideo("alder", root / "Annotations/480p/alder", root / "JPEGImages/480p/alder")
    Objects([alder]).check({"birch", "cedar"}, with_frames)
    with pytest.raises(InputError, match="objects of other videos were needed, and 1 training video"):
        Objects([alder]).check({"alder", "birch"}, with_frames)


def test_tracks_without_an_object(root, tmp_path):
    (tmp_path / "empty").mkdir()
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(tmp_path / "empty/0.png")
    lender = Objects([AnnotatedVideo("empty", tmp_path / "empty")])
    with pytest.raises(InputError, match="annotations in a row show no object"):
        lender.draw_track(np.random.default_rng(0), 4, 48, 48, "alder")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"mask_mix": "object=1", "davis_root": "bare"}, "objects of other videos were needed, and 0"),
        ({"paste": 0.1, "davis_root": "bare"}, "0 training video(s) with masks and frames"),
        ({"mask_mix": "object=1", "mask_root": "nowhere"}, "nowhere holds nothing: it is no folder: --mask_root needs"),
        ({"mask_mix": "object=1", "mask_root": "flat"}, "flat holds 1 .png file: --mask_root needs"),
        ({"mask_mix": "object=1", "mask_root": "hollow"}, "hollow/a holds nothing: a folder of masks was needed"),
        ({"paste": 0.1, "davis_root": "small"}, "masks of the frames' size"),
        ({"masks_of_videos": "nowhere"}, "nowhere is no folder: --masks_of_videos needs"),
        ({"masks_of_videos": "hollow"}, "none named as a training video such as alder"),
        ({"masks_of_videos": "small/Annotations/480p", "ytvos_root": "twin"}, "share a name: --masks_of_videos cannot"),
        ({"masks_of_videos": "few"}, "has no mask for 7 of the 8 frames"),
        ({"masks_of_videos": "small/Annotations/480p"}, "masks of the frames' size were needed (--masks_of_videos)"),
    ],
)
def test_bad_input(root, tmp_path, settings, reason):
    for name in ("bare", "small"):
        (tmp_path / name).mkdir()
        for part in ("JPEGImages", "ImageSets"):
            (tmp_path / name / part).symlink_to(root / part)
    (tmp_path / "twin/JPEGImages").mkdir(parents=True)
    (tmp_path / "twin/JPEGImages/alder").symlink_to(root / "JPEGImages/480p/birch")
    small = Image.fromarray(np.ones((10, 10), np.uint8))
    for folder in ("flat", "hollow/a", "few/alder", "small/Annotations/480p/alder", "small/Annotations/480p/birch"):
        (tmp_path / folder).mkdir(parents=True)
        for t in {"hollow/a": [], "flat": [0], "few/alder": [0]}.get(folder, range(LENGTH)):
            small.save(tmp_path / folder / f"{t:05d}.png")
    given = {name: tmp_path / value if name.endswith(("root", "videos")) else value for name, value in settings.items()}
    with pytest.raises(InputError) as caught:
        dataset(**{"root": root, **given} if "davis_root" not in given else {"root": given.pop("davis_root"), **given})
    assert reason in str(caught.value).replace(f"{tmp_path}/", "")
