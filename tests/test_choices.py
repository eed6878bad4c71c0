"""Tests of mcd_edu.samples.choices.

The oracle below answers every form a second time, from the prose of the notebook alone: it gives
all option texts that are true, or None where the question should not be asked. It looks at plain
dictionaries and asks second by second; it uses nothing of the module that it checks.
"""
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.data import tokenize
from mcd_edu.features import DataError, open_features
from mcd_edu.samples.choices import (
    CHOICE_FORMS,
    FAMILIES,
    build_choice_set,
    choice_candidates,
    choice_records,
    choose_choices,
    choose_clips,
    four_options,
    two_by_two,
)
from mcd_edu.samples.pictures import INSTRUMENTS
from mcd_edu.samples.scenes import Player, Scene, sample_scene

KEYS = ["id", "video_name", "video_id", "question_text", "multi_choice", "answer",
        "question_relation", "question_type"]
TYPES = ["Which", "Come From", "Happening", "Where", "Why", "Before Next", "When", "Used For"]
SECONDS = range(10)
SCENES = [sample_scene(f"{i:08d}", i) for i in range(800)]


# ---- the oracle

def plays(p, t): return p["onset"] is not None and p["onset"] <= t < p["end"]


class World:
    "A scene as a list of dictionaries, with the plainest of questions about it"
    def __init__(self, scene):
        record = scene.to_json()
        self.all, self.setting = record["players"], record["setting"] + "s"
        self.seen = [p for p in self.all if p["place"] is not None]
        self.heard = [p for p in self.all if any(plays(p, t) for t in SECONDS)]
        self.kinds_seen, self.kinds_heard = names(self.seen), names(self.heard)


def names(players): return {p["instrument"] for p in players}
def called(players, name): return [p for p in players if p["instrument"] == name]
def begins(p): return min(t for t in SECONDS if plays(p, t))
def stops(p): return max(t for t in SECONDS if plays(p, t)) + 1
def only(found): return found[0] if len(found) == 1 else None
def the(kinds, after=""): return {f"the {name}{after}" for name in kinds}
def one_of_a_kind(w, p): return len(called(w.all, p["instrument"])) == 1


def only_heard(w, name): return only(called(w.heard, name))


def top(players, value):
    "The one player whose value is larger than that of all others, of two or more"
    best = [p for p in players if all(value(p) > value(q) for q in players if q is not p)]
    return only(best) if len(players) > 1 else None


def first(w): return top(w.heard, lambda p: -begins(p))
def loudest(w): return top(w.heard, lambda p: p["level"])


def from_where(w, p):
    if p is None or not one_of_a_kind(w, p): return None
    return {"from off screen" if p["place"] is None else f"from the {p['place']}"}


def place_of(p): return "in the middle" if p["place"] == "middle" else f"on the {p['place']}"


def at_the_end(w):
    late = [p for p in w.heard if plays(p, 9)]
    return None if names(late) in (set(), w.kinds_heard) else the(names(late))


def doing(w, name):
    p = only_heard(w, name)
    if p is None: return None
    late, early = not plays(p, 0), not plays(p, 9)
    if late and early: return {"it comes in late and stops early"}
    return {"it only comes in late" if late else "it only stops early" if early else
            "it plays throughout"}


def on_stage(w):
    words = {1: "one musician stands", 2: "two musicians stand", 3: "three musicians stand",
             4: "four musicians stand"}
    return {words[len(w.seen)] + " there"} if len(w.seen) in words else None


def where(w, name):
    found = called(w.seen, name)
    if not found: return {"not in the picture"}
    return {place_of(found[0])} if len(found) == 1 else None


def silent_one(w):
    still = [p for p in w.seen if p not in w.heard]
    if not still:
        return {"everybody plays"} if 0 < len(w.kinds_seen) == len(w.seen) else None
    return {place_of(still[0])} if len(still) == 1 and one_of_a_kind(w, still[0]) else None


def coming(w):
    return {p["instrument"] for p in w.heard if not plays(p, 0)}


