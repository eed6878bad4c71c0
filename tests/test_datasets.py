"""Four datasets in the folders of the real ones, good and bad: questions, answers, splits, batches."""

import json
import os
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mcd_edu.data import ANSWERS, MUSIC_AVQA, QUESTION_TYPES, DataError, Question, Schema, Vocabulary
from mcd_edu.datasets import (
    AVQA_TYPES,
    DATASETS,
    NO_ID,
    Naming,
    annotation_files,
    detect,
    frequent_answers,
    load_questions,
    load_splits,
    plain_name,
    read_mapping,
    schema_from_json,
    schema_to_json,
    split_by_video,
    whole_number,
)

RECORDS = {
    "music_avqa": {
        "video_id": "00000007", "question_id": 7, "type": '["Audio-Visual", "Location"]',
        "question_content": "What is the <LR> instrument of the <FL> sounding instrument？ ",
        "templ_values": '["left", "first"]', "question_deleted": 0, "anser": "cello"},
    "avqa": {
        "id": 7, "video_name": "-bcDEF_ghi-_000030", "video_id": 12, "answer": 1,
        "question_text": "What is the source of the sound in the video?",
        "multi_choice": ["violin", "cello ", "Tuba", "dog"], "question_relation": "Both",
        "question_type": "Come From"},
    "msvd_qa": {"answer": "cello", "id": 7, "question": "what is a man playing?", "video_id": 12},
    "msrvtt_qa": {"answer": "man", "category_id": 9, "id": 7, "question": "who plays a cello?",
                  "video_id": 12}}
NAMES = {"music_avqa": "{:08d}", "avqa": "clip_{}", "msvd_qa": "vid{}", "msrvtt_qa": "video{}"}
SIZES = {"train": range(8), "val": range(8, 11), "test": range(11, 14)}
ALL = pytest.mark.parametrize("name", DATASETS)


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def record_of(name, video, number):
    """A question on a video; answers, kinds and lengths differ from one to the next."""
    record = dict(RECORDS[name])
    if name == "music_avqa":
        return record | {"video_id": f"{video:08d}", "question_id": number,
                         "anser": ANSWERS[number % 42]}
    if name == "avqa":
        relation, kind = AVQA_TYPES[number % 24]
        return record | {"id": number, "video_name": f"clip_{video}", "video_id": video,
                         "answer": number % 4, "question_relation": relation, "question_type": kind}
    word = "what who how when where why".split()[number % 6]
    return record | {"id": number, "video_id": video, "question": f"{word} is it{' x' * (number % 3)}?",
                     "answer": f"word{number % 7}"}


def make(name, folder, per_video=3, named=None, dims=(4, 3)):
    """A folder as it would be downloaded; features hold the number of the video. No dims: none."""
    source = DATASETS[name]
    for split, file in source.files.items():
        videos = SIZES["test" if name == "avqa" and split == "test" else split]
        records = [record_of(name, video, 10 * video + i) for video in videos for i in range(per_video)]
        write(folder / source.folders[0] / file, records)
    for kind, dim in zip((source.visual[0], source.audio[0]), dims):
        (folder / "feats" / kind).mkdir(parents=True, exist_ok=True)
        for video in range(14):
            path = folder / "feats" / kind / f"{(named or NAMES[name]).format(video)}.npy"
            np.save(path, np.full((5, dim), video, np.float32))
    return folder


@pytest.fixture(params=DATASETS)
def made(request, tmp_path):
    return request.param, make(request.param, tmp_path / request.param)


def parse(name, naming=None, place=0, **change):
    record = {key: value for key, value in (RECORDS[name] | change).items() if value is not None}
    return DATASETS[name].parse(record, place, naming or Naming())


# Records ---------------------------------------------------------------------------------------

