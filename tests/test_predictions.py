"""Files of predictions: what is written is read, and two files are compared question by question."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mcd_edu.data import MUSIC_AVQA, DataError, Schema
from mcd_edu.datasets import load_splits
from mcd_edu.evaluation import compare, predict, score
from mcd_edu.inference import clue_maps
from mcd_edu.model import MCD, MCDConfig
from mcd_edu.predictions import answer_lines, read_lines, read_pair, read_predictions, write_predictions
from mcd_edu.training import ask, make_toy_set


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy_set(folder, num_train=4, num_val=2, num_test=7, per_video=5)
    return load_splits(folder)["test"]


def make(data, seed=0, **options):
    torch.manual_seed(seed)
    model = MCD(MCDConfig(len(data.vocabulary), visual_dim=data.visual.shape[-1],
                          audio_dim=data.audio.shape[-1], embed_dim=16, num_heads=2, **options))
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def written(data, tmp_path_factory):
    return write_predictions(tmp_path_factory.mktemp("out") / "a.jsonl", make(data), data)


def test_every_question_has_its_line(data, written):
    lines = read_lines(written)
    assert [line["id"] for line in lines] == sorted(q.question_id for q in data.questions)
    questions = {q.question_id: q for q in data.questions}
    for line in lines:
        question = questions[line["id"]]
        assert (line["gold"], line["video"]) == (question.answer, question.video_id)
        assert tuple(line["type"]) == question.question_type and line["dataset"] == "music_avqa"


def test_a_line_against_the_model(data, written):
    model, lines = make(data), {line["id"]: line for line in read_lines(written)}
    for batch in data.batches(1):  # another batch size: the answers do not depend on it
        with torch.inference_mode(): answer = ask(model, batch, need_clues=True)
        for k in range(batch.tokens.shape[1]):
            line, chances = lines[int(batch.question_ids[0, k])], answer.logits[0, k].softmax(-1)
            assert line["prediction"] == data.schema.answers[int(chances.argmax())]
            for name, chance in line["probabilities"].items():
                assert chance == pytest.approx(float(chances[data.schema.answers.index(name)]), abs=1e-4)
            assert 1 - sum(line["probabilities"].values()) < 42 * 1e-3
            maps = clue_maps(answer.clues[:, k][0][None], batch.tokens[:, k] != 0)[0]
            for key, clues in zip(("looks_at", "listens_to"), maps):
                assert set(np.argsort(-clues.numpy())[:3]) == set(line[key])


def test_reading_gives_the_predictions_of_the_model(data, written):
    again, direct = read_predictions(written), predict(make(data), data)
    assert again.schema.name == "music_avqa" and again.schema.question_types == MUSIC_AVQA.question_types
    for name in ("right", "types", "question_ids"):
        assert np.array_equal(getattr(again, name), getattr(direct, name))
    assert score(again, 50) == score(direct, 50)


def test_compare_is_that_of_the_models(data, written, tmp_path):
    other = make(data, seed=1)
    path = write_predictions(tmp_path / "b.jsonl", other, data)
    one, two = read_pair(written, path)
    assert (one.predicted != two.predicted).any()
    direct = predict(make(data), data), predict(other, data)
    assert np.array_equal(one.predicted == two.predicted, direct[0].predicted == direct[1].predicted)
    assert np.array_equal(one.right, direct[0].right) and np.array_equal(two.right, direct[1].right)
    assert compare(one, two, 100) == compare(*direct, 100)


def test_candidates_are_written_in_words(data, tmp_path):
    questions = [replace(q, choices=(q.answer, "nothing", "everything", "perhaps")) for q in data.questions]
    schema = Schema("four", (), MUSIC_AVQA.question_types, 4)
    four = object.__new__(type(data))
    four.__dict__ |= {**data.__dict__, "questions": questions, "schema": schema,
                      "choices": torch.stack([data.encode(q.choices, 4) for q in questions]),
                      "answers": torch.zeros(len(data), dtype=torch.long)}
    model = make(data, num_choices=4)
    for line in answer_lines(model, four):
        assert line["prediction"] in line["probabilities"] and line["gold"] in line["probabilities"]
        assert len(line["probabilities"]) <= 4
    path = write_predictions(tmp_path / "four.jsonl", model, four)
    assert np.array_equal(read_predictions(path).right, predict(model, four).right)


def test_nothing_half_written_stays(data, tmp_path):
    broken = make(data)
    broken.config = replace(broken.config, visual_dim=3)
    with pytest.raises(ValueError, match="visual features"):
        write_predictions(tmp_path / "a.jsonl", broken, data)
    assert not list(tmp_path.iterdir())


LINE = {"dataset": "x", "id": 1, "video": "v", "type": ["a", "b"], "gold": "yes", "prediction": "no"}


@pytest.mark.parametrize("lines, message", [
    ([], "holds no predictions"), ([LINE, LINE], "line 2 is no prediction.*an id twice"),
    ([{**LINE, "id": "1"}], "line 1"), ([{**LINE, "id": True}], "line 1"), ([[1]], "line 1"),
    ([{**LINE, "type": "ab"}], "line 1"), ([{**LINE, "type": ["a"]}], "line 1"),
    ([{**LINE, "gold": None}], "line 1"), ([{k: v for k, v in LINE.items() if k != "gold"}], "'gold'")])
def test_files_that_are_none(tmp_path, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(DataError, match=message) as caught: read_predictions(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_absent_cut_and_other_files(written, tmp_path):
    with pytest.raises(DataError, match="no such file.*evaluate"): read_predictions(tmp_path / "p")
    cut = tmp_path / "cut.jsonl"
    cut.write_text(written.read_text()[:-9])
    with pytest.raises(DataError, match="JSONDecodeError"): read_predictions(cut)
    cut.write_text("\n".join(written.read_text().splitlines()[1:]))
    with pytest.raises(DataError, match="not the same questions"): read_pair(written, cut)


def test_types_of_another_dataset_are_refused_by_a_schema(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(LINE))
    assert read_predictions(path).schema.question_types == (("a", "b"),)
    with pytest.raises(DataError, match="none of music_avqa"): read_predictions(path, MUSIC_AVQA)


def test_a_sign_that_other_programs_take_for_the_end_of_a_line(tmp_path):
    line = {"dataset": "avqa", "id": 1, "video": "a", "type": ["Sound", "Why"], "gold": "a\u2028b\u0085c", "prediction": "x"}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert [one["gold"] for one in read_lines(path)] == ["a\u2028b\u0085c"]


def test_nothing_but_predictions_is_overwritten(tmp_path, data):
    model, path = make(data), tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(DataError, match="choose another name"): write_predictions(path, model, data)
    assert path.read_text() == "my notes"
    path.write_text("")
    first = write_predictions(path, model, data).read_text()
    assert first and write_predictions(path, model, data).read_text() == first
