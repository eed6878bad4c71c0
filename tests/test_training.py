"""Training can be repeated, stopped and resumed bit by bit; what is broken is refused in one line."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mcd_edu import training
from mcd_edu.baselines.knowledge_distillation import TeacherCache
from mcd_edu.data import DataError
from mcd_edu.datasets import load_splits
from mcd_edu.devices import Feed, Team
from mcd_edu.model import MCD, MCDConfig, mcd_losses
from mcd_edu.models import config_for
from mcd_edu.samples.scenes import Scene
from mcd_edu.training import (
    CheckpointError,
    Guard,
    Progress,
    Step,
    TrainingConfig,
    accuracy,
    dataset_digest,
    flatten_optimizer,
    keywords,
    learn,
    learning_rate,
    load_checkpoint,
    make_optimizer,
    make_toy_set,
    perfect_features,
    restore_optimizer,
    save_checkpoint,
    train,
    train_epoch,
)

CONFIG = TrainingConfig(epochs=4, num_videos=4, learning_rate=3e-3)
BRIEF = replace(CONFIG, epochs=2)
FILES = ("config.json", "model.safetensors", "resume.safetensors")


def tiny(data, **options) -> MCDConfig:
    """A model that trains in no time."""
    sizes = dict(visual_dim=data.visual.shape[-1], audio_dim=data.audio.shape[-1])
    return MCDConfig(len(data.vocabulary), **sizes, embed_dim=16, num_heads=2, num_blocks=1,
                     shared_dim=8, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy")
    make_toy_set(path, num_train=10, num_val=4, num_test=4, per_video=5)
    return path


@pytest.fixture(scope="module")
def splits(folder):
    return load_splits(folder)


@pytest.fixture(scope="module")
def finished(splits, tmp_path_factory):
    """A training from beginning to end: its folder and its history."""
    path = tmp_path_factory.mktemp("finished")
    history = train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=path,
                    config=CONFIG)
    return path, history


def contents(path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in FILES}


# The toy set -----------------------------------------------------------------------------------

def test_the_toy_set_is_the_same_each_time(folder, tmp_path):
    make_toy_set(tmp_path, num_train=10, num_val=4, num_test=4, per_video=5)
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) == 2 * 18 + 9
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_the_perfect_encoder_writes_down_the_truth(folder):
    for record in json.loads((folder / "truth" / "train.json").read_text()):
        scene = Scene.from_json(record)
        seen, heard = perfect_features(scene, np.random.default_rng(0), noise=0)
        assert seen.shape == (10, 37) and heard.shape == (10, 18) and seen.dtype == np.float32
        assert (seen[:, :18].sum(1) == len(scene.visible)).all()
        assert (seen[:, -1] == (scene.setting == "indoor")).all()
        sounding = [sum(p.onset <= t < p.end for p in scene.sounding) for t in range(10)]
        assert heard[:, :6].sum(1).tolist() == sounding


# Splits ----------------------------------------------------------------------------------------

def test_splits_share_no_video_and_one_vocabulary(splits):
    videos = [set(part.videos) for part in splits.values()]
    assert not videos[0] & videos[1] and not videos[0] & videos[2] and not videos[1] & videos[2]
    assert len({id(part.vocabulary) for part in splits.values()}) == 1


def test_clips_shorten_train_alone(folder, splits):
    fewer = load_splits(folder, clips=3)
    assert fewer["train"].videos == splits["train"].videos[:3]
    assert len(fewer["test"]) == len(splits["test"])
    assert load_splits(folder, clips=99)["train"].videos == splits["train"].videos


def test_types_reach_the_text_objects_only_when_asked(folder, splits):
    shown = load_splits(folder, types=True)
    assert ((shown["train"].objects != 0).sum(1) > (splits["train"].objects != 0).sum(1)).all()


def test_bad_splits_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match="clips=0"):
        load_splits(folder, clips=0)
    with pytest.raises(DataError, match="no such annotation file"):
        load_splits(tmp_path)
    (tmp_path / "json").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / "json" / f"avqa-{split}.json").write_text("[]")
    with pytest.raises(DataError, match="train has no questions"):
        load_splits(tmp_path)


def test_keywords_are_the_values_of_the_placeholders(splits):
    found = keywords(splits["train"])
    assert found == sorted(set(found)) and "accordion" in found and "is" not in found


# Schedule and optimiser ------------------------------------------------------------------------

@given(steps=st.integers(1, 200), warmup=st.floats(0, 1), top=st.floats(1e-5, 1))
def test_learning_rate_is_the_formula(steps, warmup, top):
    config = TrainingConfig(warmup=warmup, learning_rate=top)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    start = max(1, round(warmup * steps))
    for step, rate in enumerate(rates):
        if step < start:
            wanted = top * (step + 1) / start
        else:
            wanted = top * (1 + math.cos(math.pi * (step - start) / (steps - start))) / 2
        assert rate == pytest.approx(wanted)
    assert max(rates) == pytest.approx(top) and min(rates) > 0
    assert rates.index(max(rates)) in (start - 1, start)


@pytest.mark.parametrize("wrong", [dict(epochs=0), dict(learning_rate=0), dict(warmup=1.5),
                                   dict(learning_rate=float("nan")), dict(num_videos=0),
                                   dict(num_questions=-1), dict(clip_norm=0), dict(seed=-1),
                                   dict(precision="half"), dict(learning_rate=math.inf), dict(epochs=1.5),
                                   dict(weight_decay=-1), dict(clip_norm=math.inf), dict(seed=2**32)])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=f"TrainingConfig: {next(iter(wrong))}="):
        TrainingConfig(**wrong)


def test_only_matrices_decay(splits):
    model = MCD(tiny(splits["train"]))
    matrices, vectors = make_optimizer(model, CONFIG).param_groups
    assert matrices["weight_decay"] == CONFIG.weight_decay and vectors["weight_decay"] == 0
    decays = {id(p) for p in matrices["params"]}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert id(module.weight) in decays, name
        if isinstance(module, nn.LayerNorm):
            assert id(module.weight) not in decays and id(module.bias) not in decays, name
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_optimizer_state_survives_safetensors(splits, tmp_path):
    model = MCD(tiny(splits["train"]))
    optimizer = make_optimizer(model, CONFIG)
    train_epoch(model, splits["train"], optimizer, CONFIG, 0)
    save_file(flatten_optimizer(optimizer), tmp_path / "x.safetensors")
    other = make_optimizer(model, CONFIG)
    restore_optimizer(other, load_file(tmp_path / "x.safetensors"))
    first, second = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert first.keys() == second.keys()
    for number, entry in first.items():
        assert entry.keys() == second[number].keys()
        for name, tensor in entry.items():
            assert torch.equal(tensor, second[number][name]) and tensor.shape == second[number][name].shape


# One epoch -------------------------------------------------------------------------------------

def test_an_epoch_is_the_plain_loop(splits):
    """Written out once more, with the schedule, the clipping and the means."""
    data, epoch = splits["train"], 2
    config = replace(CONFIG, clip_norm=.1, seed=3)
    models = [MCD(tiny(data)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    found = train_epoch(models[0], data, make_optimizer(models[0], config), config, epoch)

    model, optimizer = models[1].train(), make_optimizer(models[1], config)
    torch.manual_seed(30_002)
    batches, rows = list(data.batches(4, 16, 30_002)), []
    torch.manual_seed(30_002)
    torch.empty((), dtype=torch.int64).random_()  # the loader draws its own seed
    for i, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch * len(batches) + i, 4 * len(batches), config)
        state = model.encode_video(batch.visual, batch.audio, batch.mask)
        answer = model.answer(state, batch.tokens, batch.objects)
        losses = mcd_losses(model, state, answer, batch.answers, batch.question_mask,
                            batch.video_ids)
        optimizer.zero_grad()
        losses["total"].backward()
        length = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1, config.clip_norm / length)
        optimizer.step()
        rows.append({name: loss.item() for name, loss in losses.items()})
    for name in rows[0]:
        assert found[name] == pytest.approx(np.mean([row[name] for row in rows]), rel=1e-4)
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(tensor, models[1].state_dict()[name], rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_no_number_spoils_nothing(folder):
    data = load_splits(folder)["train"]
    model = MCD(tiny(data))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data.audio[:] = float("nan")
    with pytest.raises(ValueError, match="epoch 0, batch 0.*not finite.*lower learning_rate") as error:
        train_epoch(model, data, make_optimizer(model, CONFIG), CONFIG, 0)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_a_gradient_that_is_no_number_is_noticed_too(splits):
    model = MCD(tiny(splits["train"]))
    model.position.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(ValueError, match="gradient (inf|nan)"):
        train_epoch(model, splits["train"], make_optimizer(model, CONFIG), CONFIG, 0)
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_was_trained_before_the_bad_loss_is_kept(splits, tmp_path):
    def poison(history):
        if len(history) == 2:
            data.audio[:] = float("inf")
    data = load_splits_again(splits)
    with pytest.raises(ValueError, match="epoch 2"):
        train(tiny(data), data, val=splits["val"], folder=tmp_path, config=CONFIG, on_epoch=poison)
    assert load_checkpoint(tmp_path)[2]["epoch"] in (0, 1)


def load_splits_again(splits):
    """A training set that may be changed."""
    copy = object.__new__(type(splits["train"]))
    copy.__dict__.update(splits["train"].__dict__)
    copy.audio = splits["train"].audio.clone()
    return copy


def test_accuracy_counts_one_question_at_a_time(splits):
    data = splits["val"]
    model = MCD(tiny(data)).eval()
    right = 0
    with torch.inference_mode():
        for i in range(len(data)):
            v = data.video[i]
            words = data.tokens[i][data.tokens[i] != 0]
            state = model.encode_video(data.visual[v][None], data.audio[v][None])
            logits = model.answer(state, words[None, None], data.objects[i][None, None]).logits
            right += int(logits.argmax() == data.answers[i])
    for num_videos in (1, 3, 64):
        assert accuracy(model, data, num_videos=num_videos) == right / len(data)


# Repeat, stop, resume --------------------------------------------------------------------------

def test_two_runs_are_bit_identical_and_another_seed_is_not(splits, finished, tmp_path):
    path, history = finished
    args = dict(data=splits["train"], val=splits["val"])
    torch.manual_seed(99)  # what happened before must not matter
    assert train(tiny(splits["train"]), folder=tmp_path / "a", config=CONFIG, **args) == history
    assert contents(tmp_path / "a") == contents(path)
    other = train(tiny(splits["train"]), folder=tmp_path / "b", config=replace(CONFIG, seed=1), **args)
    assert other[-1]["total"] != history[-1]["total"]


class Stop(Exception):
    """Somebody pressed the button."""


@pytest.mark.parametrize("epochs", [1, 2, 3, 4])
def test_stopped_after_any_epoch_and_resumed(splits, finished, tmp_path, epochs):
    def stop(history):
        if len(history) == epochs:
            raise Stop
    go = partial(train, tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path,
                 config=CONFIG)
    with pytest.raises(Stop):
        go(on_epoch=stop)
    torch.manual_seed(7)
    assert go() == finished[1]
    assert contents(tmp_path) == contents(finished[0])


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of folders there")
def test_one_training_at_a_time(splits, finished, tmp_path):
    """A second one in the same folder is refused, and the first does not notice."""
    folder, tried = tmp_path / "deep" / "model", []
    go = partial(train, tiny(splits["train"]), splits["train"], val=splits["val"], folder=folder, config=CONFIG)

    def begin_another(history):
        with pytest.raises(OSError, match="model: another run works there; wait until it has ended"):
            go()
        tried.append(len(history))
    assert go(on_epoch=begin_another) == finished[1] and tried == [1, 2, 3, 4]
    assert contents(folder) == contents(finished[0])
    assert go() == finished[1]  # free again


def test_a_folder_where_nothing_was_trained_goes_again(splits, tmp_path, monkeypatch):
    def fails(*args):
        raise Stop
    monkeypatch.setattr(MCD, "losses", fails)
    with pytest.raises(Stop):
        train(tiny(splits["train"]), splits["train"], splits["val"], tmp_path / "model", CONFIG)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["checkpoint", "progress", "mid-epoch"])
def test_stopped_inside_an_epoch_and_resumed(splits, finished, tmp_path, monkeypatch, stage):
    """After the checkpoint but before the progress file; while writing; between two steps."""
    calls = []

    def fails(real, at):
        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise Stop
            return real(*args, **kwargs)
        return call

    go = partial(train, tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path,
                 config=CONFIG)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        if stage == "checkpoint":
            patch.setattr(Progress, "save", fails(Progress.save, 2))
        elif stage == "progress":
            patch.setattr(training, "write_tensors", fails(training.write_tensors, 3))
        else:
            patch.setattr(MCD, "losses", fails(MCD.losses, 5))
        go()
    assert not list(tmp_path.glob(".*"))
    assert go() == finished[1]
    assert contents(tmp_path) == contents(finished[0])


KILLED = """
import os, signal, sys, torch
from mcd_edu import training
from mcd_edu.datasets import load_splits
from mcd_edu.model import MCDConfig
torch.set_num_threads(1)
splits = load_splits(sys.argv[1])
data = splits["train"]
config = MCDConfig(len(data.vocabulary), visual_dim=data.visual.shape[-1],
                   audio_dim=data.audio.shape[-1], embed_dim=16, num_heads=2, num_blocks=1,
                   shared_dim=8)
