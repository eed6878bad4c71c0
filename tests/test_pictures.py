"Pictures: names, shapes, transparency, determinism, and that the 22 can be told apart."
from functools import cache
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mcd_edu.samples.pictures import (
    DRAWINGS,
    INSTRUMENTS,
    NUM_VARIANTS,
    PLACES,
    Pen,
    blank,
    draw_background,
    draw_instrument,
    draw_player,
    finish,
    smooth,
    tube,
)

EVERY = list(product(INSTRUMENTS, range(NUM_VARIANTS)))
DRAWERS = (draw_instrument, draw_player)
cached = cache(lambda draw, *args: draw(*args))


def on_white(picture):
    colour, alpha = picture[..., :3] / 255, picture[..., 3:] / 255
    return colour * alpha + 1 - alpha


def test_names():
    assert len(INSTRUMENTS) == len(set(INSTRUMENTS)) == 22
    assert list(INSTRUMENTS) == sorted(INSTRUMENTS)
    assert tuple(DRAWINGS) == INSTRUMENTS
    assert PLACES == ("indoor", "outdoor")


@pytest.mark.parametrize("draw", DRAWERS)
def test_pictures_are_clean(draw):
    for name, variant in EVERY:
        picture = cached(draw, name, variant, 52)
        assert picture.shape == (52, 52, 4) and picture.dtype == np.uint8
        corners = picture[[0, 0, -1, -1], [0, -1, 0, -1], 3]
        assert not corners.any(), f"{name} {variant}: a corner is not transparent"
        alpha = picture[..., 3]
        border = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert (border > 128).sum() <= 4, f"{name} {variant}: cut off at the border"
        assert 0.08 < (alpha > 128).mean() < 0.9, f"{name} {variant}: too empty or too full"
        assert ((alpha > 0) & (alpha < 255)).any(), f"{name} {variant}: hard edges"
        assert picture.flags.writeable


@pytest.mark.parametrize("draw", DRAWERS)
def test_same_call_same_bytes_and_variants_differ(draw):
    for name in INSTRUMENTS:
        first, second = (cached(draw, name, variant, 36) for variant in range(NUM_VARIANTS))
        assert np.array_equal(first, draw(name, 0, 36))
        assert np.abs(on_white(first) - on_white(second)).mean() > 0.04, name


@pytest.mark.parametrize("size", [36, 52])
def test_every_pair_of_instruments_differs(size):
    pictures = {key: on_white(cached(draw_player, *key, size)) for key in EVERY}
    for one, other in combinations(EVERY, 2):
        gap = np.abs(pictures[one] - pictures[other]).mean()
        assert one[0] == other[0] or gap > 0.05, (one, other, gap)


def test_far_player_is_recognised_from_near_one():
    "A nearest neighbour on 16 pixels a side knows each far player from the near ones."
    def tiny(key, size):
        rgb = Image.fromarray((on_white(cached(draw_player, *key, size)) * 255).astype(np.uint8))
        return np.asarray(rgb.resize((16, 16), Image.Resampling.BOX), dtype=float)

    near = np.stack([tiny(key, 52) for key in EVERY])
    for i, key in enumerate(EVERY):
        assert np.abs(near - tiny(key, 36)).mean((1, 2, 3)).argmin() == i, key


def test_instrument_dominates():
    "Without its player the instrument still spans most of the picture."
    for name, variant in EVERY:
        drawing, sheet = DRAWINGS[name], blank(64)
        x, y, scale = drawing.place
        pen = sheet.moved(mirror=bool(variant)).moved(x - 50, y - 50, scale, drawing.lean[variant])
        drawing.draw(pen, variant)
        rows, columns = np.nonzero(finish(sheet, 64)[..., 3] > 64)
        assert max(np.ptp(rows), np.ptp(columns)) / 64 > 0.7, (name, variant)