def test_the_same_moment_in_four_datasets():
    assert parse("music_avqa") == Question(
        7, "00000007", "What is the left instrument of the first sounding instrument？",
        ("Audio-Visual", "Location"), ("left", "first"), "cello")
    assert parse("avqa") == Question(
        7, "-bcDEF_ghi-_000030", "What is the source of the sound in the video?",
        ("Both", "Come From"), (), "cello", ("violin", "cello", "Tuba", "dog"))
    assert parse("msvd_qa") == Question(7, "vid12", "what is a man playing?", ("", "what"), (), "cello")
    assert parse("msrvtt_qa") == Question(7, "video12", "who plays a cello?", ("", "who"), (), "man")


@pytest.mark.parametrize("question, kind", [
    ("what's up?", "what"), ("Who is it", "who"), ("  HOW many?", "how"), ("when？", "when"),
    ("where", "where"), ("why is it?", "other"), ("whose dog is it?", "other"), ("is it?", "other")])
def test_kind_is_the_first_word(question, kind):
    assert parse("msvd_qa", question=question).question_type == ("", kind)


def test_kinds_of_avqa_are_three_times_eight():
    assert len(set(AVQA_TYPES)) == 24
    assert AVQA_TYPES[0] == ("Sound", "Which") and AVQA_TYPES[-1] == ("Both", "Used For")


@ALL
def test_every_row_is_complete(name):
    source = DATASETS[name]
    assert {"train", "test"} <= set(source.files) <= {"train", "val", "test"}
    assert set(source.keys) <= set(RECORDS[name])
    assert source.folders and source.visual and source.audio


def test_answers_of_words_are_brought_to_one_form():
    assert parse("msvd_qa", answer="  Polar  Bear ").answer == "polar bear"


@pytest.mark.parametrize("answer, right", [(0, "violin"), (3, "dog"), (2.0, "Tuba"), ("1", "cello")])
def test_the_right_choice_is_a_number(answer, right):
    assert parse("avqa", answer=answer).answer == right


BAD = {
    "music_avqa": [
        ({"anser": "kazoo"}, "unknown answer"), ({"anser": None}, "'anser'"),
        ({"video_id": "../secret"}, "not a plain"), ({"type": '["Smell", "Counting"]'}, "unknown"),
        ({"question_content": " ？"}, "has no words"), ({"question_content": 3}, "has no words"),
        ({"question_content": None}, "'question_content'"), ({"templ_values": '["left"]'}, "1 values"),
        ({"templ_values": "null", "question_content": "Is it?"}, "not a list of words"),
        ({"question_id": 7.5}, "whole number"), ({"question_id": "x"}, "whole number")],
    "avqa": [
        ({"multi_choice": ["a", "b", "c"]}, "no list of 4"), ({"multi_choice": list("abcde")}, "no list"),
        ({"multi_choice": "abcd"}, "no list"), ({"multi_choice": None}, "'multi_choice'"),
        ({"multi_choice": ["dog", "Dog ", "cat", "cow"]}, "a choice twice"),
        ({"multi_choice": ["dog", "", "cat", "cow"]}, "choice '' has no words"),
        ({"multi_choice": ["dog", None, "cat", "cow"]}, "choice None has no words"),
        ({"multi_choice": [1, 2, 3, 4]}, "choice 1 has no words"),
        ({"answer": 4}, "answer 4 is none of the choices 0 to 3"), ({"answer": -1}, "whole number"),
        ({"answer": 1.5}, "whole number"), ({"answer": "cello"}, "whole number"),
        ({"answer": True}, "whole number"), ({"answer": None}, "'answer'"),
        ({"question_relation": "Smell"}, "question_relation 'Smell'"),
        ({"question_relation": ["Both"]}, "question_relation"), ({"question_type": {}}, "question_type"),
        ({"question_type": "Whither"}, "question_type 'Whither'"), ({"question_type": None}, "'question_type'"),
        ({"question_text": "…"}, "has no words"), ({"question_text": None}, "'question_text'"),
        ({"video_name": "../../etc/passwd"}, "not a plain"), ({"video_name": "a.b"}, "not a plain"),
        ({"video_name": None}, "'video_name'"), ({"video_id": "../x"}, "not a plain"),
        ({"id": "seven"}, "whole number"), ({"id": -7}, "whole number")],
    "msvd_qa": [
        ({"question": ""}, "question '' has no words"), ({"question": None}, "'question'"),
        ({"answer": " "}, "answer ' ' has no words"), ({"answer": 3}, "answer 3 has no words"),
        ({"answer": None}, "'answer'"), ({"video_id": "../12"}, "not a plain"),
        ({"video_id": "a\n"}, "not a plain"), ({"video_id": True}, "not a plain"),
        ({"video_id": 1.5}, "not a plain"), ({"video_id": [1]}, "not a plain"),
        ({"video_id": None}, "'video_id'"), ({"id": 1.5}, "whole number"), ({"id": [1]}, "whole number")]}