def kill(*args): os.kill(os.getpid(), signal.SIGKILL)
real, count = os.replace, []
def die_before(draft, path):
    count.append(path.suffix == ".safetensors")
    if sum(count) == int(sys.argv[3]):
        draft.write_bytes(draft.read_bytes()[:1000])   # half a draft, and no time to tidy up
        kill()
    real(draft, path)
os.replace = die_before
training.train(config, data, splits["val"], sys.argv[2], training.TrainingConfig(
    epochs=4, num_videos=4, learning_rate=3e-3))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_killed_while_writing_and_resumed(folder, splits, finished, tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(tmp_path), "4"],
                          env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list(tmp_path.glob(".*.part")), "it died while writing"
    load_checkpoint(tmp_path)  # what stands under the real names is whole
    history = train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path,
                    config=CONFIG)
    assert history == finished[1] and contents(tmp_path) == contents(finished[0])
    assert not list(tmp_path.glob(".*.part"))


def test_a_finished_training_is_not_trained_again(splits, finished):
    path, history = finished
    before = contents(path)
    assert train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=path, config=CONFIG,
                 on_epoch=lambda history: pytest.fail("trained again")) == history
    assert contents(path) == before


def test_the_best_epoch_on_val_is_kept(splits, finished, tmp_path, monkeypatch):
    path, history = finished
    best = max(history, key=lambda entry: (entry["val"], entry["epoch"]))
    model, vocabulary, about = load_checkpoint(path)
    assert about["epoch"] == best["epoch"] and accuracy(model, splits["val"]) == best["val"]
    assert vocabulary.words == splits["train"].vocabulary.words and not model.training
    assert about["keywords"] == keywords(splits["train"])
    scores = iter([.2, .5, .5, .1])
    monkeypatch.setattr("mcd_edu.training.accuracy", lambda *args: next(scores))
    train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path, config=CONFIG)
    assert load_checkpoint(tmp_path)[2]["epoch"] == 2  # a tie goes to the later one


