"""Simple modality alignment against plain loops: the KL, and attention along time and features."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import linear, norm
from toys import ask, awake, clips

from mcd_edu.baselines.alignment import (
    Alignment,
    AlignmentConfig,
    CrossAttentionBlock,
    kl_alignment,
)

TINY = AlignmentConfig(20, num_answers=5, visual_dim=6, audio_dim=3, embed_dim=8, num_heads=2,
                       text_layers=1, num_segments=6, max_tokens=8, ffn_mult=2, dropout=0.)
VARIANTS = [{"axis": axis, "pre_norm": pre_norm} for axis in ("time", "features")
            for pre_norm in (True, False)]


def make(dtype=torch.float32, **options) -> Alignment:
    return awake(Alignment(replace(TINY, **options)), dtype)


# Oracles ----------------------------------------------------------------------------------------

def kl_by_loops(first, second):
    """KL(first ‖ second) of two vectors after a softmax each."""
    p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (first, second))
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def attend(attn, query, rows):
    """What one vector finds in the rows, and the weights by head."""
    width, found, by_head = attn.embed_dim // attn.num_heads, [], []
    query, rows = linear(attn.to_query, query), [linear(attn.to_key_value, row) for row in rows]
    for start in range(0, attn.embed_dim, width):
        scores = [math.exp(sum(query[i] * row[i] for i in range(start, start + width))
                           / math.sqrt(width)) for row in rows]
        by_head.append([score / sum(scores) for score in scores])
        found += [sum(w * row[attn.embed_dim + i] for w, row in zip(by_head[-1], rows))
                  for i in range(start, start + width)]
    return linear(attn.to_output, found), by_head


def gelu(row):
    return [z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in row]


def add(first, second):
    return [x + y for x, y in zip(first, second)]


def answer_by_loops(model, visual, audio, words):
    """Logits and the clues of each word, for one question (word vectors) and one video."""
    low = [[add(linear(project[1], row), place) for row, place in zip(x.tolist(), model.position.tolist())]
           for project, x in zip(model.project, (visual, audio))]
    media = low[0] + low[1] if model.config.axis == "time" else [v + a for v, a in zip(*low)]
    block, pre, clues, found = model.block, model.config.pre_norm, [], []
    media = [norm(block.media_norm, row) if pre else row for row in media]
    for x in words:
        one, weights = attend(block.attn, norm(block.norm, x) if pre else x, media)
        x = add(x, one) if pre else norm(block.norm, add(x, one))
        y = norm(block.ffn_norm, x) if pre else x
        y = add(x, linear(block.ffn[3], gelu(linear(block.ffn[0], y))))
        found.append(y if pre else norm(block.ffn_norm, y))
        clues.append(weights)
    question = [sum(column) / len(column) for column in zip(*found)]
    return linear(model.head[4], gelu(linear(model.head[1], norm(model.head[0], question)))), clues


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_model_equals_the_loops(options):
    model, (visual, audio), tokens = make(torch.float64, **options), clips(dtype=torch.float64), ask()
    answer = model.answer(model.encode_video(visual, audio), tokens, None, need_clues=True)
    streams = 2 if options["axis"] == "time" else 1
    assert answer.logits.shape == (3, 2, 5) and answer.question.shape == (3, 2, 8)
    assert answer.clues.shape == (3, 2, streams, 2, 6, 5)
    for i in range(3):
        for j in range(2):
            n = int((tokens[i, j] != 0).sum())
            words = model.text(tokens[i, j, :n]).tolist()
            logits, clues = answer_by_loops(model, visual[i], audio[i], words)
            torch.testing.assert_close(answer.logits[i, j], torch.tensor(logits, dtype=torch.float64))
            found = answer.clues[i, j, :, :, :n].permute(2, 1, 0, 3).flatten(2).double()
            torch.testing.assert_close(found, torch.tensor(clues, dtype=torch.float64))


@pytest.mark.parametrize("direction", ["visual_audio", "audio_visual", "both"])
def test_kl_equals_the_loop(direction):
    visual, audio = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    there = [(visual[i, j].tolist(), audio[i, j].tolist()) for i, j in mask.nonzero().tolist()]
    assert len(there) == 5
    pairs = {"visual_audio": there, "audio_visual": [pair[::-1] for pair in there]}
    mean = {name: sum(kl_by_loops(*pair) for pair in pairs[name]) / 5 for name in pairs}
    expected = mean.get(direction, sum(mean.values()) / 2)
    assert abs(kl_alignment(visual, audio, mask, direction).item() - expected) < 1e-5


@given(st.integers(0, 50), st.floats(-3, 3))
def test_kl_is_never_negative_and_blind_to_a_constant(seed, shift):
    visual, audio = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(seed))
    kl = kl_alignment(visual, audio)
    assert kl > 0
    torch.testing.assert_close(kl_alignment(visual + shift, audio - shift), kl, atol=1e-5, rtol=1e-5)
    assert kl_alignment(visual, visual + shift).abs() < 1e-5
    assert kl_alignment(visual, audio, torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_weight_zero_leaves_cross_entropy_alone():
    tokens, answers = ask(), torch.tensor([[0, 1], [2, -1], [1, 0]])
    found = {}
    for weight in (0., 2.):
        model = make(weight_kl=weight)
        state = model.encode_video(*clips())
        losses = model.losses(state, model.answer(state, tokens, None), answers)
        assert set(losses) == {"total", "ce", "kl"} and losses["kl"] > 0
        torch.testing.assert_close(losses["total"], losses["ce"] + weight * losses["kl"])
        found[weight] = losses["ce"]
    assert found[0.] == found[2.]


def test_unknown_answers_and_padded_questions_do_not_count():
    model, tokens = make(weight_kl=0.), ask()
    state = model.encode_video(*clips())
    answer = model.answer(state, tokens, None)
    there = torch.tensor([[True, True], [True, False], [True, True]])
    loss = model.losses(state, answer, torch.tensor([[0, -1], [2, 4], [1, 3]]), there)["total"]
    log = answer.logits.log_softmax(-1)
    torch.testing.assert_close(loss, -(log[0, 0, 0] + log[1, 0, 2] + log[2, 0, 1] + log[2, 1, 3]) / 4)


@pytest.mark.parametrize("options", [*VARIANTS, {"num_choices": 2}, {"weight_kl": 0.}], ids=str)
def test_gradient_reaches_every_parameter(options):
    model, tokens = make(**options), ask(longest=8)
    choices = torch.tensor([[3, 4], [5, 0]]).expand(3, 2, 2, 2) if "num_choices" in options else None
    tokens[0, 0] = torch.arange(1, 9)  # every position
    state = model.encode_video(*clips(t=6))
    answer = model.answer(state, tokens, None, choices=choices)
    model.losses(state, answer, torch.tensor([[0, 1], [1, -1], [1, 0]]))["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("axis", ["time", "features"])
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_padding_and_company_change_nothing(axis, lengths, seed):
    model, b = make(axis=axis), len(lengths)
    visual, audio = clips(b, seed=seed)
    mask, tokens = torch.arange(5) < torch.tensor(lengths)[:, None], ask(b, seed=seed)
    state = model.encode_video(visual, audio, mask)
    noise = model.encode_video(*(x.masked_fill(~mask[..., None], 50.) for x in (visual, audio)), mask)
    clean, noisy = model.answer(state, tokens, None, True), model.answer(noise, tokens, None, True)
    assert torch.equal(clean.logits, noisy.logits) and clean.logits.isfinite().all()
    assert (clean.clues.masked_select(~mask[:, None, None, None, None]) == 0).all()
    zeros = torch.zeros(b, 2, dtype=torch.long)
    assert torch.equal(model.losses(state, clean, zeros)["kl"], model.losses(noise, noisy, zeros)["kl"])
    for i, length in enumerate(lengths):
        if not length: continue
        alone = model.encode_video(visual[i:i + 1, :length], audio[i:i + 1, :length])
        for j in range(2):
            words = tokens[i:i + 1, j:j + 1, :(tokens[i, j] != 0).sum()]
            torch.testing.assert_close(clean.logits[i, j], model.answer(alone, words, None).logits[0, 0],
                                       atol=1e-5, rtol=0)


def test_an_empty_question_and_an_empty_video_stay_finite():
    model, (visual, audio) = make(), clips()
    tokens, mask = ask(), torch.ones(3, 5, dtype=torch.bool)
    tokens[0, 0], mask[1] = 0, False
    state = model.encode_video(visual.requires_grad_(), audio, mask)
    answer = model.answer(state, tokens, None)
    model.losses(state, answer, torch.zeros(3, 2, dtype=torch.long))["total"].backward()
    assert answer.logits.isfinite().all() and visual.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_weights_are_shared_by_picture_and_sound_along_time_only():
    for axis, total in (("time", 1.), ("features", 1.)):
        model = make(axis=axis)
        clues = model.answer(model.encode_video(*clips()), ask(), None, True).clues
        torch.testing.assert_close(clues.sum((2, 5)), torch.full((3, 2, 2, 6), total))


def test_choices_equal_the_loop():
    model, tokens = make(num_choices=2), ask()
    answer = model.answer(model.encode_video(*clips()), tokens, None,
                          choices=torch.tensor([[3, 4], [5, 0]]).expand(3, 2, 2, 2))
    described = model.head(answer.question)
    for c, words in enumerate([[3, 4], [5]]):
        candidate = model.text(torch.tensor(words)).mean(0)
        torch.testing.assert_close(answer.logits[..., c], described @ candidate / math.sqrt(8))


def test_bfloat16_autocast():
    model, tokens = make(), ask()
    exact = model.answer(model.encode_video(*clips()), tokens, None).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = model.encode_video(*clips())
        answer = model.answer(state, tokens, None)
        losses = model.losses(state, answer, torch.zeros(3, 2, dtype=torch.long))
    torch.testing.assert_close(answer.logits.float(), exact, atol=0.1, rtol=0.05)
    assert losses["kl"].dtype == losses["ce"].dtype == torch.float32


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_learns_first_and_last(options):
    """Who is seen first, who is heard last: in seconds, in every variant."""
    torch.manual_seed(0)
    config = AlignmentConfig(4, num_answers=3, visual_dim=3, audio_dim=3, embed_dim=16, num_heads=2,
                             text_layers=1, num_segments=3, max_tokens=1, dropout=0., **options)
    model, tokens = Alignment(config), torch.tensor([[[2], [3]]]).expand(64, 2, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        who = torch.randint(3, (2, 64, 3))
        state = model.encode_video(*torch.nn.functional.one_hot(who).float())
        answer, right = model.answer(state, tokens, None), torch.stack([who[0, :, 0], who[1, :, 2]], 1)
        optimizer.zero_grad()
        model.losses(state, answer, right)["total"].backward()
        optimizer.step()
    assert (answer.logits.argmax(-1) == right).float().mean() > 0.95


STATE = make().encode_video(*clips())


@pytest.mark.parametrize("wrong, message", [
    (lambda: AlignmentConfig(9, axis="depth"), "axis='depth'.*time, features"),
    (lambda: AlignmentConfig(9, direction="up"), "direction='up'.*visual_audio"),
    (lambda: AlignmentConfig(9, weight_kl=-1.), "weight_kl=-1.0"),
    (lambda: AlignmentConfig(9, embed_dim=7, axis="features"), "two equal halves"),
    (lambda: kl_alignment(torch.ones(2, 3, 4), torch.ones(2, 3, 5)), "same segments and width"),
    (lambda: kl_alignment(*torch.ones(2, 2, 3, 4), torch.ones(2, 4).bool()), "b t = \\(2, 3\\)"),
    (lambda: kl_alignment(*torch.ones(2, 2, 3, 4), direction="up"), "choose visual_audio"),
    (lambda: CrossAttentionBlock(8, num_heads=3), "3 heads"),
    (lambda: make().encode_video(clips()[0], clips(t=4)[1]), "same videos and segments"),
    (lambda: make().encode_video(*clips(t=7)), "1 to 6 of them"),
    (lambda: make().encode_video(*clips(), torch.ones(3, 5)), "mask must be bool"),
    (lambda: make().answer(STATE, ask(b=2), None), "3 videos of the state"),
    (lambda: make().answer(STATE, torch.ones(3, 2, 9).long(), None), "9 words"),
    (lambda: make(num_choices=3).answer(STATE, ask(), None), "3 candidates"),
    (lambda: make().losses(STATE, make().answer(STATE, ask(), None), torch.zeros(3, 1).long()),
     "b k = \\(3, 2\\)"),
])
def test_wrong_input_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)
