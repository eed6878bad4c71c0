"Tests of mcd_edu.samples.actions and action_set: scenes, questions, features, and the sets in the real layouts."
import hashlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.samples.action_set import (
    ACTION_SETS,
    CLIP,
    HUMANS,
    NUMBERS,
    WIDTH,
    ActionSetConfig,
    appearance_statistics,
    build_action_set,
    choose_questions,
    colour_codes,
    encode_frames,
    held_back_pairs,
    motion_statistics,
    open_questions,
    pool_cells,
    projection,
    random_features,
    read_silent_video,
    split_scenes,
    spots,
    video_name,
    write_annotations,
)
from mcd_edu.samples.actions import (
    ACTIONS,
    COLOURS,
    FPS,
    KINDS,
    PLACES,
    SIZE,
    TIMES,
    ActionScene,
    Actor,
    actor_sprite,
    backdrop,
    item_sprite,
    pose,
    render_frames,
    sample_scene,
)

SCENES = [sample_scene(i, i) for i in range(400)]
MIX = ACTION_SETS["msvd_qa"].mix
TINY = ActionSetConfig(num_train=4, num_val=1, num_test=3, num_clips=1, num_videos=4)
SPLITS = ("train", "val", "test")
DOG = Actor("dog", 0, "jump", None, None, 30, 90, 0.0, 1.0)
CAT = Actor("cat", 0, "throw", "ball", "red", 66, 90, 0.0, 1.0)
TOY = ActionScene(3, 0, "beach", "night", CLIP, (DOG, CAT))


def load(path): return json.loads(path.read_text(encoding="utf-8"))
def content(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A tiny set in MSVD-QA's layout, made in this process"
    folder = tmp_path_factory.mktemp("sets") / "msvd_qa"
    build_action_set(folder, "msvd_qa", TINY, workers=0)
    return folder


# ---- scenes

def test_scenes_are_the_same_everywhere():
    lines = json.dumps([scene.to_json() for scene in SCENES[:100]])
    assert hashlib.sha256(lines.encode()).hexdigest().startswith("ab0f7fd5b0c53008")


def test_scenes_do_not_depend_on_the_hash_seed():
    code = ("import json; from mcd_edu.samples.actions import sample_scene;"
            "print(json.dumps([sample_scene(0, i).to_json() for i in range(20)]))")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}).stdout for seed in ("1", "2")]
    assert runs[0] == runs[1] == json.dumps([sample_scene(0, i).to_json() for i in range(20)]) + "\n"


@given(st.integers(0, 10**7))
@settings(max_examples=100, deadline=None)
def test_rules_hold(seed):
    scene = sample_scene(1, seed, 32)
    assert scene == sample_scene(1, seed, 32)
    assert ActionScene.from_json(json.loads(json.dumps(scene.to_json()))) == scene
    assert scene.place in PLACES and scene.time in TIMES and scene.num_frames == 32
    assert 1 <= len(scene.actors) <= 4 and 1 <= len(scene.groups) <= 2
    for actor in scene.actors:
        action = ACTIONS[actor.action]
        assert actor.kind in KINDS and actor.look in (0, 1)
        assert actor.item in action.items if action.items else actor.item is None
        assert actor.colour in COLOURS if action.coloured else actor.colour is None
    deeds = [{(a.action, a.item, a.colour) for a in actors} for actors in scene.groups.values()]
    assert all(len(deed) == 1 for deed in deeds)
    actions = [a.action for actors in scene.groups.values() for a in actors[:1]]
    items = [a.item for actors in scene.groups.values() for a in actors[:1] if a.item]
    assert len(set(actions)) == len(actions) and len(set(items)) == len(items)


def test_everything_occurs():
    actors = [actor for scene in SCENES for actor in scene.actors]
    assert {a.kind for a in actors} == set(KINDS) and {a.action for a in actors} == set(ACTIONS)
    assert {a.item for a in actors} - {None} == {item for action in ACTIONS.values() for item in action.items}
    assert {len(s.actors) for s in SCENES} == {1, 2, 3, 4} and {len(s.groups) for s in SCENES} == {1, 2}


