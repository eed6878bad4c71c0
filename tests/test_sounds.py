"Tests of mcd_edu.samples.sounds: notes, banks, parts and the mix."
import json
import logging
import math
import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.samples import sounds
from mcd_edu.samples.pictures import INSTRUMENTS, NUM_VARIANTS
from mcd_edu.samples.sounds import (
    NOTE_DB,
    NOTE_SECONDS,
    NUM_PITCHES,
    REFERENCE_DB,
    SAMPLE_RATE,
    TONES,
    VOICES,
    NoteBank,
    SynthBank,
    Tone,
    build_note_bank,
    downsample,
    fade,
    find_assets,
    gain,
    load_bank,
    mix,
    note_times,
    pitch_walk,
    play_line,
    read_flac,
    rms_db,
    sines,
    synthesise_note,
    whole_note,
    write_bank,
    write_flac,
)

HAS_ASSET = (find_assets() / "notes.json").is_file()
BANKS = [pytest.param(SynthBank(), id="synthesised")]
if HAS_ASSET:
    BANKS.append(pytest.param(NoteBank.load(), id="sampled"))


@pytest.fixture(scope="module")
def small_bank(tmp_path_factory):
    "A folder with a bank of very short synthesised notes"
    folder = tmp_path_factory.mktemp("bank")
    notes = {name: [[whole_note(name, variant, pitch)[:800] for pitch in range(2)]
                    for variant in range(NUM_VARIANTS)] for name in INSTRUMENTS}
    write_bank(notes, folder, dict(name="test"))
    return folder


# ---- levels and fades

def test_rms_db_is_its_equation():
    wave = [0.3, -0.2, 0.1, 0.5]
    by_hand = 10 * math.log10(sum(x * x for x in wave) / 4)
    assert rms_db(np.array(wave)) == pytest.approx(by_hand, abs=1e-9)
    assert rms_db(np.zeros(4)) == rms_db(np.zeros(0)) == -200


@given(st.floats(-40, 20))
def test_gain_shifts_the_level(decibels):
    wave = np.array([0.1, -0.3])
    assert rms_db(gain(decibels) * wave) == pytest.approx(rms_db(wave) + decibels, abs=1e-6)


@given(st.integers(0, 600))
@settings(deadline=None)
def test_fade_ends_at_zero_and_never_adds(num):
    faded = fade(np.ones(num), rise=0.002)
    assert len(faded) == num and faded.dtype == np.float32
    assert np.all((0 <= faded) & (faded <= 1))
    if num: assert faded[0] == faded[-1] == 0


def test_fade_leaves_its_input_alone():
    wave = np.ones(1000, dtype=np.float32)
    fade(wave)
    assert np.all(wave == 1)


# ---- the synthesiser

def test_tables_cover_every_instrument():
    assert set(TONES) == set(VOICES) == set(INSTRUMENTS)
    assert all(len(VOICES[name]) == NUM_VARIANTS for name in INSTRUMENTS)
    assert all(len(voice.keys) == NUM_PITCHES for name in INSTRUMENTS for voice in VOICES[name])
    assert all(len(t.drums) == NUM_PITCHES for t in TONES.values() if t.family == "drum")


def test_sines_equal_a_loop():
    tone = Tone("plucked", slope=0.7, even=0.5, formant=0, decay=0.8, attack=0, vibrato=0, noise=0)
    base, slow = 300., []
    for i in range(100):
        start, total = i / SAMPLE_RATE, 0.
        for p in range(1, 41):
            if p * base < 0.45 * SAMPLE_RATE:
                strength = p**-0.7 * (1 if p % 2 else 0.5) * math.exp(-6.9 / 0.8 * p**0.5 * start)
                total += strength * math.sin(2 * math.pi * p * base * (i + 1) / SAMPLE_RATE)
        slow.append(total)
    np.testing.assert_allclose(sines(tone, base, np.arange(100) / SAMPLE_RATE), slow, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in INSTRUMENTS if TONES[n].stretch < 0.01 and not TONES[n].drums])
def test_synthesised_pitch_is_the_key(name):
    base = 440 * 2 ** ((VOICES[name][0].keys[2] - 69) / 12)
    wave = synthesise_note(name, 0, 2, NOTE_SECONDS)[1600:].astype(float)
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 65536))
    frequency = np.fft.rfftfreq(65536, 1 / SAMPLE_RATE)
    near = np.abs(frequency / base - 1) < 0.1
    assert frequency[near][spectrum[near].argmax()] == pytest.approx(base, rel=0.02)


