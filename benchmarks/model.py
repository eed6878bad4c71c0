"""How fast MCD answers and learns, beside the late-fusion baseline, in one run.

    python benchmarks/model.py                       # about 12 minutes on 2 cores
    python benchmarks/model.py --quick               # the same at toy sizes, under a minute
    python benchmarks/model.py --device cuda --bf16 --compile

Every model is run with random features and questions in the true shapes. What is compared takes
turns, round by round, with a matrix product among them, so that a busy machine disturbs all alike;
a figure is the median of the rounds. `cached` encodes a video once for all its questions, `uncached`
once for each question, `stored` finds it encoded. Writes benchmarks/model.json, which
nbs/experiments/speed.ipynb draws; benchmarks/README.md holds the floor and the notes.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from mcd_edu.baselines.late_fusion import LateFusionConfig
from mcd_edu.data import VideoBatch
from mcd_edu.encoders import encode_segments, load_encoders
from mcd_edu.extraction import SHIPPED, extract
from mcd_edu.media import read_segments
from mcd_edu.model import MCDConfig
from mcd_edu.models import build
from mcd_edu.training import TrainingConfig, ask, make_optimizer

HERE = Path(__file__).resolve().parent
CLIPS = HERE.parent / "data_samples/music_avqa/videos"
WORDS, OBJECTS, VOCABULARY = (5, 14), (0, 4), 100  # of a question, as in the sample set
EPOCHS, QUESTIONS = 30, 31_927  # of a training on MUSIC-AVQA
QUESTIONS_A_BATCH = 32


@dataclass(frozen=True)
class Setting:
    """The sizes of one measurement; t, d, k and b of the notebooks."""
    segments: int = 60
    width: int = 512
    questions: int = 5  # of each video
    videos: int = 6  # in a batch
    visual_dim: int = 512
    audio_dim: int = 128
    blocks: int = 2


MAIN = Setting()  # the one that the targets are set for
SAMPLE = Setting(10, 128, 16, 2, 192, 128)  # as on the sample set
TOY = Setting(10, 64, 5, 2, 64, 32)


def main_settings(quick: bool) -> list[Setting]:
    """One, 5 and 20 questions of a video in batches of about 32 questions, and the sample set."""
    if quick:
        return [TOY, replace(TOY, questions=1)]
    counts = [(k, max(1, round(QUESTIONS_A_BATCH / k))) for k in (1, 5, 20)]
    return [replace(MAIN, segments=t, questions=k, videos=b) for t in (10, 60) for k, b in counts] + [SAMPLE]


def scaling_settings(quick: bool, device: str) -> dict[str, list[Setting]]:
    """What grows alone → its settings."""
    base = TOY if quick else replace(MAIN, videos=2)
    values = {"segments": (5, 10) if quick else (10, 20, 40, 60, 120),
              "questions": (1, 4) if quick else (1, 2, 5, 10, 20),
              "videos": (1, 2) if quick else (1, 2, 4, 8, 16) if device == "cpu" else (4, 16, 64, 256),
              "width": (32, 64) if quick else (128, 256, 512, 768)}
    return {name: [replace(base, **{name: value}) for value in of_name] for name, of_name in values.items()}


# Machine ---------------------------------------------------------------------------------------

def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def machine(device: str) -> dict:
    """What the figures were measured on."""
    cpu = [line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if "model name" in line]
    memory = [int(line.split()[1]) for line in read_lines("/proc/meminfo") if "MemTotal" in line]
    card = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"device": device, **card, "cpu": (cpu or [platform.processor()])[0], "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "memory_gb": round(sum(memory) * 1024 / 1e9, 1),
            "load_before": round(os.getloadavg()[0], 1), "system": platform.system(),
            "python": platform.python_version(), "torch": torch.__version__}


# Clock -----------------------------------------------------------------------------------------

def seconds(step: Callable, device: str) -> float:
    """How long one call takes, the device's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(steps: dict, repeats: int, device: str, beside: Callable | None = None) -> dict:
    """Median, fastest and slowest of each step, the steps interleaved, `beside` before each of them; the first round only
    warms up."""
    times = defaultdict(list)
    for number in range(repeats + 1):
        for name, step in steps.items():
            if beside and number:
                times["beside"].append(seconds(beside, device))
            spent = seconds(step, device)
            if number:
                times[name].append(spent)
    return {name: {"seconds": statistics.median(found), "fastest": min(found), "slowest": max(found)}
            for name, found in times.items()}