def test_look_alikes_differ_in_size():
    "A cello covers much more than a violin, a guitar more than a ukulele."
    area = {name: (draw_instrument(name)[..., 3] > 128).sum() for name in INSTRUMENTS}
    assert area["cello"] > 1.4 * area["violin"]
    assert area["acoustic_guitar"] > 1.2 * area["ukulele"]
    assert area["bassoon"] > 1.2 * area["clarinet"] > 1.2 * area["flute"]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(EVERY), st.integers(8, 140))
def test_any_size(key, size):
    for draw in DRAWERS:
        assert draw(*key, size).shape == (size, size, 4)
    assert draw_background("indoor", size).shape == (size, size, 3)


@pytest.mark.parametrize("draw", DRAWERS)
def test_wrong_name_or_variant(draw):
    with pytest.raises(ValueError, match="kazoo.*accordion.*xylophone"):
        draw("kazoo")
    for variant in (-1, 2, None):
        with pytest.raises(ValueError, match="choose one of 0, 1"):
            draw("tuba", variant)


def test_backgrounds():
    scenes = {(place, seed): draw_background(place, 128, seed)
              for place, seed in product(PLACES, range(3))}
    for scene in scenes.values():
        assert scene.shape == (128, 128, 3) and scene.dtype == np.uint8
        _, counts = np.unique(scene.reshape(-1, 3), axis=0, return_counts=True)
        assert np.sort(counts)[-4:].sum() > 0.85 * 128 * 128, "not plain"
        assert np.percentile(scene.min(-1), 50) > 150, "not pale"
    for one, other in combinations(scenes, 2):
        assert np.abs(scenes[one] / 255 - scenes[other] / 255).mean() > 0.01, (one, other)
    assert np.array_equal(scenes["indoor", 1], draw_background("indoor", 128, 4))


def test_background_at_random():
    draws = [draw_background("outdoor", 32, np.random.default_rng(7)) for _ in range(2)]
    assert np.array_equal(*draws)
    rng = np.random.default_rng(0)
    assert len({draw_background("outdoor", 32, rng).tobytes() for _ in range(30)}) == 3


def test_wrong_place():
    with pytest.raises(ValueError, match="underwater.*indoor, outdoor"):
        draw_background("underwater")


def test_instruments_stand_out_from_every_background():
    for name, variant in EVERY:
        picture = cached(draw_instrument, name, variant, 52)
        solid = picture[..., 3] > 200
        for place, seed in product(PLACES, range(3)):
            scene = cached(draw_background, place, 52, seed)
            contrast = np.abs(picture[solid, :3].astype(float) - scene[solid]).max(-1).mean()
            assert contrast > 50, (name, variant, place, seed, contrast)


points = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=2, max_size=8)


@given(points, st.booleans(), st.integers(1, 9))
def test_smooth_goes_through_its_points(corners, closed, steps):
    curve = smooth(corners, closed, steps)
    assert len(curve) == steps * (len(corners) - (not closed)) + (not closed)
    np.testing.assert_allclose(curve[::steps], corners, atol=1e-9)


def test_moved_pen():
    pen = blank(64)
    assert isinstance(pen, Pen)
    side = pen.image.width
    np.testing.assert_allclose(pen.moved(angle=90).pixels([(50, 0)]), [(side, side / 2)])
    np.testing.assert_allclose(pen.moved(mirror=True).pixels([(10, 20)]), pen.pixels([(90, 20)]))
    np.testing.assert_allclose(pen.moved(3, 4).pixels([(10, 20)]), pen.pixels([(13, 24)]))
    twice = pen.moved(5, scale=0.5).moved(angle=30).moved(angle=-30).moved(scale=2)
    np.testing.assert_allclose(twice.pixels([(10, 20)]), pen.moved(5).pixels([(10, 20)]))


def test_tube_without_a_gap():
    pen = blank(64)
    tube(pen, [(20, 80, 10), (20, 20, 10), (80, 20, 10), (80, 80, 10)], "#ffffff")
    picture = finish(pen, 64)
    for x, y in smooth([(20, 80), (20, 20), (80, 20), (80, 80)])[3:-3]:
        assert picture[int(y * 0.64), int(x * 0.64), 3] == 255
