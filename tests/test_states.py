"""A stored state gives the answers of the video; one that is damaged or of another model is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import ask, awake, clips

from mcd_edu.baselines.alignment import AlignmentConfig
from mcd_edu.baselines.knowledge_distillation import KDConfig
from mcd_edu.baselines.late_fusion import LateFusionConfig
from mcd_edu.model import MCDConfig
from mcd_edu.models import build
from mcd_edu.states import load_state, name_parts, save_state

SIZES = dict(vocab_size=20, visual_dim=6, audio_dim=3, embed_dim=8, num_heads=2)
CONFIGS = [MCDConfig(**SIZES), LateFusionConfig(**SIZES, hidden_dim=6), AlignmentConfig(**SIZES), KDConfig(**SIZES)]


def model_of(config):
    return awake(build(config))


def encoded(model, mask=None):
    with torch.inference_mode():
        return model.encode_video(*clips(), mask)


@pytest.fixture
def stored(tmp_path):
    """A model, and the file of a state of it."""
    model = model_of(CONFIGS[0])
    save_state(tmp_path / "clip.safetensors", model, encoded(model))
    return model, tmp_path / "clip.safetensors"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("masked", [False, True])
def test_answers_from_the_file_are_those_from_the_video(config, masked, tmp_path):
    model, path = model_of(config), tmp_path / "deeper" / "clip.safetensors"
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool) if masked else None
    state = encoded(model, mask)
    save_state(path, model, state)
    again = load_state(path, model)
    assert type(again) is type(state) and (again.mask is None) == (not masked)
    with torch.inference_mode():
        answers = [model.answer(x, ask(), ask(longest=4)).logits for x in (state, again)]
    assert torch.equal(*answers)
    assert [path.name for path in path.parent.iterdir()] == ["clip.safetensors"]


def test_every_tensor_has_a_name_of_its_own():
    model = model_of(CONFIGS[0])
    parts = name_parts(encoded(model))
    assert len(parts) == 2 + 2 + 4 * 2 + 2 * 2 and "aggregator.1.0.key" in parts and "mask" not in parts
    assert len({part.data_ptr() for part in parts.values()}) == len(parts)


def test_the_file_holds_numbers_and_a_fingerprint(stored):
    with safe_open(stored[1], "pt") as file:
        assert set(file.metadata()) == {"weights"} and len(file.metadata()["weights"]) == 16
        assert set(file.keys()) == set(name_parts(encoded(stored[0])))


def test_frames_of_a_segment_are_no_obstacle(tmp_path):
    model = model_of(KDConfig(**SIZES, num_frames=4))
    with torch.inference_mode():
        state = model.encode_video(torch.randn(2, 5, 4, 6), torch.randn(2, 5, 3))
    save_state(tmp_path / "clip.safetensors", model, state)
    assert torch.equal(load_state(tmp_path / "clip.safetensors", model).appearance, state.appearance)


@pytest.mark.parametrize("change", [
    lambda model: next(model.parameters()).data.add_(1e-3),          # trained a little further
    lambda model: model.project_visual[0].mean.add_(1),              # other statistics
])
def test_the_state_of_another_model_is_refused(stored, change):
    model, path = stored
    with torch.no_grad():
        change(model)
    with pytest.raises(ValueError, match="of another model"):
        load_state(path, model)


def test_the_state_of_another_kind_of_model_is_refused(stored):
    with pytest.raises(ValueError, match="of another model"):
        load_state(stored[1], model_of(CONFIGS[1]))


@pytest.mark.parametrize("spoil, named", [
    (lambda content: content[:-50], "no state that can be read"),
    (lambda content: content[:5], "no state that can be read"),
    (lambda content: b"", "no state that can be read"),
    (lambda content: b"\x80\x04pickle", "no state that can be read"),
])
def test_a_broken_file_is_refused(stored, spoil, named):
    model, path = stored
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=named) as error:
        load_state(path, model)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("rename", [{"low.0": "low.7"}, {"high.1": None}, {}])
def test_other_parts_are_refused(stored, rename):
    """A name that is none, one that lacks, and a file without a fingerprint."""
    model, path = stored
    with safe_open(path, "pt") as file:
        about = file.metadata() if rename else None
    tensors = {rename.get(name, name): x for name, x in load_file(path).items() if rename.get(name, name)}
    save_file(tensors, path, about)
    with pytest.raises(ValueError, match="not the parts" if rename else "of another model") as error:
        load_state(path, model)
    assert "\n" not in str(error.value)


def test_no_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_state(tmp_path / "nowhere", model_of(CONFIGS[0]))


def test_metadata_is_plain_text(stored):
    header = stored[1].read_bytes()[8:]
    length = int.from_bytes(stored[1].read_bytes()[:8], "little")
    assert set(json.loads(header[:length])["__metadata__"]) == {"weights"}