def beside(device: str) -> tuple[int, Callable]:
    """A matrix product to run among other things, which tells how fast the machine was then, and its operations."""
    side = 1024 if device == "cpu" else 4096
    return 2 * side**3, matrix_steps([(side, side, side)], torch.float32, device).popitem()[1]


# Floor -----------------------------------------------------------------------------------------

def operations(step: Callable) -> int:
    """Multiplications and additions of all matrix products of a step, backward included."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("ignore")  # on hardware that is not there
        with torch.backends.mkldnn.flags(enabled=False):  # a fused LSTM is not counted otherwise
            step()
    return counter.get_total_flops()


def matrix_steps(shapes: list[tuple], dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """Products of n × m and m × p matrices, by the name of their shape."""
    def product(n, m, p):
        first, second = (torch.randn(shape, device=device, dtype=dtype) for shape in ((n, m), (m, p)))
        result = torch.empty(n, p, device=device, dtype=dtype)
        return lambda: torch.mm(first, second, out=result)
    return {f"{n} × {m} × {p}": product(n, m, p) for n, m, p in shapes}


def matrix_rates(device: str, quick: bool, dtype: torch.dtype) -> dict:
    """Operations a second of plain matrix products: squares, and what the model asks for most."""
    sides = (256, 512) if quick else (1024, 2048) if device == "cpu" else (4096, 8192)
    d, rows = MAIN.width, MAIN.videos * MAIN.segments
    own = [(rows, d, d), (rows, d, 2 * d), (rows, 2 * d, d)]
    steps = matrix_steps([(n, n, n) for n in sides] + own, dtype, device)
    found = take_turns(steps, 5 if quick else 15, device)
    rates = {}
    for name, times in found.items():
        n, m, p = map(int, name.split(" × "))
        rates[name] = {"median": 2 * n * m * p / times["seconds"], "best": 2 * n * m * p / times["fastest"]}
    return {"best": max(rate["best"] for rate in rates.values()), "shapes": rates}


def copy_rate(device: str) -> float:
    """Bytes a second that are read and written when a large tensor is copied."""
    source = torch.ones(2**25, device=device)  # 128 MiB, more than any cache holds
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return 2 * 4 * source.numel() / times["fastest"]


# What is run -----------------------------------------------------------------------------------

def padded(rows: int, span: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Word numbers of random questions, padded to the longest; the first is the longest there may be."""
    low, high = span
    lengths = torch.randint(low, high + 1, (rows,), generator=generator)
    lengths[0] = high
    numbers = torch.randint(2, VOCABULARY, (rows, high), generator=generator)
    return numbers.masked_fill(torch.arange(high) >= lengths[:, None], 0)


def make_batch(setting: Setting, device: str) -> VideoBatch:
    """Random features and questions."""
    generator = torch.Generator().manual_seed(0)
    b, k, t = setting.videos, setting.questions, setting.segments
    tokens, objects = (rearrange(padded(b * k, span, generator), "(b k) l -> b k l", b=b) for span in (WORDS, OBJECTS))
    whole = torch.ones(b, k, dtype=torch.bool)
    return VideoBatch(torch.randn(b, t, setting.visual_dim, generator=generator),
                      torch.randn(b, t, setting.audio_dim, generator=generator),
                      torch.ones(b, t, dtype=torch.bool), tokens, objects,
                      torch.randint(42, (b, k), generator=generator), torch.zeros(b, k, dtype=torch.long),
                      whole, torch.arange(b), rearrange(torch.arange(b * k), "(b k) -> b k", b=b)).to(device)


