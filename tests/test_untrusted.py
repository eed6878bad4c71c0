"""Nothing that is handed in is run, leads out of its folder, becomes markup, or fills the memory.

    pytest tests/test_untrusted.py           # the fuzz targets: see tests/fuzz/test_fuzz.py
"""

import ast
import json
import os
import shutil
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager
from nbconvert import HTMLExporter
from notebooks import run_notebook

from mcd_edu.data import parse_question
from mcd_edu.datasets import DATASETS, MAPPING, Naming, plain_name
from mcd_edu.extraction import check_name as check_video
from mcd_edu.features import DataError, FeatureFolder, check_name, data_file, read_index, read_json
from mcd_edu.media import write_json, write_whole

ROOT = Path(__file__).resolve().parent.parent
HOURS = float(os.environ.get("SILENT_HOURS", 0.5))  # of silence in one file
SOURCES = sorted(path for folder in ("mcd_edu", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py"))

# ---- nothing is run

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load",
         "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "tempfile.mktemp"}
ALLOWED = {  # place → why
    ("mcd_edu/assignments.py", "exec"): "the work of a student, in a process of its own",
    ("mcd_edu/assignments.py", "compile"): "the same",
    ("mcd_edu/media.py", "av.open"): "the one place that reads media, with formats and protocols named",
}


def dotted(node: ast.expr) -> str:
    """np.load, for a name or a chain of attributes; ? stands for anything else."""
    if isinstance(node, ast.Name): return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def dangers(source: str) -> set[str]:
    """Calls and imports that run, or may run, what a file says."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names} & MODULES
        if isinstance(node, ast.ImportFrom) and node.module in MODULES: found.add(node.module)
        if not isinstance(node, ast.Call): continue
        name, given = dotted(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        def is_given(key, value, given=given): return isinstance(given.get(key), ast.Constant) and given[key].value is value
        if name in CALLS: found.add(name)
        if name in ("np.load", "numpy.load") and not is_given("allow_pickle", False): found.add(name)
        if name == "av.open" and len(node.args) < 2: found.add(name)              # not to write
        if "shell" in given and not is_given("shell", False): found.add("shell=True")
        if "trust_remote_code" in given and not is_given("trust_remote_code", False): found.add("trust_remote_code")
        if is_given("allow_pickle", True): found.add("allow_pickle=True")
    return found


@pytest.mark.parametrize("source, found", [
    ("import pickle", {"pickle"}), ("from pickle import loads", {"pickle"}), ("torch.load('x')", {"torch.load"}),
    ("np.load('x')", {"np.load"}), ("np.load('x', allow_pickle=True)", {"np.load", "allow_pickle=True"}),
    ("np.load('x', allow_pickle=False)", set()), ("eval('1')", {"eval"}), ("model.eval()", set()),
    ("subprocess.run('ls', shell=True)", {"shell=True"}), ("yaml.load(x)", {"yaml.load"}), ("yaml.safe_load(x)", set()),
    ("f(trust_remote_code=trust)", {"trust_remote_code"}), ("re.compile('x')", set()), ("compile('x')", {"compile"}),
    ("f().eval()", set()), ("av.open(x)", {"av.open"}), ("av.open(x, 'w')", set())])
def test_dangers_are_seen(source, found):
    assert dangers(source) == found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_a_file_says(path):
    name = path.relative_to(ROOT).as_posix()
    found = dangers(path.read_text(encoding="utf-8"))
    assert found == {danger for place, danger in ALLOWED if place == name and danger in found}


NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
HARMLESS = {"np.load", "av.open"}        # numpy refuses pickles of itself, and what is opened there is our own


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_notebook_runs_what_a_file_says(path):
    cells = nbformat.read(path, 4).cells
    code = "\n".join(TransformerManager().transform_cell(cell.source) for cell in cells if cell.cell_type == "code")
    exported = {danger for place, danger in ALLOWED if place == "mcd_edu/assignments.py" and path.stem == "16_assignments"}
    assert dangers(code) - HARMLESS == exported


# ---- nothing leads out of its folder

HOSTILE = ["..", ".", "", "../x", "../../etc/passwd", "/etc/passwd", "a/b", "a\\b", "C:\\x", "C:x", "\\\\server\\x", "a\0b",
           "a\n", "~", "~root", "x" * 151, "a.npy", "a;b", "$(id)", "%2e%2e%2f", "\u2215etc", "a\u202eb", " ", "-\t"]
BROKEN = ValueError, KeyError


@given(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=200)))
def test_an_id_is_a_name_inside_the_folder_or_refused(text):
    """In every reader of annotations, features and videos."""
    folder = Path("/data/feats")
    records = {"music_avqa": {"question_content": "Is it loud?", "type": '["Audio", "Counting"]', "anser": "yes",
                              "video_id": text},
               "avqa": {"video_name": text, "question_text": "Why?", "question_relation": "View", "question_type": "Why",
                        "answer": 0, "multi_choice": ["a", "b", "c", "d"]},
               "msvd_qa": {"video_id": text, "question": "Who?", "answer": "man"},
               "msrvtt_qa": {"video_id": 7, "question": "Who?", "answer": "man"}}
    naming = Naming(mapping={"video7": text})
    readers = [lambda name=name, record=record: DATASETS[name].parse(record, 0, naming).video_id
               for name, record in records.items()]
    readers += [lambda: parse_question(records["music_avqa"] | {"question_id": 1}).video_id, lambda: plain_name(text, "id"),
                lambda: check_name(text, folder), lambda: check_video(folder / f"{text}.mp4") or Path(f"{text}.mp4").stem]
    for read in readers:
        try: name = read()
        except BROKEN: continue
        path = Path(os.path.normpath(folder / f"{name}.npy"))
        assert path.parent == folder and path.stem == name and 0 < len(name) <= 160
        assert text not in HOSTILE or name != text, "let through"


@pytest.mark.parametrize("name", [name for name in HOSTILE if "\0" not in name and name not in (" ", "-\t", "a\n")])
def test_a_mapping_of_names_does_not_lead_out(name, tmp_path):
    (tmp_path / MAPPING).write_text(f"{name} vid7\n")
    naming = Naming(mapping={"vid7": name})
    with pytest.raises(ValueError, match="is not a plain"): naming.pick("vid7")


@pytest.mark.parametrize("sha256", ["../" + "0" * 61, "/" + "0" * 63, "0" * 63 + "\0", 64, None])
def test_a_store_names_no_file_outside(sha256, tmp_path):
    index = {"format": "mcd_edu features", "version": 1, "encoder": "e", "dtype": "float32", "segment": [4],
             "sha256": sha256, "videos": {"a": 1}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="is damaged"): read_index(tmp_path / "index.json")
    assert data_file(tmp_path, "0" * 64).parent == tmp_path


@pytest.mark.skipif(not hasattr(os, "symlink") or sys.platform == "win32", reason="links need rights on Windows")
def test_writing_follows_no_link(tmp_path):
    """A link where a draft or a result goes is replaced; what it leads to stays as it is."""
    other = tmp_path / "other"
    other.write_text("mine")
    for name in (".a.json.part", "a.json"): (tmp_path / name).symlink_to(other)
    write_json(tmp_path / "a.json", [1])
    assert other.read_text() == "mine" and not (tmp_path / "a.json").is_symlink()
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
    (tmp_path / ".b.part").symlink_to(other)
    with pytest.raises(ZeroDivisionError): write_whole(tmp_path / "b", lambda draft: 1 / 0)
    assert other.read_text() == "mine" and not list(tmp_path.glob(".*"))


SLOW_WRITER = """
import sys, time
from pathlib import Path
from mcd_edu.media import write_whole
def write(draft):
    with open(draft, "w") as file:
        file.write("first, ")
        file.flush()
        print("halfway", flush=True)
        time.sleep(float(sys.argv[2]))
        file.write("whole")
write_whole(Path(sys.argv[1]), write)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a draft that is open cannot be taken away there")
@pytest.mark.parametrize("killed", [False, True])
def test_two_processes_never_share_a_draft(tmp_path, killed):
    """The second waits for the first, or for its end; what has the name is whole at any time."""
    path = tmp_path / "a.txt"
    other = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(path), "60" if killed else "1.5"], text=True,
                             stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert other.stdout.readline() == "halfway\n"
    assert (tmp_path / ".a.txt.part").read_text() == "first, " and not path.exists()
    if killed: other.kill()
    seen = []
    write_whole(path, lambda draft: (seen.append(path.exists() and path.read_text()), draft.write_text("second")))
    assert seen == [False if killed else "first, whole"] and path.read_text() == "second"
    assert (other.wait(120) == 0) != killed and [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="not a file"): read_json(tmp_path / "pipe.json")
    (tmp_path / "large.json").write_text("[1, 2, 3]")
    with pytest.raises(ValueError, match="more than 5 bytes"): read_json(tmp_path / "large.json", 5)
    assert read_json(tmp_path / "large.json") == [1, 2, 3]


# ---- nothing becomes markup

EVIL = ["<script>evil()</script>", "</script><script>evil()</script>", "<img src=x onerror=evil()>", '"><svg onload="evil()">',
        "<a href='javascript:evil()'>x</a>", "[x](javascript:evil())", "![x](x){onerror=evil()}", "<!-- evil", "]]>evil",
        "<iframe srcdoc='evil'>", "<style>*{background:url(evil)}</style>", "$\\href{javascript:evil()}{x}$", "\x1b[31mevil"]

PAGE = """
from dataclasses import replace
import sys
import numpy as np
from mcd_edu.cli import describe, printable
from mcd_edu.inference import Reply
from mcd_edu.media import MediaError, Segments, read_segments
from mcd_edu.visual import compare_clues, plot_clues, plot_scene, plot_types, TYPES
from mcd_edu.samples.scenes import sample_scene
clues = dict(looks_at=(0,), listens_to=(1,), visual_clues=(.5, .5), audio_clues=(.5, .5), seconds=(0, 1))
replies = [Reply(text, text, .5, ((text, .2),), **clues, unknown=(text,), note=text) for text in EVIL]
segments = Segments(np.zeros((2, 4, 128, 128, 3), np.uint8), np.zeros((2, 16000), np.float32), np.arange(2), 2.)
scene = sample_scene("00000000", 0)
table = {name: 50. for name in (*TYPES, "micro (all questions)")}
"""


class Elements(HTMLParser):
    """All elements of a page with their attributes, and what scripts say."""
    def __init__(self, page):
        super().__init__()
        self.found, self.scripts, self.inside = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script": self.scripts.append("")

    def handle_endtag(self, tag): self.inside = ""

    def handle_data(self, data):
        if self.inside == "script": self.scripts[-1] += data


def export(parts: list[list[str]], tmp_path: Path) -> list[str]:
    """Pages from one executed notebook, one for each part of its cells."""
    cells = [nbformat.v4.new_code_cell(cell) for part in parts for cell in part]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "page.ipynb")
    done = run_notebook(tmp_path / "page.ipynb", tmp_path / "out.ipynb", {}, 300)
    pages, cells = [], [cell for cell in done.cells if cell.cell_type == "code"]
    for part in parts:
        done.cells, cells = cells[:len(part)], cells[len(part):]
        pages.append(HTMLExporter().from_notebook_node(done)[0])
    return pages


