import pytest
import torch

from mdm_models.text import ClassLabels, load_text_encoder


@pytest.fixture
def animals(tmp_path):
    (tmp_path / "animals.txt").write_text("tench\ngoldfish\ncrane\ncrane\n")
    return load_text_encoder(tmp_path / "animals.txt")


def test_a_number_is_a_one_hot_token():
    labels = ClassLabels(1000)
    features, mask = labels(["207", "0"])
    assert features.shape == (2, 1, 1000)
    assert features.argmax(dim=-1).tolist() == [[207], [0]]
    assert features.sum(dim=-1).tolist() == [[1], [1]]
    assert mask.tolist() == [[True], [True]]
    assert (labels.width, labels.max_tokens) == (1000, 1)


def test_the_empty_prompt_is_no_class():
    features, mask = ClassLabels(10)([""])
    assert (features == 0).all()
    assert mask.all()


def test_names_come_from_a_file_with_one_a_line(animals):
    features, _ = animals(["Goldfish", "tench", "3"])
    assert features.argmax(dim=-1).tolist() == [[1], [0], [3]]
    assert animals.width == 4


def test_numbered_classes_need_no_file():
    labels = load_text_encoder("classes:10")
    assert labels.width == 10
    assert labels(["7"])[0].argmax() == 7


@pytest.mark.parametrize("classes", ["classes:", "classes:0", "classes:many"])
def test_a_number_of_classes_that_is_none_is_refused(classes):
    with pytest.raises(ValueError, match="classes:1000"):
        load_text_encoder(classes)


def test_a_name_that_two_classes_have_means_the_first(animals):
    assert animals.number("crane") == 2


def test_a_number_is_that_of_the_class_where_names_are_numbers_too():
    """As of folders called so, which data number in the order of their names: KEY.cls is 1 of what lies in 10."""
    labels = ClassLabels(["1", "10", "2"])
    assert [labels.number(prompt) for prompt in ("0", "1", "2", "10")] == [0, 1, 2, 1]


def test_blank_lines_at_the_end_are_no_classes(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n\n \0\n")
    assert load_text_encoder(tmp_path / "names.txt").numbers == {"cat": 0, "dog": 1}


def test_a_blank_line_between_names_is_refused(tmp_path):
    (tmp_path / "names.txt").write_text("cat\n\ndog\n")
    with pytest.raises(ValueError, match=r"names.txt: class 1 of 3 has no name"):
        load_text_encoder(tmp_path / "names.txt")


@pytest.mark.parametrize("within", ["\u2028", "\x85", "\x0b", "\x0c"])
def test_only_line_breaks_end_a_name(tmp_path, within):
    (tmp_path / "names.txt").write_text(f"ca{within}t\r\ndog\rcow\n", newline="")
    assert load_text_encoder(tmp_path / "names.txt").numbers == {f"ca{within}t": 0, "dog": 1, "cow": 2}


def test_dtype_is_as_wanted():
    features, _ = ClassLabels(10, dtype=torch.bfloat16)(["1"])
    assert features.dtype == torch.bfloat16


def test_a_misspelt_name_is_refused_with_the_nearest_one(animals):
    with pytest.raises(ValueError, match="did you mean 'goldfish'"):
        animals(["goldfisch"])


def test_an_unknown_name_is_refused_with_what_is_known(animals):
    with pytest.raises(ValueError, match="a number from 0 to 3 or by its name"):
        animals(["violin"])


@pytest.mark.parametrize("prompt", ["10", "-1", "²", "1.5"])
def test_a_number_out_of_range_is_refused(prompt):
    with pytest.raises(ValueError, match="from 0 to 9"):
        ClassLabels(10)([prompt])


def test_no_classes_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        ClassLabels(0)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"model.pth.*name of a class on each line"):
        load_text_encoder(tmp_path / "model.pth")