def one_a_row(batch: VideoBatch) -> VideoBatch:
    """The same questions, each with a copy of its video: what a model has to do that cannot cache."""
    k = batch.tokens.shape[1]
    videos = (repeat(x, "b ... -> (b k) ...", k=k) for x in (batch.visual, batch.audio, batch.mask))
    asked = (rearrange(x, "b k ... -> (b k) 1 ...") for x in
             (batch.tokens, batch.objects, batch.answers, batch.types, batch.question_mask))
    return VideoBatch(*videos, *asked, repeat(batch.video_ids, "b -> (b k)", k=k),
                      rearrange(batch.question_ids, "b k -> (b k) 1"))


def make_model(kind: str, setting: Setting, device: str) -> nn.Module:
    """MCD, or the late-fusion baseline with about as many parameters."""
    torch.manual_seed(0)
    sizes = dict(visual_dim=setting.visual_dim, audio_dim=setting.audio_dim, embed_dim=setting.width,
                 num_segments=setting.segments)
    if kind == "mcd":
        config = MCDConfig(VOCABULARY, num_blocks=setting.blocks, **sizes)
    else:
        config = LateFusionConfig(VOCABULARY, hidden_dim=440 * setting.width // 128, **sizes)
    return build(config).to(device).eval()


def answer(model: nn.Module, batch: VideoBatch, precision=nullcontext) -> Tensor:
    """Logits, each video encoded once."""
    with torch.inference_mode(), precision():
        return ask(model, batch).logits


def answer_stored(model: nn.Module, batch: VideoBatch, state, precision=nullcontext) -> Tensor:
    """Logits about videos that are encoded already."""
    with torch.inference_mode(), precision():
        return model.answer(state, batch.tokens, batch.objects).logits


def encode(model: nn.Module, batch: VideoBatch):
    """What is known of the videos before a question is asked."""
    with torch.inference_mode():
        return model.encode_video(batch.visual, batch.audio, batch.mask)


def learn(model: nn.Module, optimizer, batch: VideoBatch, precision=nullcontext) -> None:
    """One whole training step, as in `train_epoch`."""
    model.train()
    with precision():
        state = model.encode_video(batch.visual, batch.audio, batch.mask)
        found = model.answer(state, batch.tokens, batch.objects)
        losses = model.losses(state, found, batch.answers, batch.question_mask, batch.video_ids)
    optimizer.zero_grad()
    losses["total"].backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    model.eval()


def learner(model: nn.Module) -> Callable[..., None]:
    """`learn` with an optimizer that is as fresh as the model; it learns so slowly that figures stay finite."""
    return partial(learn, model, make_optimizer(model, TrainingConfig(learning_rate=1e-6)))


def rounded(values: dict, digits: int = 6) -> dict:
    """Numbers with six digits that count."""
    return {key: float(f"{value:.{digits}g}") if isinstance(value, float) else value for key, value in values.items()}


# Measurements ----------------------------------------------------------------------------------

def steps_of(kind: str, model: nn.Module, setting: Setting, device: str, tasks: list[tuple]) -> dict[tuple, Callable]:
    """(model, task, how) → the call to be timed."""
    batch = make_batch(setting, device)
    alone, train = one_a_row(batch), learner(model)
    every = {("inference", "cached"): partial(answer, model, batch),
             ("inference", "uncached"): partial(answer, model, alone),
             ("inference", "stored"): partial(answer_stored, model, batch, encode(model, batch)),
             ("training", "cached"): partial(train, batch), ("training", "uncached"): partial(train, alone)}
    return {(kind, *task): step for task, step in every.items() if task in tasks}


def measure(setting: Setting, part: str, rate: float, repeats: int, device: str,
            kinds: tuple = ("mcd",), tasks: tuple = ("cached", "uncached")) -> list[dict]:
    """A row for each model, task and way of doing it, measured side by side."""
    tasks = [(task, how) for task in ("inference", "training") for how in tasks if (task, how) != ("training", "stored")]
    if part != "settings":
        tasks = [task for task in tasks if task != ("training", "uncached")]
    steps = {}
    for kind in kinds:
        steps |= steps_of(kind, make_model(kind, setting, device), setting, device, tasks)
    counts = {key: operations(step) for key, step in steps.items()}
    count, product = beside(device)
    times = take_turns(steps, repeats, device, product)
    near = count / times.pop("beside")["seconds"]
    asked = setting.videos * setting.questions
    return [rounded({"part": part, "model": key[0], "task": key[1], "how": key[2], **asdict(setting), **time_of,
                     "questions_per_second": asked / time_of["seconds"], "operations": counts[key],
                     "operations_per_second": counts[key] / time_of["seconds"],
                     "share": counts[key] / time_of["seconds"] / rate, "matrix_rate_beside": near,
                     "share_beside": counts[key] / time_of["seconds"] / near}) for key, time_of in times.items()]


@torch.inference_mode()
def same_answers(setting: Setting, device: str) -> dict:
    """The largest difference between logits: cached and uncached; torch's fused attention and the plain one."""
    model, batch = make_model("mcd", setting, device), make_batch(setting, device)
    cached = ask(model, batch).logits
    alone = rearrange(ask(model, one_a_row(batch)).logits, "(b k) 1 a -> b k a", b=setting.videos)
    plain = ask(model, batch, need_clues=True).logits
    return {**asdict(setting), "cached_uncached": float((cached - alone).abs().max()),
            "fused_plain": float((cached - plain).abs().max())}


def extra_question(setting: Setting, words: int, objects: int, repeats: int, device: str) -> list[dict]:
    """Each model's first question, its video encoded on the way, one more on the same video, and 20 more at once."""
    setting, rows, more = replace(setting, questions=1, videos=1), [], 20
    batch, many = (make_batch(replace(setting, questions=k), device) for k in (1, more))
    batch, many = (replace(x, tokens=x.tokens[..., :words], objects=x.objects[..., :objects]) for x in (batch, many))
    for kind in ("mcd", "late_fusion"):
        model = make_model(kind, setting, device)
        state = encode(model, batch)
        steps = {"first": partial(answer, model, batch), "extra": partial(answer_stored, model, batch, state),
                 "together": partial(answer_stored, model, many, state)}
        counts = {name: operations(step) for name, step in steps.items()}
        times = {name: found["seconds"] for name, found in take_turns(steps, repeats, device).items()}
        rows.append(rounded({"model": kind, **asdict(setting), "words": words, "objects": objects,
                             **{f"{name}_operations": counts[name] for name in steps},
                             **{f"{name}_seconds": times[name] for name in steps},
                             "operations_ratio": counts["extra"] / counts["first"],
                             "seconds_ratio": times["extra"] / times["first"],
                             "together_seconds_ratio": times["together"] / more / times["first"]}))
    return rows


def parameters(setting: Setting, device: str) -> list[dict]:
    """How many each model has, in which part, and which of them one training step leaves without a gradient."""
    rows = []
    for kind in ("mcd", "late_fusion"):
        model = make_model(kind, setting, device)
        parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        learner(model)(make_batch(replace(setting, videos=2, questions=2), device))
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        rows.append({"model": kind, "width": setting.width, "parameters": sum(p.numel() for p in model.parameters()),
                     "parts": parts, "without_gradient": still})
    return rows


def variants(setting: Setting, wanted: list[str], repeats: int, device: str, rates: dict) -> tuple[list, list]:
    """MCD under bf16 autocast, compiled, and both; what fails is skipped and says why."""
    batch, rows, skipped, (count, product) = make_batch(setting, device), [], [], beside(device)
    expected = answer(make_model("mcd", setting, device), batch)
    for variant in wanted:
        model = make_model("mcd", setting, device)
        half = "bf16" in variant
        precision = partial(torch.autocast, device, torch.bfloat16) if half else nullcontext
        try:
            if "compiled" in variant:
                torch.compiler.reset()
                model.encode_video, model.answer = torch.compile(model.encode_video), torch.compile(model.answer)
            steps = {"inference": partial(answer, model, batch, precision), "training": partial(learner(model), batch, precision)}
            difference = float((steps["inference"]().float() - expected).abs().max())
            times = take_turns(steps, repeats, device, product)
            near = count / times["beside"]["seconds"]
        except Exception as error:  # whatever a compiler may raise
            skipped.append({"variant": variant, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
            continue
        counted = make_model("mcd", setting, device)  # the same sums, compiled or not
        counts = {"inference": operations(partial(answer, counted, batch)),
                  "training": operations(partial(learner(counted), batch))}
        rate = rates["bf16" if half else "fp32"]["best"]
        rows += [rounded({"part": "variants", "variant": variant, "model": "mcd", "task": task, "how": "cached",
                          **asdict(setting), **times[task], "operations": counts[task],
                          "questions_per_second": setting.videos * setting.questions / times[task]["seconds"],
                          "operations_per_second": counts[task] / times[task]["seconds"],
                          "share": counts[task] / times[task]["seconds"] / rate, "matrix_rate_beside": near,
                          "share_beside": counts[task] / times[task]["seconds"] / near, "difference": difference})
                 for task in steps]
    return rows, skipped


GROUPS = {"attention": ("scaled_dot_product", "flash", "fmha"),
          "matrix products": ("addmm", "aten::mm", "bmm", "matmul", "linear", "gemm", "nvjet"),
          "LSTM": ("lstm", "rnn"), "layer norm": ("layer_norm",), "GELU": ("gelu",),
          "optimizer and clipping": ("_fused_adamw", "foreach", "norm"),
          "copies and sums": ("copy", "cat", "add", "mul", "sum", "fill", "clone", "where", "div", "zero")}


def group_of(name: str) -> str:
    """The kind of work that an operator does."""
    return next((group for group, marks in GROUPS.items() if any(mark in name for mark in marks)), "other")


def where_it_goes(setting: Setting, device: str) -> list[dict]:
    """Share of the time of each kind of work, from torch's profiler."""
    rows, kinds = [], [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    for kind in ("mcd", "late_fusion"):
        model, batch = make_model(kind, setting, device), make_batch(setting, device)
        for task, step in {"inference": partial(answer, model, batch), "training": partial(learner(model), batch)}.items():
            step()
            with profile(activities=kinds) as found:
                for _ in range(3):
                    step()
            spent = defaultdict(float)
            for event in found.key_averages():
                spent[group_of(event.key)] += event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            total = sum(spent.values()) or 1.0
            rows.append({"model": kind, "task": task, **asdict(setting),
                         "shares": {name: round(x / total, 4) for name, x in sorted(spent.items(), key=lambda x: -x[1])}})
    return rows


# Memory ----------------------------------------------------------------------------------------

def held(setting: Setting, kind: str, task: tuple, device: str, threads: int) -> dict:
    """The most memory that one kind of work needs, in a process of its own."""
    torch.set_num_threads(threads)
    model = make_model(kind, setting, device)
    step = steps_of(kind, model, setting, device, [task]).popitem()[1]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    status = dict(line.split(":", 1) for line in read_lines("/proc/self/status"))
    most = torch.cuda.max_memory_allocated() if device == "cuda" else int(status.get("VmHWM", "0").split()[0]) * 1024
    return {"model": kind, "task": task[0], "how": task[1], **asdict(setting), "peak_gb": round(most / 1e9, 3)}


def memory(settings: list[Setting], device: str) -> list[dict]:
    """Peak memory of inference and training, each in a fresh process; the whole process, where there is no GPU."""
    rows, spawn = [], multiprocessing.get_context("spawn")
    for setting in settings:
        for kind in ("mcd", "late_fusion"):
            for task in (("inference", "cached"), ("inference", "uncached"), ("training", "cached"), ("training", "uncached")):
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    rows.append(pool.submit(held, setting, kind, task, device, torch.get_num_threads()).result())
    return rows


# Clips -----------------------------------------------------------------------------------------

def clips(folder: Path, at_most: int, device: str) -> dict:
    """From mp4 files to features, in seconds of video a second: decoding, encoding, and the whole extraction."""
    paths = sorted(folder.glob("*.mp4"))[:at_most]
    if not paths:
        return {"skipped": f"no clips in {folder.name}"}
    encoders, lengths, spent = load_encoders(SHIPPED), [], defaultdict(float)
    for path in [paths[0], *paths]:  # the first one twice: to warm up
        lengths.append(0)
        begin = time.perf_counter()
        segments = read_segments(path)
        between = time.perf_counter()
        encode_segments(encoders, segments)
        lengths[-1] = len(segments.frames)
        if len(lengths) > 1:
            spent["decoding"] += between - begin
            spent["encoding"] += time.perf_counter() - between
    total = sum(lengths[1:])
    with tempfile.TemporaryDirectory() as out:
        whole = seconds(lambda: extract(paths, out, device=device, progress=False), device)
    return rounded({"clips": len(paths), "seconds_of_video": total,
                    **{f"{name}_times_real_time": total / x for name, x in spent.items()},
                    "one_after_the_other_times_real_time": total / sum(spent.values()),
                    "extract_times_real_time": total / whole})


# Report ----------------------------------------------------------------------------------------

def targets(report: dict) -> list[dict]:
    """What was asked for, what was measured, and by how much it is missed: gap 1 is just met."""
    def row(name, wanted, measured, at_least, note=""):
        met = measured >= wanted if at_least else measured <= wanted
        gap = (wanted / measured if at_least else measured / wanted) if measured and wanted else float(not met)
        return rounded({"target": name, "wanted": f"{'≥' if at_least else '≤'} {wanted:g}", "measured": float(measured),
                        "met": bool(met), "gap": float(gap), "note": note}, 4)

    size = {key: value for key, value in asdict(MAIN).items() if key != "videos"}
    found = []
    for task in ("inference", "training"):
        rows = [r for r in report["rows"] if (r["part"], r["model"], r["task"], r["how"]) == ("settings", "mcd", task, "cached")]
        one = next((r for r in rows if all(r[key] == value for key, value in size.items())), rows[0])
        note = (f"T={one['segments']}, d={one['width']}, {one['questions']} questions a video: {one['questions_per_second']:.1f} "
                f"questions/s, {one['operations_per_second'] / 1e9:.1f} of {one['matrix_rate_beside'] / 1e9:.1f} GFLOP/s in the "
                f"same rounds; of the best moment of the run, {report['matrix']['fp32']['best'] / 1e9:.1f}: {one['share']:.0%}")
        found.append(row(f"{task}: share of the matrix-product rate", 0.5, one["share_beside"], True, note))
    extra = [r for r in report["extra_question"] if r["model"] == "mcd"]
    for r in extra:
        note = f"{r['words']} words, {r['objects']} objects; T={r['segments']}, d={r['width']}"
        found.append(row("an extra question, operations, of the first", 0.1, r["operations_ratio"], False, note))
        found.append(row("an extra question, asked alone, time, of the first", 0.1, r["seconds_ratio"], False, note))
        found.append(row("an extra question, one of 20, time, of the first", 0.1, r["together_seconds_ratio"], False, note))
    own = next(r for r in report["parameters"] if r["model"] == "mcd")
    found.append(row("parameters", 16e6, own["parameters"], False, f"d={own['width']}"))
    found.append(row("parameters without gradient", 0, len(own["without_gradient"]), False, ", ".join(own["without_gradient"])))
    for key in ("cached_uncached", "fused_plain"):
        largest = max(r[key] for r in report["same_answers"])
        found.append(row(f"{key.replace('_', ' and ')} answers differ by", 1e-5, largest, False))
    if "extract_times_real_time" in report["clips"]:
        found.append(row("mp4 to features, times real time", 50, report["clips"]["extract_times_real_time"], True))
    if report["machine"]["device"] == "cuda":
        fast = max((r for r in report["rows"] if (r["model"], r["task"], r["how"]) == ("mcd", "training", "cached")
                    and (r["segments"], r["width"]) == (MAIN.segments, MAIN.width)), key=lambda r: r["questions_per_second"])
        note = (f"from {fast['questions_per_second']:.0f} questions/s, {fast.get('variant', 'fp32')}, "
                f"{fast['share']:.0%} of the matrix-product rate")
        whole = EPOCHS * QUESTIONS / fast["questions_per_second"]
        found.append(row(f"{EPOCHS} epochs at MUSIC-AVQA size, seconds", 60, whole, False, note))
    return found


def run(options: argparse.Namespace) -> dict:
    """Everything, in order."""
    quick, device = options.quick, options.device
    repeats = options.repeats or (2 if quick else 7)
    tell = (lambda *_: None) if options.silent else partial(print, flush=True)
    begin = time.perf_counter()
    report = {"machine": machine(device), "quick": quick, "words": WORDS, "objects": OBJECTS}
    types = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if device == "cuda" or options.bf16 else {})
    report["matrix"] = {name: matrix_rates(device, quick, dtype) for name, dtype in types.items()}
    report["copy_bytes_per_second"] = copy_rate(device)
    rate = report["matrix"]["fp32"]["best"]
    tell(f"matrix products: {rate / 1e9:.1f} GFLOP/s")
    report["rows"] = []
    for setting in main_settings(quick):
        both, ways = ("mcd", "late_fusion"), ("cached", "uncached", "stored")
        report["rows"] += measure(setting, "settings", rate, repeats, device, both, ways)
        tell(setting, f"{time.perf_counter() - begin:.0f} s")
    for name, settings in scaling_settings(quick, device).items():
        for setting in settings:
            ways = ("cached", "uncached") if name in ("segments", "questions") else ("cached",)
            report["rows"] += measure(setting, name, rate, min(repeats, 3), device, tasks=ways)
        tell(name, f"{time.perf_counter() - begin:.0f} s")
    base = TOY if quick else MAIN if device == "cpu" else replace(MAIN, questions=3, videos=256)
    wanted = ["plain"] + ["bf16"] * ("bf16" in types) + ["compiled"] * options.compile
    wanted += ["bf16 compiled"] * ("bf16" in types and options.compile)
    rows, report["skipped"] = variants(base, wanted, repeats, device, report["matrix"])
    report["rows"] += rows
    report["same_answers"] = [same_answers(setting, device) for setting in dict.fromkeys([base, SAMPLE, *main_settings(quick)])]
    report["extra_question"] = [row for words, objects in ((8, 2), (WORDS[1], OBJECTS[1]))
                                for row in extra_question(MAIN, words, objects, repeats, device)]
    report["parameters"] = parameters(MAIN, device)
    report["where_it_goes"] = where_it_goes(base, device)
    tell("profile", f"{time.perf_counter() - begin:.0f} s")
    report["memory"] = [] if quick else memory([MAIN], device)
    report["clips"] = clips(CLIPS, 3 if quick else 40, device)
    report["matrix_afterwards"] = matrix_rates(device, quick, torch.float32)["best"]
    report["targets"] = targets(report)
    report["machine"]["load_after"] = round(os.getloadavg()[0], 1)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    return report


def show(report: dict) -> str:
    """A table of the settings, and the targets."""
    lines = ["model        task       how        T    d   k   b  questions/s  GFLOP/s  share  beside"]
    for r in report["rows"]:
        sizes = f"{r['segments']:<4} {r['width']:<4} {r['questions']:<3} {r['videos']:<3}"
        lines.append(f"{r['model']:12} {r['task']:10} {r.get('variant', r['how']):10} {sizes} {r['questions_per_second']:10.1f} "
                     f"{r['operations_per_second'] / 1e9:8.1f} {r['share']:6.0%} {r.get('share_beside', 0):6.0%}")
    for r in report["targets"]:
        lines.append(f"{'met    ' if r['met'] else 'NOT MET'} {r['target']}: {r['measured']:.3g} ({r['wanted']}) {r['note']}")
    return "\n".join([*lines, *(f"skipped {r['variant']}: {r['reason']}" for r in report["skipped"])])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="toy sizes, under a minute")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; all cores if not given")
    parser.add_argument("--repeats", type=int, help="rounds of each comparison")
    parser.add_argument("--bf16", action="store_true", help="also under bf16 autocast (always on a GPU)")
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--silent", action="store_true", help="print nothing")
    parser.add_argument("--out", type=Path, default=HERE / "model.json")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    report = run(options)
    options.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not options.silent:
        print(show(report))


if __name__ == "__main__":
    main()
