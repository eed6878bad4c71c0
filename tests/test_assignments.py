"""Assignments: what is made from the sources, who gets which points, and what cannot break it."""

import csv
import importlib
import json
import math
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mcd_edu import assignments
from mcd_edu.assignments import (
    COLUMNS,
    COURSE,
    Cell,
    assignment_names,
    build_course,
    check_here,
    check_submission,
    checks_of,
    grade,
    load_assignment,
    mark_of,
    new_assignment,
    notebook_of,
    read_cells,
    read_submission,
    run_tasks,
    safe_cell,
    student_cell,
)
from mcd_edu.cli import app, main

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {checks_of(read_cells(path)).name: path
           for path in sorted((ROOT / "nbs" / "assignments").glob("*.ipynb"))}
MUTANTS = [(name, *mutant) for name in SOURCES
           for mutant in importlib.import_module(f"mutants.{name}").MUTANTS]

each_assignment = pytest.mark.parametrize("name", SOURCES)


def run_one(name, cells, task):
    """The result of one task; the cells of the others are there, and are not tested."""
    assignment = load_assignment(name)
    others = [other.name for other in assignment.tasks if other.name != task]
    (result,) = run_tasks(assignment, cells, others)
    return result


# The course ------------------------------------------------------------------------------------

def test_the_course_is_whole_and_in_step_with_its_sources(tmp_path):
    names = build_course(ROOT / "nbs" / "assignments", tmp_path)
    assert names == list(SOURCES) == assignment_names() and len(names) == 7
    built = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shipped = {path.name: path.read_bytes() for path in COURSE.iterdir()}
    assert built == shipped, "run `make export`"


@each_assignment
def test_a_source_asks_for_enough_and_not_for_too_much(name):
    cells, assignment = read_cells(SOURCES[name]), load_assignment(name)
    assert len(cells) <= 30 and 3 <= len(assignment.tasks) <= 4
    texts = [cell.source for cell in cells if cell.kind == "markdown"]
    assert sum("## In words" in text for text in texts) == 1
    assert sum(text.startswith("**Your answer:**") for text in texts) == 1
    assert any(".ipynb)" in text for text in texts), "no link to the notebook of the library"
    assert sum(other == name for other, *_ in MUTANTS) >= 10
    asked = {task for other, task, *_ in MUTANTS if other == name}
    assert asked == {task.name for task in assignment.tasks}, "each task has its mutants"


@each_assignment
def test_the_reference_passes(name):
    results = list(run_tasks(load_assignment(name), read_submission(SOURCES[name]).cells))
    assert [result.task for result in results] == [task.name for task in load_assignment(name).tasks]
    assert all(result.passed for result in results), results


@each_assignment
def test_the_stub_fails_in_every_task(name):
    results = list(run_tasks(load_assignment(name), read_submission(COURSE / f"{name}.ipynb").cells))
    assert [result.note for result in results] == ["visible tests: not written yet"] * len(results)


