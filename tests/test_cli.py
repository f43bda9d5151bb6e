"Presets and the command line: what a description holds, what each command does, and what scripts may rely on."
import json, os, re, shutil, signal, statistics, subprocess, sys, time
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
import hypothesis.strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from typer.testing import CliRunner

from diffusion_nb import cli, experiments as x
from diffusion_nb.schedule import linear

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = ["train", "sample", "evaluate", "runs", "presets", "data", "reproduce"]
SMALL = ["--set", "data=mnist_small", "--set", "images=256", "--set", "hidden=4,4", "--set", "T=20", "--set", "batch_size=32", "--set", "precision=fp32"]

def run(*args, code=0):
    "A command in this process; its output, stderr included."
    r = CliRunner().invoke(cli.app, [str(a) for a in args], prog_name="diffusion-nb")
    assert r.exit_code == code, f"exit code {r.exit_code}\n{r.output}"
    assert "Traceback" not in r.output
    return r.output

def script(*args, cwd, code=0, path=ROOT, **more):
    "A command in a process of its own."
    p = subprocess.run([sys.executable, "-m", "diffusion_nb.cli", *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=300,
                       env=os.environ | {"PYTHONPATH": str(path), **more})
    assert p.returncode == code and "Traceback" not in p.stderr, f"exit code {p.returncode}\n{p.stdout}{p.stderr}"
    return p.stdout + p.stderr

def weights(folder): return (folder/"ema.safetensors").read_bytes()

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A run of eight steps."
    folder = tmp_path_factory.mktemp("runs")/"tiny"
    run("train", "report-ddpm", *SMALL, "--steps", 8, "--run", folder, "--no-progress")
    return folder

# --- presets

@pytest.mark.parametrize("name, T, lr", [("report-ddpm", 1000, 2e-4), ("report-ddpm-2", 1500, 4e-4)])
def test_the_reports_tables(name, T, lr):
    "Tables 1.1 and 1.2, and what the text adds; the betas are not rescaled with T."
    e = x.experiment(name)
    assert [e[k] for k in ("beta_1", "beta_T", "T", "lr", "hidden", "batch_size", "act")] == [1e-4, 0.02, T, lr, (16, 32, 32, 16), 128, "gelu"]
    assert [e[k] for k in ("optimizer", "loss", "epochs", "steps", "minutes", "data", "network", "schedule", "warmup", "clip")] == \
           ["adam", "mse", 100, None, None, "mnist", "cnn", "constant", 0, None]
    process, net = x.build("process", e.values), x.new_network(e.values)
    assert torch.equal(process.schedule.beta, linear(T, rescale=False).beta) and process.T == T
    assert [b[0].out_channels for b in net.blocks] == [16, 32, 32, 16] and isinstance(net.blocks[0][2], torch.nn.GELU)

def test_presets_are_data():
    assert json.loads(json.dumps(x.PRESETS))["report-ddpm"]["T"] == 1000
    for name in x.PRESETS: x.experiment(name)
    p = x.preset("quick")
    p["T"] = 7
    assert "T" not in x.preset("quick")

@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(1e-6, 1e6).map(lambda v: float(f"{v:g}")), st.lists(st.integers(1, 99), min_size=2, max_size=5).map(tuple),
                 st.sampled_from(["cosine", "2 min", "mnist"])))
def test_what_is_shown_can_be_typed(v):
    assert x.parse(f"key={x.as_text(v)}") == ("key", v)

@given(st.text(max_size=30))
def test_parse_never_breaks(text):
    try: key, value = x.parse(text)
    except x.ExperimentError: return
    assert key == text.partition("=")[0].strip() and (value is None or isinstance(value, (bool, int, float, tuple, str)))

def test_an_override_replaces_what_contradicts_it():
    e = x.experiment("report-ddpm", minutes=2., network="unet")
    assert (e["epochs"], e["minutes"], e["widths"], e["d_time"]) == (None, 2., (16, 32, 64), 64) and "hidden" not in e.values
    assert x.experiment("report-ddpm", network="cnn", T=1000).overrides == {}

# --- what a mistake costs: exit code 2, one message, nothing written

