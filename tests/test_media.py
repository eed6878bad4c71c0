"""Videos of every kind, whole and broken: what is read, what is refused, and in which words."""

import os
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mcd_edu.media as media
from mcd_edu.media import (
    FRAME_SIZE,
    FRAMES_PER_SEGMENT,
    MAX_PIXELS,
    SAMPLE_RATE,
    FrameCollector,
    MediaError,
    SoundCollector,
    is_cut,
    read_segments,
    segment_starts,
    write_video,
    write_whole,
)

# Making videos ---------------------------------------------------------------------------------

def tone(frequency, seconds=1.0, rate=SAMPLE_RATE):
    return 0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def scale(seconds, rate=SAMPLE_RATE):
    """A tone a second, 200 Hz, 250 Hz, …"""
    return np.concatenate([tone(200 + 50 * (i % 20), rate=rate) for i in range(seconds)])


def grey(level, width=64, height=64):
    return np.full((height, width, 3), level, np.uint8)


def staircase(seconds, fps=4.0):
    """Frames whose grey level rises by 20 a second."""
    return [grey(20 * int(i / fps)) for i in range(round(seconds * fps))]


def make(path, frames=None, sound=None, fps=4.0, rate=SAMPLE_RATE, times=None, sound_start=0,
         gap=0, codecs=("libx264", "aac"), options=None):
    """Write a video with or without either track, with frames at any `times` (seconds)."""
    with av.open(f"file:{path}", "w", options=options or {}) as container:
        if frames is not None:
            speed = Fraction(fps).limit_denominator(1001)
            video = container.add_stream(codecs[0], rate=speed)
            video.height, video.width = frames[0].shape[:2] if len(frames) else (64, 64)
            video.pix_fmt, video.thread_count = "yuv420p", 1
            video.codec_context.time_base = Fraction(1, 1000) if times is not None else 1 / speed
        if sound is not None:
            sound = np.atleast_2d(sound).astype(np.float32)
            layout = "stereo" if len(sound) == 2 else "mono"
            audio = container.add_stream(codecs[1], rate=rate, layout=layout)
        container.start_encoding()
        for i, array in enumerate([] if frames is None else frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts = i if times is None else round(1000 * times[i])
            frame.time_base = video.codec_context.time_base
            container.mux(video.encode(frame))
        if frames is not None:
            container.mux(video.encode())
        for at in range(0, 0 if sound is None else sound.shape[1], 1024):
            piece = np.ascontiguousarray(sound[:, at:at + 1024])
            samples = av.AudioFrame.from_ndarray(piece, "fltp", layout)
            late = sound_start + (gap if at > sound.shape[1] // 2 else 0)
            samples.pts, samples.sample_rate = at + round(late * rate), rate
            samples.time_base = Fraction(1, rate)
            container.mux(audio.encode(samples))
        if sound is not None:
            container.mux(audio.encode())
    return path


def patched(source, path, old, new):
    """A copy of a file with some bytes replaced."""
    data = source.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def levels(segments):
    """Mean grey level of each kept frame, t f."""
    return segments.frames.mean((2, 3, 4))


def pitches(segments):
    """Strongest frequency of each second, Hz."""
    return np.abs(np.fft.rfft(segments.waveform)).argmax(-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def whole(folder):
    return make(folder / "whole.mp4", staircase(10), scale(10))


# What is written is read back at the right second ----------------------------------------------

def check_scale(segments, num, offset=0):
    assert len(segments) == num
    expected = 20 * np.arange(num)[:, None]
    np.testing.assert_allclose(levels(segments), expected.repeat(FRAMES_PER_SEGMENT, 1), atol=3)
    np.testing.assert_allclose(pitches(segments), 200 + 50 * np.arange(num), atol=1)


def test_shapes_and_types(whole):
    segments = read_segments(whole)
    assert segments.frames.shape == (10, FRAMES_PER_SEGMENT, FRAME_SIZE, FRAME_SIZE, 3)
    assert segments.waveform.shape == (10, SAMPLE_RATE)
    assert segments.frames.dtype == np.uint8 and segments.waveform.dtype == np.float32
    assert segments.seconds.tolist() == list(range(10))
    assert segments.duration == pytest.approx(10, abs=0.1)


def test_each_second_has_its_picture_and_its_sound(whole):
    check_scale(read_segments(whole), 10)


def test_write_video_puts_everything_in_its_place(tmp_path):
    path = tmp_path / "new" / "12:30.mp4"  # a folder that is not there, a name with a colon
    write_video(path, np.stack(staircase(6)), scale(6))
    check_scale(read_segments(path), 6)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_sound_is_in_place_to_the_sample(tmp_path):
    clicks = np.zeros(3 * SAMPLE_RATE, np.float32)
    for second in range(3):
        clicks[second * SAMPLE_RATE + 4000:][:400] = 0.5
    write_video(tmp_path / "a.mp4", np.stack(staircase(3)), clicks)
    segments = read_segments(tmp_path / "a.mp4")
    onsets = (np.abs(segments.waveform) > 0.25).argmax(-1)
    np.testing.assert_allclose(onsets, 4000, atol=20)
    assert segments.duration == pytest.approx(3, abs=0.01)


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in "a.mp4", "b.mp4":
        write_video(tmp_path / name, np.stack(staircase(2)), scale(2))
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_picture_changes_within_a_second_are_seen(tmp_path):
    frames = np.stack([grey(60 * (i % 4)) for i in range(8)])
    write_video(tmp_path / "a.mp4", frames, scale(2))
    np.testing.assert_allclose(levels(read_segments(tmp_path / "a.mp4")),
                               [[0, 60, 120, 180]] * 2, atol=4)


@pytest.mark.parametrize("fps", [7.3, 29.97, 60, 1])
def test_odd_frame_rates(tmp_path, fps):
    segments = read_segments(make(tmp_path / "a.mp4", staircase(10, fps), scale(10), fps))
    # a frame may come up to one frame's time after the second began
    middle = levels(segments)[:, 1:] if fps > 4 else levels(segments)
    np.testing.assert_allclose(middle, (20 * np.arange(10)[:, None]).repeat(middle.shape[1], 1),
                               atol=3)


@given(gaps=st.lists(st.integers(20, 1500), min_size=3, max_size=12))
@settings(max_examples=15)
def test_variable_frame_rate(tmp_path_factory, gaps):
    times = np.cumsum([0, *gaps[:-1]]) / 1000
    path = tmp_path_factory.mktemp("variable") / "a.mp4"
    make(path, [grey(20 * i) for i in range(len(times))], times=times)
    segments = read_segments(path, num_segments=20, allow_missing=True)
    for second, kept in zip(segments.seconds, levels(segments)):
        for j, level in enumerate(kept):
            moment = second + (j + 0.5) / FRAMES_PER_SEGMENT
            on_show = max(i for i, time in enumerate(times) if time <= moment)
            assert level == pytest.approx(20 * on_show, abs=4)


def test_stereo_is_averaged(tmp_path):
    left, right = tone(300, 3, 44_100), tone(700, 3, 44_100)
    path = make(tmp_path / "a.mp4", staircase(3), np.stack([left, right]), rate=44_100)
    spectrum = np.abs(np.fft.rfft(read_segments(path).waveform)) / (SAMPLE_RATE / 2)
    np.testing.assert_allclose(spectrum[:, [300, 700]], 0.15, atol=0.01)


def test_stereo_is_not_louder_than_mono(tmp_path):
    mono = tone(300, 2, 44_100)
    for name, sound in ("1.mp4", mono), ("2.mp4", np.stack([mono, mono])):
        path = make(tmp_path / name, staircase(2), sound, rate=44_100)
        level = read_segments(path).waveform[0].std()
        # FFmpeg's own mix of two channels is 1.4 times as loud
        assert level == pytest.approx(0.3 / 2 ** 0.5, rel=0.1)


@pytest.mark.parametrize("name, codecs, rate", [
    ("a.mkv", ("libx264", "aac"), SAMPLE_RATE), ("a.mov", ("libx264", "aac"), SAMPLE_RATE),
    ("a.ts", ("libx264", "aac"), SAMPLE_RATE), ("a.mkv", ("ffv1", "pcm_s16le"), 8_000)])
def test_other_containers(tmp_path, name, codecs, rate):
    path = make(tmp_path / name, staircase(5), scale(5, rate), codecs=codecs, rate=rate)
    segments = read_segments(path)
    np.testing.assert_allclose(pitches(segments)[:5], 200 + 50 * np.arange(5), atol=1)
    np.testing.assert_allclose(levels(segments)[:5, 1], 20 * np.arange(5), atol=3)


@pytest.mark.parametrize("layout", ["5.1", "6.1", "7.1"])
def test_many_channels_are_averaged(tmp_path, layout):
    channels = len(av.AudioLayout(layout).channels)
    level = np.repeat(np.linspace(0, .5, channels)[None], SAMPLE_RATE, 0)         # another one in each channel
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout=layout)
        samples = av.AudioFrame.from_ndarray((32768 * level).astype(np.int16).reshape(1, -1), "s16", layout)
        samples.sample_rate, samples.pts = SAMPLE_RATE, 0
        container.mux(audio.encode(samples))
        container.mux(audio.encode())
    segments = read_segments(tmp_path / "a.wav", allow_missing=True)
    np.testing.assert_allclose(segments.waveform, .25, atol=1e-3)


@pytest.mark.parametrize("fps", [1, 2, 4, 25])
def test_avi_does_not_say_in_which_order_frames_are_shown(tmp_path, fps):
    path = make(tmp_path / "a.avi", staircase(6, fps), scale(6), fps=fps, codecs=("libx264", "pcm_s16le"))
    segments = read_segments(path)
    np.testing.assert_allclose(levels(segments)[:5, 2], 20 * np.arange(5), atol=3)


@pytest.mark.parametrize("name, start", [("a.ts", 7), ("a.mkv", 100), ("a.webm", 10), ("a.mp4", 3)])
def test_clock_that_does_not_start_at_zero(tmp_path, name, start):
    codecs, rate = (("libvpx", "libopus"), 48_000) if name.endswith("webm") else (("libx264", "aac"), SAMPLE_RATE)
    path = make(tmp_path / name, staircase(5), scale(5, rate), times=start + np.arange(20) / 4, sound_start=start,
                codecs=codecs, rate=rate)
    segments = read_segments(path)
    assert len(segments) == 5 and segments.duration == pytest.approx(5, abs=.3)
    np.testing.assert_allclose(levels(segments), 20 * np.arange(5)[:, None].repeat(4, 1), atol=4)
    np.testing.assert_allclose(pitches(segments), 200 + 50 * np.arange(5), atol=1)


def test_sound_that_starts_late_and_stops_early(tmp_path):
    path = make(tmp_path / "a.mp4", staircase(8), scale(4), sound_start=3)
    loud = np.abs(read_segments(path).waveform).max(-1) > 0.1
    assert loud.tolist() == [False] * 3 + [True] * 4 + [False]


def test_gap_in_the_sound(tmp_path):
    path = make(tmp_path / "a.mp4", staircase(10), scale(4), gap=5)
    segments = read_segments(path)
    loud = np.abs(segments.waveform).max(-1) > 0.1
    assert not loud[3:7].any() and loud[[0, 1, 7, 8]].all()
    np.testing.assert_allclose(pitches(segments)[[0, 1, 8]], [200, 250, 350], atol=3)


# Lengths ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds, num", [(0.4, 1), (1, 1), (1.5, 1), (1.8, 2), (3, 3)])
def test_short_videos(tmp_path, seconds, num):
    frames = [grey(100)] * round(10 * seconds)
    segments = read_segments(make(tmp_path / "a.mp4", frames, tone(300, seconds), fps=10))
    assert len(segments) == num and segments.duration == pytest.approx(seconds, abs=0.1)
    np.testing.assert_allclose(levels(segments), 100, atol=4)


def test_rest_of_a_short_video_is_silent(tmp_path):
    path = make(tmp_path / "a.mp4", [grey(100)] * 4, tone(300, 0.4), fps=10)
    assert np.abs(read_segments(path).waveform[0, 8000:]).max() < 0.01


@pytest.fixture(scope="module")
def ten_minutes(folder):
    frames = (grey(i * 240 // 600) for i in range(600))
    return make(folder / "long.mkv", list(frames), scale(600, 8_000), fps=1, rate=8_000,
                codecs=("libx264", "pcm_s16le"))


def test_ten_minutes_are_sampled_evenly(ten_minutes):
    segments = read_segments(ten_minutes)
    assert len(segments) == 10 and segments.duration == pytest.approx(600, abs=1)
    assert (segments.seconds[0], segments.seconds[-1]) == (0, 599)
    assert set(np.diff(segments.seconds)) <= {66, 67}
    np.testing.assert_allclose(pitches(segments), 200 + 50 * (segments.seconds % 20), atol=1)
    np.testing.assert_allclose(levels(segments)[:, 2], segments.seconds * 240 // 600, atol=4)


def test_all_seconds_of_ten_minutes_on_request(ten_minutes):
    segments = read_segments(ten_minutes, num_segments=1000)
    assert segments.seconds.tolist() == list(range(600))


def test_file_is_opened_and_decoded_once(ten_minutes, monkeypatch):
    opened, decoded, made = [], [], []

    class Counting(FrameCollector):
        def add(self, frame):
            decoded.append(frame.pts)
            super().add(frame)

        def take(self, until=float("inf")):
            before = len(self.frames)
            super().take(until)
            made.append(len(self.frames) > before)

    monkeypatch.setattr(media, "FrameCollector", Counting)
    real = av.open
    monkeypatch.setattr(media.av, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    read_segments(ten_minutes)
    assert len(opened) == 1
    assert len(decoded) == len(set(decoded)) == 600
    assert sum(made) <= 10 * FRAMES_PER_SEGMENT  # no other frame is turned into an array


MEASURE = """
import resource, sys
from mcd_edu.media import read_segments
read_segments(sys.argv[1], allow_missing=True)
unit = 1e6 if sys.platform == "darwin" else 1e3
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
"""


def test_memory_does_not_grow_with_length(tmp_path):
    pytest.importorskip("resource")  # not on Windows
    megabytes = {}
    for seconds in 20, 200:  # 1,800 more frames would be 88 MB
        path = make(tmp_path / f"{seconds}.mp4", [grey(i % 250) for i in range(10 * seconds)],
                    fps=10)
        out = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True,
                             capture_output=True, text=True).stdout
        megabytes[seconds] = float(out)
    assert megabytes[200] < megabytes[20] + 25


@given(st.floats(0, 1e5), st.integers(1, 200))
def test_segment_starts_are_whole_seconds_within_the_video(duration, num_segments):
    starts = segment_starts(duration, num_segments)
    assert 1 <= len(starts) <= num_segments and starts[0] == 0
    assert (np.diff(starts) >= 1).all() and starts[-1] <= max(0, duration - 0.75)
    if duration + 0.25 >= num_segments:
        assert len(starts) == num_segments


@pytest.mark.parametrize("num_segments", [0, -3])
def test_no_segments_are_refused(whole, num_segments):
    with pytest.raises(ValueError, match="at least 1"):
        read_segments(whole, num_segments)


# Shapes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("width, height", [(37, 45), (1, 1), (640, 16), (16, 640)])
def test_any_size_becomes_a_square(tmp_path, width, height):
    frames = [grey(90, width, height)] * 8
    path = make(tmp_path / "a.mkv", frames, scale(2), codecs=("ffv1", "aac"))
    np.testing.assert_allclose(levels(read_segments(path)), 90, atol=4)


@pytest.mark.parametrize("matrix, bright", [
    ((1, 0, 0, 1), "left"), ((0, 1, -1, 0), "top"),        # as it is; a quarter turn clockwise
    ((-1, 0, 0, -1), "right"), ((0, -1, 1, 0), "bottom")])
def test_phone_held_upright(tmp_path, matrix, bright):
    frame = grey(0, 64, 48)
    frame[:, :32] = 255
    path = make(tmp_path / "a.mp4", [frame] * 8, scale(2))
    a, b, c, d = (65536 * x for x in matrix)
    flat, turned = (struct.pack(">9i", *m, 0, 0, 0, 1 << 30)
                    for m in ((65536, 0, 0, 0, 65536), (a, b, 0, c, d)))
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # the picture track comes first
    assert data[at:at + 36] == flat
    path.write_bytes(data[:at] + turned + data[at + 36:])
    if not hasattr(av.VideoFrame, "rotation"):
        pytest.skip("this PyAV does not tell the rotation")
    picture = read_segments(path).frames[0, 0].mean(-1)
    sides = {"left": picture[:, :9], "right": picture[:, -9:], "top": picture[:9],
             "bottom": picture[-9:]}
    assert max(sides, key=lambda side: sides[side].mean()) == bright
    assert sides[bright].mean() > 240


def test_giant_pictures_are_refused(whole, monkeypatch):
    assert MAX_PIXELS >= 7680 * 4320
    monkeypatch.setattr(media, "MAX_PIXELS", 64 * 63)
    with pytest.raises(MediaError, match=r"64×64 are too large; scale"):
        read_segments(whole)


# Files that cannot be used ---------------------------------------------------------------------

def refused(path, message, **options):
    """The file is refused in one line that begins with its name, and gives a remedy."""
    with pytest.raises(MediaError) as caught:
        read_segments(path, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < len(str(path)) + 200
    assert text.startswith(f"{path}: ") and message in text.removeprefix(f"{path}: ")
    assert any(word in text for word in ("give", "copy", "convert", "record", "Pass", "scale"))
    return text


def test_no_file(tmp_path):
    refused(tmp_path / "a.mp4", "no such file")


def test_folder(tmp_path):
    refused(tmp_path, "is a folder")


def test_empty_file(tmp_path):
    (tmp_path / "a.mp4").touch()
    refused(tmp_path / "a.mp4", "is empty")


@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.srt", "a"])
@pytest.mark.parametrize("text", ["Beat two eggs.\n" * 99, "1\n00:00:00,000 --> 00:00:01,000\nhi\n",
                                  "x", "\x1b[31m" * 99])
def test_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    refused(tmp_path / name, "not a video", allow_missing=True)


def test_random_bytes(tmp_path):
    (tmp_path / "a.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    refused(tmp_path / "a.mp4", "not a video")


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile {}\nduration 5\n",
                                  "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{}\n"])
def test_playlist_is_not_followed(tmp_path, text, whole):
    (tmp_path / "b.mp4").write_bytes(whole.read_bytes())
    for name in "a.mp4", "a.m3u8":
        (tmp_path / name).write_text(text.format("b.mp4"))
        refused(tmp_path / name, "not a video")


def test_picture_file(tmp_path):
    from PIL import Image
    for name in "a.png", "a.gif", "a.jpg":
        Image.new("RGB", (64, 64)).save(tmp_path / name)
        refused(tmp_path / name, "not a video", allow_missing=True)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.97])
def test_truncated_with_the_index_lost(tmp_path, whole, share):
    data = whole.read_bytes()
    assert data.index(b"mdat") < data.index(b"moov")
    (tmp_path / "a.mp4").write_bytes(data[:round(share * len(data))])
    refused(tmp_path / "a.mp4", "not a video")


@pytest.mark.parametrize("allow_missing", [False, True])
@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_truncated_within_the_index(tmp_path, whole, share, allow_missing):
    """Where the index of the sound is lost, the sound is not replaced by silence."""
    data = whole.read_bytes()
    index = data.index(b"moov") - 4
    (tmp_path / "a.mp4").write_bytes(data[:index + 16 + round(share * (len(data) - index - 16))])
    refused(tmp_path / "a.mp4", "cut off", allow_missing=allow_missing)


def test_boxes_that_tell_where_a_file_ends(tmp_path):
    """Lengths of 4 bytes, of 8, and none: to the end of the file."""
    head, path = b"\0\0\0\x0cftypisom", tmp_path / "a.mp4"
    long = b"\0\0\0\1mdat" + (20).to_bytes(8, "big") + b"abcd"
    for content, cut in (head, False), (head + long, False), (head + long[:-1], True), (head + b"\0\0\0\0mdatabc", False), \
                        (head[:9], True), (head + b"abc", False), (b"\0" * 40, False):
        path.write_bytes(content)
        assert is_cut(path) == cut, content


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8, 0.97])
def test_truncated_with_the_index_in_front(tmp_path, share):
    path = make(tmp_path / "a.mp4", staircase(10), scale(10), options={"movflags": "faststart"})
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    path.write_bytes(data[:round(share * len(data))])
    refused(path, "")


def test_truncated_between_two_packets(tmp_path):
    path = make(tmp_path / "a.mp4", staircase(10), scale(10), options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        ends = sorted(p.pos + p.size for p in container.demux() if p.size)
    data = path.read_bytes()
    for end in ends[len(ends) // 3], ends[len(ends) * 2 // 3]:
        path.write_bytes(data[:end])
        refused(path, "it was cut off")


def test_truncated_matroska(tmp_path):
    path = make(tmp_path / "a.mkv", staircase(10), scale(10))
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    refused(path, "it was cut off")


def test_frames_that_stay_long_are_no_truncation(tmp_path):
    path = make(tmp_path / "a.mp4", [grey(0), grey(60), grey(120)], fps=0.2)
    segments = read_segments(path, num_segments=20, allow_missing=True)
    np.testing.assert_allclose(levels(segments)[:, 1], np.repeat([0, 60, 120], 5), atol=4)
    path = make(tmp_path / "b.mp4", [grey(50)], scale(10), times=[0])
    np.testing.assert_allclose(levels(read_segments(path)), 50, atol=4)


def test_no_sound_track(tmp_path):
    path = make(tmp_path / "a.mp4", staircase(5))
    assert "--allow-missing" in refused(path, "has no sound track")
    segments = read_segments(path, allow_missing=True)
    assert segments.waveform.shape == (5, SAMPLE_RATE) and not segments.waveform.any()
    np.testing.assert_allclose(levels(segments)[:, 1], 20 * np.arange(5), atol=3)


def test_no_picture_track(tmp_path):
    path = make(tmp_path / "a.mp4", None, scale(5))
    assert "--allow-missing" in refused(path, "has no picture track")
    segments = read_segments(path, allow_missing=True)
    assert segments.frames.shape == (5, FRAMES_PER_SEGMENT, FRAME_SIZE, FRAME_SIZE, 3)
    assert not segments.frames.any()
    np.testing.assert_allclose(pitches(segments), 200 + 50 * np.arange(5), atol=1)


FRAGMENTED = {"movflags": "empty_moov+frag_keyframe"}  # writes tracks even if nothing is in them


def test_no_frames_at_all(tmp_path):
    path = make(tmp_path / "a.mp4", [], [[]], options=FRAGMENTED)
    for allow_missing in False, True:
        refused(path, "has no frames", allow_missing=allow_missing)


@pytest.mark.parametrize("frames, sound, message", [
    ([], scale(3), "0 frames in its picture track"), (staircase(3), [[]], "0 frames in its sound")])
def test_a_track_without_frames(tmp_path, frames, sound, message):
    path = make(tmp_path / "a.mp4", frames, sound, options=FRAGMENTED)
    with av.open(str(path)) as container:
        assert container.streams.video and container.streams.audio
    refused(path, message)
    segments = read_segments(path, allow_missing=True)
    assert segments.frames.any() == bool(len(frames))
    assert segments.waveform.any() == (len(sound[0]) > 0 if len(frames) else True)


def test_unknown_codec(tmp_path, whole):
    refused(patched(whole, tmp_path / "a.mp4", b"avc1", b"zzzz"), "picture track is in an unknown")


def test_latin_1_in_the_title_does_no_harm(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w", metadata_encoding="latin-1") as container:
        container.metadata["title"] = "Café"
        video = container.add_stream("libx264", rate=4)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for picture in staircase(2):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    assert len(read_segments(tmp_path / "a.mp4", allow_missing=True)) == 2


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60)
def test_damaged_bytes_never_give_another_error(tmp_path_factory, whole, seed):
    rng, data = np.random.default_rng(seed), bytearray(whole.read_bytes())
    index = data.index(b"moov")
    for low in (0, index) if seed % 2 else (index,):
        for at in rng.integers(low, len(data), 4):
            data[at] = rng.integers(256)
    path = whole.with_name("damaged.mp4")
    path.write_bytes(data)
    try:
        segments = read_segments(path, allow_missing=bool(seed % 3))
    except MediaError as error:
        assert "\n" not in str(error)
    else:
        assert len(segments) <= 10 and segments.frames.shape[0] == len(segments)


# Nothing half-written stays --------------------------------------------------------------------

@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failing_writer_leaves_what_was_there(tmp_path, there, error):
    path = tmp_path / "new" / "a.json" if not there else tmp_path / "a.json"
    if there:
        path.write_text("before")

    def writer(draft):
        assert draft != path and draft.parent == path.parent
        draft.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_whole(path, writer)
    assert [file.read_text() for file in path.parent.iterdir()] == ["before"] * there


def test_whole_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("before")
    write_whole(path, lambda draft: draft.write_text(path.read_text() + " and after"))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before and after"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_target_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link", "."):
        with pytest.raises(OSError, match="not a file; choose another name"):
            write_whole(tmp_path / name if name != "." else Path("."), lambda draft: draft.write_text("x"))
    assert (tmp_path / "pipe").is_fifo() and sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


def test_target_that_is_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "a", lambda draft: draft.write_text("x"))
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_failing_encoder_leaves_nothing(tmp_path, monkeypatch):
    real = av.VideoFrame.from_ndarray
    frames = iter(range(5))

    class Failing:
        @staticmethod
        def from_ndarray(array, format):
            if next(frames) == 4:
                raise MemoryError("in the middle")
            return real(array, format=format)

    monkeypatch.setattr(media.av, "VideoFrame", Failing)
    with pytest.raises(MemoryError):
        write_video(tmp_path / "a.mp4", np.stack(staircase(3)), scale(3))
    assert not list(tmp_path.iterdir())


def test_sample_rate_that_aac_does_not_know(tmp_path):
    with pytest.raises((av.error.FFmpegError, ValueError)):
        write_video(tmp_path / "a.mp4", np.stack(staircase(1)), scale(1), sample_rate=12_345)
    assert not list(tmp_path.iterdir())


ONE = np.stack(staircase(1))


@pytest.mark.parametrize("frames, sound, message", [
    (ONE[:0], scale(1), "uint8 of n h w 3"), (ONE[0], scale(1), "uint8 of n h w 3"),
    (ONE.astype(float), scale(1), "uint8 of n h w 3"), (ONE[..., :1], scale(1), "n h w 3"),
    (ONE[:, :63], scale(1), "64×63 pixels"), (ONE[:, :, :61], scale(1), "61×64 pixels"),
    (ONE, scale(1)[:0], "one channel"), (ONE, np.stack([scale(1)] * 2), "one channel"),
    (ONE, scale(1) * np.nan, "finite"), (ONE, np.append(scale(1), np.inf), "finite")])
def test_wrong_arrays_are_refused(tmp_path, frames, sound, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, sound)
    assert not list(tmp_path.iterdir())


# The collectors alone --------------------------------------------------------------------------

@given(times=st.lists(st.integers(0, 400), min_size=1, max_size=12, unique=True).map(sorted),
       wanted=st.lists(st.integers(0, 500), max_size=12).map(sorted),
       start=st.integers(0, 1000))
@settings(max_examples=50)
def test_frame_collector_against_a_loop(times, wanted, start):
    collector = FrameCollector((np.array(wanted) + 0.5) / 100, start / 100)
    for i, time in enumerate(times):
        frame = av.VideoFrame.from_ndarray(grey(20 * i, 8, 8), format="rgb24")
        frame.pts, frame.time_base = time + start, Fraction(1, 100)
        collector.add(frame)
    collector.take()
    # what was on show; before the first frame, the first frame
    expected = [max([i for i, time in enumerate(times) if time <= moment] or [0])
                for moment in wanted]
    assert [round(int(picture[0, 0, 0]) / 20) for picture in collector.frames] == expected


def test_frame_without_a_time_is_left_out():
    collector = FrameCollector(np.array([0.5]))
    collector.add(av.VideoFrame.from_ndarray(grey(9, 8, 8), format="rgb24"))
    collector.take()
    assert collector.frames == []


@given(pieces=st.lists(st.integers(1, 40_000), min_size=1, max_size=8),
       kept=st.sets(st.integers(0, 5), min_size=1).map(sorted))
@settings(max_examples=30)
def test_sound_collector_against_a_cut(pieces, kept):
    wave = np.arange(1, sum(pieces) + 1, dtype=np.float32)
    collector = SoundCollector(np.array(kept))
    collector.position = 0
    for piece in np.split(wave, np.cumsum(pieces)[:-1]):
        collector.copy(piece)
    expected = np.pad(wave, (0, 6 * SAMPLE_RATE))[:6 * SAMPLE_RATE].reshape(6, SAMPLE_RATE)[kept]
    np.testing.assert_array_equal(collector.waveform, expected)