def test_history_grows_by_one_dictionary_an_epoch(splits, tmp_path):
    lengths = []
    history = train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path,
                    config=CONFIG, on_epoch=lambda history: lengths.append(len(history)))
    assert lengths == [1, 2, 3, 4]
    assert all(set(entry) == {"epoch", "total", "ce", "av", "qv", "qa", "val"} for entry in history)


def test_it_learns(tmp_path):
    make_toy_set(tmp_path / "data", num_train=60, num_val=10, num_test=1)
    splits = load_splits(tmp_path / "data")
    config = TrainingConfig(epochs=5, num_videos=4, learning_rate=3e-3)
    history = train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path,
                    config=config)
    assert history[-1]["ce"] < history[0]["ce"] - .5 and history[-1]["total"] < history[0]["total"]


# What is refused -------------------------------------------------------------------------------

@pytest.mark.parametrize("change, named", [
    (dict(config=replace(CONFIG, epochs=5)), "training.epochs: 4 there, 5 here"),
    (dict(model=dict(dropout=.2)), "model.dropout: 0.1 there, 0.2 here"),
    (dict(types=True), "data: "),
    (dict(clips=9), "questions: 50 there, 45 here"),
    (dict(noise=True), "data: "),
])
def test_other_settings_are_refused(folder, splits, finished, change, named):
    other = load_splits(folder, clips=change.get("clips"), types=change.get("types", False))
    data = other["train"]
    if "noise" in change:
        data.visual[3, 2, 1] += 1e-3
    before = contents(finished[0])
    with pytest.raises(CheckpointError, match="other settings") as error:
        train(tiny(splits["train"], **change.get("model", {})), data, val=splits["val"],
              folder=finished[0], config=change.get("config", CONFIG))
    assert named in str(error.value) and "\n" not in str(error.value)
    assert contents(finished[0]) == before


