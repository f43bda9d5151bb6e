"JupyterLab as a reader meets it: open a chapter, run it, drag a slider, see the picture change."
import os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import pytest

from browser import chromium, open_browser

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = "02_forward.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address of a JupyterLab over a copy of the notebooks."
    chromium()
    folder = tmp_path_factory.mktemp("lab")/"nbs"
    shutil.copytree(ROOT/"nbs", folder, ignore=shutil.ignore_patterns(".*", "_quarto.yml"))
    settings = folder.parent/"settings"/"@jupyterlab"/"notebook-extension"/"tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # cells out of sight are there, too
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(folder.parent/"config"), "JUPYTER_DATA_DIR": str(folder.parent/"data"), "IN_TEST": "1", "PYTHONPATH": str(ROOT),
                        "JUPYTERLAB_SETTINGS_DIR": str(folder.parent/"settings")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=", "--allow-root",
               "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", f"--notebook-dir={folder}"]
    server = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/api", timeout=2)
            break
        except OSError: time.sleep(.25)
    else: pytest.fail("JupyterLab did not start within a minute")
    yield url
    server.terminate()
    server.wait(20)


def test_run_a_chapter_and_drag_its_slider(lab):
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(f"{lab}/lab/tree/{CHAPTER}")
        page.wait_for_selector(".jp-Notebook", timeout=60_000)
        page.wait_for_timeout(2000)
        page.click("text=Run >> nth=0")
        page.click("text=Run All Cells >> nth=0")
        page.wait_for_selector(".jp-OutputArea .widget-image, .jp-OutputArea img.jupyter-widgets", timeout=240_000, state="attached")
        image = page.locator("img.widget-image").first
        image.scroll_into_view_if_needed()
        before = image.get_attribute("src")
        handle = page.locator(".jupyter-widgets .noUi-handle").first
        handle.scroll_into_view_if_needed()
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"]/2, box["y"] + box["height"]/2)
        page.mouse.down()
        page.mouse.move(box["x"] + 120, box["y"] + box["height"]/2, steps=8)
        page.mouse.up()
        page.wait_for_function("before => document.querySelector('img.widget-image').src !== before", arg=before, timeout=30_000)
        assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']:has-text('Traceback')").count() == 0
