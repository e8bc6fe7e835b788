import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from mdm_models.evaluation import clip_score
from mdm_models.evaluation.clip_score import ClipScore
from tests.evaluation.conftest import noise
from tests.text.directories import save_open_clip

CPU = torch.device("cpu")
CAPTIONS = ["a red fox", "a penguin on ice", "a fox"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[open_clip.CLIP, str]:
    """A tiny CLIP for images of 8² and the directory that it is saved in."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    return save_open_clip(folder), str(folder)


def cosines(model: open_clip.CLIP, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Written out with open_clip alone: (N,) of images (N, 3, H, W) uint8."""
    prepare = image_transform(8, is_train=False)
    pixels = torch.stack([prepare(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        seen = model.encode_image(pixels)
        read = model.encode_text(open_clip.SimpleTokenizer()(captions, 12))
    return (seen * read).sum(dim=1) / (seen.norm(dim=1) * read.norm(dim=1))


def test_the_score_is_100_times_the_mean_cosine(saved):
    model, folder = saved
    images = noise(3, 20)
    score = ClipScore(folder, CPU)
    score.add(images[:2], CAPTIONS[:2])
    score.add(images[2:], CAPTIONS[2:])
    assert score.compute() == pytest.approx(100 * cosines(model, images, CAPTIONS).mean().item(), rel=1e-5)


def test_a_clip_scores_the_mean_over_its_frames(saved):
    model, folder = saved
    clips = noise(2, 8, frames=3)
    score = ClipScore(folder, CPU)
    score.add(clips, CAPTIONS[:2])
    by_frame = [cosines(model, clips[:, :, t], CAPTIONS[:2]).mean().item() for t in range(3)]
    assert score.compute() == pytest.approx(100 * sum(by_frame) / 3, rel=1e-5)


def test_the_model_sees_many_frames_at_once(saved, monkeypatch):
    model, folder = saved
    clips, seen = noise(3, 8, frames=3), []
    score = ClipScore(folder, CPU)
    encode = score._model.encode_image
    monkeypatch.setattr(clip_score, "BATCH", 4)
    monkeypatch.setattr(score._model, "encode_image", lambda x, **k: seen.append(len(x)) or encode(x, **k))
    score.add(clips, CAPTIONS)
    assert seen == [4, 4, 1]
    by_frame = [cosines(model, clips[:, :, t], CAPTIONS).mean().item() for t in range(3)]
    assert score.compute() == pytest.approx(100 * sum(by_frame) / 3, rel=1e-5)


def test_a_score_begins_anew_after_it_was_computed(saved):
    score = ClipScore(saved[1], CPU)
    images = noise(2, 8)
    score.add(images[:1], CAPTIONS[:1])
    first = score.compute()
    score.add(images[1:], CAPTIONS[1:2])
    assert score.compute() != first
    score.add(images[:1], CAPTIONS[:1])
    score.add(images[:0], [])
    assert score.compute() == first


def test_a_long_caption_is_cut(saved):
    score = ClipScore(saved[1], CPU)
    score.add(noise(1, 8), ["a fox " * 100])
    assert -100 <= score.compute() <= 100


@pytest.mark.parametrize("content", [[], ["open_clip_config.json"]])
def test_a_directory_without_a_model_is_refused(tmp_path, content):
    for name in content:
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"CLIP model {tmp_path}"):
        ClipScore(str(tmp_path), CPU)