BAD["msrvtt_qa"] = BAD["msvd_qa"]
EACH_BAD = [(name, change, message) for name, changes in BAD.items() for change, message in changes]


@pytest.mark.parametrize("name, change, message", EACH_BAD)
def test_bad_record_is_an_error_that_names_file_and_record(tmp_path, name, change, message):
    folder = make(name, tmp_path, per_video=1, dims=())
    path = annotation_files(folder, DATASETS[name])["train"]
    write(path, [*json.loads(path.read_text("utf-8")), RECORDS[name] | change])
    with pytest.raises(DataError) as caught:
        load_splits(folder, name)
    text = str(caught.value)
    assert text.startswith(f"{path}: record 8") and message in text and "skip_bad" in text
    assert "\n" not in text


@ALL
def test_bad_records_can_be_left_out_and_are_counted(tmp_path, name):
    folder = make(name, tmp_path, dims=())
    path = annotation_files(folder, DATASETS[name])["train"]
    bad = [RECORDS[name] | change for change, _ in BAD[name]]
    expected = load_questions(folder, name)
    write(path, [*bad, 3, None, *json.loads(path.read_text("utf-8"))])
    with pytest.warns(UserWarning, match=f"{path.name}: skipped {len(bad) + 2} of {len(bad) + 26} rec"):
        assert load_questions(folder, name, skip_bad=True) == expected


@ALL
def test_an_id_that_was_there_before(tmp_path, name):
    path = annotation_files(make(name, tmp_path, dims=()), DATASETS[name])["train"]
    write(path, [RECORDS[name], RECORDS[name]])
    with pytest.raises(DataError, match="record 1: question_id 7 was there before"):
        load_questions(tmp_path, name)


@ALL
@pytest.mark.parametrize("content, message", [
    (b"", "not JSON"), (b"<html>", "not JSON"), (b"[" * 100_000, "not JSON"),
    (b"{}", "list of records"), (b"\xff\xfe\x00", "not JSON")])
def test_file_that_is_no_annotation(tmp_path, name, content, message):
    path = annotation_files(make(name, tmp_path, dims=()), DATASETS[name])["train"]
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path.name}: .*{message}"):
        load_splits(tmp_path, name)
    with pytest.raises(DataError, match=f"{path.name}: .*{message}|no dataset there"):
        detect(tmp_path)


@ALL
@pytest.mark.parametrize("split", ["train", "test"])
def test_an_annotation_file_that_is_missing(tmp_path, name, split):
    path = annotation_files(make(name, tmp_path, dims=()), DATASETS[name])[split]
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name}: no such annotation file"):
        load_splits(tmp_path, name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("/"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2))


@given(st.data())
def test_any_value_gives_a_question_or_an_error_that_readers_expect(data):
    name = data.draw(st.sampled_from(list(DATASETS)))
    key = data.draw(st.sampled_from(sorted(RECORDS[name])))
    try:
        question = parse(name, **{key: data.draw(json_values)})
    except (KeyError, ValueError) as error:
        assert "\n" not in str(error)
    else:
        assert re.fullmatch(r"[\w-]+", question.video_id) and question.text.strip()
        assert question.question_type in DATASETS[name].question_types
        assert 0 <= question.question_id < 10**18


# MUSIC-AVQA and its later editions -------------------------------------------------------------

def test_music_avqa_is_read_as_before(tmp_path):
    splits = load_splits(make("music_avqa", tmp_path))
    assert splits["train"].schema is MUSIC_AVQA
    assert splits["train"].answers.tolist() == [q.question_id % 42 for q in splits["train"].questions]
    assert splits["train"].choices is None


