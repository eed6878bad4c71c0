"""The same seed gives the same weights; an answer does not depend on what else is asked, or on what was kept.

    pytest tests/test_invariance.py
"""

from dataclasses import replace
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcd_edu.data import AVQADataset
from mcd_edu.datasets import load_splits
from mcd_edu.models import MODELS, build, config_for
from mcd_edu.samples.choices import build_choice_set
from mcd_edu.training import TrainingConfig, ask, make_toy_set, train

SMALL = {"mcd": {"num_heads": 2, "shared_dim": 8}}     # options beside the width


class Asked(NamedTuple):
    """A model, what it is asked about, and what it answers to every question by itself."""
    kind: str
    model: torch.nn.Module
    splits: dict[str, AVQADataset]
    alone: dict[int, torch.Tensor]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, dict[str, AVQADataset]]:
    """Questions with a common list of answers, and such with four choices each."""
    folder = tmp_path_factory.mktemp("toy")
    make_toy_set(folder / "music_avqa", 12, 2, 2, 5)
    build_choice_set(folder / "avqa", folder / "music_avqa")
    return {name: load_splits(folder / name, name) for name in ("music_avqa", "avqa")}


@pytest.fixture(scope="module", params=product(MODELS, ("music_avqa", "avqa")), ids="-".join)
def asked(request, toys):
    """A small model whose every parameter takes part."""
    torch.manual_seed(1)
    kind, name = request.param
    splits, data = toys[name], toys[name]["train"]
    model = build(config_for(kind, data, embed_dim=16, **SMALL.get(kind, {})))
    model.fit_features(data.visual, data.audio, data.mask)
    for parameter in model.parameters(): torch.nn.init.normal_(parameter, std=0.3)
    alone = {}
    for number in range(len(data)): alone |= answers(model.eval(), data, [np.array([number])])
    return Asked(kind, model, splits, alone)


@torch.inference_mode()
def answers(model, data, groups) -> dict[int, torch.Tensor]:
    """Question id → logits, asked in some grouping."""
    batch = data.collate(groups)
    logits = ask(model, batch).logits
    return {int(batch.question_ids[b, k]): logits[b, k] for b, k in batch.question_mask.nonzero().tolist()}


def same(one: dict, other: dict) -> None:
    """Answers to the same questions agree to 1e-5, and so do the answers that win."""
    assert one.keys() == other.keys()
    for number, logits in one.items():
        torch.testing.assert_close(logits, other[number], atol=1e-5, rtol=1e-5)
        assert logits.argmax() == other[number].argmax()


def regroup(data, draw) -> list:
    """Videos in any order, any of their questions in any order, split over rows in any way."""
    groups = []
    videos = draw(st.lists(st.integers(0, len(data.videos) - 1), min_size=1, max_size=6, unique=True))
    for video in videos:
        numbers = (data.video == video).nonzero()[:, 0].tolist()
        chosen = draw(st.permutations(numbers))[:draw(st.integers(1, len(numbers)))]
        cut = draw(st.integers(0, len(chosen) - 1))
        groups += [np.array(part) for part in (chosen[:cut], chosen[cut:]) if part]
    return draw(st.permutations(groups))


@given(draw=st.data())
@settings(max_examples=20)
def test_an_answer_is_the_same_in_any_company(asked, draw):
    found = answers(asked.model, asked.splits["train"], regroup(asked.splits["train"], draw.draw))
    same(found, {number: asked.alone[number] for number in found})


@given(draw=st.data())
@settings(max_examples=10)
@torch.inference_mode()
def test_an_answer_is_the_same_with_what_was_kept(asked, draw):
    """The state of a video is computed once, kept, and asked again and again, in any order."""
    model, data = asked.model, asked.splits["train"]
    batch = data.collate(regroup(data, draw.draw))
    kept = model.encode_video(batch.visual, batch.audio, batch.mask)
    before = [tensor.clone() for tensor in tensors(kept)]
    assert before
    for k in draw.draw(st.permutations(range(batch.tokens.shape[1]))):
        choices = None if batch.choices is None else batch.choices[:, k:k + 1]
        one = model.answer(kept, batch.tokens[:, k:k + 1], batch.objects[:, k:k + 1], draw.draw(st.booleans()), choices).logits
        there = batch.question_mask[:, k].nonzero()[:, 0].tolist()
        numbers = batch.question_ids[:, k].tolist()
        same({numbers[b]: one[b, 0] for b in there}, {numbers[b]: asked.alone[numbers[b]] for b in there})
    assert all(torch.equal(one, other) for one, other in zip(tensors(kept), before)), "asking changed the state"


def tensors(state) -> list[torch.Tensor]:
    """All tensors of a state, however it is nested."""
    if isinstance(state, torch.Tensor): return [state]
    return [tensor for part in state for tensor in tensors(part)] if isinstance(state, tuple | list) else []


@torch.inference_mode()
def test_padding_is_of_no_influence(asked):
    """More segments, words and keywords that are not there change no answer."""
    data, pad = asked.splits["train"], torch.nn.functional.pad
    batch = data.collate([np.array([0, 1]), np.array([7])])
    mask = batch.mask.clone()
    mask[:, 6:] = False
    cut = replace(batch, visual=batch.visual[:, :6], audio=batch.audio[:, :6], mask=mask[:, :6])
    long = replace(batch, visual=batch.visual.masked_fill(~mask[..., None], 1e3), mask=mask,
                   audio=batch.audio.masked_fill(~mask[..., None], -1e3),
                   tokens=pad(batch.tokens, (0, 3)), objects=pad(batch.objects, (0, 2)))
    one, other = (dict(enumerate(ask(asked.model, b).logits[batch.question_mask])) for b in (cut, long))
    same(one, other)


def test_one_seed_gives_one_model(asked, tmp_path):
    """Two trainings of one seed leave the same bytes; another seed leaves others."""
    def run(name, seed):
        return train(asked.model.config, asked.splits["train"], asked.splits["val"], tmp_path / name,
                     TrainingConfig(epochs=2, num_videos=4, seed=seed), show_progress=False)
    one, two, other = run("one", 3), run("two", 3), run("other", 4)
    assert one == two != other
    one, two, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "other"))
    assert one == two != other
