"""VFID: the network against the published layout and figures of the original's code, the distance against closed
forms, and eval_DiffuEraser.py with random I3D weights."""

import csv
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DATA, DEVICES

import eval_DiffuEraser
from libs.comparison import scoring
from libs.comparison.methods import Method
from libs.comparison.videos import find_videos, read_restoration
from libs.evaluation.baselines import BASELINES
from libs.evaluation.vfid import I3D, frechet_distance, load_i3d, max_pool, same_padding
from libs.inference.composition import paste

LAYOUT = json.loads((DATA / "published_layout/pytorch-i3d/keys.json").read_text())
# Of the InceptionI3d of pytorch-i3d with the weights and videos below, in training mode and double precision, its
# Mixed_5c averaged as ProPainter's core/metrics.py does: seven of the features, and the sum of all.
CHANNELS = [0, 383, 384, 767, 768, 895, 896]
ORIGINAL = {
    (9, 33, 47): ([0.43752, 0.297128, 0.436125, 0.461451, 0.515199, 0.442391, 0.199699], 405.519819),
    (20, 48, 64): ([0.381854, 0.356406, 0.432888, 0.453365, 0.434839, 0.403588, 0.516429], 457.455128),
}


def weights_by_formula():
    generator, state_dict = torch.Generator().manual_seed(0), {}
    for key in sorted(LAYOUT):
        values = torch.randn(LAYOUT[key], generator=generator)
        if values.dim() > 1:
            state_dict[key] = values * (2 / values[0].numel()) ** 0.5
        else:
            state_dict[key] = 1 + 0.1 * values.abs() if key.endswith(("weight", "var")) else 0.1 * values
    return state_dict


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory):
    """Random weights as the published file is: without batch norm's counters, not zipped."""
    path = tmp_path_factory.mktemp("i3d") / "i3d_rgb_imagenet.pt"
    torch.save(weights_by_formula(), path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture(scope="module")
def i3d(i3d_file):
    return load_i3d(i3d_file).cpu()


@pytest.fixture(scope="module")
def precise():
    """In double precision: a few pixels normalised by themselves lose digits."""
    model = I3D()
    model.load_state_dict(weights_by_formula(), strict=False)
    return model.double()


def features_of(model, *videos):
    batch = torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).double() / 255
    with torch.no_grad():
        return model(batch).numpy()


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    return {
        size: torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy() for size in ORIGINAL
    }


def test_layout_is_the_published_one():
    shapes = {key: list(value.shape) for key, value in I3D().state_dict().items() if "num_batches" not in key}
    assert shapes == LAYOUT and len(LAYOUT) == 287
    assert LAYOUT["Conv3d_1a_7x7.conv3d.weight"] == [64, 3, 7, 7, 7]
    assert LAYOUT["Mixed_4e.b2b.conv3d.weight"] == [64, 32, 3, 3, 3]
    assert LAYOUT["logits.conv3d.weight"] == [400, 1024, 1, 1, 1]
    assert sum(parameter.numel() for parameter in I3D().parameters()) == 12_697_264


@pytest.mark.parametrize("size", ORIGINAL)
@pytest.mark.parametrize("device", DEVICES)
def test_features_are_the_originals(i3d, precise, clips, size, device):
    feature, (some, total) = features_of(precise, clips[size])[0], ORIGINAL[size]
    assert np.allclose(feature[CHANNELS], some, rtol=0, atol=1e-6) and feature.sum() == pytest.approx(total, abs=1e-5)
    described = i3d.to(device).describe(clips[size], "clip")
    i3d.cpu()
    assert described.shape == (1024,) and np.abs(described - feature).mean() < 1e-4