@pytest.mark.parametrize("edition", ["json_update", "json_by_question"])
def test_label_editions_and_splits(tmp_path, edition):
    make("music_avqa", tmp_path)
    for split in SIZES:
        records = json.loads((tmp_path / "json" / f"avqa-{split}.json").read_text("utf-8"))
        write(tmp_path / edition / f"avqa-{split}.json", [r | {"anser": "suona"} for r in records])
    assert set(load_splits(tmp_path, annotations=edition)["test"].answers.tolist()) == {41}
    assert set(load_splits(tmp_path)["test"].answers.tolist()) != {41}


def test_new_questions_of_v2_have_no_id():
    old = [RECORDS["music_avqa"] | {"question_id": i} for i in (2, 0)]
    new = [{k: v for k, v in record.items() if k not in ("question_id", "question_deleted")}
           for record in old]
    ids = [DATASETS["music_avqa"].parse(record, i, Naming()).question_id
           for i, record in enumerate([*new, *old])]
    assert ids == [NO_ID, NO_ID + 1, 2, 0]  # by their places the second of the new would be 1, the first 0


@pytest.mark.parametrize("change", [
    {"question_id": 7.0}, {"extra": [1]}, {"question_deleted": None}, {"type": ["Audio-Visual", "Location"]},
    {"templ_values": ["left", "first"]}])
def test_irregular_records_of_later_editions(change):
    assert parse("music_avqa", **change) == parse("music_avqa")


def test_video_names_of_v2():
    assert parse("music_avqa", video_id="-hNci03mKAE_flip").video_id == "-hNci03mKAE_flip"


def test_rephrased_questions_of_r():
    text = "Does the Acoustic guitar, or the cello, play all the time?"
    question = parse("music_avqa", question_content=text,
                     templ_values='["acoustic_guitar", "cello", "leftest"]')
    assert question.text == text and question.values == ("acoustic_guitar", "cello")
    assert parse("music_avqa", question_content=text, templ_values=None).values == ()
    assert parse("music_avqa", question_content=text, templ_values="[]").values == ()


@pytest.mark.parametrize("file", ["avqa-test-tail.json", "../other/tail.json"])
def test_other_file_names(tmp_path, file):
    make("music_avqa", tmp_path)
    write(tmp_path / "json" / file, [record_of("music_avqa", 12, 5000)])
    splits = load_splits(tmp_path, files={"test": file})
    assert splits["test"].question_ids.tolist() == [5000] and len(splits["train"]) == 24
    with pytest.raises(DataError, match="'tail' is no split"):
        load_splits(tmp_path, files={"tail": file})


REAL = os.environ.get("MUSIC_AVQA")


@pytest.mark.skipif(not REAL, reason="MUSIC_AVQA names no folder with avqa-val.json")
def test_real_annotations_of_music_avqa():
    found = [path for path in (Path(REAL) / "json" / "avqa-val.json", Path(REAL) / "avqa-val.json")
             if path.is_file()]
    if not found:
        pytest.skip("there is no avqa-val.json in the folder")
    names = dict.fromkeys(("train", "val", "test"), str(found[0]))
    questions = load_questions(REAL, "music_avqa", files=names)["val"]
    forms = {record["question_content"] for record in json.loads(found[0].read_text("utf-8"))}
    assert len(questions) == 4568 and len(forms) == 33
    assert {q.question_type for q in questions} == set(QUESTION_TYPES)
    assert all(MUSIC_AVQA.number(question) >= 0 for question in questions)
    assert not any("<" in q.text for q in questions)
    assert all(q.question_id < NO_ID for q in questions)


# Video names -----------------------------------------------------------------------------------

@pytest.mark.parametrize("there, mapping, expected", [
    ((), {}, "vid12"), (("12",), {}, "12"), (("vid12", "12"), {}, "vid12"),
    ((), {"vid12": "abc_0_9"}, "abc_0_9"), (("vid12",), {"vid12": "abc_0_9"}, "vid12"),
    (("abc_0_9", "12"), {"vid12": "abc_0_9"}, "abc_0_9"), ((), {"vid13": "abc_0_9"}, "vid12")])
