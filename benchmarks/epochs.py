"""A whole training at MUSIC-AVQA size, timed: 9,288 videos, 31,927 questions, 30 epochs.

    python benchmarks/epochs.py --device cuda --precision bfloat16 --compile
    python benchmarks/epochs.py --quick              # the same at toy size, on a CPU, in seconds

Features are random, in the real shapes; questions and answers too, so that nothing is learned. It is the training of
`mcd_edu.training`: the same batches, step and guard, without checkpoints. Writes benchmarks/epochs.json: seconds an epoch, the
device's share of its own measured matrix-product rate, and what the operations, the optimizer's bytes and the layout of the
batches would take alone.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import model as bench  # noqa: E402  (the script beside this one)

from mcd_edu.data import AVQADataset  # noqa: E402
from mcd_edu.devices import Feed, Team  # noqa: E402
from mcd_edu.model import MCDConfig  # noqa: E402
from mcd_edu.models import build  # noqa: E402
from mcd_edu.training import Guard, Step, TrainingConfig, learn, make_optimizer, train_epoch  # noqa: E402


@dataclass(frozen=True)
class Size:
    """Of a dataset, and of the model that learns from it."""
    videos: int = 9288
    questions: int = 31_927
    segments: int = 60
    width: int = 512
    visual_dim: int = 512
    audio_dim: int = 128
    epochs: int = 30
    batch: int = 256  # videos


TOY = Size(videos=24, questions=80, segments=6, width=32, visual_dim=16, audio_dim=8, epochs=2, batch=8)
WANTED_SECONDS = 60


class MadeUp(AVQADataset):
    """Random features and questions, each video with at least one of them."""

    def __init__(self, size: Size):
        generator = torch.Generator().manual_seed(0)
        v, n, t = size.videos, size.questions, size.segments
        self.visual = torch.randn(v, t, size.visual_dim, generator=generator)
        self.audio = torch.randn(v, t, size.audio_dim, generator=generator)
        self.mask = torch.ones(v, t, dtype=torch.bool)
        self.video = torch.cat([torch.arange(v), torch.randint(v, (n - v,), generator=generator)])
        self.tokens, self.objects = (bench.padded(n, span, generator) for span in (bench.WORDS, bench.OBJECTS))
        self.answers = torch.randint(42, (n,), generator=generator)
        self.types, self.question_ids, self.choices = torch.zeros(n, dtype=torch.long), torch.arange(n), None

    def __len__(self) -> int:
        return len(self.answers)


def model_config(size: Size) -> MCDConfig:
    return MCDConfig(bench.VOCABULARY, visual_dim=size.visual_dim, audio_dim=size.audio_dim, embed_dim=size.width,
                     num_segments=size.segments)


def epoch_operations(step: Step, feed: Feed, config: TrainingConfig, batches: int = 2) -> float:
    """Of all matrix products of an epoch: those of its first batches, scaled to all rows."""
    optimizer, guard, counted, rows = make_optimizer(step, config), Guard(config, 0, feed.team.device), 0, 0
    every = [len(batch.video_ids) for batch in feed.batches(config.num_videos, config.num_questions, 0)]
    for batch in islice(feed.batches(config.num_videos, config.num_questions, 0), batches):
        counted += bench.operations(partial(learn, step, optimizer, feed.share(batch), guard))
        rows += len(batch.video_ids)
    return counted * sum(every) / rows


def floor(step: Step, feed: Feed, config: TrainingConfig, rate: float) -> dict:
    """Seconds an epoch that each thing would take alone; the slowest of them bounds the rest."""
    numbers, begin = sum(p.numel() for p in step.parameters()), time.perf_counter()
    steps = sum(1 for _ in feed.batches(config.num_videos, config.num_questions, 1))
    layout = time.perf_counter() - begin
    count = epoch_operations(step, feed, config)
    moved = 7 * 4 * numbers * steps  # weight, gradient and two moments read, three of them written
    return {"operations": count, "steps": steps, "parameters": numbers, "matrix_products": count / rate,
            "optimizer": moved / bench.copy_rate(feed.team.device.type), "layout_of_batches": layout}


def run(options: argparse.Namespace) -> dict:
    """The whole training, epoch by epoch; the first one, which compiles and warms up, is counted apart."""
    size, team = TOY if options.quick else Size(), Team.find(options.device)
    size = replace(size, **{name: getattr(options, name) for name in ("epochs", "batch", "videos", "questions")
                            if getattr(options, name)})
    device, half = team.device.type, options.precision == "bfloat16"
    config = TrainingConfig(size.epochs + 1, 1e-6, num_videos=size.batch, precision=options.precision)
    report = {"machine": bench.machine(device), "processes": team.world, "size": asdict(size),
              "precision": options.precision, "compiled": options.compile, "quick": options.quick}
    rate = bench.matrix_rates(device, options.quick, torch.bfloat16 if half else torch.float32)["best"]
    model, data = build(model_config(size)).to(team.device), MadeUp(size)
    alone = Team(team.device)
    report["floor_of_an_epoch"] = floor(Step(model, alone, options.precision), Feed(data, alone), config, rate)
    feed = Feed(data, team)
    step = team.wrap(Step(model, team, options.precision, "inductor" if options.compile else None))
    epoch = partial(train_epoch, model, feed, make_optimizer(model, config), config, step=step)
    report["first_epoch_seconds"] = bench.seconds(partial(epoch, 0), device)
    times = [bench.seconds(partial(epoch, number), device) for number in range(1, size.epochs + 1)]
    total, count = sum(times), report["floor_of_an_epoch"]["operations"]
    share = count * size.epochs / total / (rate * team.world)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return report | {"resident": feed.resident, "matrix_rate": rate, "epoch_seconds": times, "seconds": total,
                     "questions_per_second": size.questions * size.epochs / total, "share": share,
                     "peak_gb": memory, "wanted_seconds": WANTED_SECONDS, "main": team.main,
                     "met": None if options.quick or device != "cuda" else total < WANTED_SECONDS}


def show(report: dict) -> str:
    """What a person wants to know."""
    size, each = report["size"], report["seconds"] / report["size"]["epochs"]
    speed = f"{report['seconds']:.1f} s ({report['questions_per_second']:.0f} questions/s)"
    lines = [f"{size['epochs']} epochs of {size['questions']:,} questions on {size['videos']:,} videos, T={size['segments']}, "
             f"d={size['width']}, {report['precision']}: {speed}, {report['share']:.0%} of the matrix-product rate",
             f"the first epoch, apart, {report['first_epoch_seconds']:.1f} s; another {each:.3f} s, of which alone would take"]
    floors = report["floor_of_an_epoch"]
    return "\n".join(lines + [f"  {name.replace('_', ' '):18} {floors[name]:.3f} s"
                              for name in ("matrix_products", "optimizer", "layout_of_batches")])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="as in mcd-edu train; several GPUs with torchrun")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    for name in ("epochs", "batch", "videos", "questions"):
        parser.add_argument(f"--{name}", type=int, help="other than at MUSIC-AVQA size")
    parser.add_argument("--silent", action="store_true", help="print nothing")
    parser.add_argument("--out", type=Path, default=HERE / "epochs.json")
    options = parser.parse_args(arguments)
    report = run(options)
    if not report.pop("main"):
        return
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not options.silent:
        print(show(report))


if __name__ == "__main__":
    main()
