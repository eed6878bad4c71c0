"""The late-fusion baseline against plain loops: LSTM, attention over the segments, tanh gate."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import linear, norm
from toys import ask, awake, clips

from mcd_edu.baselines.late_fusion import Grounding, LateFusion, LateFusionConfig, QuestionReader
from mcd_edu.model import MCD, MCDConfig

TINY = LateFusionConfig(20, num_answers=5, visual_dim=6, audio_dim=3, embed_dim=8, hidden_dim=7,
                        num_heads=2, num_segments=6, max_tokens=8, dropout=0.)


def make(dtype=torch.float32, **options) -> LateFusion:
    return awake(LateFusion(replace(TINY, **options)), dtype)


# Oracles: the equations, one number after the other ---------------------------------------------

def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def read_by_loops(reader, tokens):
    """Words → sentence, gate by gate."""
    lstm, width = reader.lstm, reader.lstm.hidden_size
    hidden, cell = [0.] * width, [0.] * width
    for token in tokens:
        word = [math.tanh(x) for x in reader.words.weight[token].tolist()]
        gates = [sum(w * x for w, x in zip(row_x, word)) + sum(w * h for w, h in zip(row_h, hidden))
                 + b_x + b_h for row_x, row_h, b_x, b_h in zip(
                     lstm.weight_ih_l0.tolist(), lstm.weight_hh_l0.tolist(),
                     lstm.bias_ih_l0.tolist(), lstm.bias_hh_l0.tolist())]
        for i in range(width):
            enter, forget, new, out = (gates[i + n * width] for n in range(4))
            cell[i] = sigmoid(forget) * cell[i] + sigmoid(enter) * math.tanh(new)
            hidden[i] = sigmoid(out) * math.tanh(cell[i])
    project, layer_norm = reader.to_sentence
    return norm(layer_norm, linear(project, [math.tanh(x) for x in hidden + cell]))


def ground_by_loops(ground, question, segments):
    """What a question finds in the segments of a modality, and the weights by head."""
    attn, width = ground.attn, ground.attn.embed_dim // ground.attn.num_heads
    query, rows = linear(attn.to_query, question), [linear(attn.to_key_value, x) for x in segments]
    found, by_head = [], []
    for start in range(0, attn.embed_dim, width):
        scores = [math.exp(sum(query[i] * row[i] for i in range(start, start + width))
                           / math.sqrt(width)) for row in rows]
        by_head.append([score / sum(scores) for score in scores])
        found += [sum(w * row[attn.embed_dim + i] for w, row in zip(by_head[-1], rows))
                  for i in range(start, start + width)]
    found = linear(attn.to_output, found)
    hidden = [z * (1 + math.erf(z / math.sqrt(2))) / 2 for z in linear(ground.ffn[0], found)]
    normed = norm(ground.norm, [x + y for x, y in zip(found, linear(ground.ffn[3], hidden))])
    mean = [sum(column) / len(column) for column in zip(*segments)]
    return [x + y for x, y in zip(normed, mean)], by_head


def answer_by_loops(model, visual, audio, tokens):
    """Logits and clues of one question about one video, nothing padded."""
    question, found, clues = read_by_loops(model.read, tokens), [], []
    for project, ground, features in zip(model.project, model.ground, (visual, audio)):
        segments = [[x + p for x, p in zip(linear(project[1], row), place)]
                    for row, place in zip(features.tolist(), model.position.tolist())]
        one, weights = ground_by_loops(ground, question, segments)
        found, clues = found + one, clues + [weights]
    fused = linear(model.fuse, [math.tanh(x) for x in found])
    joint = [math.tanh(x * q) for x, q in zip(fused, question)]
    return linear(model.head[1], joint), clues


def test_model_equals_the_loops():
    model, (visual, audio), tokens = make(torch.float64), clips(dtype=torch.float64), ask()
    answer = model.answer(model.encode_video(visual, audio), tokens, None, need_clues=True)
    assert answer.logits.shape == (3, 2, 5) and answer.question.shape == (3, 2, 8)
    assert answer.clues.shape == (3, 2, 2, 2, 1, 5)
    for i in range(3):
        for j in range(2):
            words = [word for word in tokens[i, j].tolist() if word]
            logits, clues = answer_by_loops(model, visual[i], audio[i], words)
            torch.testing.assert_close(answer.logits[i, j], torch.tensor(logits, dtype=torch.float64))
            torch.testing.assert_close(answer.clues[i, j, :, :, 0].double(),
                                       torch.tensor(clues, dtype=torch.float64))


def test_clues_are_optional_and_change_no_answer():
    model, tokens = make(), ask()
    state = model.encode_video(*clips())
    assert model.answer(state, tokens, None).clues is None
    torch.testing.assert_close(model.answer(state, tokens, None).logits,
                               model.answer(state, tokens, None, True).logits)


def test_choices_equal_the_loop():
    model, tokens = make(num_choices=3), ask()
    choices = torch.tensor([[3, 4], [5, 0], [0, 0]]).expand(3, 2, 3, 2)
    answer = model.answer(model.encode_video(*clips()), tokens, None, choices=choices)
    described = model.head(answer.question)
    for c, words in enumerate([[3, 4], [5]]):
        candidate = torch.tensor(read_by_loops(model.read, words))
        torch.testing.assert_close(answer.logits[..., c], described @ candidate / math.sqrt(8))
    assert (answer.logits[..., 2] == 0).all()  # a candidate without words has no score


@pytest.mark.parametrize("options", [{}, {"num_choices": 3}], ids=str)
def test_gradient_reaches_every_parameter(options):
    model, tokens = make(**options), ask()
    choices = torch.tensor([[3, 4], [5, 0], [6, 0]]).expand(3, 2, 3, 2) if options else None
    state = model.encode_video(*clips(t=6))
    answer = model.answer(state, tokens, None, choices=choices)
    losses = model.losses(state, answer, torch.tensor([[0, 1], [2, -1], [1, 0]]))
    assert set(losses) == {"total", "ce"}
    losses["total"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_what_does_not_count_is_not_in_the_loss():
    model, tokens = make(), ask()
    state = model.encode_video(*clips())
    answer = model.answer(state, tokens, None)
    answers = torch.tensor([[0, -1], [2, 4], [1, 3]])
    there = torch.tensor([[True, True], [True, False], [True, True]])
    log = answer.logits.log_softmax(-1)
    counted = [(0, 0, 0), (1, 0, 2), (2, 0, 1), (2, 1, 3)]
    expected = -sum(log[i] for i in counted) / len(counted)
    torch.testing.assert_close(model.losses(state, answer, answers, there)["total"], expected)
    nothing = model.losses(state, answer, answers.fill_(-1))["total"]
    assert nothing == 0 and nothing.isfinite()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 9))
def test_padding_and_company_change_nothing(lengths, seed):
    model, b = make(), len(lengths)
    visual, audio = clips(b, seed=seed)
    mask, tokens = torch.arange(5) < torch.tensor(lengths)[:, None], ask(b, seed=seed)
    clean = model.answer(model.encode_video(visual, audio, mask), tokens, None, True)
    noisy = model.answer(model.encode_video(*(x.masked_fill(~mask[..., None], 50.) for x in
                                              (visual, audio)), mask), tokens, None, True)
    assert torch.equal(clean.logits, noisy.logits) and clean.logits.isfinite().all()
    assert (clean.clues.masked_select(~mask[:, None, None, None, None]) == 0).all()
    for i, length in enumerate(lengths):
        if not length: continue
        state = model.encode_video(visual[i:i + 1, :length], audio[i:i + 1, :length])
        for j in range(2):
            words = tokens[i:i + 1, j:j + 1, :(tokens[i, j] != 0).sum()]
            alone = model.answer(state, words, None)
            torch.testing.assert_close(clean.logits[i, j], alone.logits[0, 0], atol=1e-5, rtol=0)


def test_an_empty_question_and_an_empty_video_stay_finite():
    model, (visual, audio) = make(), clips()
    tokens, mask = ask(), torch.ones(3, 5, dtype=torch.bool)
    tokens[0, 0], mask[1] = 0, False
    state = model.encode_video(visual.requires_grad_(), audio, mask)
    answer = model.answer(state, tokens, None)
    model.losses(state, answer, torch.zeros(3, 2, dtype=torch.long))["total"].backward()
    assert answer.logits.isfinite().all() and visual.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("modalities, seen, heard", [
    ("both", True, True), ("visual", True, False), ("audio", False, True), ("none", False, False)])
def test_modalities_decide_what_is_perceived(modalities, seen, heard):
    model, (visual, audio), tokens = make(modalities=modalities), clips(), ask()
    def logits(*features): return model.answer(model.encode_video(*features), tokens, None).logits
    assert torch.equal(logits(visual, audio), logits(-visual, audio)) is not seen
    assert torch.equal(logits(visual, audio), logits(visual, -audio)) is not heard


def test_order_of_words_and_of_segments_counts():
    model, (visual, audio), tokens = make(), clips(), torch.tensor([[[3, 4, 5]]] * 3)
    state = model.encode_video(visual, audio)
    first = model.answer(state, tokens, None).logits
    assert not torch.allclose(first, model.answer(state, tokens.flip(-1), None).logits)
    backwards = model.encode_video(visual.flip(1), audio.flip(1))
    assert not torch.allclose(first, model.answer(backwards, tokens, None).logits)


def test_features_are_standardised_with_the_training_set():
    model, (visual, audio) = make(), clips()
    mask, tokens = torch.ones(3, 5, dtype=torch.bool), ask()
    model.fit_features(visual, audio, mask)
    before = model.answer(model.encode_video(visual, audio), tokens, None).logits
    model.fit_features(30 * visual + 7, 9 * audio - 2, mask)
    after = model.answer(model.encode_video(30 * visual + 7, 9 * audio - 2), tokens, None).logits
    torch.testing.assert_close(after, before, atol=0.05, rtol=0)  # the spread has 1e-3 added


def test_as_large_as_mcd_of_the_same_width():
    ours, theirs = (sum(p.numel() for p in model.parameters())
                    for model in (LateFusion(LateFusionConfig(100)), MCD(MCDConfig(100))))
    assert abs(ours / theirs - 1) < 0.03


def test_bfloat16_autocast():
    model, tokens = make(), ask()
    exact = model.answer(model.encode_video(*clips()), tokens, None).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = model.encode_video(*clips())
        answer = model.answer(state, tokens, None)
        loss = model.losses(state, answer, torch.zeros(3, 2, dtype=torch.long))["total"]
    torch.testing.assert_close(answer.logits.float(), exact, atol=0.1, rtol=0.05)
    assert loss.dtype == torch.float32


def test_learns_first_and_last():
    """Who is seen first, who is heard last: in seconds."""
    torch.manual_seed(0)
    config = LateFusionConfig(4, num_answers=3, visual_dim=3, audio_dim=3, embed_dim=16,
                              hidden_dim=16, num_heads=2, num_segments=3, max_tokens=1, dropout=0.)
    model, tokens = LateFusion(config), torch.tensor([[[2], [3]]]).expand(64, 2, 1)
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
    (lambda: LateFusionConfig(9, modalities="smell"), "modalities='smell'.*visual"),
    (lambda: make().encode_video(clips()[0], clips(t=4)[1]), "same videos and segments"),
    (lambda: make().encode_video(*clips(t=7)), "1 to 6 of them"),
    (lambda: make().encode_video(*clips()[::-1]), "visual features.*d = 6"),
    (lambda: make().encode_video(*clips(), torch.ones(3, 5)), "mask must be bool"),
    (lambda: make().answer(STATE, ask()[0], None), "b k l, the k questions"),
    (lambda: make().answer(STATE, ask(b=2), None), "3 videos of the state"),
    (lambda: make().answer(STATE, torch.ones(3, 2, 9, dtype=torch.long), None), "9 words.*takes 8"),
    (lambda: make(num_choices=3).answer(STATE, ask(), None), "3 candidates"),
    (lambda: make().answer(STATE, ask(), None, choices=torch.ones(3, 2, 4, 1).long()), "0 candidates"),
    (lambda: make().losses(STATE, make().answer(STATE, ask(), None), torch.zeros(3, 1).long()),
     "b k = \\(3, 2\\)"),
    (lambda: Grounding(8, num_heads=3), "3 heads"),
    (lambda: QuestionReader(9, 4, 4, max_tokens=2)(torch.ones(1, 3).long()), "cut it"),
])
def test_wrong_input_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)