def test_the_name_that_is_there_is_taken(there, mapping, expected):
    assert parse("msvd_qa", Naming(frozenset(there), mapping)).video_id == expected


@pytest.mark.parametrize("named", ["{}", None])
@ALL
def test_features_may_be_named_by_number(tmp_path, name, named):
    if name == "music_avqa" and named:
        pytest.skip("its videos have one name")
    splits = load_splits(make(name, tmp_path, named=named), name)
    for batch in splits["test"].batches(9):
        for b, video in enumerate(batch.video_ids):
            number = int(re.search("[0-9]+", splits["test"].videos[video])[0])
            assert (batch.visual[b] == number).all() and (batch.audio[b] == number).all()
            assert (batch.question_ids[b] // 10 == number).all()


def test_mapping_in_either_order(tmp_path):
    path = tmp_path / "youtube_mapping.txt"
    path.write_text("-4wsuPCjDBc_5_15 vid1\n\nvid2 -7KMZQEsJW4_205_208\r\n")
    assert read_mapping(path) == {"vid1": "-4wsuPCjDBc_5_15", "vid2": "-7KMZQEsJW4_205_208"}
    folder = make("msvd_qa", tmp_path / "data")
    (folder / "youtube_mapping.txt").write_text("-4wsuPCjDBc_5_15 vid11\n")
    for kind in "appearance", "motion":
        feats = folder / "feats" / kind
        (feats / "vid11.npy").rename(feats / "-4wsuPCjDBc_5_15.npy")
    assert "-4wsuPCjDBc_5_15" in load_splits(folder, "msvd_qa")["test"].videos


@pytest.mark.parametrize("line", ["vid1", "a b c", "abc def", "vid1 x\nvid1 y"])
def test_broken_mapping(tmp_path, line):
    path = tmp_path / "youtube_mapping.txt"
    path.write_text(f"\n{line}\n")
    with pytest.raises(DataError, match="youtube_mapping.txt: line [23] is .*mend or remove"):
        read_mapping(path)


def test_a_mapping_does_not_lead_out_of_the_folder():
    with pytest.raises(ValueError, match="not a plain"):
        parse("msvd_qa", Naming(mapping={"vid12": "../secret"}))


@given(st.text(max_size=6) | st.integers() | st.floats() | st.none() | st.booleans())
def test_plain_names_and_whole_numbers(value):
    for check in plain_name, whole_number:
        try:
            found = check(value, "key")
        except ValueError as error:
            assert str(error).startswith("key ")
        else:
            assert not set(str(found)) & set("/\\. \n")


# Answers ---------------------------------------------------------------------------------------

def talk(answers):
    return [Question(i, "video0", "what?", ("", "what"), (), answer) for i, answer in enumerate(answers)]


@given(st.lists(st.sampled_from("abcdefg")), st.integers(1, 9), st.randoms())
def test_frequent_answers_against_a_loop(answers, num, rng):
    rest, expected = set(answers), []
    while rest and len(expected) < num:
        best = None
        for answer in sorted(rest):
            if best is None or answers.count(answer) > answers.count(best):
                best = answer
        expected.append(best)
        rest.remove(best)
    assert frequent_answers(talk(answers), num) == tuple(expected)
    rng.shuffle(answers)
    assert frequent_answers(talk(answers), num) == tuple(expected)


@pytest.mark.parametrize("name, most", [("msvd_qa", 1000), ("msrvtt_qa", 4000)])
def test_the_answer_list_is_made_from_train_alone(tmp_path, name, most):
    folder = make(name, tmp_path)
    path = folder / "train_qa.json"
    records = json.loads(path.read_text())
    for record in records:
        if record["answer"] > "word2":
            record["answer"] = "word0"
    write(path, records)
    splits = load_splits(folder, name)
    answers = splits["train"].schema.answers
    assert answers == frequent_answers(splits["train"].questions, most) and answers[0] == "word0"
    assert len(answers) == 3 and all(part.schema == splits["train"].schema for part in splits.values())
    for question, number in zip(splits["test"].questions, splits["test"].answers.tolist()):
        assert number == (answers.index(question.answer) if question.answer in answers else -1)
    assert -1 in splits["test"].answers and -1 not in splits["train"].answers
    assert len(splits["test"]) == 9  # what cannot be right is still asked


def test_the_length_of_the_answer_list(tmp_path):
    folder = make("msvd_qa", tmp_path)
    long, short = (load_splits(folder, "msvd_qa", num_answers=num)["train"] for num in (99, 2))
    assert len(long.schema.answers) == 7 and short.schema.answers == long.schema.answers[:2]
    assert -1 in short.answers
    for name, num in ("msvd_qa", 0), ("avqa", 9), ("music_avqa", 42):
        with pytest.raises(DataError, match=f"num_answers={num}"):
            load_splits(folder, name, num_answers=num)


def test_choices_of_a_batch(tmp_path):
    splits = load_splits(make("avqa", tmp_path), "avqa")
    data = splits["test"]
    assert data.schema == Schema("avqa", (), AVQA_TYPES, 4)
    for batch in data.batches(2, 2):
        assert batch.choices.shape[:3] == (*batch.answers.shape, 4)
        for b, k in batch.question_mask.nonzero().tolist():
            question = next(q for q in data.questions if q.question_id == batch.question_ids[b, k])
            words = [[data.vocabulary.words[n] for n in row if n] for row in batch.choices[b, k]]
            assert words == [["violin"], ["cello"], ["tuba"], ["dog"]]
            assert question.choices[batch.answers[b, k]] == question.answer
            assert AVQA_TYPES[batch.types[b, k]] == question.question_type


# Splits ----------------------------------------------------------------------------------------

def test_three_splits_share_no_video_and_one_vocabulary(made):
    name, folder = made
    splits = load_splits(folder, name)
    assert list(splits) == ["train", "val", "test"]
    videos = [set(part.videos) for part in splits.values()]
    assert not videos[0] & videos[1] and not videos[0] & videos[2] and not videos[1] & videos[2]
    assert splits["val"].vocabulary is splits["test"].vocabulary is splits["train"].vocabulary
    words = set(Vocabulary.build(splits["train"].questions).words)
    assert set(splits["train"].vocabulary.words) == words


def test_val_of_avqa_is_test_and_a_tenth_of_train_is_val(tmp_path):
    folder = make("avqa", tmp_path)
    parts = load_questions(folder, "avqa")
    everything = [q for q in parts["train"] + parts["val"]]
    assert len({q.video_id for q in parts["val"]}) == 1 and len(everything) == 24
    assert {q.video_id for q in parts["test"]} == {"clip_11", "clip_12", "clip_13"}
    given_val = load_questions(folder, "avqa", files={"val": "val_qa.json"})  # whoever has a split of their own
    assert given_val["val"] == parts["test"] and len(given_val["train"]) == 24


@given(st.lists(st.sampled_from([f"v{i}" for i in range(30)]), min_size=1, max_size=60),
       st.floats(0.01, 0.9), st.randoms())
def test_split_by_video(videos, share, rng):
    questions = [replace(talk(["x"])[0], question_id=i, video_id=v) for i, v in enumerate(videos)]
    train, val = split_by_video(questions, share)
    assert sorted(q.question_id for q in train + val) == list(range(len(videos)))
    assert not {q.video_id for q in train} & {q.video_id for q in val}
    assert len({q.video_id for q in val}) == max(1, round(share * len(set(videos))))
    rng.shuffle(questions)
    assert {q.video_id for q in split_by_video(questions, share)[1]} == {q.video_id for q in val}


def test_the_videos_set_aside_stay_the_same():
    questions = [replace(talk(["x"])[0], question_id=i, video_id=f"clip{i}") for i in range(40)]
    aside = {q.video_id for q in split_by_video(questions)[1]}
    assert aside == {"clip11", "clip24", "clip29", "clip39"}  # a change would change published numbers


def test_fewer_clips_shorten_train_alone(made):
    name, folder = made
    everything, few = load_splits(folder, name), load_splits(folder, name, clips=2)
    assert few["train"].videos == everything["train"].videos[:2]
    assert [q for q in few["val"].questions] == everything["val"].questions
    assert len(few["test"]) == len(everything["test"])
    with pytest.raises(DataError, match="clips=0"):
        load_splits(folder, name, clips=0)


def test_types_are_shown_when_asked(made):
    name, folder = made
    hidden, shown = (load_splits(folder, name, types=types)["train"] for types in (False, True))
    assert ((shown.objects != 0).sum(1) > (hidden.objects != 0).sum(1)).all()


def test_splits_without_questions(made):
    name, folder = made
    write(annotation_files(folder, DATASETS[name])["test"], [])
    with pytest.raises(DataError, match="test has no questions"):
        load_splits(folder, name)


def test_words_and_answers_of_a_checkpoint(tmp_path):
    first = load_splits(make("msvd_qa", tmp_path / "a"), "msvd_qa")["train"]
    other = make("msvd_qa", tmp_path / "b")
    write(other / "train_qa.json", [record_of("msvd_qa", 3, 31) | {"answer": "new", "question": "new?"}])
    splits = load_splits(other, "msvd_qa", vocabulary=first.vocabulary, schema=first.schema)
    assert splits["test"].schema is first.schema and splits["test"].vocabulary is first.vocabulary
    assert splits["train"].answers.tolist() == [-1] and splits["train"].tokens[0, 0] == 1


@ALL
def test_features_that_are_missing_or_broken(tmp_path, name):
    folder = make(name, tmp_path)
    videos = [NAMES[name].format(number) for number in (11, 12)]
    kind = DATASETS[name].audio[0]
    (folder / "feats" / kind / f"{videos[0]}.npy").unlink()
    (folder / "feats" / kind / f"{videos[1]}.npy").write_bytes(b"pickle")
    with pytest.raises(DataError, match=f"{kind}/{videos[0]}.npy: features are missing"):
        load_splits(folder, name)
    with pytest.warns(UserWarning, match="skipped 6 of 9 questions on 2 videos"):
        assert len(load_splits(folder, name, skip_bad=True)["test"]) == 3


def test_other_features(made):
    name, folder = made
    source = DATASETS[name]
    (folder / "feats" / source.visual[0]).rename(folder / "feats" / "res18")
    assert load_splits(folder, name, visual="res18")["val"].visual.shape[-1] == 4
    with pytest.raises(DataError, match="features are missing"):
        load_splits(folder, name)


@pytest.mark.parametrize("ids", [[f"clip_{video}" for video in range(14)], list(range(14)),
                                 {str(video): video for video in range(14)}])
def test_packed_features_by_name_or_by_number(tmp_path, ids):
    folder = make("avqa", tmp_path, dims=())
    for kind, shape in ("small_visual", (14, 5, 2, 4)), ("small_audio", (14, 5, 3)):
        array = np.broadcast_to(np.arange(14.0, dtype=np.float32).reshape(14, *[1] * (len(shape) - 1)), shape)
        (folder / "feats").mkdir(exist_ok=True)
        np.save(folder / "feats" / f"{kind}.npy", array)
        write(folder / "feats" / f"{kind}.json", ids)
    data = load_splits(folder, "avqa")["test"]
    assert len(data.videos) == 3 and data.visual.shape == (3, 5, 4)
    for batch in data.batches(9):
        assert (batch.question_ids // 10 == batch.audio[:, :1, 0]).all()


# Batches ---------------------------------------------------------------------------------------

def same(first, second):
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in fields(first)]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_every_question_once_an_epoch(made):
    name, folder = made
    data = load_splits(folder, name)["train"]
    for seed in None, 0, 1:
        batches = list(data.batches(3, 2, seed))
        met = [int(q) for batch in batches for q in batch.question_ids[batch.question_mask]]
        assert sorted(met) == sorted(q.question_id for q in data.questions)
        assert all(map(same, batches, data.batches(3, 2, seed)))


def test_workers_lay_out_the_same_batches(made):
    name, folder = made
    data = load_splits(folder, name)["train"]
    alone, shared = (list(data.batches(2, 2, seed=3, workers=workers)) for workers in (0, 2))
    assert len(alone) == len(shared) and all(map(same, alone, shared))


# Which dataset? --------------------------------------------------------------------------------

def test_the_dataset_is_recognised(made):
    name, folder = made
    assert detect(folder) == name
    assert load_splits(folder, dataset=None)["train"].schema.name == name


@pytest.mark.parametrize("sign, name", [
    ("youtube_mapping.txt", "msvd_qa"), ("YouTubeClips", "msvd_qa"), ("TrainValVideo", "msrvtt_qa"),
    ("feats/x/vid7.npy", "msvd_qa"), ("feats/x/video7.npy", "msrvtt_qa")])
def test_look_alikes_are_told_apart_by_their_files(tmp_path, sign, name):
    folder = tmp_path / "data"
    write(folder / "train_qa.json", [RECORDS["msvd_qa"]])
    with pytest.raises(DataError, match="could be msvd_qa or msrvtt_qa; name the dataset"):
        detect(folder)
    (folder / sign).parent.mkdir(parents=True, exist_ok=True)
    (folder / sign).touch()
    assert detect(folder) == name


@pytest.mark.parametrize("edition", ["json", "json_update"])
def test_any_label_edition_is_recognised(tmp_path, edition):
    write(tmp_path / edition / "avqa-train.json", [None, RECORDS["music_avqa"]])
    assert detect(tmp_path) == "music_avqa"


@pytest.mark.parametrize("place", ["", "json", "annotations"])
def test_annotations_may_lie_in_a_folder_of_their_own(tmp_path, place):
    folder = make("avqa", tmp_path)
    (folder / place).mkdir(exist_ok=True)
    for file in "train_qa.json", "val_qa.json":
        (folder / file).rename(folder / place / file)
    assert detect(folder) == "avqa" and len(load_splits(folder, "avqa")["test"]) == 9


@pytest.mark.parametrize("records", [None, [], [3], [{"answer": 1}]])
def test_no_dataset(tmp_path, records):
    if records is not None:
        write(tmp_path / "train_qa.json", records)
    with pytest.raises(DataError) as caught:
        detect(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}: no dataset there") and "\n" not in text
    assert all(name in text for name in (*DATASETS, "avqa-train.json", "multi_choice"))


def test_unknown_dataset(tmp_path):
    with pytest.raises(DataError, match="'small_visual' is unknown; give one of music_avqa, avqa"):
        load_splits(tmp_path, "small_visual")


# Schema ----------------------------------------------------------------------------------------

def test_a_schema_survives_a_file(made, tmp_path):
    name, folder = made
    schema = load_splits(folder, name)["train"].schema
    path = write(tmp_path / "schema.json", schema_to_json(schema))
    assert schema_from_json(json.loads(path.read_text("utf-8"))) == schema


@pytest.mark.parametrize("change", [
    {"answers": None}, {"answers": "yes"}, {"answers": [1]}, {"answers": []}, {"question_types": [["a"]]},
    {"question_types": []}, {"question_types": 3}, {"question_types": [[1, "a"]]}, {"name": 3},
    {"num_choices": "4"}, {"num_choices": True}, {"num_choices": 4}])
def test_a_broken_schema(change):
    stored = json.loads(json.dumps(schema_to_json(MUSIC_AVQA)))
    with pytest.raises(DataError, match="stored schema: .*; copy the checkpoint again") as caught:
        schema_from_json(stored | change)
    assert "\n" not in str(caught.value)
    for key in stored:
        with pytest.raises(DataError, match=key):
            schema_from_json({k: v for k, v in stored.items() if k != key})
    with pytest.raises(DataError):
        schema_from_json(3)


def test_nothing_to_report_gives_no_warning(made):
    name, folder = made
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_splits(folder, name, skip_bad=True)
