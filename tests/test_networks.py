"""Scores by networks, on random weights, against the packages and the published code that they come from."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import moving_video
from conftest import DEVICES, error_line
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model
from transformers.models.clip import CLIPImageProcessorPil

from common.command_line import Parser
from common.errors import InputError, one_line_errors
from libs.evaluation.lpips import CHANNELS, Lpips, load_lpips
from libs.evaluation.metrics import SCORES, Reference
from libs.evaluation.networks import SOURCES, add_network_flags, load_networks, missing_networks
from libs.evaluation.removal_coherence import discrepancy, load_dinov2, resized, square_around
from libs.evaluation.vfid import I3D
from libs.evaluation.vision_model import normalize

# Of the package lpips 0.1.4 with the weights and frames below, in double precision, its torchvision replaced by
# AlexNet's published layers: LPIPS of the frames, and the mean of its map (spatial=True) in the hole.
LPIPS = {
    (31, 31): (0.134898478, 0.135965614),
    (33, 47): (0.127073811, 0.124892293),
    (101, 77): (0.13313189, 0.136337606),
    (240, 432): (0.131303368, 0.131463222),
}
# Of the code that PROVE's authors published, with the model and the video below, in double precision: RC-S of every
# frame and RC-T of every two.
RC = {
    "pieces": ([0.743167, 0.7433973, 0.7544217], [0.1495498, 0.1491409]),
    "large": ([0.8194784, 0.8267012, 0.8587066], [0.066969, 0.0705413]),
    "edges": ([0.8143242, 0.564561, 0.7633396], [0.8132733, 1.165707]),
}


def lpips_weights(folder):
    """The two published files with random weights; AlexNet's with the head that is not used."""
    generator, model = torch.Generator().manual_seed(0), Lpips()
    shapes = {key: value.shape for key, value in model.features.state_dict(prefix="features.").items()}
    trunk = {}
    for key in sorted(shapes):
        values = torch.randn(shapes[key], generator=generator)
        trunk[key] = values * (2 / values[0].numel()) ** 0.5 if values.dim() > 1 else 0.1 * values
    linear = {f"lin{k}.model.1.weight": torch.rand(1, n, 1, 1, generator=generator) for k, n in enumerate(CHANNELS)}
    folder.mkdir(exist_ok=True)
    torch.save(trunk | {"classifier.1.weight": torch.zeros(4, 4)}, folder / "alexnet-owt-7be5be79.pth")
    torch.save(linear, folder / "alex.pth")
    return folder