def test_a_video_is_described_by_itself(i3d, precise, clips):
    """Whatever else is in the batch, and whatever went through before."""
    frames = clips[20, 48, 64]
    alone, together = features_of(precise, frames), features_of(precise, frames, 255 - frames // 2, frames[::-1])
    assert np.allclose(together[0], alone[0], rtol=0, atol=1e-9)
    assert np.abs(together[2] - alone[0]).max() > 0.01  # time has a direction
    assert np.array_equal(i3d.describe(frames, "clip"), i3d.describe(frames, "clip"))


@pytest.mark.parametrize(
    ("side", "window", "stride", "expected"), [(224, 7, 2, (2, 3)), (33, 7, 2, (3, 3)), (10, 3, 2, (0, 1)),
    (5, 3, 2, (1, 1)), (7, 2, 2, (0, 1)), (8, 2, 2, (0, 0)), (6, 3, 1, (1, 1)), (1, 7, 2, (3, 3)), (9, 1, 2, (0, 0))]
)  # fmt: skip
def test_same_padding(side, window, stride, expected):
    assert same_padding(side, window, stride) == expected


@pytest.mark.parametrize("window", [1, 2, 3, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_same_padding_is_the_least_that_does(window, stride):
    """As many windows as strides begin in the side, and with one zero less there would be fewer."""
    for side in range(1, 40):
        before, after = same_padding(side, window, stride)
        windows = len(range(0, side, stride))
        assert len(range(0, side + before + after - window + 1, stride)) == windows
        assert before + after == 0 or len(range(0, side + before + after - window, stride)) < windows
        assert after - before in (0, 1)


def test_max_pool_by_loops():
    """Windows laid over the unpadded values: what lies outside does not count."""
    x = np.random.default_rng(0).random((5, 6, 7)).astype(np.float32)
    found = max_pool(torch.from_numpy(x)[None, None], (3, 3, 3), (2, 2, 2))[0, 0].numpy()
    # An odd side has a zero on both ends, an even one only after.
    starts = [[(max(i, 0), i + 3) for i in begins] for begins in (range(-1, 5, 2), range(0, 6, 2), range(-1, 7, 2))]
    expected = [x[t0:t1, y0:y1, z0:z1].max() for (t0, t1), (y0, y1), (z0, z1) in product(*starts)]
    assert found.shape == (3, 3, 4) and found.ravel().tolist() == expected


def samples(n, mean, deviation, seed):
    """(n, d) features of exactly that mean and of covariance diag(deviation²)."""
    values = np.random.default_rng(seed).standard_normal((n, len(mean)))
    orthonormal, _ = np.linalg.qr(values - values.mean(axis=0))
    return mean + orthonormal * np.sqrt(n - 1) * deviation


def test_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    (m1, m2), (s1, s2) = rng.random((2, 6)), rng.random((2, 6))
    first, second = samples(30, m1, s1, 1), samples(20, m2, s2, 2)
    assert np.allclose(np.cov(first, rowvar=False), np.diag(s1**2))
    expected = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(first, first + 3) == pytest.approx(6 * 9, rel=1e-10)


@pytest.mark.parametrize(("n", "d"), [(40, 8), (5, 60)])
def test_distance_by_eigenvalues(n, d):
    """The trace of the root of C1 C2 is the sum of the roots of its eigenvalues, also where the rank is n - 1 < d."""
    rng = np.random.default_rng(n)
    first, second = rng.standard_normal((n, d)) @ rng.standard_normal((d, d)), rng.standard_normal((n, d))
    c1, c2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(c1 @ c2).real.clip(0))
    shift = first.mean(axis=0) - second.mean(axis=0)
    expected = shift @ shift + np.trace(c1) + np.trace(c2) - 2 * roots.sum()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_distance_of_a_set_and_itself_is_zero():
    features = list(np.random.default_rng(0).random((5, 1024), np.float32))
    assert frechet_distance(features, features) < 1e-10
    assert frechet_distance(features, features[::-1]) < 1e-10
    assert frechet_distance(features, [feature + 0.01 for feature in features]) == pytest.approx(0.1024, rel=1e-3)


def read_means(folder):
    with open(folder / "means.csv", newline="") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def test_eval(weights, videos, i3d_file, i3d, tmp_path, capsys):
    """The column and means.csv: zero for the truth, the same for a folder and itself, and what the parts give."""
    arguments = [
        f"--frames={videos / 'DAVIS/JPEGImages/480p'}", "--videos", "buoy", "lantern", "--size=48x32",
        f"--i3d_weights={i3d_file}", f"--output_dir={tmp_path}", "--rivals", "telea", "--num_inference_steps=1",
        f"--base_model_name_or_path={weights / 'stable-diffusion-v1-5'}", f"--vae_path={weights / 'sd-vae-ft-mse'}",
        f"--weights={weights / 'diffuEraser'}", f"--baseline={weights / 'diffuEraser'}",
    ]  # fmt: skip
    eval_DiffuEraser.main(arguments)
    lines, means = capsys.readouterr().out.splitlines(), read_means(tmp_path)
    assert "VFID is of 2 videos: compare it with that of as many only" in lines
    head = next(i for i, line in enumerate(lines) if "PSNR" in line)
    shown = {line[:20].split()[0]: line.split()[-1] for line in lines[head + 1 : head + 6]}
    assert lines[head].split()[-1] == "VFID" and shown["the"] == "0.000" and shown["difference"] == "0.000"
    assert shown["telea"] == f"{float(means['telea']['vfid']):.3f}"
    model = weights / "diffuEraser"
    assert float(means[str(model)]["vfid"]) == float(means[f"baseline {model}"]["vfid"]) > 1e-3  # noise in the holes
    assert means["telea"]["videos"] == "2" and means["telea"]["frames"] == "52"
    assert "vfid" not in (tmp_path / "scores.csv").read_text()
    assert "VFID" in (tmp_path / "report.html").read_text()

    args = eval_DiffuEraser.build_parser().parse_args(arguments)
    eval_DiffuEraser.split_mask_span(args)
    features = []
    for number, folder in enumerate(find_videos(args)):
        frames, holes, *_ = read_restoration(folder, number, args.seed, args)
        filled = paste(frames, BASELINES["telea"](frames, holes), holes)
        features.append([i3d.describe(video, folder.name) for video in (frames, filled)])
    expected = frechet_distance(*zip(*features, strict=True))
    assert expected > 1e-4 and float(means["telea"]["vfid"]) == pytest.approx(expected, rel=1e-3)


def test_eval_without_i3d_weights(videos, tmp_path, capsys):
    eval_DiffuEraser.main([f"--frames={videos / 'DAVIS/JPEGImages/480p'}", "--videos", "buoy", "--size=32x32",
                           "--rivals", "mean-colour", "--no_model", f"--output_dir={tmp_path}"])  # fmt: skip
    assert "VFID" not in capsys.readouterr().out
    row = read_means(tmp_path)["mean-colour"]
    assert "vfid" not in row and row["videos"] == "1" and float(row["psnr"]) > 0


def small(changes):
    """A state dict of the published layout with changes (None: left out); zeros that take no room in a file."""
    shapes = {key: shape for key, shape in {**LAYOUT, **changes}.items() if shape is not None}
    return {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}


WRONG_FILES = {
    "missing": (None, "cannot be read (No such file or directory)"),
    "folder": (Path.mkdir, "cannot be read (Is a directory)"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 20), "is no file of tensors"),
    "cut": (None, "is no file of tensors or is cut short"),
    "object": (lambda path: torch.save(Path("x"), path), "is no file of tensors"),
    "tensor": (lambda path: torch.save(torch.zeros(3), path), "Conv3d_1a_7x7.bn.bias (and 286 more) is missing"),
    "wrapped": (lambda path: torch.save({"state_dict": small({}), 0: 1}, path), "is (), not there"),
    "flow": (lambda path: torch.save(small({"Conv3d_1a_7x7.conv3d.weight": [64, 2, 7, 7, 7]}), path),
             "Conv3d_1a_7x7.conv3d.weight is (64, 2, 7, 7, 7), not (64, 3, 7, 7, 7)"),
    "charades": (lambda path: torch.save(small({"logits.conv3d.weight": [157, 1024, 1, 1, 1],
                                                "logits.conv3d.bias": [157]}), path),
                 "logits.conv3d.bias (and 1 more) is (157,), not (400,)"),
    "incomplete": (lambda path: torch.save(small({"Mixed_5c.b3b.bn.weight": None}), path),
                   "Mixed_5c.b3b.bn.weight is missing, not (128,)"),
    "surplus": (lambda path: torch.save(small({"Mixed_6a.b0.bn.weight": [4]}), path),
                "Mixed_6a.b0.bn.weight is (4,), not there"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_one_line_before_anything_else(videos, i3d_file, tmp_path, capsys, monkeypatch, case):
    path = tmp_path / "i3d.pt"
    make, expected = WRONG_FILES[case]
    if case == "cut":
        path.write_bytes(i3d_file.read_bytes()[: 2 * 2**20])
    elif make:
        make(path)
    monkeypatch.setattr(Method, "load", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(scoring, "score_jobs", lambda *_: pytest.fail("too late"))
    with pytest.raises(SystemExit) as stop:
        eval_DiffuEraser.main([f"--frames={videos / 'DAVIS/JPEGImages/480p'}", f"--i3d_weights={path}",
                               f"--output_dir={tmp_path / 'out'}"])  # fmt: skip
    errors = capsys.readouterr().err.strip().splitlines()
    assert (
        stop.value.code == 1 and len(errors) == 1 and errors[0].startswith(f"error: {path}") and expected in errors[0]
    )
    assert "--i3d_weights needs the state dict i3d_rgb_imagenet.pt" in errors[0]


def test_copies_that_were_saved_again_load(i3d, clips, tmp_path):
    """Zipped, in half precision, with batch norm's counters."""
    model = I3D()
    model.load_state_dict(i3d.state_dict(), strict=False)
    torch.save(model.half().state_dict(), tmp_path / "copy.pt")
    feature = load_i3d(tmp_path / "copy.pt").cpu().describe(clips[9, 33, 47], "clip")
    assert feature.dtype == np.float32 and np.abs(feature - i3d.describe(clips[9, 33, 47], "clip")).max() < 0.1


def test_one_video_is_no_set(videos, i3d_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        eval_DiffuEraser.main([f"--frames={videos / 'DAVIS/JPEGImages/480p'}", "--videos", "buoy", "--no_model",
                               f"--i3d_weights={i3d_file}", f"--output_dir={tmp_path}"])  # fmt: skip
    assert "VFID needs two videos or more" in capsys.readouterr().err


def test_videos_of_no_size_for_i3d(i3d, monkeypatch):
    with pytest.raises(ValueError, match="tiny: 8 frames of 32x20 are one pixel to I3D"):
        i3d.describe(np.zeros((8, 20, 32, 3), np.uint8), "tiny")
    assert i3d.describe(np.zeros((8, 20, 33, 3), np.uint8), "wide").shape == (1024,)

    def run_out_of_memory(videos):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(i3d, "forward", run_out_of_memory)
    with pytest.raises(ValueError, match="huge: 9 frames of 40x20 need more GPU memory for VFID: lower --size"):
        i3d.describe(np.zeros((9, 20, 40, 3), np.uint8), "huge")