def leaving(w):
    return {p["instrument"] for p in w.heard if not plays(p, 9)}


def changes(w, t):
    "Who comes in or stops between second t − 1 and t, and who plays in both"
    moved = [p for p in w.heard if plays(p, t - 1) != plays(p, t)]
    return moved, [p for p in w.heard if plays(p, t - 1) and plays(p, t)]


def a_cause(w, moment, causes):
    "Is there a moment at which one soloist, and nobody else, makes that change?"
    found = set()
    for p in w.heard:
        t = moment(p)
        if not 0 < t < 10 or only_heard(w, p["instrument"]) is None: continue
        moved, others = changes(w, t)
        if moved == [p] and others: found.add(p["instrument"])
    # every kind that ever comes in (or stops) is a possible cause; the asked one must be a clear one
    return found, causes


def silence(w):
    if any(plays(p, 9) for p in w.heard) or not w.heard: return None
    end = max(stops(p) for p in w.heard)
    final = only([p for p in w.heard if stops(p) == end])
    return the({final["instrument"]}, " stops") if final and only_heard(w, final["instrument"]) else None


def hidden(w): return w.kinds_heard - w.kinds_seen


def nobody_plays(w):
    return None if any(p in w.heard for p in w.seen) else the(hidden(w), " plays off screen")


def in_order(w):
    "Who comes in, in order; None where two come in together or two of a kind sound"
    order = sorted(w.heard, key=begins)
    clear = len({begins(p) for p in order}) == len(names(order)) == len(order)
    return order if clear else None


def entry(w, name, step):
    order = in_order(w) or []
    at = [i + step for i, p in enumerate(order) if p["instrument"] == name]
    return order[at[0]] if at and 0 <= at[0] < len(order) else None


def comes_in(w, name):
    p = only_heard(w, name)
    if p is None: return None
    t = begins(p)
    return {"at the very beginning" if t == 0 else "shortly after the beginning" if t <= 2 else
            "before the middle" if t <= 4 else "in the second half"}


def stops_at(w, name):
    p = only_heard(w, name)
    if p is None: return None
    t = stops(p)
    return {"in the first half" if t <= 5 else "soon after the middle" if t <= 7 else
            "shortly before the end" if t <= 9 else "at the very end"}


def halves(players):
    early = any(plays(p, t) for p in players for t in range(5))
    late = any(plays(p, t) for p in players for t in range(5, 10))
    return {"in both halves" if early and late else "only in the first half" if early else
            "only in the second half" if late else "never"}


def is_heard(w, name):
    return halves(called(w.heard, name)) if len(called(w.heard, name)) < 2 else None


def at(w, spot): return only([p for p in w.seen if place_of(p) == spot])


def heard_at(w, spot):
    p = at(w, spot)
    return halves([p]) if p and one_of_a_kind(w, p) else None


HANDS = {"with a bow": "violin cello erhu", "on a keyboard": "piano accordion",
         "by beating": "drum congas xylophone",
         "by plucking": "guzheng pipa ukulele banjo acoustic_guitar electric_bass",
         "by blowing": "flute clarinet bassoon saxophone trumpet tuba suona bagpipe"}


def played(p): return p and {way for way, kinds in HANDS.items() if p["instrument"] in kinds.split()}


