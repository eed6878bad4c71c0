"""Reading annotations and features, good and bad, and batches in which every video stands once."""

import json
import os
import warnings
from collections import Counter
from dataclasses import fields
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.data import (
    ANSWERS,
    QUESTION_TYPES,
    AVQADataset,
    Question,
    Vocabulary,
    fill_placeholders,
    group_by_video,
    parse_question,
    read_annotations,
    text_objects,
    tokenize,
    trim,
)
from mcd_edu.features import DataError

RECORD = {
    "video_id": "00000001", "question_id": 7, "type": '["Audio-Visual", "Location"]',
    "question_content": "What is the <LR> instrument of the <FL> sounding instrument？ ",
    "templ_values": '["left", "first"]', "question_deleted": 0, "anser": "cello"}


def write(path, records, **options):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8", **options)
    return path


# Annotations -----------------------------------------------------------------------------------

def test_record_is_read():
    assert parse_question(RECORD) == Question(
        7, "00000001", "What is the left instrument of the first sounding instrument？",
        ("Audio-Visual", "Location"), ("left", "first"), "cello")


def test_answers_and_types():
    assert len(ANSWERS) == len(set(ANSWERS)) == 42
    assert len(QUESTION_TYPES) == len(set(QUESTION_TYPES)) == 9
    assert {"more than ten", "acoustic_guitar", "ten", "simultaneously"} <= set(ANSWERS)
    assert (ANSWERS[0], ANSWERS[7], ANSWERS[41]) == ("two", "yes", "suona")


@pytest.mark.parametrize("change", [
    {}, {"question_id": 7.0}, {"question_id": "7"}, {"extra": [1, 2]}, {"question_deleted": None},
    {"type": ["Audio-Visual", "Location"]}, {"templ_values": ["left", "first"]}])
def test_forms_of_later_editions(tmp_path, change):
    question, = read_annotations(write(tmp_path / "a.json", [RECORD | change]))
    assert question == parse_question(RECORD)


def test_missing_id_becomes_the_place_and_missing_values_none(tmp_path):
    bare = {"video_id": "v", "type": '["Visual", "Location"]', "anser": "indoor",
            "question_content": "Where is the performance?", "question_id": None}
    absent = {key: value for key, value in bare.items() if key != "question_id"}
    records = [bare, absent | {"templ_values": None}, absent | {"templ_values": "[]"}]
    questions = read_annotations(write(tmp_path / "a.json", records))
    assert [q.question_id for q in questions] == [0, 1, 2]
    assert {q.values for q in questions} == {()}


def test_large_ids_stay_exact(tmp_path):
    question, = read_annotations(write(tmp_path / "a.json", [RECORD | {"question_id": 2**59 + 1}]))
    assert question.question_id == 2**59 + 1


def test_byte_order_mark_does_no_harm(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([RECORD]), encoding="utf-8-sig")
    assert len(read_annotations(path)) == 1


def test_no_records(tmp_path):
    assert read_annotations(write(tmp_path / "a.json", [])) == []


