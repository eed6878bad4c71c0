"""Local element fusion against a loop written from the equation, and its properties."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.fusion import LocalElementFusion, NoFusion, ObjectGate

b, k, t, l, m, d = 2, 3, 5, 4, 3, 8


# every test of `case` runs as the class comes, with one of the two additions, and with neither
@pytest.fixture(params=[(True, True), (True, False), (False, True), (False, False)],
                ids=["both", "gated", "ordered", "neither"])
def case(request):
    torch.manual_seed(0)
    level = lambda: (torch.randn(b, t, d), torch.randn(b, t, d))
    gated, ordered = request.param
    fusion = LocalElementFusion(d, num_heads=2, gated=gated, ordered=ordered, max_objects=m)  # as many places as objects
    low, high = level(), level()
    for p in fusion.parameters(): torch.nn.init.normal_(p, std=.3)
    return dict(fusion=fusion, low=low, high=high, question=torch.randn(b, k, l, d),
                objects=torch.randn(b, k, m, d),
                objects_mask=torch.tensor([[[1, 1, 1], [1, 0, 1], [0, 0, 0]],
                                           [[1, 0, 0], [0, 1, 1], [1, 1, 1]]]).bool(),
                mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]]).bool())


def run(case, **changes):
    c = {**case, **changes}
    keys_values = c["fusion"].keys_values(c["low"], c["high"])
    return c["fusion"](c["question"], c["objects"], keys_values, c["objects_mask"], c["mask"])[0]


# ---- the oracle: plain lists and loops, from the equation

def matvec(weight, x, bias=None):
    y = [sum(w * v for w, v in zip(row, x)) for row in weight]
    return y if bias is None else [a + c for a, c in zip(y, bias)]


def linear(layer, x):
    return matvec(layer.weight.tolist(), x, None if layer.bias is None else layer.bias.tolist())


def layer_norm(layer, x):
    mean = sum(x) / len(x)
    std = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
    return [(v - mean) / std * w + c for v, w, c in zip(x, layer.weight.tolist(), layer.bias.tolist())]


def attend(box, query, segments):
    "One vector looks at a list of vectors, in heads."
    query, e = linear(box.to_query, query), d // box.num_heads
    key_value = [linear(box.to_key_value, x) for x in segments]
    mixed = []
    for h in range(box.num_heads):
        part = slice(h * e, (h + 1) * e)
        scores = [sum(a * c for a, c in zip(query[part], kv[:d][part])) / math.sqrt(e) for kv in key_value]
        total = sum(math.exp(s) for s in scores)
        mixed += [sum(math.exp(s) / total * kv[d:][part][i] for s, kv in zip(scores, key_value))
                  for i in range(e)]
    return linear(box.to_output, mixed)


def gate(fusion, modality, obj, find):
    "LN(find) times (1 + G LN(object)), number by number; the find as it is without gates."
    if not fusion.gates: return find
    one = fusion.gates[modality]
    factors = linear(one.choose, layer_norm(fusion.objects_norm, obj))
    return [x * (1 + factor) for x, factor in zip(layer_norm(one.find_norm, find), factors)]


def by_hand(case):
    fusion, rows = case["fusion"], []
    places = [[1.] * 2 * d] * m if fusion.places is None else fusion.places.tolist()
    for i in range(b):
        for j in range(k):
            element = []
            for modality, box in enumerate(fusion.boxes):
                segments = [level[modality][i, s].tolist() for level in (case["low"], case["high"])
                            for s in range(t) if case["mask"][i, s]]
                found = []
                for n, obj in enumerate(case["objects"][i, j].tolist()):
                    if not case["objects_mask"][i, j, n]: continue
                    find = attend(box, layer_norm(fusion.objects_norm, obj), segments)
                    place = places[n][modality * d:(modality + 1) * d]
                    found += [[p * (o + f) for p, o, f in zip(place, obj, gate(fusion, modality, obj, find))]]
                element += [sum(x) / len(found) for x in zip(*found)] if found else [0.] * d
            written = linear(fusion.write, element)
            rows += [layer_norm(fusion.question_norm, [q + w for q, w in zip(token, written)])
                     for token in case["question"][i, j].tolist()]
    return torch.tensor(rows).reshape(b, k, l, d)


def test_equals_the_equation(case):
    torch.testing.assert_close(run(case), by_hand(case), atol=1e-5, rtol=1e-5)


def test_shapes(case):
    visual, audio = case["fusion"].keys_values(case["low"], case["high"])
    assert visual.key.shape == audio.value.shape == (b, 2, 2 * t, d // 2)
    box = case["fusion"].boxes[1]
    torch.testing.assert_close(audio.value[:, :, :t], box.keys_values(case["low"][1]).value)
    torch.testing.assert_close(audio.value[:, :, t:], box.keys_values(case["high"][1]).value)
    assert run(case).shape == (b, k, l, d)
    elements, _ = case["fusion"].elements(case["objects"], (visual, audio), case["objects_mask"], case["mask"])
    assert elements.shape == (b, k, 2 * d)


def test_the_weights_are_those_that_were_used(case):
    keys_values = case["fusion"].keys_values(case["low"], case["high"])
    inputs = case["question"], case["objects"], keys_values, case["objects_mask"], case["mask"]
    fused, weights = case["fusion"](*inputs, need_weights=True)
    torch.testing.assert_close(fused, run(case))
    assert weights.shape == (b, k, 4, 2, m, t) and case["fusion"](*inputs)[1] is None
    assert (weights[1, ..., ~case["mask"][1]] == 0).all(), "a segment that is not there is not looked at"
    query = case["fusion"].objects_norm(case["objects"])
    for modality, box in enumerate(case["fusion"].boxes):     # values that are the weights: the box finds its own attention
        value = torch.eye(2 * t).expand(b, 2, 2 * t, 2 * t)
        key, logits = keys_values[modality].key, box.to_query(query).reshape(b, k, m, 2, d // 2)
        mask = case["mask"].repeat(1, 2)[:, None, None]
        found = torch.nn.functional.scaled_dot_product_attention(
            logits.reshape(b, k * m, 2, d // 2).transpose(1, 2), key, value, attn_mask=mask)
        found = found.reshape(b, 2, k, m, 2, t).permute(0, 2, 4, 1, 3, 5)     # b k levels h m t
        torch.testing.assert_close(weights[:, :, modality::2], found, atol=1e-6, rtol=1e-5)


def test_masked_objects_and_segments_are_silent(case):
    noise = 1e3
    hide = lambda x: torch.where(case["mask"][..., None], x, noise)
    noisy = run(case, low=tuple(map(hide, case["low"])), high=tuple(map(hide, case["high"])),
                objects=torch.where(case["objects_mask"][..., None], case["objects"], noise))
    torch.testing.assert_close(noisy, run(case), atol=1e-6, rtol=1e-6)


def test_no_masks_are_full_masks(case):
    full = run(case, objects_mask=torch.ones(b, k, m).bool(), mask=torch.ones(b, t).bool())
    torch.testing.assert_close(run(case, objects_mask=None, mask=None), full)


@pytest.mark.parametrize("objects, objects_mask", [
    (torch.randn(b, k, m, d), torch.zeros(b, k, m).bool()), (torch.zeros(b, k, 0, d), None),
    (torch.zeros(b, k, 0, d), torch.zeros(b, k, 0).bool())])
def test_without_objects_only_the_norm_is_left(case, objects, objects_mask):
    fused = run(case, objects=objects, objects_mask=objects_mask)
    torch.testing.assert_close(fused, case["fusion"].question_norm(case["question"]))


def test_no_fusion_is_the_norm_alone():
    nothing, question = NoFusion(8), torch.randn(2, 3, 4, 8)
    torch.nn.init.normal_(nothing.question_norm.weight)
    keys_values = nothing.keys_values((None, None), (None, None))
    written, weights = nothing(question, torch.randn(2, 3, 5, 8), keys_values, None, None, True)
    torch.testing.assert_close(written, nothing.question_norm(question))
    assert weights is None and keys_values == ()


def test_the_two_additions_can_be_switched_off():
    plain = LocalElementFusion(d, num_heads=2, gated=False, ordered=False)
    assert not {name.split(".")[0] for name, _ in plain.named_parameters()} & {"gates", "places"}
    both = LocalElementFusion(d, num_heads=2)
    assert both.places.shape == (8, 2 * d) and len(both.gates) == 2, "both are on as the class comes"


def test_a_gate_that_chooses_nothing_is_a_layer_norm():
    gate, objects, finds = ObjectGate(d), torch.randn(b, m, d), torch.randn(b, m, d)
    for p in gate.choose.parameters(): torch.nn.init.zeros_(p)
    torch.testing.assert_close(gate(objects, finds), torch.nn.functional.layer_norm(finds, (d,)))


@pytest.mark.parametrize("ordered", [True, False])
def test_places_of_one_are_no_places_and_more_objects_than_places_are_refused(ordered):
    torch.manual_seed(0)
    fusion = LocalElementFusion(d, num_heads=2, ordered=ordered, max_objects=m)
    state = fusion.keys_values(*((torch.randn(b, t, d), torch.randn(b, t, d)) for _ in range(2)))
    question, objects = torch.randn(b, k, l, d), torch.randn(b, k, m + 1, d)
    if not ordered:
        assert fusion(question, objects, state)[0].shape == question.shape, "without places there is no limit"
        return
    with pytest.raises(ValueError, match=f"{m + 1} objects.*places for {m}.*raise max_objects"):
        fusion(question, objects, state)[0]
    torch.nn.init.ones_(fusion.places)
    plain = LocalElementFusion(d, num_heads=2, ordered=False)
    plain.load_state_dict({name: p for name, p in fusion.state_dict().items() if name != "places"})
    torch.testing.assert_close(fusion(question, objects[:, :, :m], state)[0], plain(question, objects[:, :, :m], state)[0])


def test_only_a_place_that_is_filled_learns():
    torch.manual_seed(0)
    fusion = LocalElementFusion(d, num_heads=2, max_objects=m)
    state = fusion.keys_values(*((torch.randn(b, t, d), torch.randn(b, t, d)) for _ in range(2)))
    fused = fusion(torch.randn(b, k, l, d), torch.randn(b, k, m - 1, d), state)[0]
    (fused * torch.randn_like(fused)).sum().backward()
    assert (fusion.places.grad.abs().sum(1) > 0).tolist() == [True] * (m - 1) + [False]


def test_a_video_without_segments_gives_finite_output_and_gradient(case):
    mask = case["mask"].clone()
    mask[0] = False
    low = tuple(x.clone().requires_grad_() for x in case["low"])
    fused = run(case, mask=mask, low=low)
    fused.square().sum().backward()
    assert fused.isfinite().all() and all(x.grad.isfinite().all() for x in low)
    assert (low[0].grad[0] == 0).all()


def test_gradient_reaches_every_parameter_and_input(case):
    inputs = [x.requires_grad_() for x in (*case["low"], *case["high"], case["question"], case["objects"])]
    (run(case) * torch.randn(b, k, l, d)).sum().backward()
    for name, p in case["fusion"].named_parameters():
        assert p.grad.abs().sum() > 0, name
    if case["fusion"].places is not None: assert (case["fusion"].places.grad.abs().sum(1) > 0).all()
    for x in inputs:
        assert x.grad.abs().sum() > 0 and x.grad.isfinite().all()
    assert (case["objects"].grad[~case["objects_mask"]] == 0).all(), "a masked object learns nothing"


def test_alone_as_in_a_batch(case):
    together = run(case)
    for i in range(b):
        one = {name: case[name][[i]] for name in ("question", "objects", "objects_mask", "mask")}
        alone = run(case, low=tuple(x[[i]] for x in case["low"]), high=tuple(x[[i]] for x in case["high"]), **one)
        torch.testing.assert_close(alone, together[[i]], atol=1e-5, rtol=1e-5)


def test_padding_a_batch_changes_nothing(case):
    pad, places = torch.nn.functional.pad, case["fusion"].places
    if places is not None: case["fusion"].places = torch.nn.Parameter(torch.cat([places, torch.randn(2, 2 * d)]))
    longer = run(case, low=tuple(pad(x, (0, 0, 0, 3), value=7.) for x in case["low"]),
                 high=tuple(pad(x, (0, 0, 0, 3), value=7.) for x in case["high"]), mask=pad(case["mask"], (0, 3)),
                 objects=pad(case["objects"], (0, 0, 0, 2), value=7.), objects_mask=pad(case["objects_mask"], (0, 2)))
    torch.testing.assert_close(longer, run(case), atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(m)), st.permutations(range(k)), st.integers(0, 99))
def test_unordered_objects_are_a_set_and_questions_keep_to_themselves(objects_order, questions_order, seed):
    torch.manual_seed(seed)
    fusion = LocalElementFusion(d, num_heads=2, ordered=False)
    state = fusion.keys_values(*((torch.randn(b, t, d), torch.randn(b, t, d)) for _ in range(2)))
    question, objects, mask = torch.randn(b, k, l, d), torch.randn(b, k, m, d), torch.rand(b, k, m) > .4
    fused = fusion(question, objects, state, mask)[0]
    shuffled = fusion(question[:, questions_order], objects[:, questions_order][:, :, objects_order], state,
                      mask[:, questions_order][:, :, objects_order])[0]
    torch.testing.assert_close(shuffled, fused[:, questions_order], atol=1e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(m)), st.permutations(range(k)), st.integers(0, 99))
def test_the_order_of_objects_counts_the_order_of_questions_does_not(objects_order, questions_order, seed):
    torch.manual_seed(seed)
    fusion = LocalElementFusion(d, num_heads=2)
    state = fusion.keys_values(*((torch.randn(b, t, d), torch.randn(b, t, d)) for _ in range(2)))
    question, objects = torch.randn(b, k, l, d), torch.randn(b, k, m, d)
    fused = fusion(question, objects, state)[0]
    torch.testing.assert_close(fusion(question[:, questions_order], objects[:, questions_order], state)[0],
                               fused[:, questions_order], atol=1e-5, rtol=1e-5)
    shuffled = fusion(question, objects[:, :, objects_order], state)[0]
    assert torch.allclose(shuffled, fused, atol=1e-4) == (list(objects_order) == list(range(m)))
    fusion.places.data = fusion.places.data[list(objects_order)]  # the places go along: as before
    torch.testing.assert_close(fusion(question, objects[:, :, objects_order], state)[0], fused, atol=1e-5, rtol=1e-5)


def test_every_token_gets_the_same_element(case):
    case["fusion"].question_norm = torch.nn.Identity()
    written = run(case) - case["question"]
    torch.testing.assert_close(written, written[:, :, :1].expand_as(written), atol=1e-5, rtol=1e-5)


def test_low_and_high_both_matter(case):
    for name in ("low", "high"):
        for modality in range(2):
            changed = list(case[name])
            changed[modality] = changed[modality] + torch.randn(b, t, d)
            assert not torch.allclose(run(case, **{name: tuple(changed)}), run(case)), (name, modality)


def test_dropout_only_in_training(case):
    old = case["fusion"]
    fusion = LocalElementFusion(d, num_heads=2, dropout=.5, gated=bool(old.gates), ordered=old.places is not None)
    case["fusion"] = fusion
    assert not torch.equal(run(case), run(case))
    fusion.eval()
    assert torch.equal(run(case), run(case))


def test_double_precision_gradients(case):
    case.update({name: case[name].double() for name in ("question", "objects")})
    case["fusion"].double()
    low, high = ([x.double() for x in case[name]] for name in ("low", "high"))
    f = lambda lv, question, objects: run(case, low=(lv, low[1]), high=high, question=question, objects=objects)
    assert torch.autograd.gradcheck(f, [x.requires_grad_() for x in (low[0], case["question"], case["objects"])],
                                    fast_mode=True)


def test_autocast(case):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_precision = run(case)
    torch.testing.assert_close(low_precision.float(), run(case), atol=.05, rtol=.05)


def test_state_round_trip(case):
    old = case["fusion"]
    other = LocalElementFusion(d, num_heads=2, gated=bool(old.gates), ordered=old.places is not None, max_objects=m)
    other.load_state_dict(case["fusion"].state_dict())
    assert torch.equal(run(case, fusion=other), run(case))


def test_wrong_input(case):
    with pytest.raises(ValueError, match="embed_dim 8 .*3 heads"):
        LocalElementFusion(d, num_heads=3)
    for match, change in {"question": dict(question=torch.randn(b, k, l, d + 1)),
                          "objects": dict(objects=torch.randn(b, k, m, d + 1)),
                          "b k l d": dict(question=torch.randn(b, l, d)),
                          "each question its own": dict(objects=torch.randn(b, k + 1, m, d)),
                          "mask must be bool.*b t": dict(mask=torch.ones(b, t)),
                          "b t = ": dict(mask=torch.ones(b, 2 * t).bool()),
                          "mask must be bool": dict(objects_mask=torch.ones(b, k, m))}.items():
        with pytest.raises(ValueError, match=match):
            run(case, **change)