def test_synthesised_notes_do_not_depend_on_the_process():
    code = ("import hashlib; from mcd_edu.samples.sounds import *; "
            "print(hashlib.sha256(synthesise_note('flute', 1, 3, .5).tobytes()).hexdigest())")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={**os.environ, "PYTHONHASHSEED": seed,
                                "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}).stdout
            for seed in ("1", "2")}
    assert len(runs) == 1


def test_a_note_is_the_callers_own():
    synthesise_note("tuba", 0, 0, 0.1)[:] = 1
    assert synthesise_note("tuba", 0, 0, 0.1)[0] == 0
    with pytest.raises(ValueError):
        whole_note("tuba", 0, 0)[0] = 1


# ---- both banks

@pytest.mark.parametrize("bank", BANKS)
def test_every_note_has_its_length_level_and_soft_ends(bank):
    for name in INSTRUMENTS:
        for variant in range(NUM_VARIANTS):
            for pitch in range(bank.num_pitches):
                note = bank.note(name, variant, pitch, 0.7)
                assert note.dtype == np.float32 and len(note) == round(0.7 * SAMPLE_RATE)
                assert note[0] == note[-1] == 0 and np.abs(note[-16:]).max() < 0.01
                assert np.abs(note).max() < 1
                assert rms_db(note[:SAMPLE_RATE // 2]) == pytest.approx(NOTE_DB, abs=0.1)
    assert len(bank.note("flute", 0, 0, 99)) == round(NOTE_SECONDS * SAMPLE_RATE)


@pytest.mark.parametrize("bank", BANKS)
def test_variants_and_pitches_differ(bank):
    for name in INSTRUMENTS:
        notes = {bank.note(name, variant, pitch, 0.3).tobytes()
                 for variant in range(NUM_VARIANTS) for pitch in range(bank.num_pitches)}
        assert len(notes) == NUM_VARIANTS * bank.num_pitches, name


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("arguments, word", [
    (("kazoo", 0, 0, 1), "kazoo"), (("flute", 2, 0, 1), "variant 2"), (("flute", -1, 0, 1), "variant -1"),
    (("flute", 0, 4, 1), "pitch 4"), (("flute", 0, 0, 0), "0 seconds"),
    (("flute", 0, 0, float("nan")), "nan seconds"),
])
def test_no_such_note(bank, arguments, word):
    with pytest.raises(ValueError, match=word):
        bank.note(*arguments)


def log_mel_mean(wave, bands=24, size=1024):
    "A small listener: the log-mel spectrum, averaged over time"
    edge = 700 * (10 ** (np.linspace(90, 2770, bands + 2) / 2595) - 1)[:, None]
    f = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    up, down = (f - edge[:-2]) / np.diff(edge[:-1], axis=0), (edge[2:] - f) / np.diff(edge[1:], axis=0)
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[::320] * np.hanning(size)
    filters = np.clip(np.minimum(up, down), 0, None)
    return np.log(np.abs(np.fft.rfft(frames)) ** 2 @ filters.T + 1e-6).mean(0)


@pytest.mark.parametrize("bank", BANKS)
def test_instruments_can_be_told_apart_at_unheard_pitches(bank):
    x = np.array([[[log_mel_mean(bank.note(name, v, p, 1.)) for p in range(NUM_PITCHES)]
                   for v in range(NUM_VARIANTS)] for name in INSTRUMENTS])
    right = []
    for held in range(NUM_PITCHES):
        centroids = np.concatenate(np.delete(x, held, axis=2).mean(2))
        distance = np.linalg.norm(x[:, :, held, None] - centroids, axis=-1)
        right.append(distance.argmin(-1) // NUM_VARIANTS == np.arange(len(INSTRUMENTS))[:, None])
    assert np.mean(right) > 0.6  # guessing: 0.045


# ---- the files of a bank

def test_flac_is_lossless(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32768, 10_001).astype(np.int16)
    write_flac(samples, tmp_path / "x.flac")
    np.testing.assert_array_equal(read_flac(tmp_path / "x.flac"), samples)
    assert [f.name for f in tmp_path.iterdir()] == ["x.flac"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_flac(np.ones(10, np.int16), tmp_path / "x.flac")
    def broken(*_): raise OSError("disk full")
    monkeypatch.setattr(sounds.os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_flac(np.zeros(10, np.int16), tmp_path / "x.flac")
    monkeypatch.undo()
    assert [f.name for f in tmp_path.iterdir()] == ["x.flac"]
    assert read_flac(tmp_path / "x.flac").all()


def test_bank_round_trip(small_bank):
    bank = NoteBank.load(small_bank)
    assert bank.num_pitches == 2 and bank.kind == "sampled"
    expected = fade(whole_note("pipa", 1, 1)[:800])
    np.testing.assert_allclose(bank.note("pipa", 1, 1, 9.), expected, atol=0.51 / 32767)
    with pytest.raises(ValueError, match="pitch 2"):
        bank.note("pipa", 1, 2, 0.1)


def spoil(folder, small_bank, what):
    "A copy of the bank with one fault"
    for end in ("json", "flac"):
        (folder / f"notes.{end}").write_bytes((small_bank / f"notes.{end}").read_bytes())
    index = json.loads((folder / "notes.json").read_text())
    if what == "sample":
        samples = read_flac(folder / "notes.flac")
        samples[100] += 1
        write_flac(samples, folder / "notes.flac")
    elif what == "truncated":
        data = (folder / "notes.flac").read_bytes()
        (folder / "notes.flac").write_bytes(data[:len(data) // 2])
    elif what == "not flac": (folder / "notes.flac").write_bytes(b"version https://git-lfs")
    elif what == "not json": (folder / "notes.json").write_text("{")
    elif what == "list": (folder / "notes.json").write_text("[]")
    elif what == "instrument gone": del index["notes"]["flute"]
    elif what == "rate": index["sample_rate"] = 8000
    elif what == "beyond the end": index["notes"]["flute"][0][0] = [10**9, 800]
    if what in ("instrument gone", "rate", "beyond the end"):
        (folder / "notes.json").write_text(json.dumps(index))


@pytest.mark.parametrize("what", ["sample", "truncated", "not flac", "not json", "list",
                                  "instrument gone", "rate", "beyond the end"])
def test_a_damaged_bank_is_refused(tmp_path, small_bank, what):
    spoil(tmp_path, small_bank, what)
    with pytest.raises(ValueError, match="fetch"):
        NoteBank.load(tmp_path)
    with pytest.raises(ValueError, match="fetch"):  # and not silently replaced by the synthesiser
        load_bank(tmp_path)


def test_without_a_bank_notes_are_synthesised_and_the_log_says_so(tmp_path, caplog):
    with pytest.raises(FileNotFoundError, match="build_note_bank"):
        NoteBank.load(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert load_bank(tmp_path).kind == "synthesised"
    assert "synthesised" in caplog.text


@pytest.mark.skipif(not HAS_ASSET, reason="the note bank is not here")
def test_the_shipped_bank():
    folder = find_assets()
    about = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    assert about["source"]["licence"] == "MIT" and "Frank Wen" in about["source"]["copyright"]
    assert (folder / "notes.flac").stat().st_size < 3_000_000
    assert load_bank().kind == "sampled" and load_bank().num_pitches == NUM_PITCHES


def test_building_without_a_soundfont(tmp_path):
    with pytest.raises(FileNotFoundError, match="fluid-soundfont-gm"):
        build_note_bank(tmp_path / "none.sf2", tmp_path)


def test_building_without_tinysoundfont(tmp_path, monkeypatch):
    (tmp_path / "some.sf2").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(ImportError, match="pip install tinysoundfont"):
        build_note_bank(tmp_path / "some.sf2", tmp_path)


def test_downsampling_keeps_low_and_removes_high():
    time = np.arange(4800) / 48000
    low, high = (downsample(np.sin(2 * np.pi * f * time))[100:-100] for f in (1000, 10_000))
    assert rms_db(low) == pytest.approx(-3.01, abs=0.1) and rms_db(high) < -60


# ---- parts and the mix

@given(onset=st.floats(0, 8), length=st.floats(0.05, 2), density=st.floats(0.2, 20), seed=st.integers(0, 99))
def test_note_times_are_in_order_and_near_the_beat(onset, length, density, seed):
    times = note_times(onset, onset + length, density, Random(seed))
    assert times[0] == onset and times[-1] == onset + length
    assert all(a < b for a, b in zip(times, times[1:]))
    assert len(times) - 1 == max(1, round((onset + length - onset) * density))
    for i, moment in enumerate(times[:-1]):
        assert abs(moment - onset - i / density) <= 0.1 / density + 1e-9


@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 99))
def test_pitch_walk_takes_small_steps_in_the_register(num_notes, num_pitches, seed):
    walk = pitch_walk(num_notes, num_pitches, Random(seed))
    assert len(walk) == num_notes and all(0 <= pitch < num_pitches for pitch in walk)
    assert all(abs(a - b) <= 1 for a, b in zip(walk, walk[1:]))


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("density, level", [(1, 0), (3, -8), (6, -16)])
def test_level_length_and_silence(bank, density, level):
    for i, name in enumerate(INSTRUMENTS):
        line = play_line(bank, name, i % 2, 1, 4, density, level, 5, Random(i))
        assert line.shape == (5 * SAMPLE_RATE,) and line.dtype == np.float32
        assert rms_db(line[SAMPLE_RATE:4 * SAMPLE_RATE]) == pytest.approx(REFERENCE_DB + level, abs=0.5)
        assert not line[:SAMPLE_RATE].any() and not line[4 * SAMPLE_RATE:].any()
        assert np.abs(line[SAMPLE_RATE]) < 1e-3 and np.abs(line[4 * SAMPLE_RATE - 1]) < 1e-3


@pytest.mark.parametrize("bank", BANKS)
def test_a_line_is_determined_by_its_seed(bank):
    first, second, other = (play_line(bank, "pipa", 0, 0, 4, 3, 0, 5, Random(s)) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_density_is_the_number_of_notes():
    line = play_line(SynthBank(), "xylophone", 0, 0, 10, 2, 0, 10, Random(0))
    envelope = np.abs(line).reshape(-1, 160).max(1)  # 10 ms
    strokes = (envelope[1:] > 0.1) & (envelope[:-1] <= 0.1)
    assert strokes.sum() + (envelope[0] > 0.1) == 20


@given(onset=st.floats(0, 2.9), length=st.floats(0.02, 3), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_times_give_the_whole_clip(onset, length, seed):
    end = min(onset + length, 3.)
    if end - onset < 0.01: return
    line = play_line(SynthBank(), "banjo", 0, onset, end, 4, 0, 3., Random(seed))
    assert line.shape == (48_000,) and np.isfinite(line).all()


@pytest.mark.parametrize("change, word", [
    (dict(onset=-1), "-1"), (dict(onset=5), "from 5 to 4"), (dict(end=11), "11"), (dict(end=1.005), "too short"),
    (dict(density=0), "density 0"), (dict(density=float("nan")), "density"), (dict(density=100), "at most 20"),
    (dict(instrument="kazoo"), "kazoo"), (dict(variant=7), "variant 7"),
])
def test_impossible_lines(change, word):
    right = dict(instrument="flute", variant=0, onset=1, end=4, density=2, level_db=0,
                 total_seconds=10, rng=Random(0))
    with pytest.raises(ValueError, match=word):
        play_line(SynthBank(), **{**right, **change})


def test_mix_is_the_sum_where_it_is_soft_and_never_clips_where_it_is_loud():
    first, second = np.linspace(-0.3, 0.3, 50), np.linspace(0.2, -0.1, 50)
    np.testing.assert_allclose(mix([first, second]), first + second, atol=1e-7)
    ramp = np.linspace(-4, 4, 2001)
    bent = mix([ramp])
    assert np.abs(bent).max() <= 1 and bent.dtype == np.float32
    assert np.all(np.diff(bent) >= 0)  # louder never becomes quieter
    np.testing.assert_allclose(bent, -bent[::-1], atol=1e-7)


@pytest.mark.parametrize("bank", BANKS)
def test_five_loud_players_do_not_clip(bank):
    rng = Random(0)
    lines = [play_line(bank, name, 0, 0, 5, density, 0, 5, rng) for name, density in
             (("congas", 1), ("drum", 2), ("xylophone", 1), ("tuba", 6), ("suona", 3))]
    wave = mix(lines)
    assert wave.shape == (5 * SAMPLE_RATE,) and np.abs(wave).max() < 1
    assert np.mean(np.abs(np.sum(lines, axis=0)) > 0.7) < 1e-2


def test_mix_refuses_nothing_and_unequal_lengths():
    with pytest.raises(ValueError, match="at least one"):
        mix([])
    with pytest.raises(ValueError, match="total_seconds"):
        mix([np.zeros(3), np.zeros(4)])