@pytest.mark.parametrize("args, says", [
    (["train", "report-dpm"], "did you mean 'report-ddpm'?"),
    (["train"], "Missing argument"),
    (["train", "quick", "--set", "warmpu=3"], "did you mean 'warmup'?"),
    (["train", "quick", "--set", "hidden=8,8"], "network=cnn"),
    (["train", "quick", "--set", "T"], "name=value"),
    (["train", "quick", "--set", "T=0"], "T must be at least 1"),
    (["train", "quick", "--set", "widths=3"], "three multiples of 8"),
    (["train", "quick", "--set", "lr=fast"], "lr must be a number above 0"),
    (["train", "quick", "--set", "betas=cosin"], "did you mean 'cosine'?"),
    (["train", "quick", "--set", "data=minst"], "did you mean 'mnist'?"),
    (["train", "quick", "--steps", 3, "--epochs", 2], "exactly one of epochs, steps and minutes"),
    (["train", "quick", "--steps", "many"], "--steps"),
    (["presets", "nothing"], "no preset is called 'nothing'"),
    (["sample", "somewhere", "-n", 0], "at least 1"),
    (["data", "imagenet"], "no data set 'imagenet'"),
    (["reproduce", "figure-9"], "did you mean 'figure-1.9'?"),
    (["trian"], "trian"),
    (["runs", "--jsno"], "jsno")])
