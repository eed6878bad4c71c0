"""The encoders: spectrogram and thirds against loops, what they keep, and what they refuse."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu

from mcd_edu.encoders import (
    AudioEncoder,
    Encoders,
    LogMel,
    TextEncoder,
    TextLayer,
    VisualEncoder,
    convolution,
    encode_segments,
    load_encoders,
    mel_filters,
    save_encoders,
)
from mcd_edu.media import Segments


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def encoders():
    "Untrained, but with batch-norm statistics that are not the trivial ones."
    torch.manual_seed(1)
    encoders = Encoders(VisualEncoder(), AudioEncoder())
    for network in encoders[:2]:
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
        network.eval()
    return encoders


def seconds(n=3):
    frames = torch.randint(256, (n, 4, 128, 128, 3), dtype=torch.uint8)
    return frames, 0.1 * torch.randn(n, 16000)


# ---- mel filters and spectrogram


def test_mel_filters_against_a_loop():
    top = 2595 * math.log10(1 + 8000 / 700)
    edges = [700 * (10 ** (top * i / 65 / 2595) - 1) for i in range(66)]
    filters = mel_filters()
    assert filters.shape == (257, 64)
    for j in range(64):
        low, peak, high = edges[j : j + 3]
        for i in range(257):
            f = 8000 * i / 256
            weight = (f - low) / (peak - low) if f < peak else (high - f) / (high - peak)
            assert abs(filters[i, j].item() - max(0.0, weight)) < 1e-4


def test_mel_filters_hear_every_band():
    for num_mels in 16, 40, 64:
        filters = mel_filters(num_mels)
        assert (filters >= 0).all() and (filters <= 1).all() and (filters.sum(0) > 0).all()
        assert filters.argmax(0).diff().ge(0).all(), "bands rise with frequency"


def log_mel_by_hand(sound, t, filters):
    "One frame, from the definition of the Fourier sum."
    n, power = len(sound), []
    piece = np.zeros(512)
    for i in range(512):
        at = 160 * t + i - 256
        at = -at if at < 0 else 2 * (n - 1) - at if at >= n else at
        window = 0.5 - 0.5 * math.cos(2 * math.pi * (i - 56) / 400) if 56 <= i < 456 else 0.0
        piece[i] = window * sound[at]
    for f in range(257):
        angle = 2 * np.pi * f * np.arange(512) / 512
        power.append((piece * np.cos(angle)).sum() ** 2 + (piece * np.sin(angle)).sum() ** 2)
    bands = [sum(p * w for p, w in zip(power, column)) for column in filters.T]
    return [math.log10(band + 1e-6) / 3 for band in bands]


def test_log_mel_against_a_loop():
    sound = 0.1 * torch.randn(2, 16000)
    out = LogMel()(sound)
    assert out.shape == (2, 101, 64)
    for n, t in (0, 0), (0, 1), (1, 50), (1, 99), (0, 100):
        expected = log_mel_by_hand(sound[n].numpy().astype(float), t, mel_filters().numpy())
        torch.testing.assert_close(out[n, t], torch.tensor(expected, dtype=torch.float32),
                                   atol=1e-4, rtol=1e-4)


def test_log_mel_is_absolute():
    log_mel, sound = LogMel(), 0.1 * torch.randn(1, 16000)
    quiet, loud = log_mel(sound), log_mel(2 * sound)
    torch.testing.assert_close(loud - quiet, torch.full_like(quiet, math.log10(4) / 3),
                               atol=1e-3, rtol=0)
    torch.testing.assert_close(log_mel(torch.zeros(1, 16000)), torch.full((1, 101, 64), -2.0))


def test_log_mel_finds_a_tone():
    time = torch.arange(16000) / 16000
    for hertz in 300.0, 1000.0, 4000.0:
        band = LogMel()(torch.sin(2 * math.pi * hertz * time)[None])[0, 50].argmax().item()
        assert mel_filters()[round(hertz / 31.25), band] > 0.3


# ---- the ear


def test_audio_shape_and_pooling_by_hand(encoders):
    _, sound = seconds(2)
    audio = encoders.audio
    x = audio.trunk(audio.log_mel(sound))
    assert x.shape[1] == 128 and x.shape[3] == 8
    rows = []
    for n in range(2):
        mean = [x[n, c, :, f].mean() for c in range(128) for f in range(8)]
        most = [x[n, c, :, f].max() for c in range(128) for f in range(8)]
        rows.append(audio.embed(torch.stack(mean + most)))
    out = audio(sound)
    assert out.shape == (2, AudioEncoder.dim)
    torch.testing.assert_close(out, torch.stack(rows), atol=1e-5, rtol=1e-5)


def test_louder_moves_the_features(encoders):
    _, sound = seconds(1)
    out = encoders.audio(torch.cat([sound, 2 * sound, 4 * sound]))
    first, second = (out[1] - out[0]).norm(), (out[2] - out[0]).norm()
    assert second > first > 0.005 * out[0].norm()


# ---- the eye


def third_by_hand(encoder, frames, side):
    "Frames f h w 3 of one second → the features of one third, picture by picture."
    padded = torch.zeros(4, 128, 129, 3)
    padded[:, :, :128] = frames.float() / 255 - 0.5
    third = padded[:, :, 43 * side : 43 * (side + 1)]
    channels = [third[0, :, :, c] for c in range(3)]
    channels += [third[i + 1, :, :, c] - third[i, :, :, c] for i in range(3) for c in range(3)]
    x = encoder.trunk(torch.stack(channels)[None])[0]
    assert x.shape == (96, 8, 3)
    bands = [[x[c, 2 * band : 2 * band + 2] for band in range(4)] for c in range(96)]
    pooled = [b.mean() for row in bands for b in row] + [b.max() for row in bands for b in row]
    return encoder.embed(torch.stack(pooled))


def test_visual_against_a_loop(encoders):
    frames, _ = seconds(2)
    out = encoders.visual(frames)
    assert out.shape == (2, VisualEncoder.dim)
    expected = [[third_by_hand(encoders.visual, frames[n], side) for side in range(3)]
                for n in range(2)]
    expected = torch.stack([torch.cat(row) for row in expected])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", range(3))
def test_a_third_changes_its_own_block_only(encoders, side):
    frames, _ = seconds(1)
    changed = frames.clone()
    changed[:, :, 40:80, 43 * side + 5 : 43 * side + 30] = 0
    before, after = (encoders.visual(x).reshape(3, 64) for x in (frames, changed))
    moved = (after - before).norm(dim=1) > 1e-5
    assert moved.tolist() == [i == side for i in range(3)]


def test_the_same_thing_looks_the_same_on_the_left_and_in_the_middle(encoders):
    frames = torch.full((2, 4, 128, 128, 3), 100, dtype=torch.uint8)
    thing = torch.randint(256, (4, 40, 30, 3), dtype=torch.uint8)
    frames[0, :, 60:100, 5:35], frames[1, :, 60:100, 48:78] = thing, thing
    out = encoders.visual(frames).reshape(2, 3, 64)
    torch.testing.assert_close(out[0, 0], out[1, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[0, 2], out[1, 2])


def test_a_still_second_has_no_change_and_a_moving_one_has(encoders):
    frames, seen = seconds(1)[0], []
    handle = encoders.visual.trunk.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    still = frames[:, :1].expand(-1, 4, -1, -1, -1).contiguous()
    out = encoders.visual(still), encoders.visual(frames)
    handle.remove()
    assert (seen[0][:, 3:] == 0).all() and (seen[1][:, 3:] != 0).any()
    torch.testing.assert_close(seen[0][:, :3], seen[1][:, :3])
    assert not torch.allclose(*out)


@pytest.mark.parametrize("which", [0, 1])
def test_no_second_sees_another(encoders, which):
    given, network = seconds(3)[which], encoders[which]
    together = network(given)
    for i in range(3):
        torch.testing.assert_close(network(given[[i]]), together[[i]], atol=1e-5, rtol=1e-5)


def test_gradient_reaches_every_parameter():
    frames, sound = seconds(2)
    for network, seconds_ in (VisualEncoder(), frames), (AudioEncoder(), sound):
        out = network(seconds_)
        (out * torch.randn_like(out)).sum().backward()
        for name, p in network.named_parameters():
            assert p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


def test_silence_and_black_are_finite(encoders):
    assert encoders.audio(torch.zeros(1, 16000)).isfinite().all()
    assert encoders.visual(torch.zeros(1, 4, 128, 128, 3, dtype=torch.uint8)).isfinite().all()


def test_convolution():
    assert convolution(3, 5)(torch.randn(1, 3, 9, 8)).shape == (1, 5, 5, 4)
    assert convolution(3, 5, (2, 1))(torch.randn(1, 3, 9, 8)).shape == (1, 5, 5, 8)


@pytest.mark.parametrize("shape, dtype", [
    ((1, 4, 128, 128, 3), torch.float32), ((4, 128, 128, 3), torch.uint8),
    ((1, 3, 128, 128, 3), torch.uint8), ((1, 4, 3, 128, 128), torch.uint8),
    ((1, 4, 96, 96, 3), torch.uint8)])
def test_wrong_pictures(encoders, shape, dtype):
    with pytest.raises(ValueError, match="VisualEncoder: expected uint8 .*4, 128, 128, 3.*read_"):
        encoders.visual(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("sound", [torch.zeros(16000), torch.zeros(1, 8000),
                                   torch.zeros(1, 16000, dtype=torch.int16)])
def test_wrong_sounds(encoders, sound):
    with pytest.raises(ValueError, match="AudioEncoder: expected floats .*n 16000.*read_segments"):
        encoders.audio(sound)


# ---- save, load, encode


def test_save_and_load(encoders, tmp_path):
    save_encoders(tmp_path / "a" / "b", *encoders[:2])
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == \
        ["audio.safetensors", "visual.safetensors"]
    again = load_encoders(tmp_path / "a" / "b")
    frames, sound = seconds(2)
    torch.testing.assert_close(again.visual(frames), encoders.visual(frames), atol=5e-3, rtol=5e-3)
    torch.testing.assert_close(again.audio(sound), encoders.audio(sound), atol=5e-3, rtol=5e-3)
    for network in again[:2]:
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert all(p.dtype == torch.float32 for p in network.parameters())


def test_what_is_saved_is_half_as_large(encoders, tmp_path):
    save_encoders(tmp_path, *encoders[:2])
    tensors = load_file(tmp_path / "visual.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {"torch.float16", "torch.int64"}
    assert not any("window" in name or "filters" in name
                   for name in load_file(tmp_path / "audio.safetensors"))


def test_load_says_what_is_wrong(encoders, tmp_path):
    with pytest.raises(ValueError, match="visual.safetensors: no encoder there; train it"):
        load_encoders(tmp_path)
    save_encoders(tmp_path, *encoders[:2])
    whole = (tmp_path / "audio.safetensors").read_bytes()
    for broken in b"", b"no weights", whole[: len(whole) // 2]:
        (tmp_path / "audio.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="audio.safetensors: not the weights of this audio"):
            load_encoders(tmp_path)
    save_file({"another": torch.zeros(3)}, tmp_path / "audio.safetensors")
    with pytest.raises(ValueError, match="not the weights of this audio encoder"):
        load_encoders(tmp_path)


def test_a_failed_save_leaves_what_was_there(encoders, tmp_path, monkeypatch):
    save_encoders(tmp_path, *encoders[:2])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    def fail(path, data):
        with path.open("wb") as file: file.write(data[:100])
        raise OSError("disk full")
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError):
        save_encoders(tmp_path, *encoders[:2])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_encode_segments(encoders):
    frames, sound = seconds(3)
    segments = Segments(frames.numpy(), sound.numpy(), np.arange(3), 3.0)
    visual, audio = encode_segments(encoders, segments)
    assert visual.shape == (3, 192) and audio.shape == (3, 128)
    torch.testing.assert_close(visual.clone(), encoders.visual(frames), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(audio.clone(), encoders.audio(sound), atol=1e-5, rtol=1e-5)


# ---- the reader


def linear(layer, x): return layer.weight @ x + layer.bias


def norm(layer, x):
    spread = ((x - x.mean()) ** 2).mean() + layer.eps
    return (x - x.mean()) / spread.sqrt() * layer.weight + layer.bias


def attend(attn, query, rows):
    "One vector looks at some, head by head."
    e, query = attn.embed_dim // attn.num_heads, linear(attn.to_query, query)
    keys = [linear(attn.to_key_value, row) for row in rows]
    mixed = []
    for h in range(attn.num_heads):
        part, d = slice(h * e, h * e + e), attn.embed_dim
        scores = torch.stack([(query[part] @ row[:d][part] / math.sqrt(e)).exp() for row in keys])
        mixed.append(sum(s / scores.sum() * row[d:][part] for s, row in zip(scores, keys)))
    return linear(attn.to_output, torch.cat(mixed))


def read_by_hand(reader, tokens):
    "One question, a list of numbers without padding, word by word."
    words = [reader.words.weight[n] + reader.positions[i] for i, n in enumerate(tokens)]
    for layer in reader.layers:
        normed = [norm(layer.norm, x) for x in words]
        words = [x + attend(layer.attention, y, normed) for x, y in zip(words, normed)]
        hidden = [gelu(linear(layer.ffn[0], norm(layer.ffn_norm, x))) for x in words]
        words = [x + linear(layer.ffn[3], z) for x, z in zip(words, hidden)]
    return torch.stack([norm(reader.norm, x) for x in words])


@pytest.fixture
def reader():
    reader = TextEncoder(20, 16, max_tokens=8, num_layers=2)
    for p in reader.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return reader


def test_reader_against_a_loop(reader):
    tokens = torch.tensor([[[3, 4, 5, 0], [6, 3, 0, 0], [7, 7, 7, 7]]])
    out = reader(tokens)
    assert out.shape == (1, 3, 4, 16)
    for k in range(3):
        words = [n for n in tokens[0, k].tolist() if n]
        torch.testing.assert_close(out[0, k, : len(words)], read_by_hand(reader, words),
                                   atol=1e-5, rtol=1e-5)


def test_order_matters(reader):
    one, other = reader(torch.tensor([[3, 4, 5], [5, 4, 3]]))
    assert (one[1] - other[1]).abs().max() > 1e-3, "the word in the middle notices"


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 19), min_size=1, max_size=8), st.integers(0, 99))
def test_padding_does_not(words, seed):
    torch.manual_seed(seed)
    reader = TextEncoder(20, 16, max_tokens=8)
    padded = reader(torch.tensor([words + [0] * (8 - len(words)), [1] * 8]))
    alone = reader(torch.tensor(words))
    torch.testing.assert_close(padded[0, : len(words)], alone, atol=1e-5, rtol=1e-5)


def test_any_axes_before_the_words(reader):
    tokens = torch.randint(1, 20, (2, 3, 4, 5))
    out = reader(tokens)
    assert out.shape == (2, 3, 4, 5, 16)
    for index in (0, 0, 0), (1, 2, 3):
        torch.testing.assert_close(out[index], reader(tokens[index]), atol=1e-5, rtol=1e-5)
    assert reader(torch.zeros(2, 3, 0, dtype=torch.long)).shape == (2, 3, 0, 16)


def test_no_words_at_all_is_finite(reader):
    out = reader(torch.zeros(2, 4, dtype=torch.long))
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in reader.parameters())


def test_reader_gradient_reaches_every_parameter(reader):
    out = reader(torch.randint(1, 20, (2, 3, 8)))
    (out * torch.randn_like(out)).sum().backward()
    for name, p in reader.named_parameters():
        assert p.grad.abs().sum() > 0, name
    assert (reader.words.weight.grad[0] == 0).all(), "padding learns nothing"


def test_reader_precision(reader):
    tokens = torch.randint(1, 20, (2, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = reader(tokens)
    torch.testing.assert_close(rounded.float(), reader(tokens), atol=0.1, rtol=0.1)
    assert reader.double()(tokens).dtype == torch.float64


def test_reader_dropout_only_in_training():
    layer, x, mask = TextLayer(16, 4, 0.5), torch.randn(2, 5, 16), torch.ones(2, 5).bool()
    assert not torch.equal(layer(x, mask), layer(x, mask))
    layer.eval()
    assert torch.equal(layer(x, mask), layer(x, mask))


def test_too_long_a_question(reader):
    with pytest.raises(ValueError, match="a question of 9 words.* reads 8; cut it"):
        reader(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="embed_dim 10 .*4 heads"):
        TextEncoder(20, 10)