def code_lines(text):
    """The lines of a text that say something, without indentation and comments."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {line for line in lines if len(line) > 12}


@each_assignment
def test_no_solution_and_no_hidden_test_is_in_the_student_version(name):
    source = read_cells(SOURCES[name])
    student = "\n".join(cell.source for cell in read_cells(COURSE / f"{name}.ipynb"))
    solutions = [part for cell in source for part in assignments.SOLUTION.findall(cell.source)]
    hidden = [cell.source for cell in source if mark_of(cell.source).role == "hidden test"]
    assert len(solutions) >= 3 and len(hidden) >= 3
    assert not code_lines("\n".join(solutions)) & code_lines(student)
    left = "\n".join(cell.source for cell in source if mark_of(cell.source).role in ("test", "setup"))
    assert not code_lines("\n".join(hidden)) - code_lines(left) & code_lines(student) - code_lines(left)
    assert "SOLUTION" not in student and "hidden test:" not in student
    assert "](../" not in student, "a link that leads nowhere from a student's folder"


def run_notebook_cells(path, monkeypatch, folder):
    """Run the code cells one after the other; what each one raised."""
    from IPython.core.inputtransformer2 import TransformerManager

    monkeypatch.chdir(folder)
    names, raised = {"__name__": "__main__"}, []
    for cell in read_cells(path):
        if cell.kind != "code": continue
        try: exec(compile(TransformerManager().transform_cell(cell.source), "cell", "exec"), names)
        except Exception as error: raised.append((mark_of(cell.source).role, error))
    return raised


@each_assignment
def test_the_source_runs_from_top_to_bottom(name, monkeypatch, tmp_path, capsys):
    assert run_notebook_cells(SOURCES[name], monkeypatch, tmp_path) == []
    assert capsys.readouterr().out.count("passed ") == len(load_assignment(name).tasks)


@each_assignment
def test_the_student_version_stops_at_its_stubs_alone(name, monkeypatch, tmp_path, capsys):
    raised = run_notebook_cells(COURSE / f"{name}.ipynb", monkeypatch, tmp_path)
    assert [role for role, _ in raised] == ["test"] * len(load_assignment(name).tasks)
    assert all(isinstance(error, NotImplementedError) for _, error in raised), raised
    assert capsys.readouterr().out.count("not written yet") == len(raised)


@pytest.mark.parametrize("name, task, title, right, wrong", MUTANTS,
                         ids=[f"{name}-{task}-{title}" for name, task, title, *_ in MUTANTS])
def test_a_wrong_solution_is_caught_by_its_task(name, task, title, right, wrong):
    cells = read_submission(SOURCES[name]).cells
    assert dict(cells)[task].count(right) == 1, "the mutant does not fit the solution any more"
    mutated = [(other, source.replace(right, wrong) if other == task else source)
               for other, source in cells]
    result = run_one(name, mutated, task)
    assert not result.passed, f"nobody noticed: {title}"
    for accident in ("NameError", "syntax error", "IndentationError", "AttributeError"):
        assert accident not in result.note, f"wrong for another reason than meant: {result.note}"


# A toy course, for the rest ----------------------------------------------------------------------

SOLUTION = "# solution: toy.{}\ndef {}(x):\n    # BEGIN SOLUTION\n    return {}\n    # END SOLUTION"
TOY = [Cell("markdown", "# Assignment: toy\n\n[the layers](../03_layers.ipynb)"),
       Cell("code", "# setup\nimport math"),
       Cell("code", SOLUTION.format("double", "double", "2 * x")),
       Cell("code", "# test: toy.double\nassert double(2) == 4, 'twice two is four'"),
       Cell("code", "# hidden test: toy.double\nassert [double(x) for x in range(9)] == list(range(0, 18, 2)), 'no'"),
       Cell("code", SOLUTION.format("root", "root", "math.sqrt(x)")),
       Cell("code", "# test: toy.root\nassert root(4) == 2, 'two times two is four'"),
       Cell("code", "# hidden test: toy.root\nassert root(2) == math.sqrt(2), 'root of 2'"),
       Cell("markdown", "**Your answer:** …")]


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """The toy course, built."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "sources").mkdir()
    (folder / "sources/00_toy.ipynb").write_text(json.dumps(notebook_of(TOY)))
    assert build_course(folder / "sources", folder / "course") == ["toy"]
    return folder / "course"


def submit(folder, double="return 2 * x", root="return math.sqrt(x)", name="mine.ipynb", extra=()):
    """A submission; each body stands in its function."""
    cells = [Cell("code", f"# solution: toy.{task}\ndef {task}(x):\n    {body}")
             for task, body in (("double", double), ("root", root)) if body]
    path = folder / name
    path.write_text(json.dumps(notebook_of([*extra, *cells])), encoding="utf-8")
    return path


def notes(path, course, seconds=20):
    """Points of the two tasks, and why."""
    return [(result.passed, result.note) for result in check_submission(read_submission(path), seconds, course)]


def test_a_right_submission_passes(tmp_path, course):
    assert notes(submit(tmp_path), course) == [(True, ""), (True, "")]