ORACLE = {
    "Which instrument can be heard?": lambda w: w.kinds_heard,
    "Which instrument can be seen?": lambda w: w.kinds_seen,
    "Which instrument is heard but not seen?": hidden,
    "Which instrument is seen but not heard?": lambda w: w.kinds_seen - w.kinds_heard,
    "What does the first sound come from?":
        lambda w: first(w) and the({first(w)["instrument"]}),
    "What does the sound at the very end come from?": at_the_end,
    "Where does the first sound come from?": lambda w: from_where(w, first(w)),
    "Where does the loudest sound come from?": lambda w: from_where(w, loudest(w)),
    "What does the {} do?": doing,
    "What is happening on the stage?": on_stage,
    "What is happening in the video?": lambda w: the(w.kinds_heard, f" plays {w.setting}"),
    "Where is the {}?": where,
    "Where does this take place?":
        lambda w: {f"{w.setting}, with the {name}" for name in w.kinds_seen},
    "Where is the player who stays silent?": silent_one,
    "Why does the music get fuller?": lambda w: a_cause(w, begins, coming(w)),
    "Why does the music get thinner?": lambda w: a_cause(w, stops, leaving(w)),
    "Why does the music fall silent before the end?": silence,
    "Why is there music although nobody on the stage plays?": nobody_plays,
    "Which instrument comes in right after the {}?":
        lambda w, name: (p := entry(w, name, 1)) and {p["instrument"]},
    "Which instrument comes in right before the {}?":
        lambda w, name: (p := entry(w, name, -1)) and {p["instrument"]},
    "Where does the next sound after the {} come from?":
        lambda w, name: from_where(w, entry(w, name, 1)),
    "When does the {} come in?": comes_in,
    "When does the {} stop?": stops_at,
    "When is the {} heard?": is_heard,
    "When is the instrument {} heard?": heard_at,
    "How is the instrument {} played?": lambda w, spot: played(at(w, spot)),
    "How is the instrument that comes in first played?": lambda w: played(first(w)),
    "How is the instrument that is heard but not seen played?":
        lambda w: played({"instrument": only(list(hidden(w)))}) if len(hidden(w)) == 1 else None,
}


def truths(form, values, world):
    "The option texts that may be asked for as right, and all that are true"
    found = ORACLE[form.text](world, *values)
    if isinstance(found, tuple):
        verb = {"fuller?": " comes in", "thinner?": " stops"}[form.text.split()[-1]]
        return the(found[0], verb), the(found[1], verb)
    return found or set(), found or set()


def plain(texts): return {text.replace("_", " ") for text in texts}
def texts(choice, options): return [CHOICE_FORMS[choice.form].option.format(o) for o in options]


def check(scene, seed=0):
    "Every candidate of a scene: fair to ask, one option right, three wrong, all different"
    world, rng = World(scene), Random(seed)
    for choice in choice_candidates(scene):
        form = CHOICE_FORMS[choice.form]
        fair, true = truths(form, choice.values, world)
        options = texts(choice, four_options(choice, rng))
        assert options[0] in fair, (form.text, choice, fair)
        assert true & set(options) == {options[0]}, (form.text, options, true)
        bags = {tuple(sorted(tokenize(option.replace("_", " ")))) for option in options}
        assert len(bags) == 4, options             # a model that averages words can tell them apart
        pool = set(texts(choice, (*choice.near, *choice.far)))
        assert not true & pool                     # whatever the lot


# ---- rules

def test_forms_cover_the_schema():
    assert set(ORACLE) == {form.text for form in CHOICE_FORMS} and len(ORACLE) == len(CHOICE_FORMS)
    by_type = Counter(form.question_type for form in CHOICE_FORMS)
    assert list(by_type) == TYPES and min(by_type.values()) >= 2
    assert {form.relation for form in CHOICE_FORMS} == {"Sound", "View", "Both"}


def test_every_candidate_is_fair_and_has_one_right_answer():
    for scene in SCENES[:300]: check(scene)


@st.composite
def odd_scenes(draw):
    "Scenes that the sampler never draws: twins off-screen, five in a place, nobody there"
    players = []
    for _ in range(draw(st.integers(0, 6))):
        onset = draw(st.none() | st.integers(0, 9))
        end = None if onset is None else draw(st.integers(onset + 1, 10))
        place = draw(st.sampled_from((None, "left", "middle", "right")))
        name = draw(st.sampled_from(("violin", "flute", "drum", "piano", "acoustic_guitar")))
        level = draw(st.sampled_from((0.0, -8.0, -16.0)))
        players.append(Player(name, 0, 0, place, "near", onset, end, level, 1.0))
    return Scene("odd", draw(st.integers(0, 99)), draw(st.sampled_from(("indoor", "outdoor"))),
                 tuple(players))


