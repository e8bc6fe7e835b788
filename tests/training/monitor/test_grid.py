import torch
from PIL import Image

from mdm_models.training.monitor.grid import save_grid


def test_the_grid_is_animated_frame_by_frame(tmp_path):
    clips = torch.linspace(-1, 1, 4).view(1, 1, 4, 1, 1).expand(2, 3, 4, 16, 16)
    save_grid(tmp_path / "grid.webp", {"real": clips, "sampled": -clips}, ["a cat", "a long caption " * 20], 8.0)
    with Image.open(tmp_path / "grid.webp") as image:
        assert image.n_frames == 4
        greys = []
        for t in range(4):
            image.seek(t)
            frame = image.convert("L")
            greys.append((frame.getpixel((100, 50)), frame.getpixel((100, 200))))
    expected = [(0, 255), (85, 170), (170, 85), (255, 0)]
    assert all(
        abs(a - b) < 12 for grey, wanted in zip(greys, expected, strict=True) for a, b in zip(grey, wanted, strict=True)
    )


def test_images_make_a_still(tmp_path):
    save_grid(tmp_path / "grid.webp", {"real": torch.zeros(3, 3, 1, 64, 64)}, ["a", "b", "c"], 8.0)
    with Image.open(tmp_path / "grid.webp") as image:
        assert image.n_frames == 1
