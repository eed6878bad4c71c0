"Tests of mcd_edu.samples.scenes: the lots, the pictures, the sound and what they have in common."
import hashlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.samples.pictures import INSTRUMENTS, NUM_VARIANTS
from mcd_edu.samples.scenes import (
    COLUMNS,
    DENSITIES,
    DEPTHS,
    DURATION,
    FPS,
    LEVELS,
    PLACES,
    SIZE,
    SWING,
    Player,
    Scene,
    render_frames,
    render_waveform,
    sample_names,
    sample_scene,
    sample_timing,
    sprite,
)
from mcd_edu.samples.sounds import SAMPLE_RATE, SynthBank, rms_db

SCENES = [sample_scene(f"{i:08d}", i) for i in range(400)]
FLUTE = Player("flute", 0, 0, "left", "near", 2, 7, 0.0, 2.5)
CELLO = Player("cello", 1, 0, "middle", "far", None, None, -8.0, 1.0)
DRUM = Player("drum", 0, 0, "right", "near", 0, 10, -16.0, 6.0)
BANJO = Player("banjo", 0, 0, None, "near", 5, 10, -8.0, 6.0)
TOY = Scene("toy", 0, "outdoor", (FLUTE, CELLO, DRUM, BANJO))
BANK = SynthBank()


def movement(frames):
    "Which of the three places change within each of the ten seconds, with plain loops"
    moved = np.zeros((3, DURATION), bool)
    for row, x in enumerate(COLUMNS.values()):
        for i in range(1, len(frames)):
            if i % FPS and (frames[i] != frames[i - 1])[:, x - 20:x + 20].any():
                moved[row, i // FPS] = True
    return moved


# ---- determinism

def test_scenes_are_the_same_everywhere():
    lines = json.dumps([scene.to_json() for scene in SCENES[:100]])
    assert hashlib.sha256(lines.encode()).hexdigest().startswith("a45b8a89a8c3b423")


def test_one_scene_by_heart():
    scene = sample_scene("x", 0)
    assert scene.setting == "outdoor" and scene.seed == 0
    assert [p.instrument for p in scene.players] == ["drum", "guzheng", "suona", "saxophone"]
    assert scene.players[1] == Player(
        "guzheng", 0, 1, "middle", "near", 3, 10, -8.0, 2.5)


def test_scenes_do_not_depend_on_the_hash_seed():
    code = ("import json; from mcd_edu.samples.scenes import sample_scene;"
            "print(json.dumps([sample_scene('x', i).to_json() for i in range(20)]))")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}).stdout
            for seed in ("1", "2")]
    assert runs[0] == runs[1] == json.dumps(
        [sample_scene("x", i).to_json() for i in range(20)]) + "\n"


@given(st.integers(0, 10**7))
@settings(max_examples=60, deadline=None)
def test_same_seed_same_scene_and_json_round_trip(seed):
    scene = sample_scene("x", seed)
    assert scene == sample_scene("x", seed)
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


# ---- the world's rules

@given(st.integers(0, 10**7))
@settings(max_examples=150, deadline=None)
def test_rules_hold(seed):
    scene = sample_scene("x", seed)
    assert scene.setting in ("indoor", "outdoor")
    seen = [p for p in scene.players if p.place is not None]
    off_screen = [p for p in scene.players if p.place is None]
    assert 1 <= len(seen) <= 4 and len(off_screen) <= 1
    assert scene.players == (*seen, *off_screen)
    order = [PLACES.index(p.place) for p in seen]
    assert order == sorted(order)
    assert len({(p.place, p.depth) for p in seen}) == len(seen)
    assert len({p.place for p in seen}) == min(len(seen), 3)
    assert any(p.onset is not None for p in scene.players)
    assert not {p.instrument for p in seen} & {p.instrument for p in off_screen}
    for p in scene.players:
        assert p.instrument in INSTRUMENTS and p.level in LEVELS and p.density in DENSITIES
        assert p.picture in range(NUM_VARIANTS) and p.sound in (0, 1) and p.depth in DEPTHS
        assert (p.onset is None) == (p.end is None)
        if p.onset is not None:
            assert isinstance(p.onset, int) and isinstance(p.end, int)
            assert 0 <= p.onset <= 6 and p.onset + 3 <= p.end <= DURATION
    assert all(p.onset is not None for p in off_screen)


def test_shares_are_as_described():
    count = Counter(len(scene.visible) for scene in SCENES)
    for number, share in zip((1, 2, 3, 4), (0.15, 0.25, 0.35, 0.25)):
        assert count[number] / len(SCENES) == pytest.approx(share, abs=0.07)
    voiceover = sum(any(not p.visible for p in s.players) for s in SCENES)
    assert voiceover / len(SCENES) == pytest.approx(0.4, abs=0.08)


def test_timing_covers_its_range():
    rng = Random(0)
    drawn = {sample_timing(rng, False) for _ in range(5000)}
    assert drawn == {(a, b) for a in range(7) for b in range(a + 3, DURATION + 1)}
    assert sample_timing(rng, True) == (0, DURATION)


