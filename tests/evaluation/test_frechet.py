import math

import numpy as np
import pytest
import torch

from mdm_models.evaluation.frechet import ClipFeatures, FrechetDistance
from tests.evaluation.conftest import distance, noise

CPU = torch.device("cpu")


def colour_images(means: torch.Tensor) -> torch.Tensor:
    """(N, 3) colours 0…255 → plain images of them."""
    return means.round().clamp(0, 255).byte()[:, :, None, None].expand(-1, -1, 4, 4)


def test_a_shift_and_a_scale_have_the_closed_form(colours):
    """Σ (m − m')² + (s − s')² where the covariances commute: for s' = 2s the second term is the real variance."""
    real = colour_images(torch.randn(500, 3) * torch.tensor([3.0, 5, 8]) + 100).float()
    sampled = (real - 100) * 2 + 130
    measured = FrechetDistance(colours, is_video=False, device=CPU)
    measured.add_real(real.byte())
    measured.add_sampled(sampled.byte())
    flat = real[:, :, 0, 0].double()
    expected = ((flat.mean(0) * 2 - 70 - flat.mean(0)) ** 2).sum() + flat.var(0).sum()
    assert measured.compute() == pytest.approx(expected.item(), rel=1e-6)


def test_features_of_correlated_images_give_what_the_definition_gives(colours):
    real, sampled = noise(40), noise(30)
    measured = FrechetDistance(colours, is_video=False, device=CPU)
    for part in real.split(7):
        measured.add_real(part)
    for part in sampled.split(11):
        measured.add_sampled(part)
    assert measured.compute() == pytest.approx(distance(colours(real).numpy(), colours(sampled).numpy()), rel=1e-5)


def test_what_is_real_stays_and_what_was_sampled_goes(colours):
    measured = FrechetDistance(colours, is_video=False, device=CPU)
    measured.add_real(noise(10))
    sampled = noise(10)
    measured.add_sampled(sampled)
    first = measured.compute()
    measured.add_sampled(sampled)
    assert measured.compute() == first


def test_a_saved_reference_gives_the_same_distance(colours, tmp_path):
    path, real, sampled = tmp_path / "real.npz", noise(12), noise(10)
    measured = FrechetDistance(colours, is_video=False, device=CPU)
    measured.add_real(real)
    measured.save_reference(path, is_main=True)
    measured.add_sampled(sampled)
    expected = measured.compute()
    later = FrechetDistance(colours, is_video=False, device=CPU)
    later.load_reference(path, is_main=True)
    assert later.has_reference
    later.add_sampled(sampled)
    assert later.compute() == pytest.approx(expected, rel=1e-9)


def test_a_reference_has_the_mean_and_covariance_that_other_tools_read(colours, tmp_path):
    real = noise(12)
    measured = FrechetDistance(colours, is_video=False, device=CPU)
    measured.add_real(real)
    measured.save_reference(tmp_path / "real.npz", is_main=True)
    with np.load(tmp_path / "real.npz") as saved:
        mean, covariance = saved["mu"], saved["sigma"]
    features = colours(real).double().numpy()
    np.testing.assert_allclose(mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mu": np.zeros(3)}, "sigma"),
        ({"mu": np.zeros(2), "sigma": np.eye(2)}, r"frechet_colours needs \(3,\) and \(3, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "metric": "fid"}, "are those of fid; here it is frechet_colours"),
    ],
)
def test_a_reference_that_does_not_fit_is_refused(colours, tmp_path, content, message):
    np.savez(tmp_path / "real.npz", **content)
    with pytest.raises(ValueError, match=message):
        FrechetDistance(colours, is_video=False, device=CPU).load_reference(tmp_path / "real.npz", is_main=True)


def test_a_reference_that_is_no_archive_is_refused(colours, tmp_path):
    (tmp_path / "real.npz").write_text("not numbers")
    with pytest.raises(ValueError, match=r"real.npz: not an .npz with mu and sigma"):
        FrechetDistance(colours, is_video=False, device=CPU).load_reference(tmp_path / "real.npz", is_main=True)


def test_a_clips_features_are_the_mean_over_frames_and_the_mean_change(colours):
    clips = noise(2, frames=3)
    features = ClipFeatures(colours)(clips)
    frames = clips.float().mean(dim=(3, 4))  # (2, 3, T)
    torch.testing.assert_close(features[:, :3], frames.mean(dim=2))
    change = (frames[:, :, 1] - frames[:, :, 0]).abs() + (frames[:, :, 2] - frames[:, :, 1]).abs()
    torch.testing.assert_close(features[:, 3:], change / 2)


def test_clips_of_shuffled_frames_are_far_from_the_originals(colours):
    brightness = torch.arange(8) * 30
    clips = (brightness[None, None, :, None, None] + torch.randint(10, (20, 3, 1, 4, 4))).byte()
    measured = FrechetDistance(colours, is_video=True, device=CPU)
    measured.add_real(clips)
    measured.add_sampled(clips)
    assert measured.compute() == pytest.approx(0, abs=1e-6)
    measured.add_sampled(clips[:, :, [0, 7, 1, 6, 2, 5, 3, 4]])
    assert measured.compute() > 1000


def test_the_distance_is_named_after_the_network(colours):
    assert FrechetDistance(colours, is_video=False, device=CPU).name == "frechet_colours"
    assert FrechetDistance(colours, is_video=True, device=CPU).name == "frechet_video_colours"


def test_no_images_change_nothing(colours):
    measured = FrechetDistance(colours, is_video=False, device=CPU)
    measured.add_real(noise(4))
    measured.add_sampled(noise(4))
    measured.add_sampled(noise(0))
    assert math.isfinite(measured.compute())