@settings(max_examples=300)
@given(odd_scenes())
def test_odd_scenes_are_asked_fairly_too(scene): check(scene)


def test_no_fair_question_is_left_out():
    spots = ("on the left", "in the middle", "on the right")
    drawn = {"Where is the {}?", "When is the {} heard?"}       # some names that are not there
    for scene in SCENES[:150]:
        world, asked = World(scene), defaultdict(set)
        for choice in choice_candidates(scene):
            asked[choice.form, choice.values] |= set(texts(choice, [choice.right]))
        for i, form in enumerate(CHOICE_FORMS):
            fillings = spots if "instrument {}" in form.text else sorted(scene.kinds)
            for values in [(name,) for name in fillings] if "{}" in form.text else [()]:
                assert asked.pop((i, values), set()) == truths(form, values, world)[0], form.text
        assert {CHOICE_FORMS[form].text for form, _ in asked} <= drawn


def test_near_answers_come_first():
    for scene in SCENES[:100]:
        for choice in choice_candidates(scene):
            options = four_options(choice, Random(1))
            assert len(set(options[1:]) & set(choice.near)) == min(3, len(choice.near))


def test_families_hold_every_instrument_once():
    assert sorted(name for names in FAMILIES.values() for name in names) == sorted(INSTRUMENTS)
    assert {way: set(kinds) for way, kinds in FAMILIES.items()} == {
        way: set(kinds.split()) for way, kinds in HANDS.items()}


def test_two_by_two_hides_each_half():
    right, near = two_by_two("the {name} plays {setting}", "violin", "flute", "indoor")
    assert right == "the violin plays indoors" and len({right, *near}) == 4
    halves = Counter(word for text in (right, *near) for word in text.split()[1::2])
    assert set(halves.values()) == {2}


# ---- relation: the facts that the answer depends on

def with_other_sounds(scene, rng):
    "The same picture; who sounds when and how loud is drawn again, nobody plays off-screen"
    players = []
    for p in scene.players:
        onset = rng.choice((None, *range(8)))
        end = None if onset is None else rng.randint(onset + 1, 10)
        record = {**p.__dict__, "onset": onset, "end": end, "level": rng.choice((0.0, -8.0, -16.0))}
        if p.visible: players.append(Player(**record))
    return Scene(scene.video_id, scene.seed, scene.setting, tuple(players))


def with_other_picture(scene, rng):
    "The same sounds; places and surroundings are drawn again, who is silent is gone"
    players = [Player(**{**p.__dict__, "place": rng.choice((None, "left", "middle", "right"))})
               for p in scene.players if p.sounding]
    return Scene(scene.video_id, scene.seed, rng.choice(("indoor", "outdoor")), tuple(players))


def test_relation_names_the_facts_that_the_answer_depends_on():
    moved = defaultdict(Counter)
    for scene in SCENES:
        rng = Random(scene.seed)
        worlds = {"sounds": World(with_other_sounds(scene, rng)),
                  "picture": World(with_other_picture(scene, rng))}
        for choice in choice_candidates(scene):
            form = CHOICE_FORMS[choice.form]
            options = texts(choice, four_options(choice, rng))
            for facts, world in worlds.items():
                fair, true = truths(form, choice.values, world)
                true = true & set(options) if fair & set(options) else set()
                if true != {options[0]}: moved[form.text][facts] += 1
    for form in CHOICE_FORMS:
        needs = {"Sound": {"sounds"}, "View": {"picture"}, "Both": {"sounds", "picture"}}
        assert set(moved[form.text]) == needs[form.relation], form.text


# ---- the choice

@pytest.fixture(scope="module")
def records():
    "Records of 600 train and 200 val scenes"
    return choice_records(SCENES[:600]), choice_records(SCENES[600:], seed=1)


