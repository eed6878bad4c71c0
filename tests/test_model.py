"""The whole of MCD, against a loop over videos, questions and words, and its promises."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, pad

from mcd_edu.model import (
    HEADS,
    MCD,
    Answer,
    MCDConfig,
    PredictionHead,
    Standardise,
    VideoState,
    mcd_losses,
)
from mcd_edu.models import MODELS

LAYERS = "num_blocks", "num_layers", "text_layers"
CONFIG = MCDConfig(vocab_size=12, num_answers=5, visual_dim=6, audio_dim=4, embed_dim=8,
                   num_heads=2, num_blocks=2, num_segments=5, max_tokens=6, shared_dim=4)
b, k, t, l, m = 2, 3, 4, 5, 2


def build(seed=0, **changes):
    "A model in evaluation mode with weights that are large enough to matter."
    torch.manual_seed(seed)
    model = MCD(replace(CONFIG, **changes))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
        else:
            p.data += 0.1 * torch.randn_like(p)
    model.fit_features(3 * torch.randn(4, 5, 6) + 1, 3 * torch.randn(4, 5, 4) - 1,
                       torch.rand(4, 5) > 0.2)
    return model.eval()


@pytest.fixture
def case():
    "Two videos, the second shorter; questions and objects of several lengths."
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    tokens = torch.tensor([[[2, 3, 4, 5, 6], [7, 8, 0, 0, 0], [9, 0, 0, 0, 0]],
                           [[3, 3, 3, 0, 0], [2, 4, 6, 8, 0], [11, 10, 9, 8, 7]]])
    objects = torch.tensor([[[2, 3], [7, 0], [0, 0]], [[3, 0], [4, 6], [0, 0]]])
    return dict(visual=torch.randn(b, t, 6), audio=torch.randn(b, t, 4), mask=mask, tokens=tokens,
                objects=objects)


def run(model, case, need_clues=False, **changes):
    c = {**case, **changes}
    state = model.encode_video(c["visual"], c["audio"], c["mask"])
    return model.answer(state, c["tokens"], c["objects"], need_clues)


def close(first, second, atol=1e-5):
    torch.testing.assert_close(first, second, atol=atol, rtol=0)


# ---- the oracle: one video, one question, one vector at a time, from the equations


def linear(layer, x):
    return layer.weight @ x + (0 if layer.bias is None else layer.bias)


def norm(layer, x):
    spread = ((x - x.mean()) ** 2).mean() + layer.eps
    return (x - x.mean()) / spread.sqrt() * layer.weight + layer.bias


def feed_forward(layer, x): return linear(layer[3], gelu(linear(layer[0], x)))


def attend(attn, query, rows):
    "One vector looks at some vectors, head by head; returns what it finds and the weights."
    d, e = attn.embed_dim, attn.embed_dim // attn.num_heads
    query, rows = linear(attn.to_query, query), [linear(attn.to_key_value, row) for row in rows]
    mixed, weights = [], []
    for h in range(attn.num_heads):
        part = slice(h * e, h * e + e)
        scores = torch.stack([(query[part] @ row[:d][part] / math.sqrt(e)).exp() for row in rows])
        weights.append(scores / scores.sum())
        mixed.append(sum(w * row[d:][part] for w, row in zip(weights[-1], rows)))
    return linear(attn.to_output, torch.cat(mixed)), torch.stack(weights)


def read(text, tokens):
    words = [text.words.weight[n] + text.positions[i] for i, n in enumerate(tokens)]
    for layer in text.layers:
        normed = [norm(layer.norm, x) for x in words]
        words = [x + attend(layer.attention, y, normed)[0] for x, y in zip(words, normed)]
        words = [x + feed_forward(layer.ffn, norm(layer.ffn_norm, x)) for x in words]
    return [norm(text.norm, x) for x in words]


def watch(model, visual, audio):
    "Low and high features of one video: lists of segments, visual and audio."
    low = []
    for project, feats in (model.project_visual, visual), (model.project_audio, audio):
        scaled = [(x - project[0].mean) / project[0].spread for x in feats]
        low.append([linear(project[1], x) + model.position[i] for i, x in enumerate(scaled)])
    high = low
    for block in model.association.blocks:
        streams = block.visual, block.audio
        normed = [[norm(s.norm, x) for x in feats] for s, feats in zip(streams, high)]
        after = []
        for i, stream in enumerate(streams):
            u = [x + attend(stream.self_attn, y, normed[i])[0]
                 + attend(stream.cross_attn, y, normed[1 - i])[0]
                 for x, y in zip(high[i], normed[i])]
            after.append([x + feed_forward(stream.ffn, norm(stream.ffn_norm, x)) for x in u])
        high = after
    return low, high


def element_of(fusion, place, object_, low, high):
    "What the object in a place writes, [e_v ; e_a], and where it looked, s h t."
    query, found, looks = norm(fusion.objects_norm, object_), [], []
    for i, box in enumerate(fusion.boxes):
        find, weights = attend(box, query, low[i] + high[i])
        looks.append(weights)
        if fusion.gates:
            gate = fusion.gates[i]
            find = norm(gate.find_norm, find) * (1 + linear(gate.choose, query))
        found.append(object_ + find)
    looks = [weights[..., part] for part in (slice(len(low[0])), slice(len(low[0]), None)) for weights in looks]
    return torch.cat(found) * (1 if fusion.places is None else fusion.places[place]), torch.stack(looks)


def answer_by_hand(model, visual, audio, tokens, objects):
    "Logits a, pooled question d, clues s h l t and those of objects s h m t of a question, unpadded."
    low, high = watch(model, visual, audio)
    words = [linear(model.project_question, x) for x in read(model.text, tokens)]
    aggregator, clues = model.aggregator, []
    for level, feats in enumerate((low, high)):
        found = [[attend(aggregator.attns[0], norm(aggregator.norms[level], q),
                         [x + aggregator.modality[i] for x in feats[i]]) for i in range(2)]
                 for q in words]
        clues += [torch.stack([row[i][1] for row in found], dim=1) for i in range(2)]
        words = [q + linear(aggregator.write[level], torch.cat([v[0], a[0]]))
                 for q, (v, a) in zip(words, found)]
        words = [q + feed_forward(ffn[1], norm(ffn[0], q))
                 for ffn in [aggregator.ffns[level]] for q in words]
    fusion, element, looks = model.fusion, torch.zeros(2 * model.config.embed_dim, dtype=visual.dtype), []
    if objects:
        its = [linear(model.project_objects, x) for x in read(model.text, objects)]
        elements, looks = zip(*(element_of(fusion, n, o, low, high) for n, o in enumerate(its)))
        element = sum(elements) / len(its)
    words = [norm(fusion.question_norm, q + linear(fusion.write, element)) for q in words]
    question = pooled = sum(words) / len(words)
    if model.config.head == "late_fusion":
        video = [sum(feats) / len(feats) for feats in high]
        pooled = linear(model.head.fuse, torch.cat([question, *video]))
    logits = linear(model.head.mlp[5], gelu(linear(model.head.mlp[2], gelu(pooled))))
    return logits, question, torch.stack(clues), looks


@pytest.mark.parametrize("changes", [
    {}, {"head": "late_fusion"}, {"num_blocks": 0},
    {"gated_objects": False, "ordered_objects": False}])
def test_equals_the_equations(case, changes):
    model = build(**changes).double()
    case.update(visual=case["visual"].double(), audio=case["audio"].double())
    with torch.no_grad():
        answer = run(model, case, need_clues=True)
        for i in range(b):
            there = case["mask"][i]
            for j in range(k):
                words = [n for n in case["tokens"][i, j].tolist() if n]
                logits, question, clues, looks = answer_by_hand(
                    model, case["visual"][i, there], case["audio"][i, there], words,
                    [n for n in case["objects"][i, j].tolist() if n])
                close(answer.logits[i, j], logits, 1e-9)
                close(answer.question[i, j], question, 1e-9)
                seen = answer.clues[i, j, :, :, : len(words)]
                close(seen[..., there].double(), clues, 1e-9)
                assert (seen[..., ~there] == 0).all() and (answer.object_clues[i, j, ..., ~there] == 0).all()
                for n, look in enumerate(looks):
                    close(answer.object_clues[i, j, :, :, n][..., there].double(), look, 1e-9)


def test_shapes(case):
    model = build()
    state = model.encode_video(case["visual"], case["audio"], case["mask"])
    assert isinstance(state, VideoState)
    assert all(x.shape == (b, t, 8) for x in (*state.low, *state.high))
    assert all(kv.key.shape == (b, 2, t, 4) for level in state.aggregator for kv in level)
    assert all(kv.value.shape == (b, 2, 2 * t, 4) for kv in state.fusion)
    answer = model.answer(state, case["tokens"], case["objects"], need_clues=True)
    assert isinstance(answer, Answer)
    assert answer.logits.shape == (b, k, 5) and answer.question.shape == (b, k, 8)
    assert answer.clues.shape == (b, k, 4, 2, l, t)
    assert answer.object_clues.shape == (b, k, 4, 2, case["objects"].shape[2], t)
    silent = model.answer(state, case["tokens"], case["objects"])
    assert silent.clues is silent.object_clues is None
    close(answer.clues.sum(-1), torch.ones(b, k, 4, 2, l))


def test_asking_for_clues_changes_no_answer(case):
    model = build()
    close(run(model, case, need_clues=True).logits, run(model, case).logits)


# ---- the company does not matter


def test_alone_as_in_a_batch(case):
    model = build()
    together = run(model, case).logits
    for i in range(b):
        for j in range(k):
            alone = run(model, {name: x[[i]] for name, x in case.items()},
                        tokens=case["tokens"][[i]][:, [j]], objects=case["objects"][[i]][:, [j]])
            close(alone.logits[0, 0], together[i, j])


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(b)), st.permutations(range(k)), st.integers(0, 1),
       st.integers(0, 1), st.integers(0, 3))
def test_any_order_any_padding(videos, questions, more_segments, more_words, more_objects):
    model = build()
    generator = torch.Generator().manual_seed(0)
    case = dict(visual=torch.randn(b, t, 6, generator=generator),
                audio=torch.randn(b, t, 4, generator=generator),
                mask=torch.tensor([[True] * 4, [True, False, False, False]]),
                tokens=torch.randint(1, 12, (b, k, l), generator=generator),
                objects=torch.randint(0, 12, (b, k, m), generator=generator))
    case["tokens"][0, 1, 2:] = 0
    expected = run(model, case).logits[videos][:, questions]
    case = {name: x[videos] for name, x in case.items()}
    moved = run(model, case, visual=pad(case["visual"], (0, 0, 0, more_segments), value=9.0),
                audio=pad(case["audio"], (0, 0, 0, more_segments), value=-9.0),
                mask=pad(case["mask"], (0, more_segments)),
                tokens=pad(case["tokens"][:, questions], (0, more_words)),
                objects=pad(case["objects"][:, questions], (0, more_objects)))
    close(moved.logits, expected)


def test_padding_is_silent(case):
    model = build()
    hide = case["mask"][..., None]
    noisy = run(model, case, visual=torch.where(hide, case["visual"], 1e3),
                audio=torch.where(hide, case["audio"], -1e3))
    close(noisy.logits, run(model, case).logits)


def test_no_mask_is_a_full_mask(case):
    model = build()
    close(run(model, case, mask=None).logits,
          run(model, case, mask=torch.ones(b, t, dtype=torch.bool)).logits)


def test_nothing_there_is_finite(case):
    model = build().train()
    empty = dict(mask=torch.zeros(b, t, dtype=torch.bool), tokens=0 * case["tokens"],
                 objects=0 * case["objects"])
    state = model.encode_video(case["visual"], case["audio"], empty["mask"])
    answer = model.answer(state, empty["tokens"], empty["objects"], need_clues=True)
    losses = mcd_losses(model, state, answer, torch.zeros(b, k, dtype=torch.long))
    losses["total"].backward()
    assert answer.logits.isfinite().all() and answer.clues.isfinite().all()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_question_hears_its_own_objects_and_video_only(case):
    model = build()
    before = run(model, case).logits
    objects = case["objects"].clone()
    objects[0, 1, 0] = 9
    moved = (run(model, case, objects=objects).logits - before).abs().amax(-1) > 1e-6
    assert moved.tolist() == [[False, True, False], [False, False, False]]
    visual = case["visual"].clone()
    visual[1, 0] += 1
    moved = (run(model, case, visual=visual).logits - before).abs().amax(-1) > 1e-6
    assert moved.tolist() == [[False] * 3, [True] * 3]


def test_order_of_segments_and_of_words_matters(case):
    model = build()
    before = run(model, case).logits
    turned = run(model, case, visual=case["visual"].flip(1), audio=case["audio"].flip(1), mask=None)
    assert (turned.logits[0] - before[0]).abs().max() > 1e-4
    words = case["tokens"].clone()
    words[0, 0] = words[0, 0].flip(0)
    assert (run(model, case, tokens=words).logits[0, 0] - before[0, 0]).abs().max() > 1e-4


# ---- what the head may see


@pytest.mark.parametrize("head", ["clue_only", "late_fusion"])
def test_what_the_head_sees(case, head):
    model = build(head=head)
    state = model.encode_video(case["visual"], case["audio"], case["mask"])
    before = model.answer(state, case["tokens"], case["objects"])
    other = state._replace(high=tuple(torch.randn_like(x) for x in state.high),
                           low=tuple(torch.randn_like(x) for x in state.low))
    after = model.answer(other, case["tokens"], case["objects"])
    assert torch.equal(after.question, before.question)
    assert torch.equal(after.logits, before.logits) == (head == "clue_only")


def test_clue_only_head_is_blind_to_the_video():
    head = PredictionHead(CONFIG).eval()
    question = torch.randn(b, k, 8)
    assert torch.equal(head(question, None), head(question, "anything"))


def test_late_fusion_ignores_padding(case):
    model = build(head="late_fusion")
    state = model.encode_video(case["visual"], case["audio"], case["mask"])
    hide = case["mask"][..., None]
    other = state._replace(high=tuple(torch.where(hide, x, 1e3) for x in state.high))
    close(model.answer(other, case["tokens"], case["objects"]).logits,
          model.answer(state, case["tokens"], case["objects"]).logits)


@pytest.mark.parametrize("modalities, looks, listens", [
    ("both", True, True), ("visual", True, False), ("audio", False, True), ("none", False, False)])
def test_modalities(case, modalities, looks, listens):
    model = build(modalities=modalities)
    before = run(model, case).logits
    for name, used in ("visual", looks), ("audio", listens):
        after = run(model, case, **{name: case[name] + torch.randn_like(case[name])}).logits
        assert torch.equal(after, before) != used, name


# ---- variants: each changes what is computed, and nothing else

ANSWERS_CHANGE = [  # options that change what is said
    {"residual": False}, {"attention": "hard"}, {"association": "self"}, {"association": "cross"},
    {"association": "to_visual"}, {"association": "to_audio"}, {"num_blocks": 0}, {"num_blocks": 1},
    {"num_blocks": 3}, {"levels": "low"}, {"levels": "high"}, {"levels": "parallel"},
    {"sharing": "levels"}, {"sharing": "modalities"}, {"sharing": "none"}, {"top_k": 1},
    {"element_fusion": False}, {"gated_objects": False}, {"ordered_objects": False},
    {"head": "late_fusion"}, {"head": "late_add"}, {"head": "late_gate"}, {"matched_head": True},
    {"modalities": "visual"}, {"modalities": "audio"}, {"modalities": "none"}]
LOSSES_CHANGE = [  # options that change only what is learned from, and the losses that change
    ({"kd_kind": "kl"}, {"qv", "qa"}), ({"kd_kind": "mse"}, {"qv", "qa"}),
    ({"kd_level": "high"}, {"qv", "qa"}), ({"kd_edges": "visual"}, set()),
    ({"kd_edges": "audio"}, set()), ({"weight_av": 0.0}, set()), ({"weight_kd": 0.0}, set()),
    ({"mask_same_video": False}, {"av", "qv", "qa"})]


def twin(model, **changes):
    "The variant with all weights of the model that it has a place for."
    other = build(1, **changes)
    mine = other.state_dict()
    other.load_state_dict({**mine, **{name: x for name, x in model.state_dict().items()
                                      if name in mine and mine[name].shape == x.shape}})
    return other


def lose(model, case, copies=False):
    "All losses; `copies`: the videos of the batch count as one."
    state = model.encode_video(case["visual"], case["audio"], case["mask"])
    answer = model.answer(state, case["tokens"], case["objects"])
    return mcd_losses(model, state, answer, torch.ones(b, k, dtype=torch.long),
                      video_ids=torch.tensor([7, 7 if copies else 8]))


@pytest.mark.parametrize("changes", ANSWERS_CHANGE, ids=str)
def test_a_variant_changes_the_answers(case, changes):
    model = build()
    other = twin(model, **changes)
    one, two = run(model, case, need_clues=True), run(other, case, need_clues=True)
    assert one.logits.shape == two.logits.shape and two.logits.isfinite().all()
    assert not torch.allclose(one.logits, two.logits, atol=1e-4)
    assert one.clues.shape == two.clues.shape
    alone = run(other, {name: x[:1] for name, x in case.items()})
    close(alone.logits, two.logits[:1])
    close(run(other, case).logits, two.logits)  # with clues or without


@pytest.mark.parametrize("changes, parts", LOSSES_CHANGE, ids=[str(changes) for changes, _ in LOSSES_CHANGE])
def test_a_variant_changes_the_losses(case, changes, parts):
    model = build()
    other, copies = twin(model, **changes), "mask_same_video" in changes
    one, two = (lose(x, case, copies) for x in (model, other))
    assert torch.equal(run(model, case).logits, run(other, case).logits)
    assert {name for name in two if name != "total" and one[name] != two[name]} == parts
    assert one["total"] != two["total"]
    for edges, gone in ("visual", "qa"), ("audio", "qv"):
        assert (gone in two) == (changes.get("kd_edges") != edges)


def test_stop_gradient_keeps_the_distillation_from_the_features():
    "The numbers are the same; what is projected learns nothing from them."
    grads = []
    for stop in False, True:
        model = build(kd_stop_gradient=stop)
        low = [torch.randn(b, t, 8, requires_grad=True) for _ in "va"]
        sum(model.distillation(*low, torch.randn(b, k, 8)).values()).backward()
        grads.append([x.grad for x in low])
    assert all(x.abs().sum() > 0 for x in grads[0]) and grads[1] == [None, None]


@pytest.mark.parametrize("changes", [c for c in ANSWERS_CHANGE if c.get("modalities") is None]
                         + [c for c, _ in LOSSES_CHANGE], ids=str)
def test_what_a_variant_has_learns(case, changes):
    model = build(**changes)
    lose(model, case)["total"].backward()
    idle = {"kd_edges": {"visual": "distillation.to_audio", "audio": "distillation.to_visual"},
            "weight_kd": {0.0: "distillation"}, "element_fusion": {False: "project_objects"}}
    allowed = tuple(idle[name].get(value, "-") for name, value in changes.items() if name in idle)
    for name, p in model.named_parameters():
        learns = p.grad is not None and bool(p.grad.any())
        assert learns != name.startswith(allowed or "-"), name


def test_heads_can_be_matched():
    def size(**changes):
        return sum(p.numel() for p in MCD(MCDConfig(400, **changes)).parameters())
    largest = size(head="late_fusion")
    for head in HEADS:
        assert abs(size(head=head, matched_head=True) / largest - 1) < 1e-3, head
    assert size(head="late_fusion", matched_head=True) == largest
    assert largest / size() - 1 > 0.02  # this is why
    assert size(levels="low") == size(levels="high") == size(levels="parallel") == size()
    assert size(attention="hard") == size(residual=False) == size(top_k=2) == size()
    assert len({size(association=name) for name in ("self", "cross")}) == 1


def test_late_heads_by_hand(case):
    question = torch.randn(b, k, 8)
    state = build().encode_video(case["visual"], case["audio"], case["mask"])
    video = torch.stack([torch.cat([x[i][case["mask"][i]].mean(0) for x in state.high]) for i in range(b)])
    for kind, by_hand in {"late_add": lambda head, q, v: q + head.fuse(v),
                          "late_gate": lambda head, q, v: q * head.fuse(v.tanh()),
                          "late_fusion": lambda head, q, v: head.fuse(torch.cat([q, v], -1))}.items():
        head = PredictionHead(replace(CONFIG, head=kind)).eval()
        each = torch.stack([torch.stack([head.mlp(by_hand(head, question[i, j], video[i]))
                                         for j in range(k)]) for i in range(b)])
        close(head(question, state), each)


def test_without_text_objects_there_is_no_local_element_fusion(case):
    model = build()
    empty = run(model, case, objects=torch.zeros_like(case["objects"]))
    close(run(twin(model, element_fusion=False), case).logits, empty.logits)


@pytest.mark.parametrize("changes, match", [
    ({"num_blocks": 0, "residual": False}, "residual=False changes nothing with num_blocks=0"),
    ({"num_blocks": 0, "attention": "hard"}, "attention"), ({"num_blocks": 0, "association": "self"}, "association"),
    ({"weight_kd": 0, "kd_kind": "kl"}, "kd_kind='kl' changes nothing with weight_kd=0"),
    ({"weight_kd": 0.0, "kd_edges": "audio"}, "kd_edges"), ({"weight_kd": 0, "kd_level": "high"}, "kd_level"),
    ({"weight_kd": 0, "kd_stop_gradient": True}, "kd_stop_gradient"),
    ({"element_fusion": False, "gated_objects": False}, "gated_objects"),
    ({"association": "neither"}, "both, self, cross, to_visual, to_audio"),
    ({"levels": "middle"}, "low_high, low, high, parallel"),
    ({"attention": "mild"}, "soft, hard"), ({"sharing": "some"}, "all, levels, modalities, none"),
    ({"kd_kind": "dot"}, "nce, kl, mse"), ({"kd_edges": "va"}, "both, visual, audio"), ({"kd_level": "deep"}, "low, high")])
def test_impossible_variants_are_refused(changes, match):
    with pytest.raises(ValueError, match=match) as error:
        replace(CONFIG, **changes)
    assert "\n" not in str(error.value)


# ---- learning


@pytest.mark.parametrize("head", ["clue_only", "late_fusion"])
def test_gradient_reaches_every_parameter(case, head):
    model = build(head=head)
    state = model.encode_video(case["visual"], case["audio"], case["mask"])
    answer = model.answer(state, case["tokens"], case["objects"])
    losses = mcd_losses(model, state, answer, torch.randint(5, (b, k)))
    losses["total"].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("name, part", [("qv", "to_visual"), ("qa", "to_audio")])
def test_distillation_reaches_question_and_features(case, name, part):
    model = build()
    state = model.encode_video(case["visual"], case["audio"], case["mask"])
    answer = model.answer(state, case["tokens"], case["objects"])
    mcd_losses(model, state, answer, torch.zeros(b, k, dtype=torch.long))[name].backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = f"distillation.{part}", "distillation.to_question", "text", "aggregator", "fusion"
    for prefix in parts:
        assert any(n.startswith(prefix) for n in reached), prefix
    assert not any(n.startswith("head") for n in reached)


def test_losses_by_name_and_in_total(case):
    model = build(weight_av=0.3, weight_kd=0.7)
    state = model.encode_video(case["visual"], case["audio"], case["mask"])
    answer = model.answer(state, case["tokens"], case["objects"])
    there = torch.tensor([[True, True, False], [True, False, False]])
    right = torch.randint(5, (b, k))
    losses = mcd_losses(model, state, answer, right, there)
    assert list(losses) == ["total", "ce", "av", "qv", "qa"]
    by_hand = [-(answer.logits[i, j].exp()[right[i, j]] / answer.logits[i, j].exp().sum()).log()
               for i in range(b) for j in range(k) if there[i, j]]
    close(losses["ce"], sum(by_hand) / len(by_hand))
    close(losses["total"], losses["ce"] + 0.3 * losses["av"] + 0.7 * (losses["qv"] + losses["qa"]))


def test_masked_questions_do_not_count(case):
    model, there = build(), torch.tensor([[True, True, False], [True, False, True]])
    right = torch.randint(5, (b, k))
    losses = []
    for tokens, answers in ((case["tokens"], right),
                            (torch.where(there[..., None], case["tokens"], 11),
                             torch.where(there, right, 4))):
        state = model.encode_video(case["visual"], case["audio"], case["mask"])
        answer = model.answer(state, tokens, case["objects"])
        losses.append(mcd_losses(model, state, answer, answers, there))
    for name in losses[0]:
        close(losses[0][name], losses[1][name])
    none = mcd_losses(model, state, answer, answers, torch.zeros_like(there))
    assert all(loss.isfinite() for loss in none.values()) and none["ce"] == 0


def test_copies_of_a_video_are_no_negatives(case):
    model = build()
    twice = {name: torch.cat([x[:1], x[:1]]) for name, x in case.items()}
    state = model.encode_video(twice["visual"], twice["audio"], twice["mask"])
    answer = model.answer(state, twice["tokens"], twice["objects"])
    right = torch.zeros(b, k, dtype=torch.long)
    same = mcd_losses(model, state, answer, right, video_ids=torch.tensor([7, 7]))
    differ = mcd_losses(model, state, answer, right)
    for name in "av", "qv", "qa":
        assert same[name] < 1e-6 < differ[name], name


def test_it_learns_a_batch_by_heart(case):
    model, right = build().train(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        state = model.encode_video(case["visual"], case["audio"], case["mask"])
        answer = model.answer(state, case["tokens"], case["objects"])
        optimizer.zero_grad()
        mcd_losses(model, state, answer, right)["total"].backward()
        optimizer.step()
    assert (run(model.eval(), case).logits.argmax(-1) == right).all()


def test_dropout_only_in_training(case):
    model = build(dropout=0.5)
    assert torch.equal(run(model, case).logits, run(model, case).logits)
    model.train()
    assert not torch.equal(run(model, case).logits, run(model, case).logits)


def test_autocast(case):
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_precision = run(model, case).logits
    torch.testing.assert_close(low_precision.float(), run(model, case).logits, atol=0.2, rtol=0.1)


def test_state_round_trip(case):
    model, other = build(), MCD(CONFIG).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(model, case).logits, run(other, case).logits)


# ---- standardising


def test_standardise():
    torch.manual_seed(0)
    features, mask = 5 * torch.randn(6, 4, 3) + 2, torch.rand(6, 4) > 0.3
    layer = Standardise(3)
    assert torch.equal(layer(features), features), "nothing before fit"
    layer.fit(torch.where(mask[..., None], features, 1e4), mask)
    out = layer(features)[mask]
    close(out.mean(0), torch.zeros(3), 1e-4)
    close(out.std(0, correction=0), torch.ones(3), 1e-3)
    rows = [features[v, s].tolist() for v in range(6) for s in range(4) if mask[v, s]]
    for i, column in enumerate(zip(*rows)):
        mean = sum(column) / len(column)
        spread = math.sqrt(sum((x - mean) ** 2 for x in column) / len(column)) + 1e-3
        close(layer(features)[0, 0, i], (features[0, 0, i] - mean) / spread, 1e-4)


def test_standardise_of_features_that_never_change():
    layer = Standardise(2)
    layer.fit(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool))
    assert (layer(torch.ones(1, 1, 2)) == 0).all()
    with pytest.raises(ValueError, match="mask must be bool"):
        layer.fit(torch.ones(3, 2, 2), torch.ones(3, 2))


def test_statistics_travel_with_the_weights():
    names = build().state_dict()
    for name in "project_visual.0.mean", "project_visual.0.spread", "project_audio.0.mean":
        assert name in names


# ---- wrong input


def test_wrong_configuration():
    for change, match in (({"head": "early"}, "head='early' is unknown; choose one of clue_only"),
                          ({"modalities": "smell"}, "modalities='smell' .*both, visual")):
        with pytest.raises(ValueError, match=match):
            replace(CONFIG, **change)
    with pytest.raises(ValueError, match="embed_dim 8 .*3 heads"):
        MCD(replace(CONFIG, num_heads=3))
    with pytest.raises(AttributeError):
        CONFIG.head = "late_fusion"


@pytest.mark.parametrize("kind", MODELS)
def test_numbers_beyond_any_model_are_refused(kind):
    """Every number of every model: nothing, too much, and what is no such number at all."""
    make_config = MODELS[kind][0]
    good = make_config(9)
    for field in fields(make_config):
        value = getattr(good, field.name)
        if isinstance(value, str): continue
        odd = ([1, None] if isinstance(value, bool) else
               [math.nan, math.inf, -.1, "1", True] if isinstance(value, float) else
               [-1, 10**7, value + .5, float(value), str(value), True, None])
        for wrong in odd + [1.] * (field.name == "dropout") + [101] * (field.name in LAYERS):
            with pytest.raises(ValueError, match=rf"{make_config.__name__}: {field.name}=.*; give "):
                replace(good, **{field.name: wrong})


@pytest.mark.parametrize("match, change", [
    (r"visual features of shape \(2, 4, 7\).*b t 6", dict(visual=torch.randn(b, t, 7))),
    (r"audio features of shape \(2, 4, 6\).*b t 4", dict(audio=torch.randn(b, t, 6))),
    (r"visual features of shape \(4, 6\)", dict(visual=torch.randn(t, 6))),
    ("same videos and segments", dict(audio=torch.randn(b, t - 1, 4))),
    ("same videos and segments", dict(audio=torch.randn(b + 1, t, 4))),
    ("1 to 5 of them", dict(visual=torch.randn(b, 6, 6), audio=torch.randn(b, 6, 4))),
    ("1 to 5 of them", dict(visual=torch.randn(b, 0, 6), audio=torch.randn(b, 0, 4))),
    ("mask must be bool", dict(mask=torch.ones(b, t))),
    ("mask must be bool.*b t", dict(mask=torch.ones(b, t + 1).bool())),
    ("for each of the 2 videos", dict(tokens=torch.ones(1, k, l).long())),
    ("same k questions", dict(objects=torch.ones(b, k + 1, m).long())),
    ("give b k l and b k m", dict(tokens=torch.ones(b, l).long())),
    ("a question of 7 words", dict(tokens=torch.ones(b, k, 7).long()))])
@pytest.mark.parametrize("num_blocks", [0, 1])
def test_wrong_input(case, match, change, num_blocks):
    with pytest.raises(ValueError, match=match):
        run(build(num_blocks=num_blocks), case, **change)


def test_wrong_answers(case):
    model = build()
    state = model.encode_video(case["visual"], case["audio"], case["mask"])
    answer = model.answer(state, case["tokens"], case["objects"])
    with pytest.raises(ValueError, match="answers .*one number for each"):
        mcd_losses(model, state, answer, torch.zeros(b, k + 1, dtype=torch.long))
    with pytest.raises(ValueError, match="mask must be bool.*b k"):
        mcd_losses(model, state, answer, torch.zeros(b, k).long(), torch.ones(b, k))