def test_mistakes_of_usage(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in re.sub(r"\s+", " ", run(*args, code=2)) and not list(tmp_path.iterdir())

@pytest.mark.parametrize("args, says", [
    (["sample", "nowhere"], "there is no such folder"), (["evaluate", "nowhere"], "there is no such folder"), (["evaluate", "."], "there is no card.json"),
    (["runs"], "there is no folder runs")])
def test_failures_are_one_line(args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = [l for l in run(*args, code=1).splitlines() if l.startswith("error: ")]
    assert says in line and "DEBUG" not in line and not list(tmp_path.iterdir())

def test_an_error_that_nobody_foresaw(tiny, monkeypatch):
    def broken(*_): raise ZeroDivisionError("two\nlines")
    monkeypatch.setattr(x, "load_run", broken)
    assert run("sample", tiny, code=1).strip() == "error: ZeroDivisionError: two lines (DIFFUSION_NB_DEBUG=1 shows where)"
    monkeypatch.setenv("DIFFUSION_NB_DEBUG", "1")
    assert isinstance(CliRunner().invoke(cli.app, ["sample", str(tiny)]).exception, ZeroDivisionError)

def test_ctrl_c_while_sampling(tiny, monkeypatch, tmp_path):
    def stopped(*_): raise KeyboardInterrupt
    monkeypatch.setattr(cli, "trajectory", stopped)
    assert run("sample", tiny, "-o", tmp_path/"a.png", code=130) == "" and not list(tmp_path.iterdir())

def test_a_damaged_run_and_a_folder_that_cannot_be_written(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path/"run")
    for f in (tmp_path/"run"/"checkpoints").glob("*.safetensors"): f.write_bytes(f.read_bytes()[:99])
    assert "is damaged" in run("sample", tmp_path/"run", "-o", tmp_path/"a.png", code=1)
    (tmp_path/"file").write_text("")
    assert re.search(r"^error: .*file", run("sample", tiny, "-n", 1, "-o", tmp_path/"file"/"a.png", code=1), re.M)
    card = json.loads((tmp_path/"run"/"card.json").read_text())
    (tmp_path/"run"/"card.json").write_text(json.dumps({k: v for k, v in card.items() if k != "experiment"}))
    assert "was not made from a preset" in run("evaluate", tmp_path/"run", code=1)

# --- help

@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_and_explains_everything(name):
    out = run(name, "--help")
    assert f"Examples:\n    diffusion-nb {name}" in out
    entries = re.findall(r"^  (-[^\n]*?|[A-Z]+ <[^\n]*?)(?:  +(\S.*)|\n {10,}(\S.*))$", out, re.M)
    assert len(entries) > 1 and all(a or b for _, a, b in entries), entries

def test_help_lists_all_commands():
    out = run("--help")
    assert all(re.search(rf"^  {c} +\w", out, re.M) for c in COMMANDS) and "..." not in out.split("Commands:")[1]

def test_help_is_quick_and_light(tmp_path):
    "Median of three starts under 1.5 s, and no torch on the way."
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        script("--help", cwd=tmp_path)
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 1.5
    code = "import sys, diffusion_nb.cli; print(*sorted({'torch', 'numpy', 'PIL', 'matplotlib', 'accelerate'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True).stdout.strip() == ""

def test_the_shell_completes_presets(tmp_path):
    out = script(cwd=tmp_path, _PYTHON__M_DIFFUSION_NB_CLI_COMPLETE="complete_bash", _DIFFUSION_NB_COMPLETE="complete_bash", COMP_WORDS="diffusion-nb train re", COMP_CWORD="2")
    assert out.split() == [p for p in x.PRESETS if p.startswith("re")] and "report-ddpm-2" in out

# --- training

def test_the_card_tells_preset_and_overrides(tiny):
    said = json.loads((tiny/"card.json").read_text())["experiment"]
    assert said["preset"] == "report-ddpm"
    assert said["overrides"] == {"data": "mnist_small", "images": 256, "hidden": [4, 4], "T": 20, "batch_size": 32, "precision": "fp32", "steps": 8}
    assert said["values"]["lr"] == 2e-4 and said["values"]["beta_T"] == 0.02 and said["values"]["seed"] == 0
    assert "256 x 1 x 28 x 28" in json.loads((tiny/"card.json").read_text())["images"]

def test_a_description_repeats_the_run(tiny, tmp_path):
    "Carry out what the card says: the same weights, bit for bit; with another seed, others."
    e = x.read_experiment(tiny)
    x.start(e, tmp_path/"again", progress=False)
    assert weights(tmp_path/"again") == weights(tiny)
    run("train", "report-ddpm", *SMALL, "--steps", 8, "--seed", 1, "--run", tmp_path/"other", "--no-progress")
    assert weights(tmp_path/"other") != weights(tiny)

def test_the_same_command_goes_on(tiny, tmp_path):
    args = ["train", "report-ddpm", *SMALL, "--run", tmp_path/"run", "--no-progress", "--steps"]
    run(*args, 5)
    assert "finished: 8 steps" in run(*args, 8)
    assert weights(tmp_path/"run") == weights(tiny)
    assert "already holds a run" in run(*args, 8, "--no-resume", code=1)
    assert "lr was 0.0002 and is now 0.001" in run(*args, 9, "--set", "lr=0.001", code=1)

def test_the_folder_is_named_after_the_experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("train", "report-ddpm", *SMALL, "--steps", 1, "--no-progress")
    (folder,) = (tmp_path/"runs").iterdir()
    assert folder.name == "report-ddpm,T=20,batch_size=32,data=mnist_small,hidden=4,4,images=256,precision=fp32"
    assert folder.name in run("runs")

@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_saves_and_says_130(tmp_path):
    args = [sys.executable, "-m", "diffusion_nb.cli", "train", "report-ddpm", *SMALL, "--run", "run", "--no-progress", "--steps"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    p = subprocess.Popen([*args, "1000000"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, end = tmp_path/"run"/"log.jsonl", time.time() + 120
    while not (log.exists() and log.stat().st_size) and p.poll() is None and time.time() < end: time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 130 and "Traceback" not in err and "Stopped after step" in out, out + err
    card = json.loads((tmp_path/"run"/"card.json").read_text())
    assert card["status"] == "interrupted" and card["step"] > 0 and (tmp_path/"run"/"checkpoints"/f"step-{card['step']:08d}.safetensors").exists()
    again = subprocess.run([*args, str(card["step"] + 2)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and f"finished: {card['step'] + 2:,} steps" in again.stdout

# --- sampling and evaluating

def test_sample_writes_what_was_asked_for(tiny, tmp_path):
    out = {k: tmp_path/"new"/f"{k}.{k}" for k in ("png", "gif", "npy")}
    run("sample", tiny, "-n", 6, "--seed", 3, "-o", out["png"], "--gif", out["gif"], "--array", out["npy"])
    a, gif = np.load(out["npy"], allow_pickle=False), Image.open(out["gif"])
    assert a.shape == (6, 1, 28, 28) and a.dtype == np.float32 and np.isfinite(a).all()
    assert gif.n_frames == 20 and gif.size == Image.open(out["png"]).size
    gif.seek(gif.n_frames - 1)
    last, png = (np.asarray(im.convert("L"), dtype=int) for im in (gif, Image.open(out["png"])))
    assert abs(last - png).max() <= 2, "the GIF does not end with the picture"
    _, process, net = x.load_run(tiny)
    from diffusion_nb.ddpm import last as final
    from diffusion_nb.training import stream
    np.testing.assert_array_equal(a, final(process.sample(net, 6, generator=stream(3, "samples"))).z_t.numpy())

def test_the_seed_decides_and_ema_is_the_default(tiny, tmp_path):
    def digits(*args):
        run("sample", tiny, "-n", 2, "-o", tmp_path/"a.png", "--array", tmp_path/"a.npy", *args)
        return (tmp_path/"a.npy").read_bytes()
    assert digits() == digits("--seed", 0) == digits("--weights", "ema") != digits("--seed", 1)
    assert digits("--weights", "raw") != digits()
    assert "no weights is called" in run("sample", tiny, "--weights", "best", code=1)

def test_evaluate(tiny, tmp_path):
    table = run("evaluate", tiny, "-n", 200, "--ranges", 4, "--seed", 5, "--samples", 0, "-o", tmp_path/"a.json")
    r = json.loads((tmp_path/"a.json").read_text())
    assert (r["n"], r["seed"], r["step"], r["weights"]) == (200, 5, 8, "ema") and [v["t"] for v in r["ranges"]] == [[1, 5], [6, 10], [11, 15], [16, 20]]
    assert sum(v["n"] for v in r["ranges"]) == 200 and r["loss"] == pytest.approx(np.mean([v["loss"] for v in r["ranges"]]))
    assert f"{r['loss']:.4f}" in table and "1..5" in table and "seed 5" in table
    again = json.loads(run("evaluate", tiny, "-n", 200, "--ranges", 4, "--seed", 5, "--samples", 0, "--json"))
    assert again == r and json.loads((tiny/"evaluation.json").read_text()) == r
    assert json.loads(run("evaluate", tiny, "-n", 200, "--seed", 6, "--samples", 0, "--json"))["loss"] != r["loss"]

def test_evaluate_scores_drawn_images(tiny):
    "The same images and numbers as the library's; the loss table stays."
    from diffusion_nb import metrics as M
    table = run("evaluate", tiny, "-n", 50, "--samples", 120, "--seed", 4)
    r = json.loads((tiny/"evaluation.json").read_text())
    assert "(seed 4, ± one standard error)" in table and "120 images: tiny, step 8" in table and "floor" in table
    _, process, net = x.load_run(tiny)
    images = cli.draw_images(process, net, 120, 4)
    assert images.shape == (120, 1, 28, 28) and torch.equal(images[:100], cli.draw_images(process, net, 100, 4))
    e = M.evaluate(images, "x", most=1)
    for k in M.METRICS: assert r["images"]["scores"][k]["value"] == pytest.approx(e.scores[k].value, rel=1e-6) and r["images"]["floors"][k]["n"] == 120
    assert r["images"]["clipped"] > 0 and r["images"]["scores"]["FID"]["value"] > 10*r["images"]["floors"]["FID"]["value"]

def test_evaluate_scores_stored_images(tmp_path):
    from diffusion_nb.data import mnist, to_unit
    pixels = mnist("train").images[:200]
    for name, a in (("uint8", pixels.numpy()), ("flat", pixels[:, 0].numpy()), ("floats", to_unit(pixels).double().numpy())): np.save(tmp_path/f"{name}.npy", a)
    rs = [json.loads(run("evaluate", "--images", tmp_path/f"{name}.npy", "--json"))["images"] for name in ("uint8", "flat", "floats")]
    for r in rs: assert {k: v["value"] for k, v in r["scores"].items()} == {k: v["value"] for k, v in rs[0]["scores"].items()} and r["scores"]["FID"]["n"] == 200
    assert rs[0]["scores"]["FID"]["value"] < 2*rs[0]["floors"]["FID"]["value"] and sorted(p.name for p in tmp_path.iterdir()) == ["flat.npy", "floats.npy", "uint8.npy"]
    run("evaluate", "--images", tmp_path/"flat.npy", "-o", tmp_path/"r.json")
    assert json.loads((tmp_path/"r.json").read_text())["images"]["scores"]["FID"]["value"] == rs[0]["scores"]["FID"]["value"]

def test_evaluate_with_images_that_are_none(tmp_path, tiny):
    np.save(tmp_path/"range.npy", 2*np.random.default_rng(0).random((20, 1, 28, 28)).astype("float32"))
    np.save(tmp_path/"shape.npy", np.zeros((20, 1, 32, 32), "uint8"))
    np.save(tmp_path/"words.npy", np.array(["a", "b"]))
    np.save(tmp_path/"nan.npy", np.full((20, 1, 28, 28), np.nan, "float32"))
    (tmp_path/"text.npy").write_text("hello")
    for name, says in (("range", "another range"), ("shape", "takes images"), ("words", "no array of numbers"), ("nan", "NaN"), ("text", "cannot be read"), ("nowhere", "there is no file")):
        out = run("evaluate", "--images", tmp_path/f"{name}.npy", code=1)
        assert says in out and "DEBUG" not in out
    assert "either a run or --images" in re.sub(r"\s+", " ", run("evaluate", code=2)) and "either a run or --images" in re.sub(r"\s+", " ", run("evaluate", tiny, "--images", "a.npy", code=2))
    assert "--samples must be" in re.sub(r"\s+", " ", run("evaluate", tiny, "--samples", -1, code=2))

def test_held_out_measures_what_it_says():
    "Against a plain loop, and against the closed form: for an answer of 0 the loss is the mean square of the noise."
    class Zero(torch.nn.Module):
        def forward(self, z_t, u): return 0*z_t
    process, images = x.gaussian(T=20, rescale=False), torch.randint(0, 256, (700, 1, 8, 8), dtype=torch.uint8)
    r = x.held_out(process, Zero(), images, ranges=7, seed=1)
    assert abs(r["loss"] - 1) < 4*r["se"] and r["se"] == pytest.approx((2/64/700)**0.5, rel=0.5)
    seen = []
    class Watch(Zero):
        def forward(self, z_t, u): seen.append((u*20).round().long()); return 0*z_t
    x.held_out(process, Watch(), images, ranges=3)
    assert len(torch.cat(seen)) == 700 and set(torch.cat(seen).tolist()) == set(range(1, 21))
    assert len(x.held_out(process, Zero(), images, ranges=50)["ranges"]) == 20 and x.held_out(process, Zero(), images[:3])["se"] is None

# --- looking around

def test_runs(tiny, tmp_path):
    assert run("runs", tmp_path).strip() == f"no runs in {tmp_path}"
    shutil.copytree(tiny, tmp_path/"good")
    (tmp_path/"bad").mkdir()
    (tmp_path/"bad"/"card.json").write_text("{")
    head, bad, good = run("runs", tmp_path).splitlines()
    assert head.split()[:3] == ["run", "preset", "status"] and "card unreadable" in bad and good.split()[:4] == ["good", "report-ddpm", "finished", "1.00"]
    assert json.loads(run("runs", tmp_path, "--json"))["good"]["step"] == 8

def test_presets_command():
    assert [l.split()[0] for l in run("presets").splitlines()] == list(x.PRESETS) == list(json.loads(run("presets", "--json")))
    out = run("presets", "report-ddpm", "--set", "T=500")
    assert re.search(r"^\* +T +500 +number of steps$", out, re.M) and out.count("\n*") == 1
    assert json.loads(run("presets", "report-ddpm-2", "--json"))["T"] == 1500

def test_data_state(tmp_path, monkeypatch):
    "Missing, damaged and whole files are told apart, and none is touched."
    from diffusion_nb import data
    monkeypatch.setenv("DIFFUSION_NB_CACHE", str(tmp_path))
    a, b, *rest = data.SHA256["mnist"]
    (tmp_path/"mnist").mkdir()
    (tmp_path/"mnist"/a).write_bytes(b"good")
    (tmp_path/"mnist"/b).write_bytes(b"bad")
    monkeypatch.setitem(data.SHA256, "mnist", data.SHA256["mnist"] | {a: "770e607624d689265ca6c44884d0807d9b054d23c473c106c72be9de08b7376c"})
    state = json.loads(run("data", "mnist", "--json"))["mnist"]
    assert state["files"] == {a: "ok", b: "damaged"} | dict.fromkeys(rest, "missing") and state["folder"] == str(tmp_path/"mnist")
    assert state["sources"] == ["from_mirrors", "from_npm", "from_folder"]
    assert sorted(p.name for p in (tmp_path/"mnist").iterdir()) == sorted([a, b]) and "damaged" in run("data")

# --- installed

def required(name, extras=(), seen=None):
    "Names of the installed distributions that `name` needs, with the extras that are asked for on the way."
    seen = {} if seen is None else seen
    for r in map(Requirement, metadata.requires(name) or []):
        key = canonicalize_name(r.name)
        if r.marker and not any(r.marker.evaluate({"extra": e}) for e in ("", *extras)): continue
        if key not in seen or not r.extras <= seen[key]:
            seen[key] = seen.get(key, set()) | r.extras
            required(key, seen[key], seen)
    return seen

def link(names, site):
    "Links in `site` to the packages of these distributions: an environment that has them and nothing else, without six gigabytes of copies."
    for name in names:
        dist = metadata.distribution(name)
        for part in {f.parts[0] for f in dist.files} - {"..", "__pycache__"}:
            if not (site/part).exists(): (site/part).symlink_to(Path(dist.locate_file(part)).resolve())

def test_an_installed_wheel_from_elsewhere(tmp_path):
    "Build a wheel, install it into an environment that has what it requires and nothing else, away from the sources, and go through an experiment."
    src, home, cwd = tmp_path/"src", tmp_path/"home", tmp_path/"elsewhere"
    cwd.mkdir(), src.mkdir()
    for f in ("settings.ini", "setup.py", "README.md", "LICENSE", "MANIFEST.in"): shutil.copy(ROOT/f, src)
    shutil.copytree(ROOT/"diffusion_nb", src/"diffusion_nb", ignore=shutil.ignore_patterns("__pycache__"))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    def sh(*args):
        p = subprocess.run(list(map(str, args)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
        assert p.returncode == 0, p.stdout + p.stderr
        return p.stdout.strip()
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    sh(sys.executable, *pip, "wheel", src, "--no-deps", "--no-build-isolation", "-w", tmp_path)
    shutil.rmtree(src)
    sh(sys.executable, "-m", "venv", home)
    python = home/"bin"/"python"
    link(required("diffusion-nb"), Path(sh(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")))
    sh(python, *pip, "install", "--no-index", next(tmp_path.glob("*.whl")))     # refuses where a requirement is not met
    assert Path(sh(python, "-c", "import diffusion_nb; print(diffusion_nb.__file__)")).is_relative_to(home)
    assert sh(python, "-c", "from importlib.util import find_spec; print(find_spec('pytest'), find_spec('nbdev'))") == "None None"
    def go(*args, code=0):
        p = subprocess.run([str(home/"bin"/"diffusion-nb"), *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
        assert p.returncode == code and "Traceback" not in p.stderr, p.stdout + p.stderr
        return p.stdout
    assert "diffusion-nb [OPTIONS]" in go("--help") and go("--version").startswith("diffusion-nb ")
    small = ["--set", "images=256", "--set", "hidden=4,4", "--set", "T=20", "--set", "batch_size=32"]
    assert "finished: 8 steps" in go("train", "report-ddpm", *small, "--steps", 8, "--run", "runs/tiny", "--no-progress")
    for name in "ab": go("sample", "runs/tiny", "-n", 4, "--seed", 1, "-o", f"{name}.png", "--array", f"{name}.npy", "--gif", f"{name}.gif")
    assert (cwd/"a.npy").read_bytes() == (cwd/"b.npy").read_bytes() and (cwd/"a.png").read_bytes() == (cwd/"b.png").read_bytes()
    assert json.loads(go("evaluate", "runs/tiny", "-n", 100, "--json"))["n"] == 100
    assert "tiny  report-ddpm  finished" in go("runs")
    go("sample", "runs/other", code=1), go("train", code=2)
