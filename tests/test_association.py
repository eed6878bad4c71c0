"""The association block and its stack, against loops written from the equation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import linear, norm

from mcd_edu.association import Association, AssociationBlock, AssociationStream, TopAttention, keep_top

VARIANTS = [
    {},
    {"residual": False},
    {"self_attention": False},
    {"cross": "to_visual"},
    {"cross": "to_audio"},
    {"cross": "none"},
    {"cross": "to_visual", "self_attention": False},
    {"residual": False, "cross": "none"},
    {"attention": "hard"},
    {"attention": "hard", "self_attention": False},
]


def attend(attn, query, rows):
    "What one query vector finds in the rows, head by head."
    width, mixed = attn.embed_dim // attn.num_heads, []
    query, rows = linear(attn.to_query, query), [linear(attn.to_key_value, row) for row in rows]
    for start in range(0, attn.embed_dim, width):
        scores = [
            math.exp(sum(query[i] * row[i] for i in range(start, start + width)) / math.sqrt(width))
            for row in rows
        ]
        if isinstance(attn, TopAttention):  # only the best one counts
            scores = [float(score == max(scores)) for score in scores]
        mixed += [
            sum(score * row[attn.embed_dim + i] for score, row in zip(scores, rows)) / sum(scores)
            for i in range(start, start + width)
        ]
    return linear(attn.to_output, mixed)


def stream_by_loops(stream, own, other, other_norm):
    "u = f + SA + CA, then u + FFN(LN u), segment by segment, for one video without padding."
    normed, others = [norm(stream.norm, f) for f in own], [norm(other_norm, g) for g in other]
    out = []
    for f, query in zip(own, normed):
        u = f if stream.residual else [0.0] * len(f)
        for attn, rows in (stream.self_attn, normed), (stream.cross_attn, others):
            if attn is not None:
                u = [x + y for x, y in zip(u, attend(attn, query, rows))]
        hidden = [
            z * (1 + math.erf(z / math.sqrt(2))) / 2
            for z in linear(stream.ffn[0], norm(stream.ffn_norm, u))
        ]
        out.append([x + y for x, y in zip(u, linear(stream.ffn[3], hidden))])
    return torch.tensor(out, dtype=torch.float64)


def clips(b=3, t=5, d=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, b, t, d, generator=generator, dtype=dtype)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_block_equals_the_loop(options):
    block = AssociationBlock(6, num_heads=2, ffn_mult=2, **options).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # norms and biases take part
    visual, audio = clips(b=2, t=4, d=6, dtype=torch.float64)
    new_visual, new_audio = block(visual, audio)
    for v, a, new_v, new_a in zip(visual, audio, new_visual, new_audio):
        expected_v = stream_by_loops(block.visual, v.tolist(), a.tolist(), block.audio.norm)
        expected_a = stream_by_loops(block.audio, a.tolist(), v.tolist(), block.visual.norm)
        torch.testing.assert_close((new_v, new_a), (expected_v, expected_a))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_shape_gradient_and_no_idle_parameters(options):
    stack = Association(8, num_blocks=2, **options)
    visual, audio = stack(*clips())
    assert visual.shape == audio.shape == (3, 5, 8)
    (visual.square().sum() + audio.square().sum()).backward()
    for name, parameter in stack.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_no_block_is_the_identity():
    visual, audio = clips()
    stack = Association(8, num_blocks=0)
    assert stack(visual, audio)[0] is visual and stack(visual, audio)[1] is audio
    assert not list(stack.parameters())


def test_the_stack_is_its_blocks_in_order():
    stack, (visual, audio) = Association(8, num_blocks=3), clips()
    expected = stack(visual, audio)
    for block in stack.blocks:
        visual, audio = block(visual, audio)
    assert torch.equal(visual, expected[0]) and torch.equal(audio, expected[1])


@pytest.mark.parametrize(
    "cross, visual_hears, audio_sees",
    [
        ("both", True, True),
        ("to_visual", True, False),
        ("to_audio", False, True),
        ("none", False, False),
    ],
)
def test_cross_decides_who_looks_at_whom(cross, visual_hears, audio_sees):
    block, (visual, audio) = AssociationBlock(8, cross=cross), clips()
    before = block(visual, audio)
    assert torch.equal(block(visual, -audio)[0], before[0]) is not visual_hears
    assert torch.equal(block(-visual, audio)[1], before[1]) is not audio_sees


def test_without_residual_the_features_enter_through_attention_only():
    block, (visual, audio) = AssociationBlock(8, residual=False), clips()
    for stream in block.visual, block.audio:
        for attn in stream.self_attn, stream.cross_attn:
            torch.nn.init.zeros_(attn.to_output.weight)
    out, _ = block(visual, audio)
    torch.testing.assert_close(out, out[:1, :1].expand_as(out))  # nothing of the clip is left


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=6, unique=True), st.integers(1, 8), st.booleans())
def test_keep_top(logits, top_k, hard):
    weights = torch.tensor([logits, [0.0] * len(logits)]).softmax(-1) * torch.tensor([[1.0], [0.0]])
    kept, number = keep_top(weights, top_k, hard), min(top_k, len(logits))
    assert (kept[0] > 0).sum() == number and not kept[1].any()
    assert set(kept[0].topk(number).indices.tolist()) == set(weights[0].topk(number).indices.tolist())
    torch.testing.assert_close(kept.sum(-1), torch.tensor([1.0, 0.0]))
    if hard:
        torch.testing.assert_close(kept[0][kept[0] > 0], torch.full((number,), 1 / number))
    elif number == len(logits):
        torch.testing.assert_close(kept, weights)


def test_the_gradient_goes_straight_through_a_hard_choice():
    logits = torch.tensor([0.1, 2.0, -1.0], requires_grad=True)
    value = torch.tensor([1.0, -2.0, 3.0])
    (keep_top(logits.softmax(-1), 1, hard=True) @ value).backward()
    found, logits.grad = logits.grad, None
    (logits.softmax(-1) @ value).backward()
    torch.testing.assert_close(found, logits.grad)
    assert found.abs().min() > 0


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 9))
def test_padding_and_company_change_nothing(lengths, seed):
    stack, (visual, audio) = Association(8, num_blocks=2), clips(b=len(lengths), seed=seed)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded = [x.masked_fill(~mask[..., None], 50.0) for x in (visual, audio)]
    clean, noisy = stack(visual, audio, mask), stack(*padded, mask)
    for modality in range(2):
        assert torch.equal(clean[modality][mask], noisy[modality][mask])
        assert clean[modality].isfinite().all()
        for i, length in enumerate(lengths):
            if not length:
                continue
            alone = stack(visual[i : i + 1, :length], audio[i : i + 1, :length])[modality]
            torch.testing.assert_close(
                clean[modality][i : i + 1, :length], alone, atol=1e-5, rtol=1e-5
            )


def test_gradient_stays_finite_for_a_video_without_segments():
    stack, (visual, audio) = Association(8), clips(b=2)
    mask = torch.tensor([[True] * 5, [False] * 5])
    stack(visual.requires_grad_(), audio, mask)[0].sum().backward()
    assert visual.grad.isfinite().all() and all(
        p.grad.isfinite().all() for p in stack.blocks[0].visual.parameters()
    )


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(5)))
def test_order_of_segments_is_only_carried_along(order):
    stack, (visual, audio) = Association(8), clips()
    expected = stack(visual, audio)
    for shuffled, x in zip(stack(visual[:, order], audio[:, order]), expected):
        torch.testing.assert_close(shuffled, x[:, order], atol=1e-5, rtol=1e-5)


def test_exchanging_the_modalities_and_their_halves():
    block, mirror = AssociationBlock(8), AssociationBlock(8)
    mirror.visual, mirror.audio = block.audio, block.visual
    visual, audio = clips()
    torch.testing.assert_close(mirror(audio, visual), block(visual, audio)[::-1])


def test_bfloat16_autocast_and_float64():
    stack, (visual, audio) = Association(32), clips(d=32)
    exact, _ = stack(visual, audio)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = stack(visual, audio)
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.05)
    assert stack.double()(visual.double(), audio.double())[0].dtype == torch.float64


def test_dropout_acts_in_training_only():
    stack, clip = Association(8, dropout=0.3), clips()
    assert not torch.equal(stack(*clip)[0], stack(*clip)[0])
    stack.eval()
    assert torch.equal(stack(*clip)[0], stack(*clip)[0])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: AssociationBlock(8, cross="up"), "cross='up'.*to_visual"),
        (lambda: AssociationBlock(8, cross="none", self_attention=False), "num_blocks=0"),
        (
            lambda: AssociationBlock(8, residual=False, self_attention=False, cross="to_audio"),
            "keep one of the three",
        ),
        (
            lambda: AssociationStream(
                8, residual=False, self_attention=False, cross_attention=False
            ),
            "nothing",
        ),
        (lambda: AssociationBlock(8, num_heads=3), "3 heads"),
        (lambda: AssociationBlock(8, attention="sharp"), "'sharp'; choose one of soft, hard"),
        (lambda: TopAttention(8, top_k=0), "top_k=0"),
        (lambda: Association(8, num_blocks=-1), "num_blocks=-1"),
        (lambda: AssociationBlock(8)(torch.randn(2, 5, 8), torch.randn(2, 4, 8)), "differ"),
        (lambda: AssociationBlock(8)(torch.randn(2, 5, 7), torch.randn(2, 5, 7)), "d = 8"),
        (lambda: AssociationBlock(8)(*clips(), torch.ones(3, 4).bool()), r"b t = \(3, 5\)"),
    ],
)
def test_wrong_input_is_refused_in_one_line(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        wrong()
    assert "\n" not in str(error.value)