def test_every_type_is_asked_about_equally_often(records):
    for part in records:
        types = Counter(r["question_type"] for r in part)
        assert set(types) == set(TYPES) and min(types.values()) > 0.8 * max(types.values())
        relations = Counter(r["question_relation"] for r in part)
        assert min(relations.values()) > 0.2 * len(part)


def test_chosen_are_candidates_and_differ():
    for scene, picks in zip(SCENES[:60], choose_choices(SCENES[:60], per_video=12)):
        assert set(picks) <= set(choice_candidates(scene))
        assert len(set(picks)) == len(picks) <= 12
    assert choose_choices([]) == [] and choose_choices(SCENES[:2], per_video=0) == [[], []]


def test_right_answers_stand_everywhere_equally_often(records):
    for part in records:
        places = Counter(r["answer"] for r in part)
        assert all(abs(places[i] / len(part) - 0.25) < 0.02 for i in range(4))


def score(rule, part):
    "Share of the questions whose first best option by that rule is the right one"
    picks = [max(range(4), key=lambda i: rule(r, r["multi_choice"][i])) for r in part]
    return sum(pick == r["answer"] for pick, r in zip(picks, part)) / len(part)


def form_of(r):
    "The question without its filling"
    text, fillings = r["question_text"], ("on the left", "in the middle", "on the right")
    for name in (*(f"the {n.replace('_', ' ')}" for n in INSTRUMENTS), *fillings):
        text = text.replace(name, "…")
    return text


def test_guessing_pays_about_one_in_four(records):
    train, val = records
    right = Counter(r["multi_choice"][r["answer"]] for r in train)
    shown = Counter(o for r in train for o in r["multi_choice"])
    by_form = Counter((form_of(r), r["multi_choice"][r["answer"]]) for r in train)
    by_text = Counter((r["question_text"], r["multi_choice"][r["answer"]]) for r in train)
    best = right.most_common(1)[0][0]
    assert sum(r["multi_choice"][r["answer"]] == best for r in val) / len(val) < 0.05
    assert score(lambda r, o: right[o], val) < 0.32                   # the most frequent answer
    assert score(lambda r, o: right[o] / (shown[o] + 4), val) < 0.32  # the best odds
    assert score(lambda r, o: by_form[form_of(r), o], val) < 0.34     # the same, form known
    assert score(lambda r, o: by_text[r["question_text"], o], val) < 0.34


def test_families_betray_nothing(records):
    family = {n.replace("_", " "): way for way, names in FAMILIES.items() for n in names}
    def way(option):
        return next((family[n] for n in sorted(family, key=len, reverse=True) if n in option), None)
    train, val = records
    named = [r for r in (*train, *val) if r["question_type"] not in ("Happening", "Where")
             and all(map(way, r["multi_choice"]))]
    for best in (max, min):         # the option with most relatives, the one with fewest
        hits = 0
        for r in named:
            ways = [way(o) for o in r["multi_choice"]]
            counts = [ways.count(w) for w in ways]
            hits += (counts[r["answer"]] == best(counts)) / counts.count(best(counts))
        assert len(named) > 1500 and hits / len(named) < 0.33


# ---- records

def test_record_is_exactly_a_real_one(records):
    numbers = [r["id"] for r in records[0]]
    assert numbers == list(range(len(numbers)))
    for part, scenes in zip(records, (SCENES[:600], SCENES[600:])):
        for r in part:
            assert list(r) == KEYS and r == json.loads(json.dumps(r))
            assert r["video_name"] == scenes[r["video_id"]].video_id
            assert isinstance(r["multi_choice"], list) and len(set(r["multi_choice"])) == 4
            assert all(isinstance(option, str) and option for option in r["multi_choice"])
            assert isinstance(r["answer"], int) and 0 <= r["answer"] <= 3
            assert r["question_type"] in TYPES and r["question_text"].endswith("?")
            line = " ".join((r["question_text"], *r["multi_choice"]))
            assert not any(sign in line for sign in "{}_<>")