def copy_of(finished, tmp_path):
    for name, content in contents(finished[0]).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("spoil", [
    lambda content: content[:-100], lambda content: content[:5], lambda content: b"",
    lambda content: b"\x80\x04pickle", lambda content: content.replace(b"progress", b"progrexx"),
    lambda content: content.replace(b'{\\"settings\\"', b'[\\"settings\\"'),
    lambda content: content.replace(b'"model.position"', b'"model.positiox"'),
])
def test_a_broken_progress_file_is_refused(splits, finished, tmp_path, spoil):
    path = copy_of(finished, tmp_path)
    (path / "resume.safetensors").write_bytes(spoil(contents(path)["resume.safetensors"]))
    with pytest.raises(CheckpointError, match="delete it to begin anew") as error:
        train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=path, config=CONFIG)
    assert "resume.safetensors" in str(error.value) and "\n" not in str(error.value)


def change_moments(change):
    """Of the file that training goes on from."""
    def apply(notes, tensors): return {key: change(key, tensor) for key, tensor in tensors.items()}
    return apply


def change_history(change):
    def apply(notes, tensors):
        change(notes["history"])
        return tensors
    return apply


@pytest.mark.parametrize("spoil", [
    change_moments(lambda key, x: x[:0].clone() if key.endswith("exp_avg") and x.ndim else x),
    change_moments(lambda key, x: torch.zeros(1) if key.endswith(("exp_avg", "exp_avg_sq")) else x),
    change_moments(lambda key, x: x.new_ones(4) if key.endswith(".step") else x),
    change_moments(lambda key, x: x * torch.nan if key.endswith(".step") else x),
    change_moments(lambda key, x: -x if key.endswith(".step") else x),
    change_moments(lambda key, x: x * torch.inf if key == "optimizer.3.exp_avg" else x),
    change_moments(lambda key, x: x - 1 if key == "optimizer.3.exp_avg_sq" else x),
    lambda notes, tensors: {key: x for key, x in tensors.items() if key != "optimizer.0.exp_avg"},
    lambda notes, tensors: {key: x for key, x in tensors.items() if not key.startswith("optimizer.")},
    lambda notes, tensors: tensors | {"optimizer.999.exp_avg": torch.ones(2)},
    lambda notes, tensors: tensors | {"optimizer.x": torch.ones(2)},
    change_history(lambda history: history[0].update(val="x")), change_history(lambda history: history[0].update(val=None)),
    change_history(lambda history: history[0].update(val=math.nan)), change_history(lambda history: history.append("x")),
    change_history(lambda history: history.extend(history[:1])),
])
def test_a_bookmark_that_would_spoil_the_training_is_refused(splits, finished, tmp_path, spoil):
    """An optimizer looks at no shape: it would read beyond its moments."""
    path = copy_of(finished, tmp_path)
    with safe_open(path / "resume.safetensors", "pt") as file:
        notes, tensors = json.loads(file.metadata()["progress"]), {key: file.get_tensor(key) for key in file.keys()}
    tensors = spoil(notes, tensors)
    save_file(tensors, path / "resume.safetensors", {"progress": json.dumps(notes)})
    before = contents(path)
    with pytest.raises(CheckpointError, match="resume.safetensors: .*delete it to begin anew"):
        train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=path, config=CONFIG)
    assert contents(path) == before


