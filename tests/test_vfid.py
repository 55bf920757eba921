"""VFID: the network against the published layout and figures of the original's code, the distance against closed
forms."""

import json
from itertools import product

import numpy as np
import pytest
import torch
from conftest import DATA

from libs.vfid import I3D, frechet_distance, load_i3d, max_pool, same_padding

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
def test_features_are_the_originals(i3d, precise, clips, size):
    feature, (some, total) = features_of(precise, clips[size])[0], ORIGINAL[size]
    assert np.allclose(feature[CHANNELS], some, rtol=0, atol=1e-6) and feature.sum() == pytest.approx(total, abs=1e-5)
    described = i3d.describe(clips[size], "clip")
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