def counts(page: str) -> dict[str, int]:
    """How many elements that could do something a page has."""
    tags = [tag for tag, _ in Elements(page).found]
    return {tag: tags.count(tag) for tag in ("script", "img", "svg", "iframe", "style", "a", "object", "embed", "form")}


def test_a_page_with_hostile_text_holds_no_more_than_one_with_harmless_text(tmp_path, monkeypatch):
    """Questions, answers, names of files and errors, through the functions that notebooks show them with."""
    monkeypatch.setenv("PLOTLY_RENDERER", "notebook_connected")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    show = ["compare_clues(replies)", "plot_clues(replies[0], segments)", "for reply in replies: plot_clues(reply).show()",
            "for reply in replies: print(describe(reply))", "replies", "plot_types({text: table for text in EVIL})",
            "def hostile(player, text): return replace(player, instrument=text)\n"
            "for text in EVIL: plot_scene(replace(scene, players=tuple(hostile(p, text) for p in scene.players))).show()",
            "for text in EVIL:\n    try: read_segments(text)\n"
            "    except MediaError as error: print(printable(str(error)), file=sys.stderr)"]
    texts = EVIL, [f"question number {i}" for i in range(len(EVIL))]
    begin = [f"EVIL = [bytes.fromhex(x).decode() for x in {[text.encode().hex() for text in some]}]" + PAGE for some in texts]
    first = [begin[1], "plot_clues(replies[0]).show()"]          # the first figure brings plotly's own scripts
    _, evil, good = export([first, *([one, *show] for one in begin)], tmp_path)
    assert counts(evil) == counts(good) and evil.count("evil") >= 3 * len(EVIL)
    elements = Elements(evil)
    for tag, attributes in elements.found:
        assert not any("evil" in f"{key}{value}" for key, value in attributes.items()), (tag, attributes)
    for script in elements.scripts:            # figures are JSON in a script: the text is in strings, its signs escaped
        assert "<" not in script.partition("evil")[2].partition('"')[0]
        assert not script.strip().startswith("evil")