def edit(**changes):
    """Change the model's part of a config.json."""
    def apply(content):
        config = json.loads(content)
        config["model"].update(changes)
        return json.dumps(config).encode()
    return apply


def drop(key):
    return lambda content: json.dumps({k: v for k, v in json.loads(content).items() if k != key}).encode()


@pytest.mark.parametrize("name, spoil, named", [
    ("config.json", None, "config.json is missing"),
    ("model.safetensors", None, "model.safetensors is missing"),
    ("model.safetensors", lambda content: content[:-100], "unreadable"),
    ("model.safetensors", lambda content: content[:4], "unreadable"),
    ("model.safetensors", lambda content: b"", "unreadable"),
    ("model.safetensors", lambda content: b"\x80\x04pickle", "unreadable"),
    ("config.json", lambda content: content[:-100], "not the configuration"),
    ("config.json", lambda content: b"\xff\xfe", "not the configuration"),
    ("config.json", lambda content: b"[]", "not the configuration"),
    ("config.json", drop("words"), "not the configuration"),
    ("config.json", drop("about"), "not the configuration"),
    ("config.json", drop("model"), "not the configuration"),
    ("config.json", edit(depth=3), "not the configuration"),
    ("config.json", edit(head="magic"), "not the configuration"),
    ("config.json", edit(embed_dim=-16), "not the configuration"),
    ("config.json", edit(embed_dim="16"), "not the configuration"),
    ("config.json", edit(num_heads=3), "not the configuration"),
    ("config.json", edit(embed_dim=32), "another configuration"),
    ("config.json", edit(num_blocks=2), "another configuration"),
    ("config.json", edit(head="late_fusion"), "another configuration"),
    ("config.json", edit(vocab_size=500), "words for a vocabulary of size"),
])
def test_a_broken_checkpoint_is_refused(finished, tmp_path, name, spoil, named):
    path = copy_of(finished, tmp_path)
    if spoil is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(spoil((path / name).read_bytes()))
    with pytest.raises(CheckpointError, match=named) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_no_checkpoint_at_all_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_is_numbers_and_text(splits, tmp_path):
    model = MCD(tiny(splits["train"]))
    save_checkpoint(tmp_path, model, splits["train"].vocabulary, {"note": "naïve"})
    assert sorted(path.name for path in tmp_path.iterdir()) == list(FILES[:2])
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["about"] == {"note": "naïve"}
    loaded, *_ = load_checkpoint(tmp_path)
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())