def test_records_are_true_of_their_scenes(records):
    worlds = [World(scene) for scene in SCENES[:600]]
    by_text = {form.text: form for form in CHOICE_FORMS}
    fillings = (*INSTRUMENTS, "on the left", "in the middle", "on the right")
    asked = {form.text.replace("{}", filling.replace("_", " ")): (form, filling)
             for form in CHOICE_FORMS for filling in fillings}
    assert len(by_text) == len(CHOICE_FORMS)
    for r in records[0]:
        form, filling = asked[r["question_text"]]
        values = (filling,) if "{}" in form.text else ()
        fair, true = map(plain, truths(form, values, worlds[r["video_id"]]))
        right = r["multi_choice"][r["answer"]]
        assert right in fair and true & set(r["multi_choice"]) == {right}
        assert (r["question_type"], r["question_relation"]) == (form.question_type, form.relation)


def test_seeds_decide(records):
    assert choice_records(SCENES[:40]) == choice_records(SCENES[:40])
    assert choice_records(SCENES[:40]) != choice_records(SCENES[:40], seed=1)


def test_the_same_whatever_the_hash_seed():
    code = ("from mcd_edu.samples.choices import choice_records;"
            "from mcd_edu.samples.scenes import sample_scene;"
            "print(choice_records([sample_scene(str(i), i) for i in range(30)]))")
    env = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env)
    records = choice_records([sample_scene(str(i), i) for i in range(30)])
    assert other.stdout.decode().strip() == str(records)


# ---- the set

@pytest.fixture(scope="module")
def source(tmp_path_factory):
    "What the builder needs of a sample set of MUSIC-AVQA"
    folder = tmp_path_factory.mktemp("music_avqa")
    parts = {"train": SCENES[:12], "val": SCENES[12:15], "test": SCENES[15:20]}
    (folder / "truth").mkdir()
    for kind, dim in (("small_visual", 6), ("small_audio", 4)):
        (folder / "feats" / kind).mkdir(parents=True)
        for scene in SCENES[:20]:
            feature = np.full((10, dim), float(scene.video_id) / 8, np.float16)
            np.save(folder / "feats" / kind / f"{scene.video_id}.npy", feature)
    for split, scenes in parts.items():
        text = json.dumps([scene.to_json() for scene in scenes])
        (folder / "truth" / f"{split}.json").write_text(text)
    return folder


def load(path): return json.loads(Path(path).read_text(encoding="utf-8"))
def files(folder): return {str(p.relative_to(folder)): p.read_bytes()
                           for p in Path(folder).rglob("*") if p.is_file()}


def test_layout_and_packed_features(source, tmp_path):
    build_choice_set(tmp_path, source, num_train=9, num_val=6)
    assert sorted(files(tmp_path)) == [
        "feats/small_audio.json", "feats/small_audio.npy", "feats/small_visual.json",
        "feats/small_visual.npy", "train_qa.json", "val_qa.json"]
    videos = load(tmp_path / "feats/small_visual.json")
    assert videos == load(tmp_path / "feats/small_audio.json") and len(set(videos)) == 15
    for kind, dim in (("visual", 6), ("audio", 4)):
        packed = np.load(tmp_path / "feats" / f"small_{kind}.npy", allow_pickle=False)
        assert packed.shape == (15, 10, dim) and packed.dtype == np.float16
        for video, feature in zip(videos, packed): assert (feature == float(video) / 8).all()
    train, val = load(tmp_path / "train_qa.json"), load(tmp_path / "val_qa.json")
    assert [r["id"] for r in train + val] == list(range(len(train + val)))
    assert all(videos[r["video_id"]] == r["video_name"] for r in train + val)
    sources = {split: {r["video_id"] for r in load(source / f"truth/{split}.json")}
               for split in ("train", "val", "test")}
    assert {r["video_name"] for r in train} == set(videos[:9]) <= sources["train"]
    assert {r["video_name"] for r in val} == set(videos[9:]) <= sources["val"] | sources["test"]
    assert max(Counter(r["video_id"] for r in train).values()) == 8