def test_properties_of_players_and_scenes():
    assert [p.visible for p in TOY.players] == [True, True, True, False]
    assert [p.sounding for p in TOY.players] == [True, False, True, True]
    assert [p.duration for p in TOY.players] == [5, 0, 10, 5]
    assert [p.always for p in TOY.players] == [False, False, True, False]
    assert TOY.visible == [FLUTE, CELLO, DRUM] and TOY.sounding == [FLUTE, DRUM, BANJO]
    assert TOY.kinds == {"flute", "cello", "drum", "banjo"}


def test_names_follow_what_is_allowed():
    no_tuba = [sample_scene("x", i, lambda kinds: "tuba" not in kinds) for i in range(300)]
    assert all("tuba" not in scene.kinds for scene in no_tuba)
    with pytest.raises(ValueError, match="allowed"):
        sample_names(Random(0), 2, False, lambda kinds: False, max_draws=50)


def test_a_scene_that_nobody_plays_is_drawn_again():
    again = [i for i, scene in enumerate(SCENES) if scene.seed != i]
    assert again and all(SCENES[i].seed == i + 1_000_003 for i in again[:1])
    assert SCENES[again[0]].video_id == f"{again[0]:08d}"


# ---- pictures

def test_frames_have_their_shape():
    frames = render_frames(TOY)
    assert frames.shape == (DURATION * FPS, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert np.array_equal(frames, render_frames(TOY))


@pytest.mark.parametrize("seed", range(25))
def test_who_sounds_moves_and_who_is_silent_is_still(seed):
    scene = SCENES[seed]
    truth = [[any(p.place == place and p.sounding and p.onset <= second < p.end
                  for p in scene.players) for second in range(DURATION)] for place in PLACES]
    assert movement(render_frames(scene)).tolist() == truth


@pytest.mark.parametrize("level", LEVELS)
def test_a_player_jumps_as_far_as_its_level_says(level):
    solo = replace(TOY, players=(replace(FLUTE, level=level),))
    still = render_frames(replace(TOY, players=(replace(FLUTE, onset=None, end=None),)))[0]
    nobody = render_frames(replace(TOY, players=(replace(CELLO, place=None),)))[0]
    up, rest = render_frames(solo)[13], render_frames(solo)[12]
    assert np.array_equal(rest, still)

    def top(frame): return np.argmax((frame != nobody).any(axis=(1, 2)))
    assert top(rest) - top(up) == SWING[level]


def test_near_stands_before_far():
    near = replace(FLUTE, onset=None, end=None)
    pair = (near, replace(CELLO, place="left"))
    one, two = (render_frames(replace(TOY, players=p)) for p in (pair, pair[::-1]))
    assert np.array_equal(one, two)
    size, foot = DEPTHS["near"]
    picture = np.asarray(sprite("flute", 0, "near"))
    left = COLUMNS["left"] - size // 2
    solid = picture[..., 3] == 255
    solid[:, :max(0, -left)] = False
    rows, columns = np.nonzero(solid)
    assert (one[0][rows + foot - size, columns + left] == picture[rows, columns, :3]).all()


def test_off_screen_is_never_drawn():
    assert np.array_equal(render_frames(TOY), render_frames(replace(TOY, players=TOY.players[:3])))


# ---- sound

def test_waveform_has_its_shape_and_is_the_same_again():
    wave = render_waveform(TOY, BANK)
    assert wave.shape == (DURATION * SAMPLE_RATE,) and wave.dtype == np.float32
    assert np.abs(wave).max() <= 1 and np.array_equal(wave, render_waveform(TOY, BANK))


@pytest.mark.parametrize("seed", range(15))
def test_silence_where_nobody_plays_and_sound_where_one_begins(seed):
    scene = SCENES[seed]
    seconds = render_waveform(scene, BANK).reshape(DURATION, -1)
    for second, wave in enumerate(seconds):
        if not any(p.onset <= second < p.end for p in scene.sounding): assert not wave.any()
    for p in scene.sounding: assert rms_db(seconds[p.onset]) > -60


def test_parts_are_independent_of_each_other():
    without = render_waveform(replace(TOY, players=TOY.players[:3]), BANK)
    with_banjo = render_waveform(TOY, BANK)
    assert np.array_equal(with_banjo[:5 * SAMPLE_RATE], without[:5 * SAMPLE_RATE])
    assert not np.array_equal(with_banjo, without)


@pytest.mark.parametrize("level", LEVELS)
def test_level_is_heard(level):
    solo = render_waveform(replace(TOY, players=(replace(FLUTE, level=level),)), BANK)
    loudest = render_waveform(replace(TOY, players=(FLUTE,)), BANK)
    assert rms_db(solo) - rms_db(loudest) == pytest.approx(level, abs=0.1)


# ---- wrong input

def test_errors_are_clear():
    with pytest.raises(ValueError, match="kazoo"):
        render_frames(replace(TOY, players=(replace(FLUTE, instrument="kazoo"),)))
    with pytest.raises(ValueError, match="silent clip"):
        render_waveform(replace(TOY, players=(CELLO,)), BANK)
    with pytest.raises(TypeError, match="colour"):
        Scene.from_json({**TOY.to_json(), "colour": "red"})