# Speed that changes nothing --------------------------------------------------------------------

CPU = torch.device("cpu")


def prepared(data, model=None, precision="float32", compile=None, every=None):
    """All that `learn` needs: step, optimiser, the shares of an epoch, guard."""
    model, feed = (model or MCD(tiny(data))).train(), Feed(data, Team(CPU))
    shares = [feed.share(batch) for batch in feed.batches(4, 16, 0)]
    return (Step(model, feed.team, precision, compile), make_optimizer(model, CONFIG), shares,
            Guard(CONFIG, 7, CPU, every))


class Waits(TorchDispatchMode):
    """Counts what would make the processor wait for a GPU: numbers read, sizes that depend on values."""
    ASKING = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if by_mask or name in self.ASKING:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_never_waits_for_the_device(splits, precision):
    step, optimizer, shares, guard = prepared(splits["train"], precision=precision, every=50)
    with Waits() as waits:
        for share in shares:
            learn(step, optimizer, share, guard)
    assert waits.found == []
    with Waits() as waits:
        guard.look()
    assert waits.found == ["_local_scalar_dense"]


def test_what_waits_is_noticed():
    x = torch.arange(4.)
    for ask_for in (lambda: bool(x.sum() > 1), lambda: x.sum().item(), lambda: x[x > 1], lambda: (x > 1).nonzero(),
                    lambda: int(x.max()), lambda: x.masked_select(x > 1), lambda: x.index_put((x > 2,), x[0])):
        with Waits() as waits:
            ask_for()
        assert waits.found


