"""Question types are predicted from words of train alone; text objects are a column that can be exchanged."""

from dataclasses import replace

import pytest
import torch

from mcd_edu.data import AVQADataset, text_objects
from mcd_edu.datasets import load_splits
from mcd_edu.question_types import TYPES, bag_of_words, fit_types, predict_types, show_objects
from mcd_edu.training import make_toy_set


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy_set(folder, num_train=40, num_val=4, num_test=12)
    return load_splits(folder)


def test_a_bag_forgets_order_count_and_padding():
    assert bag_of_words(torch.tensor([[3, 1, 3, 0], [0, 0, 0, 0]]), 5).tolist() == [[0, 1, 0, 1, 0], [0] * 5]


def test_types_are_found_and_nothing_but_train_is_learned_from(splits):
    found = predict_types(splits)
    assert (found["test"] == splits["test"].types).float().mean() > .9
    other = AVQADataset.__new__(AVQADataset)
    other.__dict__ = {**splits["test"].__dict__, "types": torch.zeros_like(splits["test"].types)}
    assert (predict_types({**splits, "test": other})["test"] == found["test"]).all()
    torch.manual_seed(1)
    first = torch.rand(2)
    torch.manual_seed(1)
    predict_types(splits)
    assert torch.equal(first, torch.rand(2))


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("keywords", [False, True])
def test_objects_are_those_of_the_questions(splits, keywords, types):
    shown, found = show_objects(splits, keywords, types), predict_types(splits)
    test, names = shown["test"], splits["test"].schema.question_types
    for q, number, row in zip(test.questions, found["test"].tolist(), test.objects):
        told = q if types != "predicted" else replace(q, question_type=names[number])
        text = " ".join(text_objects(told, keywords, types != "none"))
        assert row.tolist() == test.encode([text], 8)[0].tolist()
    assert test.objects.shape == splits["test"].objects.shape and (test.types == splits["test"].types).all()
    usual = show_objects(splits)["test"].objects
    assert torch.equal(usual, splits["test"].objects)


def test_wrong_input(splits):
    with pytest.raises(ValueError, match="none, annotated, predicted"):
        show_objects(splits, types="guessed")
    with pytest.raises(ValueError, match="no questions"):
        fit_types(torch.zeros(0, 2).long(), torch.zeros(0).long(), 3, 2)