BAD = [
    ({"anser": "kazoo"}, "unknown answer 'kazoo'"), ({"anser": ["yes"]}, "unknown answer"),
    ({"anser": "Yes"}, "unknown answer"), ({"anser": None}, "has no 'anser'"),
    ({"video_id": "../secret"}, "not a plain file name"),
    ({"video_id": "a/b"}, "not a plain"), ({"video_id": "a\\b"}, "not a plain"),
    ({"video_id": ""}, "not a plain"), ({"video_id": "a.b"}, "not a plain"),
    ({"video_id": "a\n"}, "not a plain"), ({"video_id": "a b"}, "not a plain"),
    ({"video_id": ["a"]}, "not a plain"), ({"video_id": None}, "has no 'video_id'"),
    ({"question_id": 7.5}, "not a whole number"), ({"question_id": "seven"}, "not a whole number"),
    ({"question_id": True}, "not a whole number"), ({"question_id": -1}, "not a whole number"),
    ({"question_id": 10**30}, "not a whole number"),
    ({"question_id": float("nan")}, "not a whole number"),
    ({"question_id": float("inf")}, "not a whole number"),
    ({"type": '["Smell", "Counting"]'}, "unknown question type"),
    ({"type": '["Counting"]'}, "unknown question type"), ({"type": "Counting"}, "record 0: "),
    ({"type": '"Counting"'}, "not a list of words"), ({"type": "null"}, "not a list of words"),
    ({"type": "[[1]]"}, "not a list of words"), ({"type": 3}, "not a list of words"),
    ({"templ_values": "[]"}, "2 placeholders for 0 values"),
    ({"templ_values": '["left", "first", "violin"]'}, "2 placeholders for 3 values"),
    ({"templ_values": '["left", "<FL>"]'}, "still has a placeholder"),
    ({"templ_values": '["left", 1]'}, "not a list of words"),
    ({"templ_values": '"ab"'}, "not a list of words"), ({"templ_values": "[oops"}, "record 0: "),
    ({"question_content": "Is the < Object_1> there?", "templ_values": "[]"}, "1 placeholders"),
    ({"question_content": None}, "has no 'question_content'")]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_record_is_an_error_that_names_it(tmp_path, change, message):
    path = write(tmp_path / "a.json", [RECORD | change])
    with pytest.raises(DataError) as caught:
        read_annotations(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: record 0") and message in text and "skip_bad" in text
    assert "\n" not in text


@pytest.mark.parametrize("record", [None, 3, "text", [], [RECORD]])
def test_record_that_is_none(tmp_path, record):
    with pytest.raises(DataError, match="record 1: is not a record"):
        read_annotations(write(tmp_path / "a.json", [RECORD, record]))


def test_duplicate_id_is_an_error(tmp_path):
    path = write(tmp_path / "a.json", [RECORD, RECORD | {"anser": "violin"}])
    with pytest.raises(DataError, match="record 1: question_id 7 was there before"):
        read_annotations(path)
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        assert [q.answer for q in read_annotations(path, skip_bad=True)] == ["cello"]


def test_bad_records_can_be_skipped_and_are_counted(tmp_path):
    good = [RECORD | {"question_id": 100 + i} for i in range(3)]
    path = write(tmp_path / "a.json", [*(RECORD | change for change, _ in BAD), 3, *good])
    with pytest.warns(UserWarning) as caught:
        questions = read_annotations(path, skip_bad=True)
    assert [q.question_id for q in questions] == [100, 101, 102]
    assert f"skipped {len(BAD) + 1} of {len(BAD) + 4} records; record 0: " in str(caught[0].message)
    assert Path(caught[0].filename).name == "test_data.py"  # the warning points at the caller


def test_nothing_to_skip_gives_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_annotations(write(tmp_path / "a.json", [RECORD]), skip_bad=True)


@pytest.mark.parametrize("content, message", [
    (b"", "not JSON"), (b"{", "not JSON"), (b"\xff\xfe\x00", "not JSON"),
    (b"[" * 100_000, "not JSON"), (b"{}", "list of records"), (b'"text"', "list of records")])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_file_that_is_no_annotation(tmp_path, content, message, skip_bad):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=f"a.json: .*{message}"):
        read_annotations(tmp_path / "a.json", skip_bad)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_absent_annotations(tmp_path, name):
    with pytest.raises(DataError, match="no such annotation file"):
        read_annotations(tmp_path / name)


words = st.text("abcdefgh_", min_size=1, max_size=8)


@given(st.lists(st.tuples(words, words)), words)
def test_placeholders_are_filled_in_order(pairs, end):
    text = "".join(f"{before} <Object> " for before, _ in pairs) + end
    expected = "".join(f"{before} {value} " for before, value in pairs) + end
    assert fill_placeholders(text, [value for _, value in pairs]) == expected.strip()


REAL = os.environ.get("MUSIC_AVQA")