def two_frames(height, width):
    """(truth, result, hole) of noise that is alike."""
    rng = np.random.default_rng(height)
    truth, other = (rng.integers(0, 256, (height, width, 3)) for _ in range(2))
    hole = np.zeros((height, width), np.uint8)
    hole[height // 4 : height // 2, width // 3 : -3] = 255
    return truth.astype(np.uint8), (0.7 * truth + 0.3 * other).astype(np.uint8), hole


def clip_weights(folder):
    """A tiny CLIP, with text and all, whose config tells the projection's size where published ones do."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    text = {**vision, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)).save_pretrained(folder)
    return folder


def random_dinov2():
    torch.manual_seed(1)
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()
    generator = torch.Generator().manual_seed(1)

    def newest_name(entry):  # the draws' order, whatever this version of transformers calls its layers
        name = entry[0].replace("attention.output.dense", "attention.o_proj")
        return re.sub(r"attention\.attention\.([kqv])[a-z]+", r"attention.\1_proj", name)

    for _, parameter in sorted(model.named_parameters(), key=newest_name):
        parameter.data = (0.2 if parameter.dim() > 1 else 1.0) * torch.randn(parameter.shape, generator=generator)
    return model


def removal(name):
    """(result, holes) of three frames: a hole that moves, with noise in it."""
    height, width = {"pieces": (150, 200), "large": (120, 90), "edges": (90, 100)}[name]
    frames, holes = moving_video(3, height, width)[0], np.zeros((3, height, width), np.uint8)
    for t in range(3):
        if name == "large":  # wider than the square around it may be, with windows that lie in it
            holes[t, 10 + t : -10, 5:-5] = 255
        elif name == "pieces":  # with a smaller one, and one too small to count
            holes[t, 40:90, 10 + 3 * t : 60 + 3 * t] = holes[t, -30:-5, -50 - t : -20] = holes[t, 3:6, 100:104] = 255
    if name == "edges":  # two that touch at a corner, in squares of 55; then windows in which 5 patches are hole
        holes[0, 12:45, 20:53] = holes[0, 45:78, 53:86] = holes[1, 26:30, 41:46] = holes[2, 27:31, 39:44] = 255
    frames[holes > 0] = np.random.default_rng(5).integers(0, 256, (np.count_nonzero(holes), 3))
    return frames, holes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random weights of all three, as users have them."""
    root = tmp_path_factory.mktemp("networks")
    random_dinov2().save_pretrained(root / "dinov2")
    lpips, clip = lpips_weights(root / "lpips"), clip_weights(root / "clip")
    return {"lpips_weights": lpips, "clip_weights": clip, "dinov2_weights": root / "dinov2"}


@pytest.fixture(scope="module", params=DEVICES)
def networks(folders, request):
    return load_networks(SimpleNamespace(**folders), request.param)


@pytest.mark.parametrize("size", LPIPS)
def test_lpips_is_that_of_the_package(networks, size):
    truth, result, hole = two_frames(*size)
    whole, local = networks[0].compare(truth, result)
    assert whole == pytest.approx(LPIPS[size][0], abs=2e-7) and local.shape == size
    assert local[hole > 0].mean() == pytest.approx(LPIPS[size][1], abs=2e-7)


def test_lpips_of_a_video(networks):
    """The mean over the frames that have a hole; nothing without a truth, and no frames that AlexNet cannot see."""
    truth, result, hole = (np.stack([part] * 3) for part in two_frames(33, 47))
    hole[1], result[1] = 0, 0
    found = Reference(truth, hole, networks=networks[:1]).score(result)
    assert [found["lpips"], found["lpips_hole"]] == pytest.approx(LPIPS[33, 47], abs=2e-7)
    assert Reference(truth, hole, networks=networks[:1]).score(truth)["lpips"] == 0
    assert np.isnan(Reference(None, hole, truth, networks[:1]).score(result)["lpips"])
    with pytest.raises(InputError, match="frames of 47x30 are too small for LPIPS: 31x31"):
        Reference(truth[:, :30], hole[:, :30], networks=networks[:1]).score(result[:, :30])


@pytest.mark.parametrize("size", [(240, 432), (300, 200), (224, 224), (101, 77)])
def test_tc_is_that_of_transformers(networks, folders, size):
    """Its own model, with text and all, on a CPU, and its own preparation of pictures."""
    network, model = networks[1], CLIPModel.from_pretrained(folders["clip_weights"])
    frames = np.random.default_rng(2).integers(0, 256, (3, *size, 3)).astype(np.uint8)
    pixels = CLIPImageProcessorPil()(list(frames), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels).pooler_output
    cosines = torch.cosine_similarity(features[1:], features[:-1]).tolist()
    assert [row["tc"] for row in network.score(None, frames)] == pytest.approx(cosines, abs=1e-6)
    assert max(cosines) < 0.9999 and network.score(None, frames[:1]) == []


@pytest.mark.parametrize("name", RC)
def test_rc_is_that_of_its_authors(networks, name):
    frames, holes = removal(name)
    found = networks[2].score(Reference(None, holes, frames), frames)
    assert [row["rc_s"] for row in found if "rc_s" in row] == pytest.approx(RC[name][0], abs=1e-6)
    assert [row["rc_t"] for row in found if "rc_t" in row] == pytest.approx(RC[name][1], abs=1e-6)
    means = Reference(None, holes, frames, networks[2:]).score(frames)
    assert means["rc_s"] == pytest.approx(np.mean(RC[name][0]), abs=1e-6)


def test_rc_t_of_frames_that_share_no_hole(networks):
    frames, holes = removal("pieces")
    holes[0], holes[1], holes[2, :, :40] = 0, 0, 255
    assert [np.isnan(networks[2].temporal(frames[t : t + 2], holes[t : t + 2])) for t in (0, 1)] == [True, True]
    assert np.isnan(networks[2].spatial(frames[0], np.full_like(holes[0], 255)))  # nothing to compare with


def test_mmd_by_its_definition():
    """Of a Gaussian kernel with a standard deviation of 10, in thousandths, every member compared with itself too."""
    features = torch.nn.functional.normalize(torch.randn(9, 4, dtype=torch.float64), dim=1)
    one, other = np.array([0, 3, 4]), np.array([1, 2, 5, 8])

    def mean(a, b):
        return np.mean([np.exp(-float((features[i] - features[j]).square().sum()) / 200) for i in a for j in b])

    expected = 1000 * (mean(one, one) + mean(other, other) - 2 * mean(one, other))
    assert discrepancy(features, [(one, other)]) == pytest.approx(expected, abs=1e-9)
    assert discrepancy(features, [(one, one), (one, other)]) == pytest.approx(expected / 2, abs=1e-9)


@pytest.mark.parametrize(
    ("box", "expected"),
    [((40, 40, 30, 20), (30, 25, 80, 75)), ((2, 40, 30, 20), (0, 33, 34, 67)), ((0, 0, 95, 90), (0, 0, 90, 90)),
     ((10, 10, 1, 1), (10, 10, 11, 11)), ((70, 5, 30, 20), (70, 0, 100, 30))]
)  # fmt: skip
def test_square_around_a_hole(box, expected):
    """A third of its side more on all sides, or as much as the nearest border leaves to all of them."""
    rows, columns = square_around(box, 90, 100)
    assert (columns.start, rows.start, columns.stop, rows.stop) == expected


def test_rounding_of_the_square_is_the_published_one():
    assert [side for side in range(1, 112) if resized(side) != 448] == [55, 71, 83, 95, 97, 107, 110, 111]


def test_pictures_are_normalised_as_dinov2s():
    picture = np.array([[[124, 116, 104], [0, 255, 0]]], np.uint8)
    grey, green = normalize(picture, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "cpu")[0, :, 0].T
    assert grey.abs().max() < 0.02 and green.tolist() == pytest.approx([-2.1179, 2.4286, -1.8044], abs=1e-4)


def test_background_is_of_known_pixels_before_pasting():
    """What stands in the hole does not matter, neither in the frame that was shown nor in the result."""
    frames, holes = moving_video(3, 80, 100)
    raw = np.where(holes[..., None] > 0, 9, np.clip(frames.astype(int) + 4, 0, 255)).astype(np.uint8)
    another = np.where(holes[..., None] > 0, 200, frames).astype(np.uint8)
    found = Reference(None, holes, frames).score(frames, raw)
    assert found["psnr_background"] == pytest.approx(20 * np.log10(255 / 4), abs=0.05)
    assert 0.9 < found["ssim_background"] < 1 and np.isnan(found["psnr"]) and np.isnan(found["warp"])
    assert Reference(None, holes, another).score(frames, raw) == pytest.approx(found, nan_ok=True)
    same = Reference(None, holes, frames).score(frames, another)
    assert same["psnr_background"] == np.inf and same["ssim_background"] == 1
    behind = Reference(raw, holes, frames).score(frames, raw)  # a truth that differs from what was shown
    assert behind["psnr_background"] == np.inf
    assert "psnr_background" not in Reference(frames, holes).score(frames)


@pytest.fixture
def backends():
    """Those that may take TF32, which is allowed."""
    both = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in both]
    for backend in both:
        backend.allow_tf32 = True
    yield both
    for backend, value in zip(both, before, strict=True):
        backend.allow_tf32 = value


