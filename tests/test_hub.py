"Tests of mcd_edu.hub: one folder for a model, read, written and shared without a network."

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import huggingface_hub.hub_mixin as hub_mixin
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from mcd_edu.data import Vocabulary
from mcd_edu.hub import CheckpointError, fetch, fingerprint, halve, plain, results_table
from mcd_edu.inference import Answerer
from mcd_edu.model import MCD, MCDConfig
from mcd_edu.models import MODELS
from mcd_edu.training import load_checkpoint, save_checkpoint

SCORES = {"test": {"MCD": {"micro": {"value": 61.25, "low": 58.9, "high": 63.6}},
                   "<b>prior</b>": {"micro": {"value": 37.1, "low": 35.4, "high": 38.7}}}, "seed": 0}


def same(first, second):
    return all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())


@pytest.fixture
def trained(untrained, tmp_path) -> Path:
    "A folder as a training leaves it"
    folder = shutil.copytree(untrained / "model", tmp_path / "trained")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["about"] |= {"val": 0.767, "data": "music_avqa", "epoch": 11, "training": {"epochs": 12, "seed": 0}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(SCORES), encoding="utf-8")
    return folder


def test_what_training_writes_is_read_and_the_other_way_round(trained, tmp_path):
    model = MCD.from_pretrained(trained)
    written, vocabulary, about = load_checkpoint(trained)
    assert same(model, written) and not model.training and model.config == written.config
    assert model.vocabulary.words == vocabulary.words and model.about == about
    model.save_pretrained(tmp_path / "saved")
    again, vocabulary, about = load_checkpoint(tmp_path / "saved")
    assert same(model, again) and vocabulary.words == model.vocabulary.words and about == model.about
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "results.json"]
    assert MCD.from_pretrained(str(tmp_path / "saved")).results == SCORES
    assert Answerer.load(tmp_path / "saved").vocabulary.words == vocabulary.words


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_takes_part(kind, tmp_path):
    make_config, make_model = MODELS[kind]
    assert make_model.kind == kind and make_model.make_config is make_config
    words = Vocabulary(["violin", "left"])
    model = make_model(make_config(len(words), embed_dim=16))
    save_checkpoint(tmp_path, model, words, {"keywords": ["violin"]})
    loaded = make_model.from_pretrained(tmp_path)
    assert type(loaded) is make_model and same(model, loaded) and loaded.about == {"keywords": ["violin"]}
    other = next(network for name, (_, network) in MODELS.items() if name != kind)
    with pytest.raises(CheckpointError, match=f"of a model '{kind}'; here it has to be {other.kind}"):
        other.from_pretrained(tmp_path)


def test_the_card_tells_results_and_provenance(trained, tmp_path):
    model = MCD.from_pretrained(trained)
    model.save_pretrained(tmp_path / "saved")
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "mcd_edu"
    assert card.data.pipeline_tag == "visual-question-answering"
    weights = (tmp_path / "saved" / "model.safetensors").read_bytes()
    for told in (hashlib.sha256(weights).hexdigest(), "76.7 %", "61.2 (58.9 to 63.6)", "reconstruction results",
                 "from mcd_edu.model import MCD", "| epoch | 11 |", "| training: seed | 0 |", "arxiv.org"):
        assert told in card.text
    assert "<b>" not in card.text and "&lt;b&gt;prior&lt;/b&gt;" in card.text


@pytest.mark.parametrize("results", [{}, {"test": {}}, {"test": []}, {"test": {"a": {"micro": {"value": "x"}}}},
                                     {"test": {"a": {"micro": None}}}, [], {"test": {"a": {"m": {}}}}])
def test_odd_results_are_left_out(results):
    class Known: about, results = {}, {}
    Known.results = results
    assert results_table(Known) == "None are known."


@pytest.mark.parametrize("about", [{"training": "abc"}, {"training": [1]}, {"val": 10**400}, {"data": "\ud800", "val": math.nan}])
def test_odd_facts_leave_a_whole_folder(trained, tmp_path, about):
    model = MCD.from_pretrained(trained)
    model.about, model.results = about, {"test": {"a": {"micro": {"value": 10**400, "low": 0, "high": 1}}}}
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "README.md").is_file() and same(MCD.from_pretrained(tmp_path / "saved"), model)


@pytest.mark.parametrize("where", ["x" * 5000, None, 3, b"x", "a/b/c"])
def test_what_is_no_name_of_a_model_is_refused(where):
    with pytest.raises(CheckpointError, match="give the folder of a checkpoint") as error: MCD.from_pretrained(where)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_plain_text_is_one_harmless_line():
    assert plain("a\n# b | [c](d) <script> `e` \x1b[0m") == (
        "a # b \\| \\[c\\](d) &lt;script&gt; \\`e\\` ?\\[0m")
    assert len(plain("x" * 500)) == 80


