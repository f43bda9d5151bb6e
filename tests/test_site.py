"The rendered site as a visitor meets it: every page, in Chromium, with every other machine out of reach."
import functools, http.server, json, re, shutil, subprocess, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from browser import open_browser, watched

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["index", *sorted(p.stem for p in (ROOT/"nbs").glob("*.ipynb") if p.stem != "index")]
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11) and not shutil.which("quarto"), reason="smalldocs needs Python 3.11")


@pytest.fixture(scope="module")
def docs():
    "The site, rendered as `make site` does."
    p = subprocess.run([sys.executable, "tools/site.py"], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    return ROOT/"_docs"


@pytest.fixture(scope="module")
def home(docs):
    "Address of a server for the site."
    handler = functools.partial(type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None}), directory=str(docs))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with open_browser() as b: yield b


class Links(HTMLParser):
    "The anchors of a page and the places it points to."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        self.links += [a[k] for k in ("href", "src") if a.get(k)]


def test_every_notebook_has_a_page(docs):
    assert [n for n in PAGES if not (docs/f"{n}.html").exists()] == []


def test_no_broken_link(docs):
    pages = {p.name: Links(p.read_text(encoding="utf-8")) for p in docs.glob("*.html")}
    broken = []
    for name, page in pages.items():
        for link in page.links:
            if link.startswith(("http://", "https://", "mailto:", "data:", "javascript:")): continue
            path, anchor = urldefrag(urljoin(f"/{name}", link))
            path = unquote(path).lstrip("/").split("?")[0] or name
            if not (docs/path).exists(): broken.append(f"{name}: {link}")
            elif anchor and path in pages and unquote(anchor) not in pages[path].ids: broken.append(f"{name}: {link} (no such anchor)")
    assert broken == []


def test_no_page_loads_anything_from_elsewhere(docs):
    found = [f"{p.name}: {m}" for p in docs.rglob("*.html") for m in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://[^"]*"', p.read_text(encoding="utf-8"))
             if 'rel="canonical"' not in m]
    found += [f"{p.name}: {m}" for p in docs.rglob("*.css") for m in re.findall(r"@import[^;]{0,20}https?:[^;]*|url\(['\"]?https?:[^)]*\)", p.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize("name", PAGES)
def test_page_in_the_browser(browser, home, name):
    "No request leaves, nothing is complained about, mathematics is typeset, every picture is there and every slider moves."
    page, away, errors = watched(browser, home, viewport={"width": 1200, "height": 900})
    page.goto(f"{home}{name}.html")
    page.wait_for_load_state("load")   # not networkidle, which now and then never comes for pages whose requests are filtered
    page.wait_for_timeout(700)
    assert away == [] and errors == []

    text = page.locator("main").inner_text()
    assert page.locator(".katex-error").count() == 0
    assert not re.search(r"\$\$|\\\(|\\\[|\\mathbf|\\frac|\\sqrt", page.evaluate("""() => {
        const copy = document.querySelector('main').cloneNode(true);
        copy.querySelectorAll('pre, code, .katex, script').forEach(e => e.remove());
        return copy.textContent }""")), "TeX left as text"
    source = "".join("".join(c["source"]) for c in json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    if "$$" in source: assert page.locator(".katex-display").count() == source.count("$$")//2

    assert page.evaluate("() => Array.from(document.images).filter(i => !i.complete || i.naturalWidth === 0).map(i => i.src.slice(0, 80))") == []
    for box in page.locator(".dnb-scrub").all():
        for slider in box.locator("input[type=range]").all():
            if slider.get_attribute("max") == "0": continue
            before, said = box.locator("img").get_attribute("src"), slider.get_attribute("aria-valuetext")
            slider.focus()
            page.keyboard.press("ArrowLeft" if slider.input_value() == slider.get_attribute("max") else "ArrowRight")
            assert box.locator("img").get_attribute("src") != before
            assert slider.get_attribute("aria-valuetext") != said
            assert box.locator(f"label[for='{slider.get_attribute('id')}']").count() == 1
    assert errors == []
    page.close()


def test_nothing_is_wider_than_a_phone(browser, home):
    "On a narrow screen wide things scroll inside themselves."
    page, _, _ = watched(browser, home, viewport={"width": 390, "height": 800})
    wide = []
    for name in PAGES:
        page.goto(f"{home}{name}.html")
        page.wait_for_load_state("load")   # not networkidle, which now and then never comes for pages whose requests are filtered
        page.wait_for_timeout(700)
        if page.evaluate("() => document.documentElement.scrollWidth") > 392: wide.append(name)
    page.close()
    assert wide == []
