"""The aggregator and its clues, against loops written from the equation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import linear, norm

from mcd_edu.aggregator import Aggregator

VARIANTS = [{}, {"sharing": "none"}, {"ffn_mult": 0}, {"sharing": "none", "ffn_mult": 0}]
MORE = [{"sharing": "levels"}, {"sharing": "modalities", "ffn_mult": 0}, {"parallel": True}, {"top_k": 2},
        {"top_k": 1, "parallel": True, "ffn_mult": 0}]
OWN = {"all": lambda level, modality: 0, "levels": lambda level, modality: modality,
       "modalities": lambda level, modality: level, "none": lambda level, modality: 2 * level + modality}


def attend(attn, query, rows):
    "What one token finds in the segments, and its weights h t."
    width, mixed, weights = attn.embed_dim // attn.num_heads, [], []
    query, rows = linear(attn.to_query, query), [linear(attn.to_key_value, row) for row in rows]
    for start in range(0, attn.embed_dim, width):
        scores = [
            math.exp(sum(query[i] * row[i] for i in range(start, start + width)) / math.sqrt(width))
            for row in rows
        ]
        if least := getattr(attn, "top_k", 0):  # the others do not count
            scores = [score if score in sorted(scores)[-least:] else 0 for score in scores]
        weights.append([score / sum(scores) for score in scores])
        mixed += [
            sum(w * row[attn.embed_dim + i] for w, row in zip(weights[-1], rows))
            for i in range(start, start + width)
        ]
    return linear(attn.to_output, mixed), weights


def token_by_loops(aggregator, token, low, high):
    "One token d through both levels (low, high: lists t d); the token and its clues s h t."
    clues, came, found = [], token, []
    for level, streams in enumerate((low, high)):
        token = came if aggregator.parallel else token
        query, hints = norm(aggregator.norms[level], token), []
        for modality, rows in enumerate(streams):
            rows = [
                [x + e for x, e in zip(row, aggregator.modality[modality].tolist())] for row in rows
            ]
            hint, weights = attend(
                aggregator.attns[OWN[aggregator.sharing](level, modality)], query, rows
            )
            hints += hint
            clues.append(weights)
        token = [x + y for x, y in zip(token, linear(aggregator.write[level], hints))]
        if len(aggregator.ffns):
            ffn_norm, ffn = aggregator.ffns[level]
            hidden = [
                z * (1 + math.erf(z / math.sqrt(2))) / 2
                for z in linear(ffn[0], norm(ffn_norm, token))
            ]
            token = [x + y for x, y in zip(token, linear(ffn[3], hidden))]
        found.append(token)
    if aggregator.parallel:
        token = [x + y - z for x, y, z in zip(*found, came)]
    return token, clues


def make(b=3, k=4, length=5, t=6, d=8, dtype=torch.float32, seed=0):
    "Low and high features (two modalities each) and questions."
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.randn(2, 2, b, t, d, generator=generator, dtype=dtype)
    return low, high, torch.randn(b, k, length, d, generator=generator, dtype=dtype)


def run(aggregator, low, high, question, mask=None, need_weights=False):
    return aggregator(question, aggregator.keys_values(low, high), mask, need_weights)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("options", VARIANTS + MORE, ids=str)
def test_question_and_clues_equal_the_loop(options):
    aggregator = Aggregator(6, num_heads=2, **options).double()
    for parameter in aggregator.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    low, high, question = make(b=2, k=2, length=3, t=4, d=6, dtype=torch.float64)
    written, clues = run(aggregator, low, high, question, need_weights=True)
    for b in range(2):
        for k in range(2):
            for i in range(3):
                token, weights = token_by_loops(
                    aggregator, question[b, k, i].tolist(), low[:, b].tolist(), high[:, b].tolist()
                )
                torch.testing.assert_close(
                    written[b, k, i], torch.tensor(token).double(), atol=1e-6, rtol=1e-6
                )
                torch.testing.assert_close(
                    clues[b, k, :, :, i], torch.tensor(weights).double(), atol=1e-6, rtol=1e-6
                )


@pytest.mark.parametrize("options", VARIANTS + MORE, ids=str)
def test_shapes_and_gradients(options):
    aggregator, (low, high, question) = Aggregator(8, num_heads=2, **options), make()
    keys_values = aggregator.keys_values(low, high)
    assert [len(level) for level in keys_values] == [2, 2]
    assert all(x.shape == (3, 2, 6, 4) for level in keys_values for pair in level for x in pair)
    written, clues = aggregator(question, keys_values, need_weights=True)
    assert written.shape == question.shape and clues.shape == (3, 4, 4, 2, 5, 6)
    written.square().sum().backward()
    for name, parameter in aggregator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_clues_do_not_change_the_answer_and_padding_is_silent(options, lengths, seed):
    aggregator, (low, high, question) = Aggregator(8, **options), make(b=len(lengths), seed=seed)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    fast, none = run(aggregator, low, high, question, mask)
    slow, clues = run(aggregator, low, high, question, mask, need_weights=True)
    assert none is None and fast.isfinite().all()
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    assert (clues.masked_select(~mask[:, None, None, None, None]) == 0).all()
    expected_mass = mask.any(-1).float()[:, None, None, None, None].expand(clues.shape[:-1])
    torch.testing.assert_close(clues.sum(-1), expected_mass)
    noisy = [feats.masked_fill(~mask[None, ..., None], 50.0) for feats in (low, high)]
    assert torch.equal(run(aggregator, *noisy, question, mask)[0], fast)
    for i, length in enumerate(lengths):  # alone, without its padding
        if not length:
            continue
        alone, _ = run(
            aggregator, low[:, i : i + 1, :length], high[:, i : i + 1, :length], question[i : i + 1]
        )
        torch.testing.assert_close(fast[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_no_question_and_no_token_hears_another():
    aggregator, (low, high, question) = Aggregator(8), make()
    keys_values = aggregator.keys_values(low, high)
    written, _ = aggregator(question, keys_values)
    for k in range(4):
        torch.testing.assert_close(
            aggregator(question[:, k : k + 1], keys_values)[0],
            written[:, k : k + 1],
            atol=1e-5,
            rtol=1e-5,
        )
    torch.testing.assert_close(
        aggregator(question[:, :, [4, 2]], keys_values)[0],
        written[:, :, [4, 2]],
        atol=1e-5,
        rtol=1e-5,
    )


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)))
def test_clues_move_with_their_segments(order):
    aggregator, (low, high, question) = Aggregator(8), make()
    written, clues = run(aggregator, low, high, question, need_weights=True)
    shuffled, shuffled_clues = run(
        aggregator, low[:, :, order], high[:, :, order], question, need_weights=True
    )
    torch.testing.assert_close(shuffled, written, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shuffled_clues, clues[..., order], atol=1e-5, rtol=1e-5)


def test_streams_are_ordered_low_visual_low_audio_high_visual_high_audio():
    aggregator, (low, high, question) = Aggregator(8), make()
    clues = run(aggregator, low, high, question, need_weights=True)[1]

    def moved(changed_low, changed_high):
        new = run(aggregator, changed_low, changed_high, question, need_weights=True)[1]
        return [not torch.allclose(new[:, :, s], clues[:, :, s]) for s in range(4)]

    flip = torch.tensor([-1.0, 1.0])[:, None, None, None]
    assert moved(low * flip, high) == [
        True,
        False,
        True,
        True,
    ]  # the high level reads what the low one wrote
    assert moved(-low * flip, high) == [False, True, True, True]
    assert moved(low, high * flip) == [False, False, True, False]
    assert moved(low, -high * flip) == [False, False, False, True]


def test_sharing_saves_three_attentions():
    sizes = [
        sum(p.numel() for p in Aggregator(16, sharing=sharing).parameters())
        for sharing in ("all", "levels", "modalities", "none")
    ]
    attn = sum(p.numel() for p in Aggregator(16).attns.parameters())
    assert [size - sizes[0] for size in sizes] == [0, attn, attn, 3 * attn]
    names = list(Aggregator(16).state_dict())
    assert len(names) == len({p.data_ptr() for p in Aggregator(16).state_dict().values()}), (
        "no tensor is stored twice"
    )
    assert sum("to_query.weight" in name for name in names) == 1


def test_top_k_keeps_the_best_segments_and_all_of_them_is_soft():
    low, high, question = make()
    soft, top, whole = (Aggregator(8, top_k=k) for k in (0, 2, 99))
    for other in top, whole:
        other.load_state_dict(soft.state_dict())
    clues = [run(model, low, high, question, need_weights=True) for model in (soft, top, whole)]
    assert ((clues[1][1] > 0).sum(-1) == 2).all()
    torch.testing.assert_close(clues[1][1].sum(-1), torch.ones(clues[1][1].shape[:-1]))
    best = clues[0][1][:, :, :2].topk(2).indices  # of the low level; the high one has another query
    torch.testing.assert_close(clues[1][1][:, :, :2].topk(2).indices.sort().values, best.sort().values)
    torch.testing.assert_close(clues[2][0], clues[0][0])
    assert not torch.allclose(clues[1][0], clues[0][0])


def test_parallel_rounds_do_not_hear_each_other():
    low, high, question = make()
    after, beside = Aggregator(8), Aggregator(8, parallel=True)
    beside.load_state_dict(after.state_dict())
    for model, hears in (after, True), (beside, False):
        one, other = (run(model, x, high, question, need_weights=True)[1][:, :, 2:] for x in (low, -low))
        assert torch.allclose(one, other) != hears


def test_modality_embedding_shifts_the_hints_and_leaves_the_low_clues():
    aggregator, (low, high, question) = Aggregator(8), make()
    written, clues = run(aggregator, low, high, question, need_weights=True)
    torch.nn.init.normal_(aggregator.modality)
    shifted, same = run(aggregator, low, high, question, need_weights=True)
    assert not torch.allclose(shifted, written)
    torch.testing.assert_close(
        same[:, :, :2], clues[:, :, :2]
    )  # a softmax does not see a common shift


def test_gradient_stays_finite_for_a_video_without_segments():
    aggregator, (low, high, question) = Aggregator(8), make(b=2)
    mask = torch.tensor([[True] * 6, [False] * 6])
    for need_weights in True, False:
        run(aggregator, low.requires_grad_(), high, question, mask, need_weights)[
            0
        ].sum().backward()
    assert low.grad.isfinite().all() and (low.grad[:, 1] == 0).all()
    assert all(p.grad.isfinite().all() for p in aggregator.parameters())


def test_bfloat16_autocast_and_gradcheck():
    aggregator, (low, high, question) = Aggregator(32), make(d=32)
    exact, _ = run(aggregator, low, high, question)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, clues = run(aggregator, low, high, question, need_weights=True)
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.05)
    torch.testing.assert_close(clues.sum(-1), torch.ones(clues.shape[:-1]))
    tiny, inputs = (
        Aggregator(4, num_heads=2).double(),
        make(b=1, k=1, length=2, t=2, d=4, dtype=torch.float64),
    )
    for x in inputs:
        x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda low, high, question: run(tiny, low, high, question)[0], inputs
    )


AGGREGATOR, (LOW, HIGH, QUESTION) = Aggregator(8), make()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: Aggregator(8, num_heads=3), "3 heads"),
        (lambda: Aggregator(8, sharing="some"), "choose one of all, levels, modalities, none"),
        (lambda: Aggregator(8, top_k=-1), "top_k=-1"),
        (lambda: run(AGGREGATOR, LOW, HIGH, QUESTION[:, 0]), "expected shape b k l d"),
        (lambda: run(AGGREGATOR, LOW, HIGH, QUESTION[..., :7]), "d = 8"),
        (
            lambda: AGGREGATOR.keys_values(LOW[..., :7], HIGH),
            "keys_values: expected shape b t d with d = 8",
        ),
        (lambda: run(AGGREGATOR, LOW, HIGH, QUESTION, torch.ones(3, 5).bool()), r"b t = \(3, 6\)"),
        (lambda: run(AGGREGATOR, LOW, HIGH, QUESTION, torch.ones(3, 6)), "must be bool"),
    ],
)
def test_wrong_input_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)