@pytest.mark.skipif(not REAL, reason="MUSIC_AVQA names no folder with avqa-val.json")
def test_real_annotations():
    found = [path for path in (Path(REAL) / "avqa-val.json", Path(REAL) / "json" / "avqa-val.json")
             if path.is_file()]
    if not found:
        pytest.skip("there is no avqa-val.json in the folder")
    questions = read_annotations(found[0])
    forms = {record["question_content"] for record in json.loads(found[0].read_text("utf-8"))}
    assert len(questions) == 4568 and len(forms) == 33
    assert {q.question_type for q in questions} == set(QUESTION_TYPES)
    assert {q.answer for q in questions} == set(ANSWERS) - {"ten"}
    assert not any("<" in q.text or q.text != q.text.strip() for q in questions)
    assert max(len(tokenize(q.text)) for q in questions) <= 20
    assert 80 <= len(Vocabulary.build(questions)) <= 110


# Words -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("How many sounding flute in the video？ ", "how many sounding flute in the video"),
    ("Is there a ACOUSTIC_guitar sound?", "is there a acoustic_guitar sound"),
    ("Audio-Visual", "audio visual"), ("¿Dónde está el violín?", "dónde está el violín"),
    ("  ", ""), ("…？！", ""), ("", "")])
def test_tokenize(text, expected):
    assert tokenize(text) == expected.split()


@given(st.text())
def test_tokenize_never_fails(text):
    found = tokenize(text)
    assert all(word and not any(c.isspace() for c in word) for word in found)
    numbers = Vocabulary(["violin"]).encode(found, 20)
    assert len(numbers) == 20 and set(numbers) <= {0, 1, 2}


@given(st.lists(words), st.lists(words), st.integers(0, 12))
def test_vocabulary_against_a_loop(known, asked, length):
    vocabulary = Vocabulary(known)
    expected = []
    for i in range(length):
        if i >= len(asked):
            expected.append(0)
        elif asked[i] in known:
            expected.append(2 + sorted(set(known)).index(asked[i]))
        else:
            expected.append(1)
    assert vocabulary.encode(asked, length) == expected
    assert len(vocabulary) == 2 + len(set(known)) == len(vocabulary.words)


def test_vocabulary_has_words_of_questions_and_objects():
    question = parse_question(RECORD)
    vocabulary = Vocabulary.build([question])
    for word in (*tokenize(question.text), "audio", "visual", "location"):
        assert vocabulary.index[word] > 1
    assert vocabulary.words[:2] == ["<pad>", "<unknown>"]


def test_text_objects():
    question = parse_question(RECORD)
    assert text_objects(question) == ["left", "first", "Audio", "Visual", "Location"]
    assert text_objects(question, types=False) == ["left", "first"]
    assert text_objects(question, keywords=False) == ["Audio", "Visual", "Location"]
    assert text_objects(question, False, False) == []


@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5))
def test_trim_cuts_shared_padding_only(rows):
    length, longest = 6, max(1, *map(len, rows), 1)
    padded = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    assert trim(padded).tolist() == [row + [0] * (longest - len(row)) for row in rows]


# Data sets -------------------------------------------------------------------------------------

def make_questions(counts):
    """`counts[i]` questions on video i; every question and answer differs from its neighbour."""
    numbered = [i for i, count in enumerate(counts) for _ in range(count)]
    return [Question(100 + n, f"video_{i}", f"question {'x ' * (n % 5)}{n}",
                     QUESTION_TYPES[n % 9], ("violin",) * (n % 3), ANSWERS[n % 42])
            for n, i in enumerate(numbered)]


def make_data(folder, counts, segments=None, **options):
    """A data set whose features hold the video's number."""
    for kind, dim in ("visual", 4), ("audio", 3):
        (folder / kind).mkdir(exist_ok=True)
        for i in range(len(counts)):
            t = segments[i] if segments else 5
            np.save(folder / kind / f"video_{i}.npy", np.full((t, dim), i, np.float32))
    questions = make_questions(counts)
    return AVQADataset(questions, folder / "visual", folder / "audio",
                       Vocabulary.build(questions), **options)


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path, [3, 1, 6, 2], segments=[5, 3, 5, 4])


def parts(batch):
    return {field.name: getattr(batch, field.name) for field in fields(batch) if field.name != "choices"}


