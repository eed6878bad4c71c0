"""What all tests share: fixed seeds, one thread, reproducible hypothesis examples."""

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("mcd_edu", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("mcd_edu")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start each test from the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A folder with `encoders/` and `model/` as a training leaves them, untrained and small."""
    from mcd_edu.data import Vocabulary, tokenize
    from mcd_edu.encoders import AudioEncoder, VisualEncoder, save_encoders
    from mcd_edu.model import MCD, MCDConfig
    from mcd_edu.samples.pictures import INSTRUMENTS
    from mcd_edu.samples.questions import TEMPLATES
    from mcd_edu.training import save_checkpoint

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("untrained")
    save_encoders(folder / "encoders", VisualEncoder(), AudioEncoder())
    keywords = [*INSTRUMENTS, *"left right middle leftest rightest first second third last".split(),
                *"before after loudest lowest".split()]
    vocabulary = Vocabulary({*keywords, *(w for form in TEMPLATES for w in tokenize(form.text))})
    model = MCD(MCDConfig(len(vocabulary), embed_dim=32, max_tokens=20))
    for parameter in model.parameters():  # far from uniform, so that a mix-up shows
        torch.nn.init.normal_(parameter, std=0.3)
    save_checkpoint(folder / "model", model, vocabulary, {"keywords": keywords})
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A video of four seconds: a square that moves, a tone that gets louder."""
    from mcd_edu.media import write_video

    frames = np.full((16, 128, 128, 3), 200, np.uint8)
    for i, frame in enumerate(frames):
        frame[40:80, 6 * i:6 * i + 30] = (30, 90, 200)
    time = np.arange(4 * 16_000) / 16_000
    waveform = (0.1 * time * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, frames, waveform)
    return path
