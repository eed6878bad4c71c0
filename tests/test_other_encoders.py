"""Encoders that learned nothing see what they should, and their features are made once."""

import numpy as np
import pytest
import torch

from mcd_edu.data import DataError
from mcd_edu.other_encoders import OTHER_ENCODERS, Pixels, Spectrum, draw_features, encode_scene, read_scenes
from mcd_edu.training import make_toy_set

WIDTHS = {"untrained_visual": 192, "pixels": 256, "spectrum": 192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    make_toy_set(folder, num_train=1, num_val=1, num_test=1, per_video=2)
    return folder


def test_features_are_made_where_they_are_missing(folder):
    draw_features(folder, list(WIDTHS), workers=0)
    scenes = read_scenes(folder)
    files = {name: sorted((folder / "feats" / name).glob("*.npy")) for name in WIDTHS}
    for name, width in WIDTHS.items():
        assert [file.stem for file in files[name]] == [scene.video_id for scene in scenes]
        feats = np.load(files[name][0])
        assert feats.shape == (10, width) and feats.dtype == np.float16
        assert np.allclose(feats, encode_scene(scenes[0], name).numpy(), atol=2e-2, rtol=2e-3)
    before = files["pixels"][0].stat().st_mtime_ns
    files["pixels"][1].unlink()
    draw_features(folder, ["pixels"], workers=0)
    assert files["pixels"][1].is_file() and files["pixels"][0].stat().st_mtime_ns == before


def test_pixels_by_hand():
    frames = torch.randint(256, (2, 4, 128, 128, 3), dtype=torch.uint8)
    found = Pixels()(frames)
    square = frames[1, 0, 16:32, 48:64].float() / 255
    colours = found[1, :192].reshape(3, 8, 8)[:, 1, 3]
    torch.testing.assert_close(colours, square.mean((0, 1)))
    moves = (frames[1, 1:, 16:32, 48:64].float() - frames[1, :-1, 16:32, 48:64].float()).abs().mean() / 255
    torch.testing.assert_close(found[1, 192:].reshape(8, 8)[1, 3], 10 * moves)


def test_the_spectrum_hears_loudness_and_pitch():
    time = torch.arange(16_000) / 16_000
    tones = torch.stack([.1 * torch.sin(6.2832 * f * time) for f in (300, 3000)])
    soft, loud = Spectrum()(tones), Spectrum()(4 * tones)
    assert (loud[:, :64].amax(-1) > soft[:, :64].amax(-1)).all() and soft[0, :64].argmax() < soft[1, :64].argmax()


def test_the_untrained_network_is_always_the_same():
    torch.manual_seed(5)
    one, state = OTHER_ENCODERS["untrained_visual"](), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(state, torch.rand(1))
    two = OTHER_ENCODERS["untrained_visual"]()
    assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values())) and not one.training


def test_wrong_input(folder, tmp_path):
    with pytest.raises(ValueError, match="untrained_visual, pixels, spectrum"):
        draw_features(folder, ["resnet"])
    with pytest.raises(DataError, match="no scenes to draw"):
        draw_features(tmp_path, ["pixels"])
