import pytest
import torch

from mdm_models.evaluation.retrieval import nearest, share_right


def test_the_nearest_is_that_of_the_smallest_angle_about_the_gallerys_mean():
    gallery = torch.tensor([[11.0, 10.0], [9.0, 10.0], [10.0, 11.0], [10.0, 9.0]])  # about (10, 10)
    queries = torch.tensor([[30.0, 11.0], [10.0, -5.0]])  # far along the first axis; back along the second
    assert nearest(queries, gallery)[:, 0].tolist() == [0, 3]
    assert nearest(queries, gallery)[:, -1].tolist() == [1, 2]


def test_without_the_mean_what_all_have_in_common_decides_nothing():
    torch.manual_seed(0)
    gallery = torch.randn(20, 8)
    queries, right = gallery + 0.1 * torch.randn(20, 8), torch.arange(20)
    assert share_right(queries + 1000, gallery + 1000, right) == share_right(queries, gallery, right) == 1


def test_the_share_counts_right_answers_among_the_nearest():
    gallery = torch.eye(4)
    queries = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0.9, 1, 0], [1, 0, 0, 0.9]])
    assert share_right(queries, gallery, torch.arange(4)) == pytest.approx(3 / 4)
    assert share_right(queries, gallery, torch.arange(4), among=2) == 1


def test_pictures_that_have_nothing_to_do_with_each_other_are_right_by_chance():
    torch.manual_seed(0)
    share = share_right(torch.randn(1000, 16), torch.randn(10, 16), torch.randint(10, (1000,)))
    assert share == pytest.approx(0.1, abs=3 * (0.1 * 0.9 / 1000) ** 0.5)


@pytest.mark.parametrize("right", [torch.tensor([0]), torch.tensor([0, 4]), torch.tensor([0, -1])])
def test_answers_that_are_not_in_the_gallery_are_refused(right):
    with pytest.raises(ValueError, match="right"):
        share_right(torch.eye(4)[:2], torch.eye(4), right)