@pytest.mark.parametrize("body, note", [
    ("return 2 * x +", "syntax error in line 3: invalid syntax"),
    ("return x ** 2", "hidden tests: no"),
    ("return x + 3", "visible tests: twice two is four"),
    ("return undefined", "visible tests: NameError: name 'undefined' is not defined"),
    ("raise NotImplementedError", "visible tests: not written yet"),
    ("import sys; sys.exit(0)", "visible tests: SystemExit: 0"),
    ("raise KeyboardInterrupt", "visible tests: KeyboardInterrupt"),
    ("return double(x)", "visible tests: RecursionError: maximum recursion depth exceeded"),
    ("raise ValueError('a\\nb' * 10 ** 6)", "visible tests: ValueError: a ba"),
    ("class Bad(Exception):\n        def __str__(self): raise SystemExit\n    raise Bad", "visible tests: Bad"),
    ("return type('Yes', (), {'__eq__': lambda *_: True})()", None),
])
def test_what_goes_wrong_in_a_task_is_one_line_and_the_other_task_goes_on(tmp_path, course, body, note):
    checks = load_assignment("toy", course)
    first, second = run_tasks(checks, read_submission(submit(tmp_path, body)).cells)
    if note is None: return                      # equal to everything: only stricter tests can tell
    assert not first.passed and first.note.startswith(note) and len(first.note) < 400
    assert "\n" not in first.note and second.passed


@pytest.mark.parametrize("body, note", [
    ("while True: print('a' * 10_000)", "stopped after 3 s"),
    ("import os; os._exit(0)", "its process ended early"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "its process ended early"),
    ("import gc, multiprocessing.connection as c\n"
     "    for pipe in gc.get_objects():\n"
     "        if isinstance(pipe, c.Connection): pipe.send_bytes(b'[' * 90_000)", "its process ended early"),
    ("import time\n    while True:\n        try: time.sleep(9)\n        except BaseException: pass", "stopped after 3 s"),
])
def test_a_process_that_hangs_or_dies_costs_only_its_task(tmp_path, course, body, note, capfd):
    start = time.monotonic()
    (passed, why), other = notes(submit(tmp_path, body), course, 3)
    assert (passed, why) == (False, note) and other == (True, "")
    assert time.monotonic() - start < 90 and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seconds", [0, -1, 86_401, 1e7, 1e300, math.inf, math.nan])
def test_a_time_that_nobody_can_wait_is_refused_before_anything_starts(tmp_path, course, monkeypatch, seconds):
    monkeypatch.setattr(assignments, "multiprocessing", None)
    path = submit(tmp_path)
    with pytest.raises(ValueError, match="give a time above 0, at most 86400"): notes(path, course, seconds)
    with pytest.raises(ValueError, match="give a time"): list(grade(tmp_path, tmp_path / "x.csv", seconds, course))
    assert list(tmp_path.iterdir()) == [path]


def test_no_process_outlives_a_check_that_is_interrupted(tmp_path, course, monkeypatch):
    def interrupt(*_): raise KeyboardInterrupt
    monkeypatch.setattr(assignments, "messages", interrupt)
    with pytest.raises(KeyboardInterrupt): notes(submit(tmp_path), course)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not hasattr(os, "setsid"), reason="needs process groups and limits")