def test_shapes_and_types_of_a_batch(data):
    batch, = data.batches(num_videos=9)
    shapes = {name: tuple(part.shape) for name, part in parts(batch).items()}
    assert shapes == {
        "visual": (4, 5, 4), "audio": (4, 5, 3), "mask": (4, 5), "tokens": (4, 6, 6),
        "objects": (4, 6, 2), "answers": (4, 6), "types": (4, 6), "question_mask": (4, 6),
        "video_ids": (4,), "question_ids": (4, 6)}
    assert batch.visual.dtype == batch.audio.dtype == torch.float32
    assert batch.mask.dtype == batch.question_mask.dtype == torch.bool
    assert batch.tokens.dtype == batch.answers.dtype == torch.int64
    assert len(data) == 12


def test_batch_against_a_loop(data):
    batch, = data.batches(num_videos=9)
    place = {question.question_id: question for question in data.questions}
    for b, video in enumerate(data.videos):
        mine = [q for q in data.questions if q.video_id == video]
        t = len(read_feature_of(data, video))
        assert batch.mask[b].tolist() == [i < t for i in range(5)]
        for k in range(batch.tokens.shape[1]):
            assert batch.question_mask[b, k] == (k < len(mine))
            question = mine[min(k, len(mine) - 1)]  # padding repeats the last
            assert batch.question_ids[b, k] == question.question_id
            assert place[int(batch.question_ids[b, k])] is question
            words = [data.vocabulary.words[n] for n in batch.tokens[b, k] if n]
            assert words == tokenize(question.text)
            objects = [data.vocabulary.words[n] for n in batch.objects[b, k] if n]
            assert objects == list(question.values)
            assert ANSWERS[batch.answers[b, k]] == question.answer
            assert QUESTION_TYPES[batch.types[b, k]] == question.question_type


def read_feature_of(data, video):
    return data.visual[data.videos.index(video)][data.mask[data.videos.index(video)]]


@given(counts=st.lists(st.integers(1, 20), min_size=1, max_size=8), num=st.integers(1, 20),
       seed=st.none() | st.integers(0, 2**32 - 1))