class StandIn:
    "Takes the place of huggingface_hub's HfApi"
    def __init__(self, token=None): self.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        assert exist_ok
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, *, repo_id, folder_path, **options):
        StandIn.uploaded = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        StandIn.options = {"repo_id": repo_id, "token": self.token, **options}
        return f"https://huggingface.co/{repo_id}/commit/1"


def test_push_uploads_what_save_writes(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_mixin, "HfApi", StandIn)
    model = MCD.from_pretrained(trained)
    address = model.push_to_hub("someone/mcd", token="secret", commit_message="first", branch="try")
    assert address == "https://huggingface.co/someone/mcd/commit/1"
    model.save_pretrained(tmp_path / "saved")
    assert set(StandIn.uploaded) == {path.name for path in (tmp_path / "saved").iterdir()}
    for name in ("model.safetensors", "config.json", "results.json"):
        assert StandIn.uploaded[name] == (tmp_path / "saved" / name).read_bytes()
    assert b'MCD.from_pretrained("someone/mcd")' in StandIn.uploaded["README.md"]
    assert StandIn.options["commit_message"] == "first" and StandIn.options["revision"] == "try"
    assert not any(b"secret" in content for content in StandIn.uploaded.values())


def test_a_model_of_the_hub_is_found_offline(trained, tmp_path):
    commit = "a" * 40
    place = tmp_path / "cache" / "models--someone--mcd"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(trained, place / "snapshots" / commit)
    model = MCD.from_pretrained("someone/mcd", cache_dir=tmp_path / "cache", local_files_only=True)
    assert same(model, load_checkpoint(trained)[0]) and model.results == SCORES


def test_only_plain_files_are_fetched(monkeypatch, tmp_path):
    asked = {}
    def download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)
    monkeypatch.setattr("mcd_edu.hub.snapshot_download", download)
    assert fetch("someone/mcd", revision="v1") == tmp_path
    assert asked == {"name": "someone/mcd", "revision": "v1",
                     "allow_patterns": ["config.json", "model.safetensors", "results.json"]}


@pytest.mark.parametrize("where", ["no/such/folder", "someone/nothing", "../..x", "a b"])
def test_neither_folder_nor_model(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder here.*give the folder") as error:
        MCD.from_pretrained(where, cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(error.value)


def test_a_model_without_words_is_not_saved(tmp_path):
    model = MCD(MCDConfig(10, embed_dim=16))
    with pytest.raises(ValueError, match="does not know its words; set model.vocabulary"):
        model.save_pretrained(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_halved_weights_answer_alike(trained):
    before, size = MCD.from_pretrained(trained), (trained / "model.safetensors").stat().st_size
    halve(trained)
    after = MCD.from_pretrained(trained)
    assert {tensor.dtype for tensor in after.parameters()} == {torch.float32}
    assert (trained / "model.safetensors").stat().st_size < 0.55 * size
    visual, audio = torch.randn(1, 4, 192), torch.randn(1, 4, 128)
    tokens, objects = torch.tensor([[[2, 3, 4]]]), torch.tensor([[[2]]])
    logits = [model.answer(model.encode_video(visual, audio), tokens, objects).logits for model in (before, after)]
    torch.testing.assert_close(*logits, atol=0.05, rtol=0.05)
    content = {**load_file(trained / "model.safetensors"), "position": torch.full((10, 32), 1e6)}
    save_file(content, trained / "model.safetensors")
    kept = (trained / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="position holds numbers beyond 16 bits"): halve(trained)
    assert (trained / "model.safetensors").read_bytes() == kept


def test_the_shipped_model_is_read_by_its_class():
    import mcd_edu
    model = MCD.from_pretrained(Path(mcd_edu.__path__[0]) / "weights" / "music_avqa")
    assert len(model.vocabulary) == model.config.vocab_size and os.sep not in model.about.get("data", "")


def test_a_fingerprint_sees_values_types_shapes_and_texts():
    x = torch.arange(6.)
    different = [x, x.reshape(2, 3), x.double(), x + 1e-6, torch.arange(6), x > 2, "x", None]
    assert len({fingerprint(part) for part in different}) == len(different)
    assert fingerprint(x, x) != fingerprint(x) and fingerprint(x) == fingerprint(torch.arange(12.)[::2] / 2)