@pytest.mark.parametrize("every, told", [(1, 1), (2, 1), (3, 2), (50, None)])
def test_a_bad_step_is_skipped_and_told_at_the_next_look(folder, every, told):
    """Batch 1 is bad: the weights stay those after batch 0, whenever somebody looks."""
    data = load_splits(folder)["train"]
    step, optimizer, shares, guard = prepared(data, every=every)
    learn(step, optimizer, shares[0], guard)
    before = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    shares[1].own.visual[0, 0, 0] = float("inf")
    tried = []
    with pytest.raises(ValueError, match="epoch 7, batch 1: loss or gradient is not finite.*gradient (inf|nan)"):
        for share in shares[1:]:
            tried.append(share)
            learn(step, optimizer, share, guard)
        tried.clear()
        guard.look()
    assert len(tried) == (told or 0)
    assert all(torch.equal(tensor, step.state_dict()[name]) for name, tensor in before.items())


def test_looking_seldom_changes_no_weight(splits):
    models = [MCD(tiny(splits["train"])) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, every in zip(models, (1, 50)):
        step, optimizer, shares, guard = prepared(splits["train"], model, every=every)
        torch.manual_seed(0)
        for share in shares:
            learn(step, optimizer, share, guard)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_half_precision_is_in_the_products_and_not_in_the_losses(splits, monkeypatch):
    seen, products, losses = [], [], MCD.losses

    def watch(self, state, answer, *args):
        seen.extend([state.low[0].dtype, state.high[1].dtype, answer.logits.dtype, answer.question.dtype])
        assert not torch.is_autocast_enabled("cpu")
        return losses(self, state, answer, *args)

    monkeypatch.setattr(MCD, "losses", watch)
    model, totals = MCD(tiny(splits["train"], dropout=0.)), {}
    model.project_question.register_forward_hook(lambda layer, args, out: products.append(out.dtype))
    for precision in ("float32", "bfloat16"):
        step, _, shares, _ = prepared(splits["train"], model, precision)
        totals[precision] = {name: loss.detach() for name, loss in step(shares[0]).items()}
    assert products == [torch.float32, torch.bfloat16] and set(seen) == {torch.float32}
    for name, loss in totals["float32"].items():
        assert totals["bfloat16"][name].dtype == torch.float32
        assert float(totals["bfloat16"][name]) == pytest.approx(float(loss), rel=.05, abs=.05)
    assert float(totals["bfloat16"]["total"]) != float(totals["float32"]["total"])


def test_half_precision_learns_as_well_and_is_another_training(splits, finished, tmp_path):
    half = replace(CONFIG, precision="bfloat16")
    history = train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path, config=half)
    assert load_checkpoint(tmp_path)[2]["training"]["precision"] == "bfloat16"
    assert history[-1]["ce"] == pytest.approx(finished[1][-1]["ce"], abs=.1)
    with pytest.raises(CheckpointError, match="training.precision: bfloat16 there, float32 here"):
        train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path, config=CONFIG)


