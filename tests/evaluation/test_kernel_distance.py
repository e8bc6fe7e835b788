"""Distances by kernels, against their definitions."""

import itertools

import numpy as np
import pytest
import torch

from mdm_models.evaluation.comparison import Comparison
from mdm_models.evaluation.frechet import FrechetDistance
from mdm_models.evaluation.kernel_distance import KernelDistance, cmmd, kid
from tests.evaluation.conftest import noise

CPU = torch.device("cpu")


def features(count: int, shift: float = 0.0, width: int = 5) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)) + shift


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    x, y = features(6), features(7, shift=1.0)[:6]

    def mean(pairs) -> float:
        return np.mean([(float(a @ b) / 5 + 1) ** 3 for a, b in pairs])

    expected = mean(itertools.permutations(x, 2)) + mean(itertools.permutations(y, 2))
    expected -= 2 * mean(itertools.product(x, y))
    assert kid(x, y) == pytest.approx(expected, rel=1e-4)


def test_kid_of_one_distribution_is_0_on_average_however_few_samples_there_are():
    draw = torch.Generator().manual_seed(0)
    found = [kid(*torch.randn(2, 8, 5, generator=draw)) for _ in range(60)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_cmmd_is_a_thousand_times_the_mmd_of_a_gaussian_kernel():
    x, y = (torch.nn.functional.normalize(features(count, shift), dim=1) for count, shift in ((4, 0.0), (6, 1.0)))

    def mean(a, b) -> float:
        return np.mean([np.exp(-float(((p - q) ** 2).sum()) / 200) for p, q in itertools.product(a, b)])

    expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    assert cmmd(x, y) == pytest.approx(expected, rel=1e-3)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def with_kernel(colours) -> Comparison:
    return Comparison(FrechetDistance(colours, False, CPU), None, KernelDistance(colours, False, CPU))


def test_a_kept_reference_gives_the_same_distances(colours, tmp_path):
    path, real, sampled = tmp_path / "real.npz", noise(8), noise(7) // 2
    first = with_kernel(colours)
    first.add(real, sampled, [""] * 8)
    expected = first.results()
    first.save_reference(path, is_main=True)
    later = with_kernel(colours)
    later.load_reference(path, is_main=True)
    later.add(noise(7), sampled, [""] * 7)
    assert later.results() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "real.npz have no features, of which kid_colours is made; delete the file"),
        ({"features": np.zeros((4, 2), np.float32)}, r"features has shape \(4, 2\); it must be \(N, 3\)"),
    ],
)
def test_a_reference_without_features_that_fit_is_refused(colours, tmp_path, content, message):
    np.savez(tmp_path / "real.npz", mu=np.zeros(3), sigma=np.eye(3), **content)
    with pytest.raises(ValueError, match=message):
        with_kernel(colours).load_reference(tmp_path / "real.npz", is_main=True)


def test_it_is_of_the_same_features_as_the_frechet_distance_and_forgets_what_was_sampled(colours):
    comparison = with_kernel(colours)
    real, sampled = noise(8), noise(8) // 2
    comparison.add(real, sampled, [""] * 8)
    first = comparison.results()
    assert list(first) == ["frechet_colours", "kid_colours"]
    assert first["kid_colours"] == pytest.approx(kid(colours(real), colours(sampled)), rel=1e-6)
    comparison.add(real, sampled, [""] * 8)
    assert comparison.results() == pytest.approx(first)