def test_networks_score_without_tf32(networks, backends, monkeypatch):
    """Convolutions have it by default, matrix products with --allow_tf32; afterwards both are as before."""
    seen = []

    def forward(*args, **kwargs):
        seen.extend(backend.allow_tf32 for backend in backends)
        raise InterruptedError

    frame = np.zeros((40, 40, 3), np.uint8)
    i3d = I3D()
    for model, call in {
        networks[0]: lambda: networks[0].compare(frame, frame),
        networks[1].model: lambda: networks[1].describe(frame),
        networks[2].model: lambda: networks[2].describe(frame),
        i3d: lambda: i3d.describe(np.stack([frame] * 16), "a video"),
    }.items():
        monkeypatch.setattr(model, "forward", forward)
        with pytest.raises(InterruptedError):
            call()
    assert seen == [False] * 8 and all(backend.allow_tf32 for backend in backends)


def test_flags_and_columns(folders, networks):
    """A network adds its in the order of SCORES; what was not named is said in one line."""
    parser = Parser()
    add_network_flags(parser.add_argument)
    args = parser.parse_args([f"--clip_weights={folders['clip_weights']}"])
    assert [network.columns for network in load_networks(args, "cpu")] == [("tc",)]
    said = missing_networks(args)
    assert said.endswith("LPIPS and LPIPS hole (--lpips_weights), RC-S and RC-T (--dinov2_weights)")
    assert missing_networks(SimpleNamespace(**folders)) == "" and load_networks(SimpleNamespace()) == []
    frames, holes = moving_video(2, 40, 48)
    names = list(Reference(frames, holes, networks=networks).score(frames, frames))
    assert names == list(SCORES)
    by_networks = ("lpips", "lpips_hole", "tc", "rc_s", "rc_t")
    assert list(Reference(frames, holes).score(frames, frames)) == [name for name in SCORES if name not in by_networks]


@pytest.mark.parametrize("flag", SOURCES)
def test_wrong_weights_are_named_in_a_line(folders, tmp_path, capsys, flag):
    """Nothing there, another network's, a file that is cut short."""
    others = {"lpips_weights": "clip_weights", "clip_weights": "dinov2_weights", "dinov2_weights": "clip_weights"}
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folders[flag].iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 999 if path.suffix != ".json" else None])
    main = one_line_errors(lambda path: load_networks(SimpleNamespace(**{flag: path})))
    for path in (tmp_path / "nothing", folders[others[flag]], broken):
        error = error_line(capsys, main, str(path))
        assert str(path) in error and f"--{flag} needs" in error


def test_a_key_too_few_or_of_another_shape(folders, tmp_path, capsys):
    weights = lpips_weights(tmp_path / "lpips")
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, weights / "alex.pth")
    main = one_line_errors(load_lpips)
    assert "lin1.model.1.weight (and 3 more) is missing, not (1, 192, 1, 1)" in error_line(capsys, main, weights)
    (weights / "alex.pth").unlink()
    assert "has no alex.pth" in error_line(capsys, main, weights)
    for file in folders["dinov2_weights"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in tensors.items() if key != "layernorm.bias"}, tmp_path / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert "lacks layernorm.bias (1 in all)" in error_line(capsys, one_line_errors(load_dinov2), str(tmp_path))
