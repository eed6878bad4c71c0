"""The contrastive losses against loops written from the equations, and their properties."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mcd_edu.distillation import (
    Projection,
    SemanticApproximation,
    SharedSpace,
    approximation_loss,
    association_loss,
    contrastive_loss,
    same_video,
    similarities,
    unit,
    video_numbers,
    weighted_mean,
)

b, k, t, d, s = 4, 3, 5, 8, 6


def sphere(*shape):
    return unit(torch.randn(*shape))


# ---- the oracle: plain lists and loops, from the equation

def dot(x, y):
    return sum(a * c for a, c in zip(x, y))


def nce_by_hand(first, second, positives, temperature=.07, weight=None, candidates=None):
    first, second, positives = first.tolist(), second.tolist(), positives.tolist()
    total = count = 0
    for i, z in enumerate(first):
        w = 1 if weight is None else float(weight[i])
        columns = [j for j in range(len(second)) if candidates is None or candidates[j]]
        partners = [j for j in columns if positives[i][j]]
        if not partners or not w: continue
        negatives = sum(math.exp(dot(z, second[j]) / temperature) for j in columns if not positives[i][j])
        each = [math.exp(dot(z, second[j]) / temperature) for j in partners]
        total += w * sum(-math.log(x / (x + negatives)) for x in each) / len(each)
        count += w
    return total / count if count else 0.


def close(loss, by_hand):
    assert loss.item() == pytest.approx(by_hand, rel=1e-4, abs=1e-5)


# ---- contrastive_loss

@pytest.mark.parametrize("temperature", [.07, .5, 2.])
@pytest.mark.parametrize("seed", range(5))
def test_contrastive_equals_the_equation(temperature, seed):
    torch.manual_seed(seed)
    first, second, positives = sphere(5, d), sphere(7, d), torch.rand(5, 7) < .3
    weight, candidates = torch.rand(5) * (torch.rand(5) > .3), torch.rand(7) > .3
    close(contrastive_loss(first, second, positives, temperature),
          nce_by_hand(first, second, positives, temperature))
    close(contrastive_loss(first, second, positives, temperature, weight, candidates),
          nce_by_hand(first, second, positives, temperature, weight, candidates))


def test_one_positive_is_cross_entropy():
    first, second, label = sphere(6, d), sphere(6, d), torch.randperm(6)
    torch.testing.assert_close(contrastive_loss(first, second, F.one_hot(label, 6).bool(), .1),
                               F.cross_entropy(first @ second.T / .1, label))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 5), p=st.integers(1, 5), seed=st.integers(0, 10**6), temperature=st.floats(.01, 10))
def test_contrastive_is_finite_and_never_negative(n, p, seed, temperature):
    torch.manual_seed(seed)
    first = torch.randn(n, d, requires_grad=True)
    loss = contrastive_loss(unit(first), sphere(p, d), torch.rand(n, p) < .5, temperature,
                            weight=torch.rand(n) < .7, candidates=torch.rand(p) < .7)
    loss.backward()
    assert loss.isfinite() and loss >= 0 and first.grad.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(rows=st.permutations(range(4)), columns=st.permutations(range(5)), seed=st.integers(0, 10**6))
def test_contrastive_knows_no_order(rows, columns, seed):
    torch.manual_seed(seed)
    first, second, positives = sphere(4, d), sphere(5, d), torch.rand(4, 5) < .4
    torch.testing.assert_close(contrastive_loss(first[rows], second[columns], positives[rows][:, columns]),
                               contrastive_loss(first, second, positives))


def test_rows_that_do_not_count():
    first, second, positives = sphere(4, d), sphere(4, d), torch.eye(4).bool()
    positives[3] = False                                  # a row without a positive
    three = contrastive_loss(first[:3], second, positives[:3])
    torch.testing.assert_close(contrastive_loss(first, second, positives), three)
    weight = torch.tensor([True, True, False, True])      # a row that is switched off
    torch.testing.assert_close(contrastive_loss(first, second, positives, weight=weight),
                               contrastive_loss(first[:2], second, positives[:2]))
    for nobody in (dict(weight=torch.zeros(4)), dict(candidates=torch.zeros(4).bool())):
        assert contrastive_loss(first, second, positives, **nobody) == 0
    assert contrastive_loss(first, second, torch.zeros(4, 4).bool()) == 0
    assert contrastive_loss(first, second, torch.ones(4, 4).bool()) == 0, "no negatives, nothing to prove"
    assert contrastive_loss(first[:0], second, positives[:0]) == 0


def test_candidates_that_do_not_exist_are_as_if_absent():
    first, second, positives = sphere(3, d), sphere(5, d), torch.rand(3, 5) < .5
    positives[:, 0] = True
    exists = torch.tensor([True, True, False, True, False])
    torch.testing.assert_close(contrastive_loss(first, second, positives, candidates=exists),
                               contrastive_loss(first, second[exists], positives[:, exists]))


def test_positives_never_push_each_other_away():
    first, near, far, stranger = sphere(1, d), sphere(1, d), sphere(1, d), sphere(1, d)
    second = torch.cat([near, far, stranger]).requires_grad_()
    contrastive_loss(first, second, torch.tensor([[True, True, False]])).backward()
    pull = second.grad @ first[0]
    assert pull[0] <= 0 and pull[1] <= 0 and pull[2] >= 0


def test_numbers_that_would_overflow():
    z = sphere(3, d)
    z = torch.cat([z, -z]).requires_grad_()
    loss = contrastive_loss(z, z, same_video(torch.arange(6) % 3, torch.arange(6) % 3), temperature=1e-3)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision_of_losses(dtype):
    first, second, positives = sphere(5, d), sphere(5, d), torch.eye(5).bool()
    expected = contrastive_loss(first.to(dtype).double(), second.to(dtype).double(), positives)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(first.to(dtype), second.to(dtype), positives)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=1e-4)


def test_contrastive_gradcheck():
    first, second = (sphere(4, d).double().requires_grad_() for _ in range(2))
    positives = torch.rand(4, 4) < .5
    assert torch.autograd.gradcheck(lambda x, y: contrastive_loss(x, y, positives, .2), (first, second))


def test_contrastive_wrong_input():
    first, second, positives = sphere(3, d), sphere(4, d), torch.ones(3, 4).bool()
    for match, arguments in {"positives must be bool.*\\(3, 4\\).*float32": (first, second, positives.float()),
                             "positives must be bool.*\\(4, 3\\)": (first, second, positives.T),
                             "same width": (first, second[:, :5], positives),
                             "temperature=0;": (first, second, positives, 0),
                             "temperature=-1;": (first, second, positives, -1)}.items():
        with pytest.raises(ValueError, match=match):
            contrastive_loss(*arguments)


# ---- the bricks

def test_bricks():
    assert similarities(sphere(3, d), sphere(2, d)).shape == (3, 2)
    torch.testing.assert_close(unit(torch.randn(3, 2, d)).norm(dim=-1), torch.ones(3, 2))
    assert unit(torch.zeros(2, d)).isfinite().all() and unit(torch.randn(2, d).bfloat16()).dtype == torch.float32
    table = same_video(torch.tensor([1, 2]), torch.tensor([2, 1, 2]))
    assert table.tolist() == [[False, True, False], [True, False, True]]
    assert weighted_mean(torch.tensor([1., 2., 9.]), torch.tensor([True, True, False])) == 1.5
    assert weighted_mean(torch.tensor([1., 2.]), torch.zeros(2)) == 0
    assert video_numbers(torch.randn(3, d)).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="one id for each video"):
        video_numbers(torch.randn(3, d), torch.arange(4))


# ---- association_loss

def test_association_equals_the_equation():
    visual, audio, ids = torch.randn(b, d), torch.randn(b, d), torch.tensor([5, 2, 5, 9])
    for given_ids, positives in ((None, torch.eye(b).bool()), (ids, same_video(ids, ids))):
        v, a = unit(visual), unit(audio)
        by_hand = (nce_by_hand(v, a, positives) + nce_by_hand(a, v, positives)) / 2
        close(association_loss(visual, audio, given_ids), by_hand)
        torch.testing.assert_close(association_loss(audio, visual, given_ids),
                                   association_loss(visual, audio, given_ids))
        torch.testing.assert_close(association_loss(3 * visual, audio / 7, given_ids),
                                   association_loss(visual, audio, given_ids))


@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_a_video_are_never_negatives(copies):
    video = torch.randn(1, d).repeat(copies, 1)
    assert association_loss(video, video, torch.zeros(copies)) == 0
    assert association_loss(video, video).item() == pytest.approx(math.log(copies), rel=1e-5)


def test_association_pulls_together_and_reports_wrong_input():
    z = torch.eye(b, d)
    assert association_loss(z, z) < 1e-4 < 5 < association_loss(z, z.roll(1, 0))
    for match, arguments in {"b d for both": (z, z[:2]), "one id for each video": (z, z, torch.arange(3))}.items():
        with pytest.raises(ValueError, match=match):
            association_loss(*arguments)


# ---- SemanticApproximation

@pytest.fixture
def case():
    torch.manual_seed(0)
    return dict(low_visual=torch.randn(b, t, d), low_audio=torch.randn(b, t, d), question=torch.randn(b, k, d),
                mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 1, 1]]).bool(),
                question_mask=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 0, 0]]).bool(),
                video_ids=torch.tensor([7, 3, 7, 1]))


def block(**options):
    torch.manual_seed(1)
    return SemanticApproximation(d, shared_dim=s, **options)


def project_by_hand(door, x):
    layers = door[0], door[2]
    hidden = [dot(row, x) + c for row, c in zip(layers[0].weight.tolist(), layers[0].bias.tolist())]
    hidden = [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in hidden]  # GELU
    out = [dot(row, hidden) + c for row, c in zip(layers[1].weight.tolist(), layers[1].bias.tolist())]
    return [x / math.sqrt(dot(out, out)) for x in out]


def space_by_hand(approximation, case):
    media = []
    for door, low in ((approximation.to_visual, case["low_visual"]), (approximation.to_audio, case["low_audio"])):
        means = [[sum(x) / len(x) for x in zip(*[seg for seg, keep in zip(segs.tolist(), m) if keep])]
                 for segs, m in zip(low, case["mask"])]
        media.append([project_by_hand(door, mean) for mean in means])
    return *media, [[project_by_hand(approximation.to_question, q) for q in qs] for qs in case["question"].tolist()]


def edge_by_hand(kind, media, questions, case, tau):
    ids = case["video_ids"].tolist()
    rows = [(i, j) for i in range(b) for j in range(k) if case["question_mask"][i, j]]
    z = [questions[i][j] for i, j in rows]
    positives = torch.tensor([[ids[i] == other for other in ids] for i, _ in rows])
    if kind == "nce":
        z, media = torch.tensor(z), torch.tensor(media)
        return (nce_by_hand(z, media, positives, tau) + nce_by_hand(media, z, positives.T, tau)) / 2
    if kind == "mse":
        return sum(sum((x - y) ** 2 for x, y in zip(q, media[i])) for q, (i, _) in zip(z, rows)) / len(rows)
    total = 0
    for q, (i, _) in zip(z, rows):
        target, seen = ([math.exp(dot(x, other) / tau) for other in media] for x in (media[i], q))
        total += sum(p / sum(target) * math.log((p / sum(target)) / (x / sum(seen))) for p, x in zip(target, seen))
    return total / len(rows)


@pytest.mark.parametrize("temperature", [.07, .5])
@pytest.mark.parametrize("kind", ["nce", "kl", "mse"])
def test_approximation_equals_the_equation(case, kind, temperature):
    approximation = block(kind=kind, temperature=temperature)
    visual, audio, questions = space_by_hand(approximation, case)
    space = approximation.embed(case["low_visual"], case["low_audio"], case["question"], case["mask"])
    for z, expected in zip(space, (visual, audio, questions)):
        torch.testing.assert_close(z, torch.tensor(expected), atol=1e-5, rtol=1e-5)
    losses = approximation(**case)
    assert losses.keys() == {"qv", "qa"} and losses["qv"].shape == losses["qa"].shape == ()
    close(losses["qv"], edge_by_hand(kind, visual, questions, case, temperature))
    close(losses["qa"], edge_by_hand(kind, audio, questions, case, temperature))


def test_shapes(case):
    space = block().embed(case["low_visual"], case["low_audio"], case["question"])
    assert isinstance(space, SharedSpace)
    assert [tuple(z.shape) for z in space] == [(b, s), (b, s), (b, k, s)]
    for z in space:
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(z.shape[:-1]))
    assert Projection(d, s)(torch.randn(2, 5, d)).shape == (2, 5, s)


@pytest.mark.parametrize("kind", ["nce", "kl", "mse"])
def test_padding_is_silent(case, kind):
    approximation, noisy = block(kind=kind), dict(case)
    for name, keep in (("low_visual", "mask"), ("low_audio", "mask"), ("question", "question_mask")):
        noisy[name] = torch.where(case[keep][..., None], case[name], 50 * torch.randn_like(case[name]))
    torch.testing.assert_close(approximation(**noisy), approximation(**case))
    noisy["question"].requires_grad_()
    sum(approximation(**noisy).values()).backward()
    assert (noisy["question"].grad[~case["question_mask"]] == 0).all()
    no_masks = {**case, "mask": None, "question_mask": None}
    full = {**case, "mask": torch.ones(b, t).bool(), "question_mask": torch.ones(b, k).bool()}
    torch.testing.assert_close(approximation(**no_masks), approximation(**full))


@pytest.mark.parametrize("kind", ["nce", "kl", "mse"])
def test_padding_of_a_batch_changes_nothing(case, kind):
    approximation, longer = block(kind=kind), dict(case)
    for name, keep in (("low_visual", "mask"), ("low_audio", "mask"), ("question", "question_mask")):
        longer[name] = F.pad(case[name], (0, 0, 0, 2), value=9.)
        longer[keep] = F.pad(case[keep], (0, 2))
    torch.testing.assert_close(approximation(**longer), approximation(**case))


@pytest.mark.parametrize("kind", ["nce", "kl", "mse"])
def test_the_batch_has_no_order(case, kind):
    approximation, order = block(kind=kind), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(approximation(**{name: x[order] for name, x in case.items()}), approximation(**case))


def test_all_questions_are_positives_of_their_video(case):
    ids = torch.arange(b)
    media = torch.eye(b, s)
    at_home = media[:, None].expand(b, k, s)
    assert approximation_loss(at_home, media, ids) < 1e-4
    assert approximation_loss(at_home.roll(1, 0), media, ids) > 5
    same = torch.zeros(b, dtype=torch.long)
    assert approximation_loss(sphere(b, k, s), sphere(b, s), same) == 0, "one video in four copies: no negatives"


@pytest.mark.parametrize("kind", ["nce", "kl", "mse"])
def test_no_question_at_all_is_zero(case, kind):
    case["question_mask"] = torch.zeros(b, k).bool()
    approximation = block(kind=kind)
    losses = approximation(**case)
    sum(losses.values()).backward()
    assert losses["qv"] == losses["qa"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in approximation.parameters())


def test_a_video_without_segments_is_finite(case):
    case["mask"][0] = False
    approximation = block()
    losses = approximation(**case)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in approximation.parameters())


@pytest.mark.parametrize("kind", ["nce", "kl", "mse"])
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_gradient(case, kind, stop_gradient):
    approximation = block(kind=kind, stop_gradient=stop_gradient)
    inputs = {name: case[name].requires_grad_() for name in ("low_visual", "low_audio", "question")}
    losses = approximation(**case)
    sum(losses.values()).backward()
    for name, p in approximation.named_parameters():
        assert p.grad.abs().sum() > 0, name
    assert inputs["question"].grad.abs().sum() > 0
    for name in ("low_visual", "low_audio"):
        assert (inputs[name].grad is None) == stop_gradient
    torch.testing.assert_close(losses, block(kind=kind)(**case))  # the stop changes no value


def test_edges_are_separate(case):
    approximation = block()
    approximation(**case)["qv"].backward()
    assert all(p.grad is None for p in approximation.to_audio.parameters())
    assert all(p.grad.abs().sum() > 0 for p in approximation.to_visual.parameters())


@pytest.mark.parametrize("edges, kept", [("visual", "qv"), ("audio", "qa")])
def test_one_edge_is_that_of_both(case, edges, kept):
    both, one = block(), block(edges=edges)
    assert one(**case) == {kept: both(**case)[kept]}


def test_the_target_of_kl_gets_no_gradient():
    media, question = sphere(b, s).requires_grad_(), sphere(b, 1, s)
    approximation_loss(question, media, torch.arange(b), kind="kl").backward()
    logits = torch.einsum("bs,cs->bc", question[:, 0], media) / .07
    target = (media @ media.T / .07).softmax(1).detach()
    expected, = torch.autograd.grad(-(target * logits.log_softmax(1)).sum(1).mean(), media)
    torch.testing.assert_close(media.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["nce", "kl", "mse"])
def test_autocast_keeps_the_losses_in_32_bits(case, kind):
    approximation = block(kind=kind, temperature=.5)
    expected = approximation(**case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = approximation(**case)
        z = approximation.embed(case["low_visual"], case["low_audio"], case["question"])
    assert all(loss.dtype == torch.float32 for loss in losses.values()) and z.visual.dtype == torch.float32
    torch.testing.assert_close(losses, expected, atol=.05, rtol=.05)


@pytest.mark.parametrize("kind", ["nce", "kl", "mse"])
def test_it_teaches(kind):
    torch.manual_seed(0)
    topics, views = torch.randn(b, 3), torch.randn(3, 3, d)
    low_visual, low_audio, question = (torch.einsum("bc,cd->bd", topics, view)[:, None] + .1 * torch.randn(b, n, d)
                                       for view, n in zip(views, (t, t, k)))
    approximation = block(kind=kind)
    optimizer = torch.optim.Adam(approximation.parameters(), 1e-2)
    before = approximation(low_visual, low_audio, question)
    for _ in range(100):
        optimizer.zero_grad()
        sum(approximation(low_visual, low_audio, question).values()).backward()
        optimizer.step()
    after, z = approximation(low_visual, low_audio, question), approximation.embed(low_visual, low_audio, question)
    assert all(after[edge] < .1 * before[edge] for edge in after)
    for media in (z.visual, z.audio):
        assert (torch.einsum("bks,cs->bkc", z.question, media).argmax(-1) == torch.arange(b)[:, None]).all()


def test_wrong_input(case):
    with pytest.raises(ValueError, match="kind='cosine' is unknown; choose nce, kl or mse"):
        block(kind="cosine")
    with pytest.raises(ValueError, match="edges='qv' is unknown; choose both, visual or audio"):
        block(edges="qv")
    for match, change in {"low_visual.*d = 8": dict(low_visual=torch.randn(b, t, d + 1)),
                          "low_audio.*b t d": dict(low_audio=torch.randn(b, d)),
                          "question.*b k d": dict(question=torch.randn(b, k, 2, d)),
                          "same b videos": dict(question=torch.randn(b - 1, k, d)),
                          "mask must be bool": dict(mask=torch.ones(b, t)),
                          "b k = \\(4, 3\\)": dict(question_mask=torch.ones(b, k + 1).bool()),
                          "one id for each video": dict(video_ids=torch.arange(b + 1))}.items():
        with pytest.raises(ValueError, match=match):
            block()(**{**case, **change})