def test_memory_files_and_children_stay_in_their_fence(tmp_path, course, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    marker = tmp_path / "pid"
    body = (f"{child}\n    open('left.txt', 'w').write('x')\n    import os\n"
            f"    open({str(marker)!r}, 'w').write(str(os.getpgid(0)))\n    return 2 * x")
    (double, root) = notes(submit(tmp_path, body, "return bytearray(2 ** 36)"), course)
    assert double == (True, "") and root == (False, "visible tests: MemoryError")
    assert not (tmp_path / "left.txt").exists(), "files of a submission land in its own folder"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(int(marker.read_text()), 0)
            time.sleep(0.1)


def test_only_definitions_of_marked_cells_are_taken(tmp_path, course):
    loud = Cell("code", "1 / 0")
    helper = Cell("code", "# helper\nimport math as m\nTWO = 2\nm.nothing()\ndef twice(x): return TWO * x")
    path = submit(tmp_path, "return twice(x)", "return m.sqrt(x)\nraise SystemExit", extra=[loud, helper])
    assert notes(path, course) == [(True, ""), (True, "")]


def test_the_visible_tests_come_from_the_course_and_not_from_the_submission(tmp_path, course):
    emptied = [Cell("code", "# test: toy.double\npass"), Cell("code", "# hidden test: toy.double\npass"),
               Cell("code", "# setup\ndouble = root = lambda x: 4")]
    path = submit(tmp_path, "return 5", extra=emptied)
    assert notes(path, course) == [(False, "visible tests: twice two is four"), (True, "")]


def test_names_of_a_submission_do_not_reach_the_tests(tmp_path, course):
    fake = Cell("code", "# helper\nclass math:\n    @staticmethod\n    def sqrt(x): return 7 if x == 2 else 2\n"
                        "def list(*_): return 0\nrange = None")
    path = submit(tmp_path, extra=[fake])
    assert notes(path, course) == [(True, ""), (False, "hidden tests: root of 2")]


@pytest.mark.parametrize("change, note", [
    (dict(root=""), "no cells begin with `# solution: toy.root`; there must be one"),
    (dict(extra=[Cell("code", "# solution: toy.root\ndef root(x): return 2")]),
     "2 cells begin with `# solution: toy.root`; there must be one"),
])
def test_a_task_has_one_cell(tmp_path, course, change, note):
    assert notes(submit(tmp_path, **change), course) == [(True, ""), (False, note)]


def test_a_quick_look_from_within_the_notebook(course, capsys):
    check_here("toy", {"double": lambda x: 2 * x}, course)
    assert capsys.readouterr().out == ("passed double\nFAILED root: visible tests: NameError: "
                                       "name 'root' is not defined\n")


# Files from outside --------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [
    b"", b"\x89PNG\r\n\xff", b"[]", b"{}", b"[" * 100_000, b'{"cells": 3}', b'{"cells": [3]}', b"null",
    b'{"cells": [{"cell_type": "code", "source": [1]}]}', '{"cells": "ä"}'.encode("latin-1"),
])
def test_what_is_no_notebook_is_refused(tmp_path, content):
    path = tmp_path / "x.ipynb"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.ipynb: not a notebook"): read_submission(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_nobody_waits_for_a_pipe_or_a_device(tmp_path):
    os.mkfifo(tmp_path / "x.ipynb")
    for path in tmp_path / "x.ipynb", Path("/dev/zero"):
        with pytest.raises(ValueError, match=f"{path.name}: not a notebook"): read_submission(path)


def test_other_notebooks_are_refused(tmp_path, course):
    path = submit(tmp_path, "", "", extra=[Cell("code", "print(1)")])
    with pytest.raises(ValueError, match="belong to 0 assignments"): read_submission(path)
    path = submit(tmp_path, extra=[Cell("code", "# solution: other.f\n")])
    with pytest.raises(ValueError, match="belong to 2 assignments"): read_submission(path)
    path = submit(tmp_path)
    with pytest.raises(ValueError, match="no assignment 'toy'"): check_submission(read_submission(path))
    with pytest.raises(ValueError, match="larger than 10 bytes"): read_cells(path, 10)


@pytest.mark.parametrize("name", ["../toy", "toy/../toy", "", "TOY", "toy\0"])
def test_only_names_of_the_course_are_names(tmp_path, course, name):
    with pytest.raises(ValueError, match="no assignment"): new_assignment(name, tmp_path, course)
    assert not list(tmp_path.iterdir())


def test_handing_out_never_overwrites(tmp_path, course):
    path = new_assignment("toy", tmp_path / "new" / "folder", course)
    assert path.read_bytes() == (course / "toy.ipynb").read_bytes()
    path.write_text("my work")
    with pytest.raises(ValueError, match="is there already"): new_assignment("toy", path.parent, course)
    assert path.read_text() == "my work"


@pytest.mark.parametrize("spoil", [
    lambda cells: cells.pop(4),                                                    # no hidden test
    lambda cells: cells.append(Cell("code", "# test: toy.other\npass")),           # of no task
    lambda cells: cells.append(cells[3]),                                          # twice
    lambda cells: cells.append(Cell("code", "# solution: else.f\n")),              # of another assignment
])
def test_a_source_that_breaks_the_rules_is_refused(spoil):
    cells = list(TOY)
    spoil(cells)
    with pytest.raises(ValueError, match="one cell `# solution:`"): checks_of(cells)


@pytest.mark.parametrize("source", [
    "# solution: toy.f\ndef f(): return 1",
    "# solution: toy.f\ndef f():\n    # BEGIN SOLUTION\n    return 1",
    "# solution: toy.f\ndef f():\n    return 1\n    # END SOLUTION",
])
def test_a_solution_without_its_two_comments_is_refused(source):
    with pytest.raises(ValueError, match="toy.f: put what the student"): student_cell(Cell("code", source))