def test_groups_hold_every_question_once(counts, num, seed):
    video = np.repeat(np.arange(len(counts)), counts)
    video = np.random.default_rng(0).permutation(video)  # the file need not be sorted
    groups = group_by_video(video, num, seed)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(video)))
    assert all(1 <= len(group) <= num and len(set(video[group])) == 1 for group in groups)
    needed = Counter({i: -(-count // num) for i, count in enumerate(counts)})
    assert Counter(int(video[group[0]]) for group in groups) == needed  # as few as can be
    again = group_by_video(video, num, seed)
    assert [group.tolist() for group in groups] == [group.tolist() for group in again]


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=5), num_videos=st.integers(1, 9),
       num_questions=st.integers(1, 9), seed=st.none() | st.integers(0, 1000), together=st.integers(1, 3))
@settings(max_examples=30)
def test_every_question_once_an_epoch(tmp_path_factory, counts, num_videos, num_questions, seed, together):
    data = make_data(tmp_path_factory.mktemp("data"), counts)
    met = []
    for batch in data.batches(num_videos, num_questions, seed, together=together):
        assert batch.question_mask[:, 0].all() and len(batch.video_ids) <= num_videos
        assert batch.question_mask.shape[1] <= num_questions
        assert (batch.visual[:, 0, 0] == batch.video_ids).all()
        for b, k in batch.question_mask.nonzero().tolist():
            question = data.questions[int(batch.question_ids[b, k]) - 100]
            assert question.video_id == data.videos[batch.video_ids[b]]
            met.append(question.question_id)
    assert sorted(met) == [q.question_id for q in data.questions]


def test_groups_of_a_video_stay_side_by_side():
    video = np.repeat([0, 1, 2], [6, 3, 8])
    order = [int(video[group[0]]) for group in group_by_video(video, 1, 0, together=3)]
    blocks = [order[i:i + 3] for i in (0, 3, 6, 9, 12)]
    runs = [len(list(run)) for _, run in groupby(order)]
    assert Counter(order) == {0: 6, 1: 3, 2: 8} and min(runs) >= 2 and any(len({*block}) == 1 for block in blocks)
    plain = group_by_video(video, 2, 7)
    assert [group.tolist() for group in plain] == [group.tolist() for group in group_by_video(video, 2, 7, together=1)]


def same(first, second):
    return all(torch.equal(part, parts(second)[name]) for name, part in parts(first).items())


def test_a_seed_gives_the_same_batches_each_time(data):
    loader = data.batches(2, 2, seed=5)
    first, again = list(loader), list(loader)
    torch.manual_seed(99)  # the batches do not depend on the global state
    np.random.seed(99)
    other = list(data.batches(2, 2, seed=5))
    assert all(same(*pair) for pair in zip(first, again, strict=True))
    assert all(same(*pair) for pair in zip(first, other, strict=True))
    orders = {str([batch.question_ids.tolist() for batch in data.batches(2, 2, seed)])
              for seed in range(6)}
    assert len(orders) > 4


def test_without_a_seed_the_order_is_that_of_the_file(data):
    ids = [int(q) for batch in data.batches(2, 2)
           for q in batch.question_ids[batch.question_mask]]
    assert ids == list(range(100, 112))


def test_a_question_does_not_depend_on_its_batch(data):
    def rows(batches):
        found = {}
        for batch in batches:
            for b, k in batch.question_mask.nonzero().tolist():
                found[int(batch.question_ids[b, k])] = (
                    batch.visual[b], batch.audio[b], batch.mask[b], trim(batch.tokens[b, k]),
                    trim(batch.objects[b, k]), batch.answers[b, k], batch.types[b, k])
        return found

    alone, together = rows(data.batches(1, 1)), rows(data.batches(9, 9, seed=1))
    assert alone.keys() == together.keys()
    for number in alone:
        for one, other in zip(alone[number], together[number]):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("keywords, types, longest", [
    (True, False, 2), (False, True, 3), (True, True, 5), (False, False, 1)])
def test_text_objects_of_a_data_set(tmp_path, keywords, types, longest):
    data = make_data(tmp_path, [9], keywords=keywords, types=types)
    batch, = data.batches()
    assert batch.objects.shape[-1] == longest
    for k, question in enumerate(data.questions):
        expected = tokenize(" ".join(text_objects(question, keywords, types)))
        assert [data.vocabulary.words[n] for n in batch.objects[0, k] if n] == expected


def test_text_objects_of_several_words_are_known(tmp_path):
    question = Question(1, "video_0", "Is the acoustic guitar loud?", QUESTION_TYPES[0],
                        ("Acoustic Guitar",), "yes")
    make_data(tmp_path, [1])
    data = AVQADataset([question], tmp_path / "visual", tmp_path / "audio",
                       Vocabulary.build([question]))
    batch, = data.batches()
    assert [data.vocabulary.words[n] for n in batch.objects[0, 0]] == ["acoustic", "guitar"]


def test_long_questions_are_cut(tmp_path):
    data = make_data(tmp_path, [6], max_tokens=3)
    assert data.tokens.shape == (6, 3)


def test_batch_moves_to_a_device(data):
    batch, = data.batches(9)
    moved = batch.to("meta")
    assert all(part.device.type == "meta" for part in parts(moved).values())
    assert moved.choices is None


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (3, -1)])
def test_sizes_below_one_are_refused(data, sizes):
    with pytest.raises(ValueError):
        data.batches(*sizes)


def test_no_questions(tmp_path):
    with pytest.raises(DataError, match="no questions"):
        AVQADataset([], tmp_path, tmp_path, Vocabulary([]))


def test_different_numbers_of_segments_name_the_video(tmp_path):
    data = make_data(tmp_path, [1, 1, 1])
    np.save(tmp_path / "audio" / "video_1.npy", np.ones((4, 3)))
    with pytest.raises(DataError, match="video video_1 has 5 and 4 segments; extract both"):
        AVQADataset(data.questions, tmp_path / "visual", tmp_path / "audio", data.vocabulary)