def test_a_compiled_step_is_the_plain_one(splits):
    """Through torch.compile, without a C++ compiler: each door is one graph, and the gradients are the same."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, found = MCD(tiny(splits["train"], dropout=0.)), []
    for backend in (None, "aot_eager"):
        step, _, shares, _ = prepared(splits["train"], model, compile=backend)
        model.zero_grad()
        losses = step(shares[0])
        losses["total"].backward()
        found.append(({name: loss.detach() for name, loss in losses.items()},
                      {name: p.grad.clone() for name, p in model.named_parameters()}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    torch.compiler.reset()


def test_train_compiles_both_doors_when_asked(splits, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda door, backend: asked.append((door.__name__, backend)) or door)
    train(tiny(splits["train"]), splits["train"], splits["val"], tmp_path, replace(CONFIG, epochs=1), compile="inductor")
    assert asked == [("encode_video", "inductor"), ("answer", "inductor")]


def test_a_bookmark_of_an_early_version_is_read(splits, finished, tmp_path):
    """One that does not name the precision: it was float32."""
    path = copy_of(finished, tmp_path) / "resume.safetensors"
    with safe_open(path, "pt") as file:
        notes, tensors = json.loads(file.metadata()["progress"]), {key: file.get_tensor(key) for key in file.keys()}
    assert notes["settings"]["training"].pop("precision") == "float32"
    save_file(tensors, path, {"progress": json.dumps(notes)})
    go = partial(train, tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path)
    assert go(config=CONFIG) == finished[1]
    with pytest.raises(CheckpointError, match="training.precision: float32 there, bfloat16 here"):
        go(config=replace(CONFIG, precision="bfloat16"))


def test_weights_spoilt_by_the_last_step_never_replace_a_good_epoch(splits, tmp_path, monkeypatch):
    go = partial(train, tiny(splits["train"]), splits["train"], splits["val"], tmp_path, CONFIG)
    def stop(history): raise Stop
    with pytest.raises(Stop): go(on_epoch=stop)
    before, real = contents(tmp_path), training.learn
    def learn(step, *rest):
        losses = real(step, *rest)
        next(step.parameters()).data.flatten()[0] = torch.nan
        return losses
    monkeypatch.setattr(training, "learn", learn)
    monkeypatch.setattr(training.Guard, "check", lambda *_: None)
    with pytest.raises(ValueError, match="epoch 1: .* is not finite after the last step; lower learning_rate"): go()
    assert contents(tmp_path) == before


# Digests and devices ---------------------------------------------------------------------------

def test_the_digest_of_a_dataset_sees_answers_and_features(folder, splits):
    same = load_splits(folder)["train"]
    assert dataset_digest(same) == dataset_digest(splits["train"]) != dataset_digest(splits["val"])
    same.answers[0] = (same.answers[0] + 1) % 42
    assert dataset_digest(same) != dataset_digest(splits["train"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_training_on_a_gpu_is_loaded_without_one(splits, tmp_path):
    history = train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path,
                    config=CONFIG, device="cuda")
    model, *_ = load_checkpoint(tmp_path)
    assert next(model.parameters()).device.type == "cpu"
    assert accuracy(model, splits["val"]) == pytest.approx(max(e["val"] for e in history), abs=.1)
    assert train(tiny(splits["train"]), splits["train"], val=splits["val"], folder=tmp_path,
                 config=CONFIG, device="cuda") == history


def test_a_student_learns_from_a_teacher_and_goes_on(splits, tmp_path):
    """Teacher, cache, student; a student without its teacher is refused."""
    data, val = splits["train"], splits["val"]
    small = dict(embed_dim=16, num_heads=2)
    train(config_for("graph_vqa", data, **small, num_layers=2), data, val, tmp_path / "teacher", BRIEF)
    teacher, *_ = load_checkpoint(tmp_path / "teacher")
    cache = TeacherCache.build(teacher, data)
    student = config_for("graph_vqa", data, **small, distillation="feature")
    history = train(student, data, val, tmp_path / "student", BRIEF, teacher=cache)
    assert len(history) == 2 and {"ce", "kd_appearance", "kd_motion"} < set(history[0])
    assert train(student, data, val, tmp_path / "student", BRIEF, teacher=cache) == history
    with pytest.raises(ValueError, match="teacher"): train(student, data, val, tmp_path / "alone", BRIEF)
    other = replace(cache, teacher="another")
    with pytest.raises(CheckpointError, match="teacher"):
        train(student, data, val, tmp_path / "student", BRIEF, teacher=other)
