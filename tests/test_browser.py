"""The explorer in a real JupyterLab, driven by a real browser; screenshots stay in runs/browser."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "runs" / "browser"
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]
CLIP, OTHER = "00002611.mp4", "00002600.mp4"
EVIL = "<img src=x onerror=\"document.title='obeyed'\">"


def missing() -> str:
    """What is not there and has to be."""
    if not any(map(shutil.which, BROWSERS)): return "no browser: apt-get install chromium"
    return "" if find_spec("playwright") else "no playwright: pip install playwright"


def need_browser() -> str:
    """The browser; without one skip, but fail where MCD_EDU_BROWSER=1 says that it must be there."""
    if reason := missing():
        (pytest.fail if os.environ.get("MCD_EDU_BROWSER") == "1" else pytest.skip)(reason)
    return next(filter(None, map(shutil.which, BROWSERS)))


@pytest.mark.parametrize("required, outcome", [("1", pytest.fail), ("", pytest.skip)])
def test_a_missing_browser_is_only_skipped_where_it_may_be(monkeypatch, required, outcome):
    monkeypatch.setenv("MCD_EDU_BROWSER", required)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(outcome.Exception, match="apt-get install chromium"): need_browser()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab that has the explorer in a folder of its own, and no other."""
    need_browser()
    root, home = (tmp_path_factory.mktemp(name) for name in ("root", "home"))
    (root / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "explorer.ipynb", root / "nbs")
    samples = root / "data_samples" / "music_avqa"
    for part in ("json", "truth", "videos"):
        shutil.copytree(ROOT / "data_samples" / "music_avqa" / part, samples / part)
    quiet = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    folders = {name: str(home / name.lower()) for name in (
        "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
        "JUPYTERLAB_WORKSPACES_DIR")}
    env = {**os.environ, **folders, "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
           "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("PLOTLY_RENDERER", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    log = home / "log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={root}", "--LabApp.extension_manager=readonly"]
    with log.open("w") as file:
        server = subprocess.Popen(command, env=env, cwd=root, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for_server(server, f"http://127.0.0.1:{port}/api?token={token}", log)
        yield f"http://127.0.0.1:{port}/lab/tree/nbs/explorer.ipynb?token={token}"
    finally:
        server.terminate()                                   # it ends its kernels too
        server.wait(timeout=30)


def wait_for_server(server: subprocess.Popen, address: str, log: Path, seconds: float = 90) -> None:
    """Return when JupyterLab answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None: break
        try: return urlopen(address, timeout=5).close()
        except (URLError, OSError): time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def page(lab):
    """The explorer's notebook in a browser of 1400 by 900, all cells run."""
    browser_path = need_browser()
    from playwright.sync_api import sync_playwright  # optional: see `need_browser`

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(90_000)
        page.goto(lab)
        page.get_by_text("| Idle").wait_for()                # the kernel is there
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            page.locator(".mcd-explorer .js-plotly-plot .main-svg").first.wait_for()
            yield page
        finally:
            shoot(page, "last")
            browser.close()


def shoot(page, name: str) -> None:
    """Keep a screenshot for a person to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    if page.locator(".mcd-explorer").count():
        page.locator(".mcd-explorer").evaluate("node => node.scrollIntoView({block: 'end'})")
    page.screenshot(path=SHOTS / f"{name}.png")


def plot(page) -> dict:
    """What plotly holds: titles, answers, and the cells of the clues."""
    return page.locator(".mcd-explorer .js-plotly-plot").evaluate("""node => ({
        notes: node.layout.annotations.map(note => note.text.replaceAll('<br>', ' ')).join(' | '),
        answers: node.data.filter(trace => trace.type == 'bar').map(trace => trace.text[0]),
        heats: node.data.filter(trace => trace.type == 'heatmap').map(trace => trace.z)})""")


def status(page): return page.locator(".mcd-explorer .mcd-note").first


def after(page, act, said: str) -> dict:
    """Do something, wait until the explorer has said something new, and look at the plot."""
    status(page).evaluate("node => { node.textContent = 'waiting'; }")
    act()
    status(page).filter(has_text=said).wait_for()
    page.wait_for_timeout(300)                               # until plotly has drawn it
    return plot(page)


def ask(page, text: str, card: int = 0) -> dict:
    """Type a question into a card, then Enter."""
    box = page.locator(".mcd-card input[type=text]").nth(card)
    def act():
        box.fill(text)
        box.press("Enter")
    return after(page, act, "answered and drawn in")


def the_first_answer_is_there_and_the_video_plays(page):
    shown = plot(page)
    assert "Is the accordion more rhythmic than the tuba?" in shown["notes"]
    assert len(shown["answers"]) == 2 and len(shown["heats"]) == 5
    video = page.locator(".mcd-explorer video")
    page.wait_for_function("node => node.readyState >= 2", arg=video.element_handle())
    assert video.evaluate("node => [node.duration, node.videoWidth]") == [pytest.approx(10, abs=.2), 128]
    cells = page.locator(".mcd-explorer .js-plotly-plot .heatmaplayer image, "
                         ".mcd-explorer .js-plotly-plot .hm image").count()
    assert cells == 5, "each look is drawn"
    shoot(page, "1-start")


def picking_a_clip_changes_answer_and_plots(page):
    before = plot(page)
    menu = page.locator(".mcd-explorer select").first
    shown = after(page, lambda: menu.select_option(label=OTHER), f"{OTHER}: answered")
    assert shown["heats"] != before["heats"] and shown["notes"] != before["notes"]
    shoot(page, "2-other-clip")


def two_questions_are_answered_and_looked_at_differently(page):
    first = ask(page, "Is there a cello in the entire video?")
    assert "Is there a cello in the entire video?" in first["notes"]
    second = ask(page, "Where is the loudest instrument?")
    assert second["answers"][0] != first["answers"][0]
    assert second["heats"][:2] != first["heats"][:2] and second["heats"][2:] == first["heats"][2:]
    pick = page.locator(".mcd-card select").nth(4)           # card B: model, pick, look
    asked = pick.locator("option").nth(1).inner_text()
    third = after(page, lambda: pick.select_option(index=1), "answered and drawn in")
    assert third["heats"][:2] == second["heats"][:2] and third["heats"][2:] != second["heats"][2:]
    assert " ".join(asked.split())[:20] in third["notes"] and "annotation:" in third["notes"]
    shoot(page, "3-two-questions")


def a_question_is_instant(page):
    seconds = []
    for text in ("Is there a voiceover?", "What is the first instrument that comes in?"):
        ask(page, text)
        seconds.append(float(re.search(r"drawn in ([\d.]+) s", status(page).inner_text())[1]))
    assert min(seconds) < 2, seconds                         # 0.3 s where nothing else is running


def levels_heads_and_words_are_chosen(page):
    menus = page.locator(".mcd-explorer select")
    shown = after(page, lambda: menus.last.select_option(label="each head apart"), "answered")
    assert [len(heat) for heat in shown["heats"][:4]] == [8] * 4
    shoot(page, "4-heads")
    after(page, lambda: menus.last.select_option(label="mean of all heads"), "answered")
    ask(page, "Is the cello louder than the congas?")
    who = page.locator(".mcd-card select").nth(2)
    shown = after(page, lambda: who.select_option(label="look of text object “congas”"), "answered")
    assert [len(heat) for heat in shown["heats"][:2]] == [2] * 2
    shoot(page, "5-text-object")


def a_mistake_is_said_and_the_picture_stays(page):
    before = plot(page)
    box = page.get_by_placeholder("path of your own video")
    def act():
        box.fill(f"no/{EVIL}.mp4")
        box.press("Enter")
    assert after(page, act, "no such file") == before
    shoot(page, "6-mistake")
    box.fill("")


def text_is_never_obeyed(page):
    shown = ask(page, f"Is there a {EVIL} cello?")
    assert "&lt;img" in shown["notes"]
    text = page.locator(".mcd-explorer .js-plotly-plot .annotation-text").all_text_contents()
    assert any("<img src=x" in line for line in text)
    assert page.locator("img[src=x]").count() == 0 and "obeyed" not in page.title()
    shoot(page, "7-markup")


def test_the_explorer_in_a_browser(page):
    """One visit, one step after another: a browser and a JupyterLab are too dear for each alone."""
    for step in (
        the_first_answer_is_there_and_the_video_plays,
        picking_a_clip_changes_answer_and_plots,
        two_questions_are_answered_and_looked_at_differently,
        a_question_is_instant,
        levels_heads_and_words_are_chosen,
        a_mistake_is_said_and_the_picture_stays,
        text_is_never_obeyed,
    ):
        step(page)