def test_what_is_not_allowed_does_not_happen():
    for seed in range(100):
        scene = sample_scene(0, seed, allowed=lambda kind, action: kind in ("dog", "cat") and action != "fly")
        assert {kind for kind, _ in scene.pairs} <= {"dog", "cat"} and "fly" not in {action for _, action in scene.pairs}
    with pytest.raises(ValueError, match="allowed"): sample_scene(0, 0, allowed=lambda kind, action: False)


# ---- pictures

def test_frames():
    frames = render_frames(TOY)
    assert frames.shape == (CLIP, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert (frames == render_frames(TOY)).all()


def test_only_sleepers_are_still():
    for action in ACTIONS:
        items = ACTIONS[action].items or (None,)
        actor = replace(DOG, action=action, item=items[0], colour="blue" if ACTIONS[action].coloured else None)
        moves = (np.diff(render_frames(replace(TOY, actors=(actor,))).astype(int), axis=0) != 0).any()
        assert moves == (action != "sleep"), action


@pytest.mark.parametrize("kind", KINDS)
def test_actors_look_different_and_have_two_looks(kind):
    picture = lambda *args: np.asarray(actor_sprite(*args)).astype(int)
    assert picture(kind).shape == (36, 36, 4) and (picture(kind)[..., 3] > 0).mean() > 0.1
    assert (picture(kind) != picture(kind, 1)).any() and (picture(kind) != picture(kind, 0, 1)).any()
    others = [abs(picture(kind) - picture(other)).mean() for other in KINDS if other != kind]
    assert min(others) > 8


def test_items_and_places_differ():
    items = sorted({item for action in ACTIONS.values() for item in action.items})
    assert len({item_sprite(item).tobytes() for item in items}) == len(items) == 16
    assert len({item_sprite("ball", colour).tobytes() for colour in COLOURS}) == 4
    means = {(place, time): np.asarray(backdrop(place, time)).tobytes() for place in PLACES for time in TIMES}
    assert len(set(means.values())) == 32


def test_night_is_darker_than_day():
    for place in PLACES: assert np.asarray(backdrop(place, "night")).mean() < 0.6 * np.asarray(backdrop(place, "day")).mean()


def test_poses_stay_in_the_picture():
    for action in ACTIONS:
        for i in range(200):
            at = pose(action, i / 20)
            assert abs(at.dx) <= 16 and -55 <= at.dy <= 10 and -1 <= at.width <= 1 and at.step in (0, 1, 2)
            assert (at.item is None) == (not ACTIONS[action].items)


@pytest.mark.parametrize("wrong", (lambda: actor_sprite("dragon"), lambda: pose("juggle", 0.0), lambda: backdrop("moon", "day"),
                                   lambda: backdrop("beach", "noon"), lambda: item_sprite("spoon")))
def test_unknown_names(wrong):
    with pytest.raises(ValueError): wrong()


# ---- questions

def test_questions_of_a_toy():
    found = {q.text: q.answer for q in open_questions(TOY)}
    article = "a" if "what is a dog doing?" in found else "the"
    assert found[f"what is {article} dog doing?"] == "jump" and found["who is jumping?"] == "dog"
    assert found["how many dogs are there?"] == "one" and found["what color is the ball?"] == "red"
    assert {q.answer for q in open_questions(TOY) if q.form == "time"} == {"night"}
    assert {q.answer for q in open_questions(TOY) if q.form == "place"} == {"beach"}
    assert "ball" in {q.answer for q in open_questions(TOY) if q.form == "item"}


def test_every_answer_follows_from_the_scene():
    "Read the question again, word by word, and answer it from the actors"
    deeds = {action.doing: name for name, action in ACTIONS.items()}
    single = {f"{kind}s": kind for kind in KINDS} | {"men": "man", "women": "woman"} | {kind: kind for kind in KINDS}
    for scene in SCENES:
        for question in open_questions(scene):
            assert question.text == question.text.lower() and question.text.endswith("?") and " " not in question.answer
            words = question.text[:-1].split()
            actors = [a for a in scene.actors if not {deeds.get(w) for w in words} - {None} or deeds.get(
                next((w for w in words if w in deeds), "")) == a.action]
            kinds = {single[w] for w in words if w in single}
            actors = [a for a in actors if not kinds or a.kind in kinds]
            kinds = {a.kind for a in actors}
            truth = {"action": {a.action for a in actors}, "actor": kinds, "creature": kinds, "number": {NUMBERS[len(actors)]},
                     "time": {scene.time}, "place": {scene.place},
                     "item": {a.item for a in actors}, "colour": {a.colour for a in actors if a.item in words}}
            assert truth[question.form] == {question.answer}, question
            assert question.type in MIX
            if question.form == "creature": assert question.answer not in HUMANS


def test_choice_is_balanced_and_repeatable():
    chosen = choose_questions(SCENES, 6, MIX, seed=2)
    assert chosen == choose_questions(SCENES, 6, MIX, seed=2) and all(len(qs) <= 6 for qs in chosen)
    assert all(len(set(qs)) == len(qs) for qs in chosen)
    flat = [q for qs in chosen for q in qs]
    types, forms = Counter(q.type for q in flat), defaultdict(Counter)
    for q in flat: forms[q.form][q.answer] += 1
    for word, share in MIX.items(): assert types[word] / len(flat) == pytest.approx(share, abs=0.06)
    for form, answers in forms.items():
        assert max(answers.values()) < (1.5 if form != "creature" else 1.8) * sum(answers.values()) / len(answers) + 3, form


@pytest.mark.parametrize("name", ACTION_SETS)
def test_guessing_from_the_question_does_not_pay(name):
    config = ACTION_SETS[name]
    scenes = split_scenes(config)
    chosen = {split: [q for qs in choose_questions(scenes[split], config.per_video, config.mix, i) for q in qs]
              for i, split in enumerate(SPLITS)}
    texts, forms = defaultdict(Counter), defaultdict(Counter)
    for q in chosen["train"]:
        texts[q.text][q.answer] += 1
        forms[q.form][q.answer] += 1
    hits = [(texts.get(q.text) or forms[q.form]).most_common(1)[0][0] == q.answer for q in chosen["test"]]
    assert len(hits) > 500 and np.mean(hits) < 0.25
    assert {q.answer for q in chosen["test"]} <= {q.answer for q in chosen["train"]}


# ---- features

def test_colour_codes():
    colours = np.array([[[[0, 0, 0], [255, 255, 255], [51, 52, 103]]]], np.uint8)
    expected = [sum(int(v) * 5 // 256 * 5 ** (2 - i) for i, v in enumerate(c)) for c in colours[0, 0]]
    assert colour_codes(colours).tolist() == [[expected]] and expected[:2] == [0, 124]


def test_pool_cells_is_a_mean_rounded_down():
    values = np.random.RandomState(0).randint(0, 256, (2, 12, 12, 3))
    for n in range(2):
        naive = [values[n, 2 * a:2 * a + 2, 2 * b:2 * b + 2, c].sum() // 4 for a in range(6) for b in range(6) for c in range(3)]
        assert pool_cells(values)[n].tolist() == naive


@pytest.mark.parametrize("masked", (False, True))
def test_spots_are_those_of_a_loop(masked):
    rng = np.random.RandomState(1)
    codes, seen = rng.randint(0, 125, (3, 20, 24)), rng.rand(3, 20, 24) < 0.5
    found = spots(codes, seen if masked else None)
    for n in range(3):
        for colour in range(125):
            ys, xs = np.nonzero((codes[n] == colour) & (seen[n] | (not masked)))
            assert found["area"][n, colour] == len(xs)
            for name, at in (("x", xs), ("y", ys)):
                centre = 8 * sum(at) // len(at) if len(at) else 0
                assert found[name][n, colour] == centre
                if len(at): assert found[f"spread_{name}"][n, colour] == 8 * sum(at * at) // len(at) - centre * centre // 8


def test_statistics_are_whole_numbers_in_a_byte():
    for scene in SCENES[:8]:
        frames = render_frames(scene)
        for groups in (appearance_statistics(frames), motion_statistics(frames[:CLIP])):
            for group in groups: assert group.dtype.kind == "i" and group.min() >= 0 and group.max() <= 255


def test_features_have_the_real_shapes():
    for num_clips in (1, 3):
        appearance, motion = encode_frames(render_frames(replace(TOY, num_frames=num_clips * CLIP)))
        assert appearance.shape == (num_clips, CLIP, WIDTH) and motion.shape == (num_clips, WIDTH)
        assert appearance.dtype == motion.dtype == np.float16
        assert np.isfinite(appearance).all() and np.isfinite(motion).all() and (appearance > 0).mean() > 0.2


def test_frames_and_clips_do_not_depend_on_their_neighbours():
    frames = render_frames(replace(TOY, num_frames=2 * CLIP))
    both, second = encode_frames(frames), encode_frames(frames[CLIP:])
    for whole, part in zip(both, second): assert np.array_equal(whole[1:], part)


def test_random_features_are_exact_sums():
    groups = [np.random.RandomState(i).randint(0, 256, (2, size)) for i, size in enumerate((30, 9))]
    matrix, out = projection((30, 9), 5), random_features(groups, 5)
    assert set(np.unique(matrix)) == {-1, 0, 1} and (abs(matrix).sum(0) == 4).all()
    assert not matrix[30:, ::2].any() and not matrix[:30, 1::2].any()
    exact = np.concatenate(groups, 1).astype(np.int64) @ matrix.astype(np.int64)
    assert np.array_equal(out, (np.maximum(exact, 0) / 64).astype(np.float16))


def test_features_are_the_same_everywhere():
    "The statistics of a made-up film: this does not depend on the drawing library"
    frames = np.random.RandomState(0).randint(0, 256, (CLIP, SIZE, SIZE, 3)).astype(np.uint8)
    frames[:, 20:40, 30:60] = (200, 30, 30)
    found = hashlib.sha256(b"".join(array.tobytes() for array in encode_frames(frames))).hexdigest()[:16]
    assert found == "8bf4387fad4133fc"


def test_motion_tells_actions_apart():
    def motion(action, phase):
        colour = "red" if ACTIONS[action].coloured else None
        actor = replace(DOG, action=action, item=(*ACTIONS[action].items, None)[0], colour=colour, phase=phase)
        return encode_frames(render_frames(replace(TOY, num_frames=48, actors=(actor,))))[1].astype(float).mean(0)
    found = np.array([[motion(action, phase) for action in ACTIONS] for phase in (0.2, 1.9)])
    found = (found - found.mean((0, 1))) / (found.std((0, 1)) + 1)
    near = np.einsum("id,jd->ij", *(f / np.linalg.norm(f, axis=1, keepdims=True) for f in found)).argmax(1)
    assert (near == np.arange(len(ACTIONS))).sum() >= 11


# ---- the sets

@pytest.mark.parametrize("name", ACTION_SETS)
def test_splits(name):
    config = ACTION_SETS[name]
    scenes, secret = split_scenes(config), held_back_pairs(config)
    assert [len(scenes[s]) for s in SPLITS] == [300, 50, 100]
    ids = [scene.video_id for s in SPLITS for scene in scenes[s]]
    assert ids == list(range(config.first_id, config.first_id + 450))
    assert len({scene.seed for s in SPLITS for scene in scenes[s]}) == 450
    assert not any(scene.pairs & secret for s in ("train", "val") for scene in scenes[s])
    new = [scene.pairs <= secret for scene in scenes["test"]]
    assert new == [True, False] * 50 and not any(scene.pairs & secret for scene in scenes["test"][1::2])
    met = {word for scene in scenes["train"] for pair in scene.pairs for word in pair}
    assert met == set(KINDS) | set(ACTIONS)


def test_the_two_sets_differ():
    first, second = ACTION_SETS["msvd_qa"], ACTION_SETS["msrvtt_qa"]
    assert held_back_pairs(first) != held_back_pairs(second) and second.num_clips > first.num_clips
    assert second.what > first.what and second.who > first.who
    for config in (first, second): assert sum(config.mix.values()) == pytest.approx(1)


def test_default_scenes_are_the_same_everywhere():
    text = json.dumps([[s.to_json() for s in split_scenes(config)[split]] for config in ACTION_SETS.values() for split in SPLITS])
    assert hashlib.sha256(text.encode()).hexdigest().startswith("93cc3a67d6c6e882")


def test_layout_of_msvd(built):
    names = set(content(built))
    assert {f"{split}_qa.json" for split in SPLITS} | {"youtube_mapping.txt", "made_from.json"} <= names
    assert {f"feats/{kind}/{i}.npy" for kind in ("appearance", "motion") for i in range(1, 9)} <= names
    mapping = dict(reversed(line.split()) for line in (built / "youtube_mapping.txt").read_text().splitlines())
    assert mapping["vid1"] == "sample00001_0_2" and len(mapping) == 8
    films = [p.stem for p in (built / "video").iterdir()]
    assert len(films) == 4 and set(films) <= set(mapping.values())
    assert not [name for name in names if name.endswith(".part")]


def test_layout_of_msrvtt(tmp_path):
    build_action_set(tmp_path, "msrvtt_qa", replace(TINY, first_id=7010), workers=0, features=False)
    assert sorted(p.name for p in (tmp_path / "video").iterdir()) == [f"video{i}.mp4" for i in (7010, 7015, 7016, 7017)]
    assert not (tmp_path / "feats").exists() and not (tmp_path / "youtube_mapping.txt").exists()


def test_records_have_the_real_schema(built):
    ids, videos = [], []
    for split in SPLITS:
        records, truth = load(built / f"{split}_qa.json"), load(built / "truth" / f"{split}.json")
        for record in records:
            assert list(record) == ["answer", "id", "question", "video_id"]
            assert isinstance(record["id"], int) and isinstance(record["video_id"], int)
        ids += [record["id"] for record in records]
        videos.append({record["video_id"] for record in records})
        assert videos[-1] <= {ActionScene.from_json(scene).video_id for scene in truth}
    assert ids == list(range(len(ids)))
    assert not (videos[0] & videos[1] or videos[0] & videos[2] or videos[1] & videos[2])


def test_a_stopped_build_goes_on(built):
    before = content(built)
    stamps = {p: p.stat().st_mtime_ns for p in built.rglob("*.npy")}
    lost, damaged = (built / "feats" / "motion" / f"{number}.npy" for number in (3, 4))
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    build_action_set(built, "msvd_qa", TINY, workers=0)
    assert content(built) == before
    assert [p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp and p.stem not in "34"] == []


def test_features_can_come_later_and_from_other_processes(built, tmp_path):
    build_action_set(tmp_path / "x", "msvd_qa", TINY, workers=0, features=False)
    build_action_set(tmp_path / "x", "msvd_qa", TINY, workers=2)
    assert content(tmp_path / "x") == content(built)


def test_another_set_in_the_folder_is_refused(built):
    before = content(built)
    with pytest.raises(ValueError, match="other scenes"): build_action_set(built, "msvd_qa", replace(TINY, seed=9), workers=0)
    with pytest.raises(ValueError, match="tgif"): build_action_set(built, "tgif_qa", TINY, workers=0)
    assert content(built) == before


def test_extreme_share_is_refused(tmp_path):
    with pytest.raises(ValueError, match="held_back"):
        build_action_set(tmp_path / "x", config=replace(TINY, held_back=0.9), workers=0)
    assert not (tmp_path / "x").exists()
    assert held_back_pairs(replace(TINY, held_back=0)) == frozenset()
    assert len(split_scenes(replace(TINY, held_back=0))["test"]) == 3


def test_films_are_silent_and_can_be_read_back(built):
    path = next((built / "video").glob("*.mp4"))
    with av.open(str(path)) as film:
        assert not film.streams.audio and film.streams.video[0].average_rate == FPS
    frames = read_silent_video(path)
    assert frames.shape == (CLIP, SIZE, SIZE, 3)
    scene = next(ActionScene.from_json(r) for s in SPLITS for r in load(built / "truth" / f"{s}.json")
                 if video_name("msvd_qa", ActionScene.from_json(r)) == path.stem)
    assert abs(frames.astype(int) - render_frames(scene)).mean() < 6
    near = [np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1]
            for a, b in zip(encode_frames(frames), encode_frames(render_frames(scene)))]
    assert min(near) > 0.85


def test_a_film_of_another_size_is_refused(tmp_path):
    from mcd_edu.samples.action_set import write_silent_video
    write_silent_video(tmp_path / "a.mp4", np.zeros((CLIP, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="96"): read_silent_video(tmp_path / "a.mp4")


def test_annotations_are_repeatable(tmp_path):
    for name in "ab": write_annotations(tmp_path / name, "msvd_qa", split_scenes(TINY), TINY)
    assert content(tmp_path / "a") == content(tmp_path / "b")
