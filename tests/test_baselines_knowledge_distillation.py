"""VQA-KD against plain loops written from its equations; masks, gradients, cache, and that it helps."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import linear

from mcd_edu.baselines.knowledge_distillation import (
    BilinearFusion,
    ClipReader,
    GraphAttention,
    GraphVQA,
    InteractionLayer,
    KDConfig,
    QuestionNorm,
    QuestionReader,
    SelfAttentivePooling,
    TeacherCache,
    distillation_losses,
    divergence,
    questions_fingerprint,
)
from mcd_edu.data import ANSWERS, QUESTION_TYPES, AVQADataset, Question, Vocabulary
from mcd_edu.model import Answer, answer_loss

b, k, t, l, a, c, d, f = 3, 4, 5, 6, 7, 4, 8, 3
SMALL = KDConfig(vocab_size=20, num_answers=a, visual_dim=6, audio_dim=5, embed_dim=d, num_heads=2,
                 num_layers=2, num_factors=3, num_segments=t, max_tokens=l, dropout=0.)
VARIANTS = {"clips": {}, "frames": dict(num_frames=f), "choices": dict(num_choices=c), "unordered": dict(positions=False),
            "student": dict(num_layers=1)}


def dot(x, y):
    return sum(v * w for v, w in zip(x, y))


def softmax(x):
    powers = [math.exp(v - max(x)) for v in x]
    return [p / sum(powers) for p in powers]


def weighted(weights, rows):
    return [sum(w * row[i] for w, row in zip(weights, rows)) for i in range(len(rows[0]))]


def without_bias(layer, x):
    return [dot(row, x) for row in layer.weight.tolist()]


def spread_out(module):
    """Parameters far from their small first values, so that a mix-up shows."""
    for p in module.parameters(): torch.nn.init.normal_(p, std=.4)
    return module


def make(name="clips", **changes):
    torch.manual_seed(0)
    model = GraphVQA(replace(SMALL, **{**VARIANTS[name], **changes}))
    for parameter in model.parameters():
        if parameter.ndim > 1: torch.nn.init.normal_(parameter, std=.3)
    return model.eval()


def inputs(name="clips"):
    torch.manual_seed(1)
    visual = torch.randn(b, t, f, 6) if name == "frames" else torch.randn(b, t, 6)
    tokens = torch.randint(2, 20, (b, k, l)).masked_fill(torch.arange(l) >= torch.tensor([[6], [4], [1], [5]]), 0)
    mask = torch.arange(t) < torch.tensor([[5], [3], [1]])
    choices = torch.randint(1, 20, (b, k, c, 3)) if name == "choices" else None
    return dict(visual=visual, audio=torch.randn(b, t, 5), mask=mask, tokens=tokens, choices=choices)


def ask(model, visual, audio, mask, tokens, choices=None, **options):
    state = model.encode_video(visual, audio, mask)
    return state, model.answer(state, tokens, torch.zeros(*tokens.shape[:2], 1).long(), choices=choices, **options)


# ---- each brick against a loop

def graph_by_hand(graph, clips, question, valid):
    """One video, one question: lists in, lists out."""
    width, e = len(question), len(question) // graph.num_heads
    query_key = [without_bias(graph.to_query_key, x) for x in clips]
    asked = linear(graph.ask, question)
    value = [[v / (1 + math.exp(-dot(x, asked))) for v in linear(graph.to_value, x)] for x in clips]
    messages = []
    for i in range(len(clips)):
        mixed = []
        for h in range(graph.num_heads):
            part = slice(h * e, (h + 1) * e)
            near = [j for j in range(len(clips)) if valid[j]]
            scores = [dot(query_key[i][:width][part], query_key[j][width:][part]) / math.sqrt(e) for j in near]
            mixed += weighted(softmax(scores), [value[j][part] for j in near])
        messages.append(linear(graph.to_output, mixed))
    return messages


def test_graph_attention_is_the_loop():
    graph = spread_out(GraphAttention(d, num_heads=2))
    clips, question = torch.randn(b, k, t, d), torch.randn(b, k, d)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    found = graph(clips, question, mask)
    for i in range(b):
        for j in range(k):
            expected = graph_by_hand(graph, clips[i, j].tolist(), question[i, j].tolist(), mask[i])
            torch.testing.assert_close(found[i, j], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_clips_without_question_are_shared_by_all_questions():
    graph = spread_out(GraphAttention(d, num_heads=2))
    clips, question = torch.randn(b, 1, t, d), torch.randn(b, k, d)
    torch.testing.assert_close(graph(clips, question), graph(clips.expand(b, k, t, d), question))
    assert graph.gate(clips, question).shape == (b, k, t)


def test_interaction_adds_what_a_clip_chooses_of_the_two_graphs():
    layer = spread_out(InteractionLayer(d, num_heads=2))
    pair, question = (torch.randn(b, k, t, d), torch.randn(b, k, t, d)), torch.randn(b, k, d)
    for x, y, norm, own, choose in zip(pair, layer(pair, question), layer.norms, layer.specific, layer.choose):
        normed = norm(x)
        both = own(normed, question), layer.common(normed, question)
        for place in ((0, 0, 0), (2, 3, 4), (1, 2, 3)):
            wish = without_bias(choose, normed[place].tolist())
            share = softmax([dot(wish, heard[place].tolist()) / math.sqrt(d) for heard in both])
            expected = x[place] + share[0] * both[0][place] + share[1] * both[1][place]
            torch.testing.assert_close(y[place], expected, atol=1e-4, rtol=1e-4)


def test_the_streams_do_not_see_each_other():
    layer, question = spread_out(InteractionLayer(d, 2)), torch.randn(b, k, d)
    one, other, third = torch.randn(3, b, k, t, d)
    torch.testing.assert_close(layer((one, other), question)[0], layer((one, third), question)[0])


def test_bilinear_fusion_is_the_loop():
    fusion, r = spread_out(BilinearFusion(d, num_factors=3)), 3
    appearance, motion = torch.randn(2, 4, d)
    for x, y, found in zip(appearance, motion, fusion(appearance, motion)):
        left, right = linear(fusion.appearance, x.tolist()), linear(fusion.motion, y.tolist())
        total = [sum(left[i * r + j] * right[i * r + j] for j in range(r)) for i in range(d)]
        root = [math.copysign(math.sqrt(abs(v)), v) for v in total]
        length = math.sqrt(dot(root, root))
        torch.testing.assert_close(found, torch.tensor([v / length * math.sqrt(d) for v in root]), atol=1e-3, rtol=1e-3)


def test_bilinear_fusion_of_nothing_is_finite():
    fusion, nothing = BilinearFusion(d), torch.zeros(2, d, requires_grad=True)
    for layer in (fusion.appearance, fusion.motion): torch.nn.init.zeros_(layer.bias)
    fused = fusion(nothing, nothing)
    fused.sum().backward()
    assert fused.isfinite().all() and nothing.grad.isfinite().all()


def test_self_attentive_pooling_is_the_loop():
    pooling, clips = spread_out(SelfAttentivePooling(d)), torch.randn(b, k, t, d)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0]]).bool()
    pooled, weights = pooling(clips, mask)
    for i in range(b):
        for j in range(k):
            near = [x.tolist() for x, there in zip(clips[i, j], mask[i]) if there]
            scores = [without_bias(pooling.score[2], [math.tanh(v) for v in linear(pooling.score[0], x)])[0] for x in near]
            torch.testing.assert_close(pooled[i, j], torch.tensor(weighted(softmax(scores), near)), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(weights[i, j][mask[i]], torch.tensor(softmax(scores)), atol=1e-4, rtol=1e-4)
    assert not weights.masked_select(~mask[:, None]).any()


def test_clip_reader_takes_the_final_states_of_each_clip():
    reader, frames = ClipReader(6, d, frames=True), torch.randn(b, t, f, 6)
    found = reader(frames)
    forward, backward = reader.lstm(frames[1, 2])[0][-1, :d // 2], reader.lstm(frames[1, 2])[0][0, d // 2:]
    torch.testing.assert_close(found[1, 2], torch.cat([forward, backward]))


def test_question_reader_stops_at_the_last_word():
    reader = QuestionReader(20, d)
    tokens = torch.tensor([[3, 4, 5, 0, 0], [7, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    words, final = reader(tokens)
    alone, alone_final = reader(tokens[:1, :3])
    torch.testing.assert_close(words[0, :3], alone[0])
    torch.testing.assert_close(final[0], alone_final[0])
    assert not final[2].any() and words.shape == (3, 5, d)


# ---- batch norm

def test_padded_questions_have_no_say_in_the_batch_norm():
    one, other, x = QuestionNorm(d), QuestionNorm(d), torch.randn(b, k, d)
    mask = torch.arange(k) < torch.tensor([[4], [2], [1]])
    noisy = torch.where(mask[..., None], x, 100 * torch.randn_like(x))
    torch.testing.assert_close(one(x, mask)[mask], other(noisy, mask)[mask])
    torch.testing.assert_close(one.running_var, other.running_var)
    torch.testing.assert_close(one(x, mask)[mask], torch.nn.BatchNorm1d(d)(x[mask]))


def test_batch_norm_of_one_question_or_none():
    norm, x = QuestionNorm(d), torch.randn(1, 1, d)
    torch.testing.assert_close(norm(x), norm.eval()(x))
    assert norm.train()(x, torch.tensor([[False]])).isfinite().all()


# ---- the model

@pytest.mark.parametrize("name", VARIANTS)
def test_shapes(name):
    model, batch = make(name), inputs(name)
    state, answer = ask(model, **batch, need_clues=True)
    assert isinstance(answer, Answer) and len(answer) == 4
    assert answer.logits.shape == (b, k, c if name == "choices" else a)
    assert answer.question.shape == (b, k, d) and answer.clues.shape == (b, k, 4, 1, l, t)
    assert answer.streams.fused.shape == answer.streams.appearance.shape == (b, k, t, d)
    assert state.appearance.shape == state.motion.shape == (b, t, d)
    torch.testing.assert_close(answer.clues.sum(-1), torch.ones(b, k, 4, 1, l))
    length = answer.streams.fused.norm(dim=-1)
    torch.testing.assert_close(length, torch.full_like(length, d ** .5))


def test_streams_are_those_of_the_answer():
    model, batch = make(), inputs()
    state, answer = ask(model, **batch)
    for one, other in zip(model.streams(state, batch["tokens"]), answer.streams): torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", VARIANTS)
def test_masked_clips_and_padding_change_nothing(name):
    model, batch = make(name), inputs(name)
    expected = ask(model, **batch, need_clues=True)[1]
    hidden = ~batch["mask"]
    noisy = {key: torch.where(hidden.reshape(b, t, *[1] * (batch[key].ndim - 2)), 50., batch[key])
             for key in ("visual", "audio")}
    found = ask(model, **{**batch, **noisy}, need_clues=True)[1]
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.clues, expected.clues)
    fewer = [slice(None), slice(None), slice(l - 1)]
    rows = (batch["tokens"] != 0).sum(-1) < l
    short = ask(model, **{**batch, "tokens": batch["tokens"][tuple(fewer)]})[1]
    torch.testing.assert_close(short.logits[rows], expected.logits[rows])
    if name == "choices":
        longer = torch.nn.functional.pad(batch["choices"], (0, 2))
        torch.testing.assert_close(ask(model, **{**batch, "choices": longer})[1].logits, expected.logits)


def test_no_clip_at_all_is_finite():
    batch = inputs()
    assert ask(make(), **{**batch, "mask": torch.zeros(b, t).bool()})[1].logits.isfinite().all()


@pytest.mark.parametrize("name", VARIANTS)
def test_an_answer_does_not_depend_on_the_batch(name):
    model, batch = make(name), inputs(name)
    expected = ask(model, **batch)[1]
    for i in range(b):
        for j in range(k):
            one = {key: None if x is None else x[i:i + 1, j:j + 1] if key in ("tokens", "choices") else x[i:i + 1]
                   for key, x in batch.items()}
            found = ask(model, **one)[1]
            torch.testing.assert_close(found.logits[0, 0], expected.logits[i, j], atol=1e-5, rtol=0)


def test_padded_questions_do_not_change_training():
    model, batch = make().train(), inputs()
    mask = torch.arange(k) < torch.tensor([[4], [2], [1]])
    expected = ask(model, **batch, question_mask=mask)[1].logits[mask]
    other = torch.where(mask[..., None], batch["tokens"], 3)
    found = ask(model, **{**batch, "tokens": other}, question_mask=mask)[1].logits[mask]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("distillation", ["none", "feature", "logit"])
def test_gradient_reaches_every_parameter(name, distillation):
    model, batch = make(name, distillation=distillation).train(), inputs(name)
    data = Asked(batch)
    if distillation != "none":
        teacher = make(name, num_layers=4)
        model.attach_teacher(TeacherCache.build(teacher, data, distillation), data)
    state, answer = ask(model, **batch)
    losses = model.losses(state, answer, torch.randint(c, (b, k)), question_ids=data.question_ids.reshape(b, k))
    losses["total"].backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_is_close():
    model, batch = make().train(), inputs()
    exact = ask(model, **batch)[1].logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state, answer = ask(model, **batch)
        loss = model.losses(state, answer, torch.zeros(b, k).long())["total"]
    assert loss.dtype == torch.float32 and (answer.logits - exact).abs().max() < .3


def test_fit_features_over_what_is_there():
    for name in ("clips", "frames"):
        model, batch = make(name), inputs(name)
        model.fit_features(batch["visual"], batch["audio"], batch["mask"])
        there = batch["visual"][batch["mask"]].reshape(-1, 6)
        torch.testing.assert_close(model.read_appearance.standardise.mean, there.mean(0))
        torch.testing.assert_close(model.read_motion.standardise.mean, batch["audio"][batch["mask"]].mean(0))


def test_without_positions_clips_are_a_set():
    order = torch.randperm(t)
    batch = {**inputs(), "mask": None}
    mixed = {**batch, "visual": batch["visual"][:, order], "audio": batch["audio"][:, order]}
    unordered, ordered = make("unordered"), make()
    torch.testing.assert_close(ask(unordered, **batch)[1].logits, ask(unordered, **mixed)[1].logits)
    assert not torch.allclose(ask(ordered, **batch)[1].logits, ask(ordered, **mixed)[1].logits)


# ---- losses

def test_answer_loss_counts_what_counts():
    logits, answers = torch.randn(b, k, a), torch.randint(a, (b, k))
    answers[0, 0], mask = -1, torch.arange(k) < torch.tensor([[4], [2], [1]])
    rows = [math.log(sum(math.exp(v) for v in logits[i, j].tolist())) - logits[i, j, answers[i, j]].item()
            for i in range(b) for j in range(k) if mask[i, j] and answers[i, j] >= 0]
    assert answer_loss(logits, answers, mask).item() == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    assert answer_loss(logits, torch.full((b, k), -1)) == 0


@pytest.mark.parametrize("temperature", [.3, 1., 4.])
def test_divergence_is_the_loop_and_torch(temperature):
    teacher, student, mask = torch.randn(b, t, d), torch.randn(b, t, d), torch.rand(b, t) > .4
    rows = []
    for i in range(b):
        for j in range(t):
            if not mask[i, j]: continue
            p, q = (softmax([v / temperature for v in x[i, j].tolist()]) for x in (teacher, student))
            rows.append(sum(x * math.log(x / y) for x, y in zip(p, q)))
    found = divergence(teacher, student, temperature, mask)
    assert found.item() == pytest.approx(sum(rows) / len(rows), rel=1e-4)
    normal = [torch.distributions.Categorical(logits=x[mask] / temperature) for x in (teacher, student)]
    torch.testing.assert_close(found, torch.distributions.kl_divergence(*normal).mean())


def test_divergence_has_the_right_gradient():
    x, y = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: divergence(x.detach(), y, .7), y)


@given(st.floats(.05, 20), st.integers(0, 1000))
def test_divergence_is_never_below_zero_and_blind_to_shifts(temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    found = divergence(teacher, student, temperature)
    assert found >= -1e-12 and abs(divergence(teacher, teacher + 3, temperature)) < 1e-12
    torch.testing.assert_close(divergence(teacher + 1, student - 2, temperature), found)


def test_feature_losses_compare_each_stream_with_the_fused_features():
    config = replace(SMALL, distillation="feature", temperature_appearance=.5, temperature_motion=2.)
    answer = ask(make(), **inputs())[1]
    taught, mask = torch.randn(b, k, t, d, requires_grad=True), inputs()["mask"]
    question_mask = torch.arange(k) < torch.tensor([[4], [2], [1]])
    found = distillation_losses(config, answer, taught, mask, question_mask)
    there = question_mask[:, :, None] & mask[:, None]
    assert list(found) == ["kd_appearance", "kd_motion"]
    for name, temperature in (("appearance", .5), ("motion", 2.)):
        rows = getattr(answer.streams, name)[there]
        torch.testing.assert_close(found[f"kd_{name}"], divergence(taught[there], rows, temperature))
    sum(found.values()).backward()
    assert taught.grad is None, "nothing flows back into the teacher"
    other = torch.where(there[..., None], taught, 9.)
    torch.testing.assert_close(distillation_losses(config, answer, other, mask, question_mask), found)


def test_weights_and_names_of_the_losses():
    batch, data = inputs(), Asked(inputs())
    changes = dict(distillation="feature", weight_appearance=.5, weight_motion=3.)
    model = make(**changes).train()
    model.attach_teacher(TeacherCache.build(make(num_layers=4), data), data)
    state, answer = ask(model, **batch)
    answers, ids = torch.zeros(b, k).long(), data.question_ids.reshape(b, k)
    losses = model.losses(state, answer, answers, question_ids=ids)
    assert list(losses) == ["total", "ce", "kd_appearance", "kd_motion"]
    torch.testing.assert_close(losses["total"], losses["ce"] + .5 * losses["kd_appearance"] + 3 * losses["kd_motion"])
    assert list(model.eval().losses(state, answer, answers)) == ["total", "ce"]


# ---- the teacher, asked once

class Asked:
    """The questions of `inputs` as a dataset: one batch, with ids that are no row numbers."""
    def __init__(self, batch, first=100):
        self.visual, self.audio, self.mask = batch["visual"], batch["audio"], batch["mask"]
        self.video = torch.arange(b).repeat_interleave(k)
        self.tokens, self.choices = batch["tokens"].flatten(0, 1), batch["choices"]
        self.question_ids, self.batch, self.asked = first + torch.randperm(b * k), batch, 0

    def batches(self, num_videos):
        from mcd_edu.data import VideoBatch
        self.asked += 1
        nothing = torch.zeros(b, k).long()
        yield VideoBatch(self.visual, self.audio, self.mask, self.batch["tokens"], nothing[..., None], nothing, nothing,
                         torch.ones(b, k).bool(), torch.arange(b), self.question_ids.reshape(b, k), self.choices)


@pytest.mark.parametrize("name", VARIANTS)
def test_cache_is_what_the_teacher_says(name):
    teacher, batch = make(name).train(), inputs(name)
    data = Asked(batch)
    caches = {kind: TeacherCache.build(teacher, data, kind) for kind in ("feature", "logit")}
    assert teacher.training and data.asked == 2
    answer = ask(teacher.eval(), **batch)[1]
    ids = data.question_ids.reshape(b, k)
    assert caches["feature"].outputs.dtype == torch.float16
    torch.testing.assert_close(caches["feature"].look_up(ids), answer.streams.fused, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(caches["logit"].look_up(ids), answer.logits, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(caches["logit"].look_up(ids[1, 2]), answer.logits[1, 2], atol=2e-3, rtol=1e-3)


def test_a_training_step_does_not_ask_the_teacher(monkeypatch):
    teacher, data, batch = make(num_layers=4), Asked(inputs()), inputs()
    student = make(num_layers=1, distillation="feature").train()
    student.attach_teacher(TeacherCache.build(teacher, data), data)
    monkeypatch.setattr(teacher, "answer", lambda *_: pytest.fail("the teacher was asked again"))
    state, answer = ask(student, **batch)
    ids = data.question_ids.reshape(b, k)
    student.losses(state, answer, torch.zeros(b, k).long(), question_ids=ids)["total"].backward()
    assert data.asked == 1 and not any("cache" in key for key in student.state_dict())
    assert all(p.grad is None for p in teacher.parameters())


def test_cache_goes_to_a_file_and_back(tmp_path):
    teacher, data, path = make(), Asked(inputs()), tmp_path / "teacher.safetensors"
    cache = TeacherCache.build(teacher, data)
    cache.save(path)
    again = TeacherCache.load(path, teacher, data)
    torch.testing.assert_close(again.outputs, cache.outputs)
    assert (again.kind, again.teacher, again.data) == (cache.kind, cache.teacher, cache.data)
    path.write_bytes(b"no cache")
    with pytest.raises(ValueError, match="no teacher cache"): TeacherCache.load(path)
    with pytest.raises(ValueError, match="no teacher cache"): TeacherCache.load(tmp_path / "missing.safetensors")


def test_cache_refuses_others(tmp_path):
    teacher, data = make(), Asked(inputs())
    cache = TeacherCache.build(teacher, data)
    cache.check(teacher, data)
    changed = Asked(inputs())
    changed.question_ids = data.question_ids.clone()
    cache.check(data=changed)
    changed.tokens[0, 0] += 1
    with pytest.raises(ValueError, match="another dataset"): cache.check(data=changed)
    with torch.no_grad(): teacher.position[0, 0] += 1
    with pytest.raises(ValueError, match="another teacher"): cache.check(teacher)
    with pytest.raises(ValueError, match="another dataset"):
        make(distillation="feature").attach_teacher(cache, changed)
    with pytest.raises(ValueError, match="wants logit, width 7"):
        make(distillation="logit").attach_teacher(cache, data)
    with pytest.raises(ValueError, match="wants feature, width 16"):
        make(distillation="feature", embed_dim=16).attach_teacher(cache, data)
    with pytest.raises(ValueError, match="not asked question 7;"): cache.look_up(torch.tensor([[7]]))
    with pytest.raises(ValueError, match="kind='words'"): TeacherCache.build(teacher, data, "words")
    data.question_ids = torch.zeros(b * k).long()
    with pytest.raises(ValueError, match="share an id"): TeacherCache.build(teacher, data)


def test_a_dataset_of_files(tmp_path):
    """With the real dataset class: padded questions, short videos, ids of an annotation file."""
    generator, questions = np.random.default_rng(0), []
    for video, length in (("a", 5), ("b", 3), ("c", 4)):
        for kind, width in (("visual", 6), ("audio", 5)):
            (tmp_path / kind).mkdir(exist_ok=True)
            np.save(tmp_path / kind / f"{video}.npy", generator.standard_normal((length, width)).astype(np.float32))
        for i in range(length - 2):
            questions.append(Question(900 - len(questions), video, f"Is there a {'very ' * i}loud flute ?",
                                      QUESTION_TYPES[i], ("flute",), ANSWERS[i]))
    vocabulary = Vocabulary.build(questions)
    data = AVQADataset(questions, tmp_path / "visual", tmp_path / "audio", vocabulary)
    config = replace(SMALL, vocab_size=len(vocabulary), num_answers=len(ANSWERS), max_tokens=20)
    student = GraphVQA(replace(config, distillation="feature"))
    student.attach_teacher(TeacherCache.build(GraphVQA(config), data, num_videos=2), data)
    student.fit_features(data.visual, data.audio, data.mask)
    for batch in data.batches(2, 16, seed=0):
        state = student.encode_video(batch.visual, batch.audio, batch.mask)
        answer = student.answer(state, batch.tokens, batch.objects, question_mask=batch.question_mask)
        losses = student.losses(state, answer, batch.answers, batch.question_mask, batch.video_ids, batch.question_ids)
        assert all(loss.isfinite() for loss in losses.values()) and len(losses) == 4


# ---- does it help?

class Lamps:
    """Four instruments under coloured lamps, in both streams, in noise; which colour has the instrument asked for?"""
    def __init__(self, n, seed):
        draw = torch.Generator().manual_seed(0)
        words, codes = (torch.linalg.qr(torch.randn(width, width, generator=draw))[0] * width ** .5 for width in (16, 32))
        instruments, lamps, self.codes = words[:4], words[4:8], codes[:4]
        draw = torch.Generator().manual_seed(seed)
        order, lamp = torch.rand(n, 4, generator=draw).argsort(1), torch.randint(4, (n, 4), generator=draw)
        self.visual, self.audio = (instruments[order] + lamps[lamp] + torch.randn(n, 4, 16, generator=draw) for _ in range(2))
        place = torch.randint(4, (n, 2), generator=draw)
        self.asked, self.answers = 2 + order.gather(1, place)[..., None], lamp.gather(1, place)
        self.mask, self.video, self.choices = torch.ones(n, 4).bool(), torch.arange(n).repeat_interleave(2), None
        self.tokens, self.question_ids = self.asked.flatten(0, 1), torch.arange(2 * n)


def accuracy(model, data):
    with torch.no_grad():
        logits = model.eval().answer(model.encode_video(data.visual, data.audio), data.asked).logits
    return (logits.argmax(-1) == data.answers).float().mean().item()


def test_a_perfect_teacher_helps_a_student_with_few_videos():
    train, test, right = Lamps(128, seed=1), Lamps(500, seed=2), {}
    outputs = train.codes[train.answers.flatten()][:, None].expand(-1, 4, -1)
    perfect = TeacherCache("feature", train.question_ids, outputs.half(), "perfect", questions_fingerprint(train))
    for kind in ("none", "feature"):
        torch.manual_seed(1)
        student = GraphVQA(KDConfig(6, 4, 16, 16, 32, num_segments=4, max_tokens=1, dropout=0., distillation=kind,
                                    weight_appearance=3., weight_motion=3., temperature_appearance=.5, temperature_motion=.5))
        if kind == "feature": student.attach_teacher(perfect, train)
        optimizer = torch.optim.Adam(student.parameters(), 3e-3)
        for _ in range(175):
            rows = torch.randint(128, (32,))
            student.train()
            state = student.encode_video(train.visual[rows], train.audio[rows])
            losses = student.losses(state, student.answer(state, train.asked[rows]), train.answers[rows],
                                    question_ids=train.question_ids.reshape(-1, 2)[rows])
            optimizer.zero_grad()
            losses["total"].backward()
            optimizer.step()
        right[kind] = accuracy(student, test)
    assert right["feature"] > right["none"] + .05 and right["none"] > .4, right


# ---- wrong input

@pytest.mark.parametrize("changes, message", [
    (dict(distillation="words"), "feature, logit, none"), (dict(embed_dim=9), "even width"),
    (dict(num_heads=3), "num_heads=3"), (dict(num_layers=0), "num_layers=0"), (dict(temperature_motion=0.), "above 0"),
])
def test_wrong_configuration(changes, message):
    with pytest.raises(ValueError, match=message): replace(SMALL, **changes)


@pytest.mark.parametrize("changes, message", [
    (dict(visual=torch.zeros(b, t, 7)), "built for b t 6 and b t 5"),
    (dict(visual=torch.zeros(b, t, f, 6)), "built for b t 6"),
    (dict(audio=torch.zeros(b, t, 6)), "b t 5"),
    (dict(audio=torch.zeros(b, t - 1, 5)), "same videos"),
    (dict(visual=torch.zeros(b, t + 1, 6), audio=torch.zeros(b, t + 1, 5), mask=None), "1 to 5"),
    (dict(mask=torch.ones(b, t)), "mask must be bool"),
    (dict(tokens=torch.zeros(b + 1, k, l).long()), "each of the 3 videos"),
    (dict(tokens=torch.zeros(b, k, l + 1).long()), "1 to 6 words"),
    (dict(choices=torch.zeros(b, k, c, 2).long()), "built for 0 candidates"),
    (dict(question_mask=torch.ones(b, k)), "mask must be bool"),
])
def test_wrong_input(changes, message):
    with pytest.raises(ValueError, match=message): ask(make(), **{**inputs(), **changes})


def test_more_wrong_input():
    batch = inputs("frames")
    batch["visual"] = batch["visual"][:, :, :2]
    with pytest.raises(ValueError, match="built for b t 3 6"): ask(make("frames"), **batch)
    for choices in (None, torch.zeros(b, k, c + 1, 2).long(), torch.zeros(b, k, c).long()):
        with pytest.raises(ValueError, match="built for 4 candidates"): ask(make("choices"), **{**inputs(), "choices": choices})
    with pytest.raises(ValueError, match="one number for each"): answer_loss(torch.zeros(b, k, a), torch.zeros(b).long())
    with pytest.raises(ValueError, match="same shape"): divergence(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="above 0"): divergence(torch.zeros(2, 3), torch.zeros(2, 3), 0.)
    student, batch = make(distillation="feature").train(), inputs()
    state, answer = ask(student, **batch)
    with pytest.raises(ValueError, match="attach_teacher"): student.losses(state, answer, torch.zeros(b, k).long())
