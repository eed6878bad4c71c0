"""Attention, feed-forward and masked mean, against loops written from the equations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mcd_edu.layers import (
    FeedForward,
    KeysValues,
    MultiHeadAttention,
    attention,
    check_mask,
    check_width,
    masked_mean,
)


def attention_by_loops(query, key, value, mask):
    "softmax(q k / √e) v with Python numbers, zeros where nothing is valid; and the weights."
    found, all_weights = (
        torch.zeros_like(query),
        torch.zeros(*query.shape[:-1], key.shape[2], dtype=query.dtype),
    )
    for b in range(query.shape[0]):
        valid = [t for t in range(key.shape[2]) if mask[b][t]]
        for h in range(query.shape[1]):
            for n in range(query.shape[2]):
                scores = {
                    t: math.exp(
                        sum(q * k for q, k in zip(query[b, h, n].tolist(), key[b, h, t].tolist()))
                        / math.sqrt(query.shape[-1])
                    )
                    for t in valid
                }
                for t in valid:
                    all_weights[b, h, n, t] = scores[t] / sum(scores.values())
                    found[b, h, n] += all_weights[b, h, n, t] * value[b, h, t]
    return found, all_weights


def make(b=3, h=2, n=4, t=5, e=3, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, e), (b, h, t, e), (b, h, t, e)
    mask = torch.stack([torch.ones(t).bool(), torch.arange(t) % 2 == 0, torch.zeros(t).bool()])[:b]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes], mask


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_equals_the_loop(need_weights, masked):
    qkv, mask = make()
    expected, expected_weights = attention_by_loops(*qkv, mask if masked else torch.ones_like(mask))
    found, weights = attention(*qkv, mask if masked else None, need_weights=need_weights)
    torch.testing.assert_close(found, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
    else:
        assert weights is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3),
    st.integers(0, 9),
)
def test_any_mask_hides_what_it_covers(rows, seed):
    mask = torch.tensor(rows)
    (query, key, value), _ = make(b=len(rows), t=4, seed=seed)
    hidden = ~mask[:, None, :, None]
    results = []
    for k, v in (key, value), (key.masked_fill(hidden, 1e4), value.masked_fill(hidden, -1e4)):
        fast, _ = attention(query, k, v, mask)
        slow, weights = attention(query, k, v, mask, need_weights=True)
        torch.testing.assert_close(fast, slow)
        assert (weights.masked_select(~mask[:, None, None]) == 0).all()
        torch.testing.assert_close(
            weights.sum(-1), mask.any(-1)[:, None, None].to(weights).expand_as(weights[..., 0])
        )
        results.append(fast)
    assert torch.equal(*results) and results[0].isfinite().all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_gradient_is_exact_and_finite(need_weights):
    qkv, mask = make(n=2, t=3, e=2)
    for tensor in qkv:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: attention(*x, mask[:, :3], need_weights=need_weights)[0], qkv
    )


def test_dropout_drops_weights_and_keeps_their_mean():
    torch.manual_seed(0)
    ones = torch.ones(1, 1, 400, 2)
    found, weights = attention(
        ones, ones[:, :, :50], ones[:, :, :50], dropout=0.5, need_weights=True
    )
    assert 0.45 < (weights == 0).double().mean() < 0.55 and abs(found.mean() - 1) < 0.02
    torch.testing.assert_close(
        weights.sum(-1), found[..., 0]
    )  # the weights that are returned were used


def test_multi_head_attention_has_the_promised_shapes():
    attn = MultiHeadAttention(12, num_heads=3)
    keys_values = attn.keys_values(torch.randn(2, 5, 12))
    assert isinstance(
        keys_values, KeysValues
    ) and keys_values.key.shape == keys_values.value.shape == (2, 3, 5, 4)
    found, weights = attn(torch.randn(2, 7, 12), keys_values, need_weights=True)
    assert found.shape == (2, 7, 12) and weights.shape == (2, 3, 7, 5)
    assert attn(torch.randn(2, 7, 12), keys_values)[1] is None


@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_attention_equals_torch(need_weights):
    attn, reference = (
        MultiHeadAttention(12, 3).double(),
        nn.MultiheadAttention(12, 3, batch_first=True).double(),
    )
    reference.load_state_dict(
        {
            "in_proj_weight": torch.cat([attn.to_query.weight, attn.to_key_value.weight]),
            "in_proj_bias": torch.cat([attn.to_query.bias, attn.to_key_value.bias]),
            "out_proj.weight": attn.to_output.weight,
            "out_proj.bias": attn.to_output.bias,
        }
    )
    query, video = torch.randn(2, 7, 12).double(), torch.randn(2, 5, 12).double()
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected, expected_weights = reference(
        query, video, video, key_padding_mask=~mask, average_attn_weights=False
    )
    found, weights = attn(query, attn.keys_values(video), mask, need_weights)
    torch.testing.assert_close(found, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)


def test_dropout_acts_in_training_only():
    attn, x = MultiHeadAttention(8, dropout=0.5), torch.randn(2, 6, 8)
    assert not torch.equal(attn(x, attn.keys_values(x))[0], attn(x, attn.keys_values(x))[0])
    attn.eval()
    assert torch.equal(attn(x, attn.keys_values(x))[0], attn(x, attn.keys_values(x))[0])


def test_alone_or_in_a_batch():
    attn, query, video = MultiHeadAttention(16), torch.randn(3, 4, 16), torch.randn(3, 6, 16)
    mask = torch.arange(6) < torch.tensor([[6], [2], [4]])
    together, _ = attn(query, attn.keys_values(video), mask)
    for i, length in enumerate([6, 2, 4]):  # alone and without the padding
        alone, _ = attn(query[i : i + 1], attn.keys_values(video[i : i + 1, :length]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "layer", [MultiHeadAttention(8), FeedForward(8)], ids=["attention", "feed-forward"]
)
def test_gradient_reaches_every_parameter(layer):
    x = torch.randn(2, 5, 8)
    out = layer(x, layer.keys_values(x))[0] if isinstance(layer, MultiHeadAttention) else layer(x)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("need_weights", [True, False])
def test_bfloat16_autocast(need_weights):
    attn, x = MultiHeadAttention(32), torch.randn(2, 6, 32)
    mask = torch.arange(6) < torch.tensor([[6], [0]])
    exact, _ = attn(x, attn.keys_values(x), mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, weights = attn(x, attn.keys_values(x), mask, need_weights)
    assert found.dtype == torch.bfloat16 and found.isfinite().all()
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)
    if need_weights:
        assert weights.dtype == torch.float32  # what is drawn still sums to 1
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, 6))


def test_feed_forward_works_on_each_position_alone():
    ffn, x = FeedForward(6, mult=3).double(), torch.randn(2, 4, 6).double()

    def gelu(z):
        return z * (1 + math.erf(z / math.sqrt(2))) / 2

    first, last = ffn[0], ffn[3]
    assert first.out_features == 18
    for b in range(2):
        for t in range(4):
            hidden = [
                gelu((w * x[b, t]).sum().item() + bias.item())
                for w, bias in zip(first.weight, first.bias)
            ]
            expected = [
                sum(w * z for w, z in zip(row.tolist(), hidden)) + bias.item()
                for row, bias in zip(last.weight, last.bias)
            ]
            torch.testing.assert_close(ffn(x)[b, t], torch.tensor(expected, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_masked_mean_equals_the_loop(rows):
    mask, x = torch.tensor(rows), torch.randn(len(rows), 3, 2, dtype=torch.float64)
    expected = [
        [sum(x[i, t, c].item() for t in range(3) if row[t]) / max(1, sum(row)) for c in range(2)]
        for i, row in enumerate(rows)
    ]
    garbage = x.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(
        masked_mean(garbage, mask, dim=1), torch.tensor(expected, dtype=torch.float64)
    )
    torch.testing.assert_close(
        masked_mean(garbage, mask, dim=-2), masked_mean(garbage, mask, dim=1)
    )


def test_masked_mean_with_more_axes_and_without_a_mask():
    x, mask = torch.randn(2, 3, 4, 5), torch.rand(2, 3, 4) > 0.5
    assert masked_mean(x, mask, dim=2).shape == (2, 3, 5)
    torch.testing.assert_close(masked_mean(x, None, dim=1), x.mean(1))
    torch.testing.assert_close(
        masked_mean(x, mask, dim=1)[0, 1], masked_mean(x[0, :, 1], mask[0, :, 1], dim=0)
    )
    x.requires_grad_()
    masked_mean(x, torch.zeros_like(mask), dim=2).sum().backward()
    assert (x.grad == 0).all()


ATTN = MultiHeadAttention(8, 2)
QUERY, KEYS_VALUES = torch.randn(2, 3, 8), ATTN.keys_values(torch.randn(2, 5, 8))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: MultiHeadAttention(10, 4), "10 does not divide into 4 heads"),
        (lambda: MultiHeadAttention(10, 0), "does not divide into 0 heads"),
        (lambda: ATTN.keys_values(torch.randn(2, 5, 7)), r"d = 8, got \(2, 5, 7\)"),
        (lambda: ATTN(torch.randn(2, 3, 4, 8), KEYS_VALUES), "expected shape b n d"),
        (lambda: ATTN(QUERY, KEYS_VALUES, torch.ones(2, 5)), "must be bool"),
        (lambda: ATTN(QUERY, KEYS_VALUES, torch.ones(2, 3).bool()), r"b t = \(2, 5\)"),
        (
            lambda: masked_mean(torch.randn(2, 3, 4), torch.ones(2, 4).bool(), 1),
            r"\(2, 3\), got torch.bool \(2, 4\)",
        ),
        (lambda: masked_mean(torch.randn(2, 3, 4), torch.ones(2, 3), 1), "must be bool"),
        (lambda: check_mask("here", torch.ones(2), (2,), "b"), "here: "),
        (
            lambda: check_width("here", torch.ones(2, 3), "b d", 4),
            "here: expected shape b d with d = 4",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)