def test_the_feature_reader_opens_it(source, tmp_path):
    build_choice_set(tmp_path, source, num_train=9, num_val=6)
    for kind, dim in (("visual", 6), ("audio", 4)):
        features = open_features(tmp_path / "feats" / f"small_{kind}.npy")
        for r in load(tmp_path / "val_qa.json"):
            feature = features[r["video_name"]]
            assert feature.shape == (10, dim) and (feature == float(r["video_name"]) / 8).all()


def test_two_builds_give_the_same_bytes(source, tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_choice_set(tmp_path / folder, source, 9, 6, per_video=4, seed=seed)
    build_choice_set(tmp_path / "a", source, 9, 6, per_video=4)
    one, two, other = (files(tmp_path / folder) for folder in "abc")
    assert one == two and one.keys() == other.keys() and one != other


def test_a_small_source_gives_all_it_has(source, tmp_path):
    build_choice_set(tmp_path, source)
    assert len(load(tmp_path / "feats/small_audio.json")) == 20
    clips = choose_clips(source, 99, 99, 0)
    assert [len(clips["train"]), len(clips["val"])] == [12, 8]


def copy(source, folder):
    for name, content in files(source).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name, content, message", [
    ("truth/val.json", None, "val.json: no such file; build the sample set of MUSIC-AVQA first"),
    ("truth/test.json", b"[{", "test.json: holds no scenes"),
    ("truth/train.json", b'[{"video_id": "x"}]', "train.json: holds no scenes"),
    ("truth/train.json", b"[]", "train.json: holds no scenes"),
    ("truth/val.json", b"7", "val.json: holds no scenes"),
    ("truth/val.json", b"[\"x\"]", "val.json: holds no scenes"),
    ("feats/small_audio/00000003.npy", None, "00000003.npy: features are missing"),
    ("feats/small_visual/00000003.npy", b"x", "00000003.npy"),
])
def test_a_source_that_is_not_whole_is_refused(source, tmp_path, name, content, message):
    broken = copy(source, tmp_path / "source")
    (broken / name).unlink()
    if content is not None: (broken / name).write_bytes(content)
    with pytest.raises(DataError, match=message): build_choice_set(tmp_path / "set", broken)
    assert not (tmp_path / "set").exists()


def test_features_of_another_shape_are_refused(source, tmp_path):
    broken = copy(source, tmp_path / "source")
    np.save(broken / "feats/small_audio/00000003.npy", np.zeros((9, 4), np.float16))
    with pytest.raises(DataError, match=r"00000003.npy: shape \(9, 4\)"):
        build_choice_set(tmp_path / "set", broken)


def test_no_source_and_no_clips_are_refused(source, tmp_path):
    with pytest.raises(DataError, match="build the sample set of MUSIC-AVQA first"):
        build_choice_set(tmp_path / "set", tmp_path / "nowhere")
    for wrong in ({"num_train": 0}, {"num_val": -1}, {"per_video": 0}):
        with pytest.raises(ValueError, match="use 1 or more"):
            build_choice_set(tmp_path / "set", source, **wrong)
    assert not (tmp_path / "set").exists()


def test_a_failed_write_leaves_what_was_there(source, tmp_path, monkeypatch):
    build_choice_set(tmp_path, source, 9, 6)
    before = files(tmp_path)
    def full(*args, **kwargs): raise OSError("disk full")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match="disk full"): build_choice_set(tmp_path, source, 9, 6, seed=1)
    assert files(tmp_path) == before


# ---- the set of the repository

SET = Path(__file__).resolve().parent.parent / "data_samples" / "avqa"


@pytest.mark.skipif(not (SET / "train_qa.json").is_file(), reason="the sample set is not built")
def test_the_set_of_the_repository_is_the_one_that_is_built(tmp_path):
    build_choice_set(tmp_path, SET.parent / "music_avqa")
    built = files(tmp_path)
    assert built == {name: content for name, content in files(SET).items() if name in built}
    assert sum(map(len, files(SET).values())) <= 8_000_000
