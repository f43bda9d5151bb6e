"The library as a package: what importing it costs, who imports whom, what is documented, what is installed; and its pictures."
import ast, base64, configparser, inspect, io, itertools, json, os, re, shutil, statistics, subprocess, sys, zipfile
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.docments import docments
from hypothesis import given
import hypothesis.strategies as st
from PIL import Image

import diffusion_nb
from diffusion_nb.plots import axes, plot_loss, png, show_images, smooth, tile
from diffusion_nb.widgets import Scrub, as_png, kernel_alive, label, scrub

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT/"diffusion_nb"
LIGHT = ["data", "schedule", "forward", "networks", "ddpm"]
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))
_cfg = configparser.ConfigParser(delimiters=["="])
_cfg.read(ROOT/"settings.ini", encoding="utf-8")
SETTINGS = _cfg["DEFAULT"]

def python(code, cwd, path=ROOT):
    "Output of `code` in a new interpreter that sees the package in `path`."
    env = os.environ | {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    p = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    return p.stdout

# --- what an import costs

IMPORT = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
from diffusion_nb import {modules}
print(json.dumps([time.perf_counter() - start, sorted({{m.split(".")[0] for m in sys.modules}}), sorted(m for m in set(sys.modules) - before)]))
"""
HEAVY = {"pandas", "torchvision", "matplotlib", "ipywidgets", "IPython", "jupyter", "jupyter_client", "jupyter_core", "jupyterlab", "nbdev", "nbformat",
         "nbclient", "execnb", "fastcore", "PIL", "scipy", "sklearn", "mlxtend", "diffusers", "accelerate", "hypothesis", "playwright"}

def test_the_chapters_import_fast_and_alone(tmp_path):
    runs = [json.loads(python(IMPORT.format(modules=", ".join(LIGHT)), tmp_path)) for _ in range(3)]
    seconds = statistics.median(r[0] for r in runs)
    assert seconds < 1, f"{seconds:.2f} s beyond torch itself"
    assert not HEAVY & set(runs[0][1]), f"imported on the way: {sorted(HEAVY & set(runs[0][1]))}"
    assert {f"diffusion_nb.{m}" for m in LIGHT} <= set(runs[0][2])

def test_each_module_imports_by_itself_and_only_what_it_needs(tmp_path):
    "`widgets` needs neither matplotlib nor ipywidgets before it draws, `plots` no widgets."
    loaded = lambda m: set(json.loads(python(IMPORT.format(modules=m), tmp_path))[1])
    assert not (HEAVY | {"diffusion_nb.plots"}) & loaded("widgets")
    assert not {"ipywidgets", "IPython", "torchvision", "pandas", "scipy"} & loaded("plots")

@pytest.mark.parametrize("module", MODULES)
def test_all_is_what_it_says(module):
    m = import_module(f"diffusion_nb.{module}")
    for name in m.__all__: assert hasattr(m, name), f"{module}.__all__ names {name}, which does not exist"
    assert len(set(m.__all__)) == len(m.__all__)

# --- who imports whom

def cells(path):
    "Python source of each code cell, without the lines that only IPython reads."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%%"):
            yield "\n".join("pass" if re.match(r"\s*[%!?]", line) else line for line in source.splitlines())

def imports(source, own=""):
    "Modules of diffusion_nb that `source` imports, and the top-level names of everything else."
    ours, others = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["diffusion_nb" if node.level else "", node.module]))
            names = [f"{base}.{a.name}" for a in node.names] if base == "diffusion_nb" else [base]
        else: continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "diffusion_nb": others.add(top)
            elif rest and rest.split(".")[0] in {*MODULES, own}: ours.add(rest.split(".")[0])
    return ours - {own}, others

def chapters():
    "Number or None for an appendix, module or None, path: every notebook."
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        if path.stem == "index": continue
        exports = [m for c in cells(path) for m in re.findall(r"^#\|\s*default_exp\s+(\w+)", c, re.M)]
        assert len(exports) <= 1, f"{path.name} exports to {exports}"
        number = re.match(r"(\d+)_", path.stem)
        assert number or re.match(r"a\d+_", path.stem), f"{path.name} is neither a chapter (00_name) nor an appendix (a0_name)"
        yield int(number[1]) if number else None, exports[0] if exports else None, path

NUMBER = {module: n for n, module, _ in chapters() if module}

def test_the_book_is_the_library():
    "A module for each notebook that exports, a notebook for each module; no two with one number."
    assert sorted(NUMBER) == MODULES
    numbers = [n for n, _, _ in chapters() if n is not None]
    assert len(set(numbers)) == len(numbers) and sorted(numbers)[:5] == [0, 1, 2, 3, 4]

@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_earlier_chapters(module):
    ours, _ = imports((PACKAGE/f"{module}.py").read_text(encoding="utf-8"), module)
    for other in ours:
        if NUMBER[other] is not None and NUMBER[module] is not None:
            assert NUMBER[other] < NUMBER[module], f"{module} (chapter {NUMBER[module]}) imports {other} (chapter {NUMBER[other]})"

def test_no_circle_of_imports():
    "Appendices may be imported by all, so none of these may need a chapter that needs it."
    graph = {m: imports((PACKAGE/f"{m}.py").read_text(encoding="utf-8"), m)[0] for m in MODULES}
    assert graph["ddpm"] >= {"schedule", "forward"}, "the reader of imports has gone blind"
    while graph:
        free = {m for m, needs in graph.items() if not needs & set(graph)}
        assert free, f"circle among {sorted(graph)}"
        for m in free: del graph[m]

@pytest.mark.parametrize("number, module, path", list(chapters()), ids=lambda v: v.stem if isinstance(v, Path) else "")
def test_a_notebook_imports_only_from_earlier_chapters(number, module, path):
    "Lesson cells too: nobody is shown what the next chapter teaches."
    for i, source in enumerate(cells(path)):
        for other in imports(source, module)[0]:
            assert number is None or NUMBER[other] is None or NUMBER[other] < number, f"code cell {i} of {path.name} imports {other}"

BROUGHT_BY = {"PIL": "matplotlib", "IPython": "ipywidgets"}  # never installed without them

@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_imports_is_required(module):
    declared = {re.match(r"[\w-]+", r)[0] for r in SETTINGS["requirements"].split()}
    others = imports((PACKAGE/f"{module}.py").read_text(encoding="utf-8"), module)[1] - set(sys.stdlib_module_names)
    missing = {m for m in others if BROUGHT_BY.get(m, m) not in declared}
    assert not missing, f"not in settings.ini: {missing}"

# --- what is documented

def exported():
    "Each function and class that a module exports, with its syntax tree."
    for module in MODULES:
        m, tree = import_module(f"diffusion_nb.{module}"), ast.parse((PACKAGE/f"{module}.py").read_text(encoding="utf-8"))
        nodes = {n.name: n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        for name in m.__all__:
            if name in nodes: yield pytest.param(module, getattr(m, name), nodes[name], id=f"{module}.{name}")

def commented(module, node):
    "Does a comment stand on the line where `node` ends?"
    line = (PACKAGE/f"{module}.py").read_text(encoding="utf-8").splitlines()[node.end_lineno - 1]
    return bool(re.search(r"#\s*\S", line.encode()[node.end_col_offset:].decode()))

def fields(module, node):
    "Annotated names in a class's body, and whether a comment stands beside each."
    return {n.target.id: commented(module, n) for n in node.body if isinstance(n, ast.AnnAssign)}

@pytest.mark.parametrize("module, v, node", list(exported()))
def test_everything_exported_is_documented(module, v, node):
    "One sentence, and a comment beside each parameter, each field and what comes back; a class `made by` a function leaves those to it."
    doc = ast.get_docstring(node)
    assert doc, "no docstring"
    assert "\n" not in doc, "one sentence; the rest is prose in the chapter"
    if isinstance(node, ast.FunctionDef):
        stars = {a.arg for a in (node.args.vararg, node.args.kwarg) if a and commented(module, a)}  # docments does not read these
        written = {a.arg for a in node.args.args + node.args.kwonlyargs + node.args.posonlyargs} | {"return"}  # `train` adds the fields of Settings
        said = docments(inspect.unwrap(v))
        bare = [k for k, text in said.items() if not text and k in written - stars and (k != "return" or node.returns)]
    else:
        methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        bare = [k for k, there in fields(module, node).items() if not there]
        if "__init__" in methods and "made by" not in doc: bare += [k for k, text in docments(v.__init__, returns=False).items() if not text and k != "self"]
        bare += [f"{k}()" for k, n in methods.items() if not k.startswith("_") and k != "forward" and not n.decorator_list and not ast.get_docstring(n)]
    assert not bare, f"no comment beside {', '.join(bare)}"

def test_this_sees_what_is_bare():
    "The reader of comments finds the parameters of functions, constructors and fields."
    names = {p.id for p in exported()}
    assert {"schedule.linear", "schedule.Schedule", "ddpm.State", "networks.CNN", "widgets.scrub"} <= names
    v = {p.id: p.values for p in exported()}
    assert set(docments(v["schedule.linear"][1])) == {"T", "beta_1", "beta_T", "rescale", "return"}
    assert {"hidden", "size"} <= set(docments(v["networks.CNN"][1].__init__, returns=False))
    assert set(fields("ddpm", v["ddpm.State"][2])) == {"t", "z_t", "x_hat"}

# --- what is installed

@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel of the package, built from a copy that has no notebooks and no git."
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("wheel")
    for f in ROOT.iterdir():
        if f.is_file() and f.suffix in {".ini", ".py", ".toml", ".cfg", ".in", ".md", ".txt", ""} and not f.name.startswith("."): shutil.copy(f, src)
    shutil.copytree(PACKAGE, src/"diffusion_nb", ignore=shutil.ignore_patterns("__pycache__"))
    p = subprocess.run([sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check", "-w", str(out)],
                       cwd=src, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stdout + p.stderr
    (path,) = out.glob("*.whl")
    return path

def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    expected = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    files = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert files == expected
    assert f"diffusion_nb-{SETTINGS['version']}-py3-none-any.whl" == wheel.name

def test_the_wheel_states_what_settings_say(wheel):
    z = zipfile.ZipFile(wheel)
    meta = z.read(next(n for n in z.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    field = lambda name: re.findall(rf"^{name}: (.*)$", meta, re.M)
    assert field("Name") == ["diffusion_nb"] and field("Version") == [SETTINGS["version"]]
    assert field("Requires-Python") == [f">={SETTINGS['min_python']}"]
    normal = lambda r: re.sub(r"[\s()]", "", r)
    assert {normal(r) for r in field("Requires-Dist") if "extra ==" not in r} == set(SETTINGS["requirements"].split())
    assert {"notebook", "site", "test", "dev"} <= set(field("Provides-Extra"))
    assert any(n.endswith("LICENSE") for n in z.namelist())

def test_it_installs_and_imports_far_from_here(wheel, tmp_path):
    target, cwd = tmp_path/"site", tmp_path/"elsewhere"
    cwd.mkdir()
    p = subprocess.run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", str(target), str(wheel)],
                       cwd=cwd, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr
    out = python(f"""
import diffusion_nb, importlib.metadata, torch
for m in {MODULES}: __import__("diffusion_nb." + m)
from diffusion_nb.ddpm import GaussianProcess, last
from diffusion_nb.schedule import cosine
x = last(GaussianProcess(cosine(3)).sample(lambda z, u: z, n=2, shape=(1, 4, 4))).z_t
print(diffusion_nb.__file__, diffusion_nb.__version__, importlib.metadata.version("diffusion_nb"), *x.shape, sep="\\n")
""", cwd, target).split("\n")
    assert Path(out[0]).is_relative_to(target)
    assert out[1:7] == [SETTINGS["version"]]*2 + ["2", "1", "4", "4"]

def test_versions_agree():
    assert diffusion_nb.__version__ == SETTINGS["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", SETTINGS["version"])
    assert Path(diffusion_nb.__file__).parent == PACKAGE, "these tests look at another copy of the package"

# --- pictures

@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_tile_puts_every_image_in_its_place(n, ncol, h, w, pad):
    x = torch.arange(n*h*w, dtype=torch.float32).view(n, 1, h, w)
    out = tile(x, ncol, pad, fill=-1.)
    rows, cols = -(-n//ncol), min(n, ncol)
    assert out.shape == (rows*(h + pad) - pad, cols*(w + pad) - pad)
    expected = torch.full_like(out, -1)
    for i in range(n):
        top, left = i//cols*(h + pad), i%cols*(w + pad)
        expected[top:top+h, left:left+w] = x[i, 0]
    assert torch.equal(out, expected)

def test_tile_leaves_gaps_transparent_and_takes_any_tensor():
    out = tile(torch.ones(3, 1, 2, 2, dtype=torch.float64, requires_grad=True), ncol=2)
    assert out.dtype == torch.float32 and not out.requires_grad
    assert out.isnan().sum() == out.numel() - 3*4 and out[:2, :2].eq(1).all() and out[3:, 3:].isnan().all()

@pytest.mark.filterwarnings("error")
def test_show_images(figures):
    x = torch.linspace(-1, 1, 6*4).view(6, 1, 2, 2)
    ax = show_images(x, ncol=3, title="six")
    (im,) = ax.images
    np.testing.assert_array_equal(im.get_array().filled(np.nan), tile(x, 3).numpy())
    assert im.get_clim() == (-0.5, 0.5) and im.get_cmap().name == "gray" and not ax.axison and ax.get_title() == "six"
    assert show_images(x[:, 0], ncol=3, lo=0, hi=1, ax=ax) is ax
    np.testing.assert_array_equal(ax.images[1].get_array().filled(np.nan), tile(x, 3).numpy())
    assert ax.images[1].get_clim() == (0, 1) and len(figures.get_fignums()) == 1

def test_png_is_a_small_transparent_png_and_closes_the_figure(figures):
    ax = axes()
    ax.plot([0, 1])
    keep = figures.figure()
    data = png(ax)
    img = Image.open(io.BytesIO(data))
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and img.format == "PNG" and img.mode == "P"
    assert len(img.convert("RGBA").getcolors(100_000)) <= 64 and img.convert("RGBA").getpixel((0, 0))[3] == 0
    assert 600 < img.width < 800 and len(data) < 20_000
    assert figures.get_fignums() == [keep.number], "the figure is still open"
    assert png(keep, colours=2).startswith(b"\x89PNG") and figures.get_fignums() == []

def test_axes(figures):
    assert axes(3, 2).shape == (2, 3)
    ax = axes(width=4, height=2)
    assert tuple(ax.figure.get_size_inches()) == (4, 2) and ax.figure.get_facecolor()[3] == 0 and not ax.spines["top"].get_visible()

def test_smooth():
    y = np.random.default_rng(0).normal(size=200)
    out = smooth(y, 50)
    np.testing.assert_allclose(out, [y[i:i+50].mean() for i in range(151)])
    np.testing.assert_allclose(smooth(y[:3], 50), [y[:3].mean()])

def test_plot_loss_shows_the_mean_of_each_epoch(figures):
    y = np.arange(25.)
    raw, means = plot_loss(y, 10).lines
    np.testing.assert_allclose(raw.get_xydata(), np.stack([np.arange(1, 26)/10, y], 1))
    np.testing.assert_allclose(means.get_xydata(), [[1, 4.5], [2, 14.5]])
    assert raw.get_color() == means.get_color()
    np.testing.assert_allclose(plot_loss(y[:4], 10).lines[1].get_xydata(), [[0.4, 1.5]])

# --- sliders

class Page(HTMLParser):
    "Tags with their attributes, and the text of the data script."
    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.data = [], [], None
        self.feed(html)
        self.close()
    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "input", "br"): self.open.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop()[0] == tag, f"</{tag}> closes something else"
    def handle_data(self, text):
        if self.open and self.open[-1][1].get("type") == "application/json": self.data = (self.data or "") + text
    def all(self, tag): return [attrs for t, attrs in self.tags if t == tag]

def frames(page):
    "The bytes of each frame in the order in which the script counts."
    data = json.loads(page.data)
    return [base64.b64decode(data["frames"][i]) for i in data.get("which", range(len(data["frames"])))]

def picture(**values): return repr(sorted(values.items())).encode()

def test_scrub_html_is_accessible_and_complete():
    s = scrub(picture, start=dict(t=5, f=0.5), alt="a digit", title="noise", t=[0, 5, 10], f=[0.25, 0.5], name=["x", "y"])
    page = Page(s.html())
    assert page.open == []
    ids = [a["id"] for a in page.all("input")]
    assert len(set(ids)) == 3 == len(page.all("output"))
    assert [a["for"] for a in page.all("label")] == ids == [a["for"] for a in page.all("output")]
    assert [(a["type"], a["min"], a["max"], a["value"], a["aria-valuetext"]) for a in page.all("input")] == \
           [("range", "0", "2", "1", "5"), ("range", "0", "1", "1", "0.5"), ("range", "0", "1", "0", "x")]
    (group,) = [a for a in page.all("div") if a.get("role") == "group"]
    assert group["aria-label"] == "noise"
    (img,) = page.all("img")
    assert img["alt"] == "a digit (t = 5, f = 0.5, name = x)"
    assert base64.b64decode(img["src"].removeprefix("data:image/png;base64,")) == picture(t=5, f=0.5, name="x")
    data = json.loads(page.data)
    assert data["names"] == ["t", "f", "name"] and data["labels"] == [["0", "5", "10"], ["0.25", "0.5"], ["x", "y"]] and data["alt"] == "a digit"
    assert frames(page) == [picture(t=t, f=f, name=n) for t, f, n in itertools.product([0, 5, 10], [0.25, 0.5], ["x", "y"])]

def test_scrub_html_asks_nobody():
    html = scrub(picture, t=range(4)).html()
    assert "http" not in html and "//" not in re.sub(r"base64,[\w+/=]*|\"frames\": \[[^]]*\]", "", html)
    assert not [a for t, attrs in Page(html).tags for a in attrs if a in ("href", "srcset") or (a == "src" and not attrs[a].startswith("data:"))]

def test_scrub_html_survives_any_text():
    nasty = "</script><b>\"'&{0} {alt} \\u003c"
    page = Page(scrub(picture, alt=nasty, title=nasty, v=[nasty, "z"]).html())
    assert page.open == [] and page.all("b") == []
    assert page.all("img")[0]["alt"] == f"{nasty} (v = {nasty})" and page.all("div")[0]["aria-label"] == nasty
    assert json.loads(page.data)["labels"] == [[nasty, "z"]] and json.loads(page.data)["alt"] == nasty
    assert page.all("input")[0]["aria-valuetext"] == nasty

def test_scrub_draws_each_frame_once(figures):
    calls = []
    def draw(t):
        calls.append(t)
        ax = axes(width=2, height=1)
        ax.set_title(str(t))
        return ax.figure if t else ax
    s = scrub(draw, t=[0, 1, 2])
    page = Page(s.html())
    s.html(), s.widget()
    assert calls == [0, 1, 2] and figures.get_fignums() == []
    assert len(set(frames(page))) == 3 and all(f.startswith(b"\x89PNG") for f in frames(page))

def test_scrub_refuses_what_it_cannot_show():
    with pytest.raises(ValueError, match="at least one quantity"): scrub(picture)
    with pytest.raises(ValueError, match="at least one quantity"): scrub(picture, t=[])
    with pytest.raises(ValueError, match="start t=7 is not one of the values"): scrub(picture, t=[1, 2], start=dict(t=7))
    with pytest.raises(ValueError, match="start u=1 is not one of the values"): scrub(picture, t=[1, 2], start=dict(u=1))

def test_the_widget_shows_the_same_frames():
    s = scrub(picture, start=dict(f=0.5), t=[0, 5, 10], f=[0.25, 0.5])
    image, t, f = s.widget().children
    assert image.value == picture(t=0, f=0.5) and [o[0] for o in t.options] == ["0", "5", "10"] and f.description == "f"
    for t.value, f.value in itertools.product([10, 5], [0.25, 0.5]): assert image.value == picture(t=t.value, f=f.value)

def test_live_controls_draw_between_the_frames():
    import ipywidgets as w
    s = scrub(picture, live=dict(t=w.IntSlider(0, 0, 10)), t=[0, 10])
    image, t = s.widget().children
    t.value = 7
    assert image.value == picture(t=7) and len(s.frames) == 2

def test_without_a_kernel_it_is_html():
    s = scrub(picture, t=[0, 1])
    assert not kernel_alive() and isinstance(s, Scrub)
    assert s._repr_mimebundle_() == {"text/plain": "Scrub(t: 2 values)", "text/html": s.html()}

def test_label():
    assert [label(v) for v in (1, 0.1 + 0.2, 1e-7, "a", None)] == ["1", "0.3", "1e-07", "a", "None"]
    assert as_png(b"x") == b"x"