# ---- nothing fills the memory

BOMBS = """
import resource, sys, time
from functools import partial
from pathlib import Path
def peak():                      # MB; ru_maxrss would count the parent's memory, too
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) // 1024
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
from mcd_edu.data import DataError, read_annotations
from mcd_edu.features import open_features, read_feature
from mcd_edu.hub import CheckpointError
from mcd_edu.media import MediaError, read_segments
from mcd_edu.model import MCD
before = peak()
for name in sys.argv[1:]:
    path, start = Path(name), time.process_time()
    readers = {".npy": read_feature, "": open_features, ".json": read_annotations, ".model": MCD.from_pretrained}
    read = readers.get(path.suffix, partial(read_segments, allow_missing=True))
    try: said = str(len(read(path)))
    except (DataError, MediaError, CheckpointError) as error: said = str(error)
    print(path.name, round(time.process_time() - start, 1), peak() - before, said, sep="|")
"""


def npy(shape) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def growing_pictures(path: Path, *sizes: int) -> None:
    """Motion JPEG whose pictures get larger on the way; the head of the file tells of the first."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = sizes[0], sizes[0], "yuvj420p"
        container.start_encoding()
        for i, size in enumerate(sizes):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt, encoder.framerate = size, size, "yuvj420p", 4
            for packet in encoder.encode(av.VideoFrame.from_ndarray(np.zeros((size * 3 // 2, size), np.uint8), "yuv420p")):
                packet.stream, packet.pts, packet.dts = stream, i, i
                container.mux(packet)


def tracks(path: Path, count: int) -> None:
    """A file of very many tracks."""
    import av
    with av.open(str(path), "w") as container:
        sounds = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in range(count)]
        for sound in sounds:
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), "s16", "mono")
            samples.sample_rate, samples.pts = 16_000, 0
            container.mux(sound.encode(samples))


def slow(path: Path) -> None:
    """Hours of sound in one piece: a sample a second."""
    import av
    with av.open(str(path), "w") as container:
        sound = container.add_stream("flac", rate=1, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 20_000), np.int16), "s16", "mono")
        samples.sample_rate, samples.pts = 1, 0
        container.mux(sound.encode(samples))
        container.mux(sound.encode())


def fine(path: Path) -> None:
    """Less than a thousandth of a second, of more than a thousand million samples a second."""
    data, rate = np.zeros(100_000, np.float32).tobytes(), 1_442_856_576
    about = struct.pack("<HHIIHH", 3, 1, rate, 64_000, 4, 32)
    path.write_bytes(b"RIFF" + struct.pack("<I", 28 + len(about) + len(data) - 8) + b"WAVEfmt " + struct.pack("<I", len(about))
                     + about + b"data" + struct.pack("<I", len(data)) + data)


def promise(folder: Path) -> None:
    """A model with one tensor more, of a thousand million numbers: a hole, which takes no room on a disk."""
    shutil.copytree(ROOT / "mcd_edu" / "weights" / "music_avqa", folder)
    path = folder / "model.safetensors"
    content, most = path.read_bytes(), 2**31
    size = int.from_bytes(content[:8], "little")
    data = content[8 + size:]
    head = json.loads(content[8:8 + size]) | {"hole": {"dtype": "F16", "shape": [most // 2],
                                                       "data_offsets": [len(data), len(data) + most]}}
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.truncate(path, 8 + len(text) + len(data) + most)


def silence(path: Path, hours: float) -> None:
    """Hours of silence, in less than a megabyte each."""
    import av
    with av.open(str(path), "w") as container:
        sound = container.add_stream("flac", rate=8000, layout="mono")
        for at in range(0, round(hours * 3600 * 8000), 65_535):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 65_535), np.int16), "s16", "mono")
            samples.sample_rate, samples.pts = 8000, at
            container.mux(sound.encode(samples))
        container.mux(sound.encode())


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded as Linux does")
def test_small_files_that_say_they_are_large(tmp_path):
    """Each is refused, or read, in little time and memory."""
    growing_pictures(tmp_path / "pictures.avi", 9000)
    growing_pictures(tmp_path / "growing.avi", *[32] * 60, 9000)
    tracks(tmp_path / "tracks.mkv", 800)
    silence(tmp_path / "silence.flac", HOURS)
    slow(tmp_path / "slow.flac")
    fine(tmp_path / "fine.wav")
    promise(tmp_path / "promise.model")
    (tmp_path / "table.npy").write_bytes(npy((10**9, 10**6)))
    (tmp_path / "empty.npy").write_bytes(npy((10**18, 0)))
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04" + bytes(100))
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "index.json").write_text(json.dumps({
        "format": "mcd_edu features", "version": 1, "encoder": "e", "dtype": "float32", "segment": [10**9],
        "sha256": "0" * 64, "videos": {"a": 10**15}}))
    (tmp_path / "deep.json").write_text("[" * 10**6)
    names = ["pictures.avi", "growing.avi", "tracks.mkv", "silence.flac", "slow.flac", "fine.wav", "table.npy", "empty.npy",
             "zip.npy", "store", "deep.json", "promise.model"]
    assert all(path.stat().st_size < 6_000_000 for path in tmp_path.glob("*.*"))
    done = subprocess.run([sys.executable, "-c", BOMBS, *(tmp_path / name for name in names)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert [name for name, *_ in rows] == names
    for name, seconds, memory, said in rows:
        assert float(seconds) < 30 + 5 * HOURS and int(memory) < 150, (name, seconds, memory, said)
        assert said.isdigit() or said.startswith(str(tmp_path / name)), said
    print(done.stdout)


def test_a_link_among_features_is_read_as_features_or_not_at_all(tmp_path):
    """Whoever made the folder may link to other disks; what is behind a link still has to be an array."""
    (tmp_path / "feats").mkdir()
    (tmp_path / "secret").write_text("password")
    np.save(tmp_path / "elsewhere.npy", np.ones((2, 3)))
    (tmp_path / "feats" / "a.npy").symlink_to(tmp_path / "secret")
    (tmp_path / "feats" / "b.npy").symlink_to(tmp_path / "elsewhere.npy")
    folder = FeatureFolder(tmp_path / "feats")
    assert folder["b"].shape == (2, 3)
    with pytest.raises(DataError) as caught: folder["a"]
    assert "password" not in str(caught.value)