# Grades ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, safe", [
    ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@x", "'@x"), ("\t=1", "'=1"), ("\r\n=1", "'=1"),
    ("|cmd", "'|cmd"), ("a=1", "a=1"), ("", ""), (3, "3"), ("x" * 9000, "x" * 2000), ("a\x1b[31mb", "a [31mb"),
])
def test_no_cell_of_the_table_is_a_formula(text, safe):
    assert safe_cell(text) == safe


def test_a_folder_becomes_a_table(tmp_path, course):
    folder = tmp_path / "in"
    (folder / "later" / ".ipynb_checkpoints").mkdir(parents=True)
    answer = [Cell("markdown", "**Your answer:** =HYPERLINK(\"x\")\n\nand \"more\", too")]
    submit(folder, extra=answer, name="=cmd|' ö'!,\n\x1b[2J.ipynb")
    submit(folder / "later", "return 0", "import os; os._exit(0)", name="a.ipynb")
    submit(folder / "later" / ".ipynb_checkpoints", name="a.ipynb")
    (folder / "b.ipynb").write_text("nothing")
    (folder / "c.ipynb").symlink_to(folder / "later" / "a.ipynb")
    (folder / "notes.txt").write_text("x")
    out = tmp_path / "out" / "grades.csv"
    shown = list(grade(folder, out, 20, course))
    with out.open(encoding="utf-8", newline="") as file: rows = list(csv.DictReader(file))
    assert rows == shown and list(rows[0]) == list(COLUMNS)
    weird, nothing, later = rows
    assert weird["submission"].startswith("'=cmd|' ö'!,") and "\x1b" not in weird["submission"]
    assert [weird[x] for x in ("assignment", "passed", "tasks", "task 1", "task 2", "task 3", "note")] == [
        "toy", "2", "2", "1", "1", "", ""]
    assert weird["answer"].startswith("'=HYPERLINK") and weird["answer"].endswith("too")
    assert (nothing["passed"], nothing["note"][:14]) == ("0", "not a notebook")
    assert (later["submission"], later["passed"], later["task 1"]) == ("later/a.ipynb", "0", "0")
    assert later["note"] == "double: visible tests: twice two is four; root: its process ended early"


def test_grading_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="no notebooks"): list(grade(tmp_path, tmp_path / "x.csv"))
    submit(tmp_path)
    with pytest.raises(ValueError, match="grades.csv"): list(grade(tmp_path, tmp_path / "mine.ipynb"))
    assert not (tmp_path / "x.csv").exists()


# The command line --------------------------------------------------------------------------------------

def test_commands_from_handing_out_to_grades(tmp_path):
    run = CliRunner().invoke
    handed_out = run(app, ["assignments", "new", "aggregator", str(tmp_path)])
    assert handed_out.exit_code == 0 and handed_out.output.endswith("aggregator.ipynb\n")
    stub = run(app, ["assignments", "check", str(tmp_path / "aggregator.ipynb")])
    assert stub.exit_code == 1 and stub.output.splitlines() == [
        *(f"FAILED {task}: visible tests: not written yet"
          for task in ("strongest", "time_bias", "ClueAttention")), "aggregator: 0 of 3 tasks passed"]
    shutil.copy(SOURCES["aggregator"], tmp_path / "solved.ipynb")
    right = run(app, ["assignments", "check", str(tmp_path / "solved.ipynb")])
    assert right.exit_code == 0 and right.output.endswith("aggregator: 3 of 3 tasks passed\n")
    out = tmp_path / "grades.csv"
    done = run(app, ["assignments", "grade", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "solved.ipynb: 3 of 3" in done.output and "aggregator.ipynb: 0 of 3" in done.output
    assert len(out.read_text().splitlines()) == 3


@pytest.mark.parametrize("line, message", [
    ("new asociation {}", "error: no assignment 'asociation'; there are encoders, association"),
    ("check {}/no.ipynb", "No such file"),
    ("grade {} --out {}/grades.csv", "no notebooks"),
])
def test_a_wrong_command_is_one_line(tmp_path, capsys, line, message):
    with pytest.raises(SystemExit) as stop: main(["assignments", *line.format(tmp_path, tmp_path).split()])
    shown = capsys.readouterr().err
    assert stop.value.code == 1 and message in shown and shown.count("\n") == 1
