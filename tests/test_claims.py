"The report, repeated: its figures and tables by name, its way of measuring against the library it used, numbers measured twice."
import dataclasses, json, re

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy import linalg, stats

from diffusion_nb import claims
from diffusion_nb.cold import ColdProcess
from diffusion_nb.data import mnist, to_unit
from diffusion_nb.experiments import ExperimentError, build, experiment, paired, study_losses
from diffusion_nb.metrics import Extractor, Result, read_results

from test_cli import ROOT, run

RUNS = [p.run for p in claims.PRINTED.values()]
RESULTS = ROOT/"results"/"results.json"

def test_every_model_of_the_report_is_shipped_at_its_first_and_twentieth_epoch():
    assert len(set(RUNS)) == 6
    for r in RUNS:
        epochs = claims.shipped(r)
        assert {1, 20} <= set(epochs) and list(epochs) == sorted(epochs)
        assert all(name == f"{r}-e{e}" for e, name in epochs.items())
    assert not set(claims.shipped("report-ddpm").values()) & set(claims.shipped("report-ddpm-2").values())   # one name begins with the other

@pytest.mark.parametrize("name", [w for r in RUNS for w in claims.shipped(r).values()])
def test_what_is_shipped_is_the_reports_preset_at_that_epoch(name):
    process, net, card = claims.load_pretrained(name)
    run, epoch = name.rsplit("-e", 1)
    assert card["experiment"]["preset"] == run and card["epoch"] == int(epoch)
    assert {k for k in card["experiment"]["overrides"]} <= {"sample_every", "keep_every", "checkpoint_every"}
    assert len(card["curve"]) == len(card["band"]) == 100
    assert all(lo <= hi for lo, hi in card["band"]) and np.mean([lo < m < hi for m, (lo, hi) in zip(card["curve"], card["band"])]) > .95

@pytest.mark.parametrize("name", [w for r in RUNS for w in claims.shipped(r).values()])
def test_every_number_of_a_shipped_model_is_stored(name):
    rows = read_results(RESULTS)
    ways = ("direct", "algorithm-2") if "cold" in name else ("samples",)
    for way in ways:
        for k in ("fid", "is", "confident"): assert f"{claims.place(name, way)}/{k}" in rows
        for k in ("fid", "is"): assert f"protocol/{name}/{way}/{k}" in rows
    assert f"report/{name}/loss" in rows

def test_wrapped_is_what_torchmetrics_does_to_such_images():
    "The library that the report used, asked to normalise images that it should have been given in [0, 1]."
    from torchmetrics.image.fid import FrechetInceptionDistance
    seen = []
    class Spy(torch.nn.Module):
        num_features = 4
        def forward(self, x):
            seen.append(x)
            return x.float().flatten(1)[:, :4]
    x = to_unit(mnist("test").images[:20])
    metric = FrechetInceptionDistance(feature=Spy(), normalize=True)
    metric.used_custom_model = False   # or it would leave the conversion to our network; with Inception it converts
    metric.update(x, real=True)
    assert seen[-1].dtype == torch.uint8 and torch.equal(seen[-1].cpu().reshape(x.shape), claims.wrapped(x))
    assert torch.equal(claims.wrapped(x).int(), torch.from_numpy(np.trunc(x.numpy()*255).astype(int) % 256).int())

def test_the_protocol_is_a_frechet_distance_of_a_hundred():
    flat = Extractor("pixels", 16, lambda b: (b.flatten(1)[:, 300:316].float()/255, b.flatten(1)[:, 300:310].float()/25), "none")
    x = to_unit(mnist("train").images[:150])
    ours = claims.protocol(x, flat)
    a, b = (claims.wrapped(v)[:100].flatten(1)[:, 300:316].double().numpy()/255 for v in (x, to_unit(mnist("test").images)))
    s, t = np.cov(a.T), np.cov(b.T)
    theirs = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(s + t - 2*linalg.sqrtm(s @ t).real)
    assert ours["fid"].value == pytest.approx(theirs, rel=1e-3) and ours["fid"].n == ours["is"].n == 100

def test_the_same_numbers_twice():
    a, b = (dict(claims.scores("report-cold-rows-4-e1", 100)) for _ in range(2))
    assert {k: v.value for k, v in a.items()} == {k: v.value for k, v in b.items()} and len(a) == 11

def test_a_cold_model_restores_the_images_it_is_given():
    x = to_unit(mnist("test").images[:3])
    out = dict(claims.drawings("report-cold-rows-e20", 3, x))
    process = claims.load_pretrained("report-cold-rows-e20")[0]
    D = process.degradation
    assert (D(out["algorithm-2"].float(), D.T) - D(x, D.T)).abs().max() < 5e-3 < (D(out["direct"].float(), D.T) - D(x, D.T)).abs().max()   # (8.8): the means are kept

def test_the_last_step_is_left_out_and_nothing_else(monkeypatch):
    process = build("process", experiment("report-cold-rows-4").values)
    short = claims.without_last(process)
    assert isinstance(short, ColdProcess) and short.T == process.T and short.degradation == process.degradation
    asked = []
    class Net(torch.nn.Module):
        def forward(self, z, u):
            asked.append(u)
            return z
    g = lambda: torch.Generator().manual_seed(0)
    x = torch.rand(2000, 1, 28, 28) - .5
    short.loss(Net(), x, generator=g())
    assert sorted({round(7*u) for u in asked[-1].tolist()}) == [1, 2, 3, 4, 5, 6]
    t = torch.randint(1, 8, (2000,), generator=g())
    assert torch.equal(short.loss(Net(), x, t), process.loss(Net(), x, t))

def test_a_study_is_resumed_and_refuses_an_arm_that_does_not_exist(tmp_path):
    (first,) = claims.study(["silu"], seeds=1, steps=2, folder=tmp_path)
    log = (tmp_path/"silu-2-0"/"log.jsonl").read_bytes()
    (again,) = claims.study(["silu"], seeds=1, steps=2, folder=tmp_path)
    assert first == again and first[0] == "study/silu/2/0/loss" and (tmp_path/"silu-2-0"/"log.jsonl").read_bytes() == log
    with pytest.raises(ExperimentError, match="did you mean 'silu'"): next(claims.study(["sliu"], folder=tmp_path))

@pytest.mark.parametrize("measure, trainer", [(lambda folder: claims.study(["silu"], 1, 2, folder), "start"), (lambda folder: claims.defects(seeds=1, steps=2, n=20), "train")])
def test_a_training_that_was_broken_off_is_not_scored(measure, trainer, tmp_path, monkeypatch):
    "The training engine ends cleanly at Ctrl-C and returns; what comes after it must not."
    trained = dataclasses.make_dataclass("Trained", ["status", "net"])
    monkeypatch.setattr(claims, trainer, lambda *args, **kwargs: trained("interrupted", torch.nn.Identity()))
    with pytest.raises(KeyboardInterrupt): next(measure(tmp_path))

def test_begun_a_step_below_even_the_truth_is_not_reached():
    process = build("process", experiment("report-cold-rows-4").values)
    class Knows(torch.nn.Module):
        def forward(self, z, u): return x
    x = to_unit(mnist("test").images[:5])
    torch.testing.assert_close(claims.from_below(process, Knows(), process.degrade(x, 7)) - x, process.degrade(x, 7) - process.degrade(x, 6), atol=1e-5, rtol=0)

def test_every_stored_run_of_the_study_is_measured_again(monkeypatch):
    seen = []
    monkeypatch.setattr(claims, "study", lambda arms, steps, folder: (seen.append((arm, steps)) or (f"study/{arm}/{steps}/{s}/loss", None) for arm in arms for s in range(3)))
    stored = {k for k in read_results(RESULTS) if k.startswith("study/")}
    assert stored and {k for k, _ in claims.recompute("study")} == stored
    seen.clear()
    assert len(list(claims.recompute("study/both"))) == 6 and set(seen) == {("both", 1000), ("both", 4000)}
    assert len(list(claims.recompute("study/silu"))) == 3

@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=3, max_size=9).filter(lambda v: len({a - b for a, b in v}) > 2))
def test_paired_is_scipys_paired_t_test(pairs):
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    mean, half = paired(a, b)
    their = stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx(tuple(their), rel=1e-6, abs=1e-9)

def test_study_losses_are_those_of_one_arm_and_one_length():
    rows = {f"study/{a}/{n}/{s}/loss": {"value": v + s} for a, n, v in (("T=1500", 1000, 10), ("T=1500,rescaled", 1000, 20), ("T=1500", 4000, 30)) for s in range(2)}
    assert [study_losses(*at, results=rows).tolist() for at in (("T=1500",), ("T=1500,rescaled",), ("T=1500", 4000), ("relu",))] == [[10, 11], [20, 21], [30, 31], []]
    with pytest.raises(ExperimentError, match="did you mean"): study_losses("T1500", results=rows)

@pytest.mark.parametrize("name", [n for n in claims.FIGURES if claims.FIGURES[n][0] not in ("epochs", "end") or "cold" in claims.FIGURES[n][1]])
def test_figures(name, figures):
    f = claims.figure(name, 2)
    kind, preset = claims.FIGURES[name]
    assert f.axes and all(a.has_data() for a in f.axes)
    if kind == "end": assert [a.get_title() for a in f.axes] == ["original", "degraded", "direct", "Algorithm 2"]
    if kind in ("loss", "FID", "IS"): assert f"epoch {max(claims.shipped(preset))} of {experiment(preset)['epochs']}" in f.axes[0].get_title()   # no shorter run is shown as the full one

@pytest.mark.parametrize("name", claims.PRINTED)
def test_tables(name):
    text, p = claims.table(name), claims.PRINTED[name]
    lines = {l.split("|")[1].strip(): [c.strip() for c in l.split("|")[2:-1]] for l in text.splitlines()}
    assert all(len(v) == 3 for v in lines.values())
    assert lines["epoch"] == [str(p.epoch), *2*[str(max(claims.shipped(p.run)))]]
    for k, v in p.said.items(): assert lines[k][0] == v
    way = "algorithm-2" if "cold" in p.run else "samples"
    stored = read_results(RESULTS)[f"{claims.place(list(claims.shipped(p.run).values())[-1], way)}/fid"]
    assert lines["FID"][2].startswith(f"{stored['value']:.3g} (") and f"n = {stored['n']:,}" in lines["FID"][2]

@pytest.mark.parametrize("value, interval, agrees", [(1.04, None, True), (.96, None, True), (1.06, None, False), (1.4, [.5, 1.5], True), (1.6, [.5, 1.5], False), (float("nan"), None, False)])
def test_agreement(value, interval, agrees):
    "The interval counts only where another processor measured."
    row = {"value": 1., "interval": interval, "hardware": "another machine"}
    assert claims.agrees(row, Result("x", value)) is agrees
    h = claims.hardware(torch.device("cpu"))
    assert claims.agrees(row | {"hardware": f"{h['cores']} cores, {h['cpu']}"}, Result("x", value)) is (agrees and value < 1.1)

# --- the command

def test_reproduce_lists_everything():
    out = run("reproduce")
    for name in [*claims.FIGURES, *claims.PRINTED, *RUNS, "study", "defects", "real"]: assert re.search(rf"(^|\s){re.escape(name)}(\b|-e\.\.\.)", out), name

def test_a_number_that_does_not_come_out_again_is_a_failure(tmp_path):
    out = run("reproduce", "real", "--check", "--results", RESULTS)
    assert out.count("stored") == 2 and "DIFFERENT" not in out
    rows = json.loads(RESULTS.read_text())
    for r in rows:
        if r["id"] == "protocol/real/fid": r["value"], r["interval"] = 2*r["value"], None
    (tmp_path/"r.json").write_text(json.dumps(rows))
    assert "1 number differs" in run("reproduce", "real", "--check", "--results", tmp_path/"r.json", code=1)
    assert "2 numbers differ" in run("reproduce", "real", "--check", "--results", tmp_path/"none.json", code=1)

def test_reproduce_records_what_it_measured(tmp_path):
    run("reproduce", "real", "--record", "--results", tmp_path/"r.json")
    rows = read_results(tmp_path/"r.json")
    assert set(rows) == {"protocol/real/fid", "protocol/real/is"} and all(r["command"] == "diffusion-nb reproduce real --record" for r in rows.values())
    stored = read_results(RESULTS)
    assert all(claims.agrees(stored[k], Result("x", r["value"])) for k, r in rows.items())

def test_reproduce_draws_a_figure_and_prints_a_table(tmp_path, monkeypatch, figures):
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    assert "figure-1.2.png" in run("reproduce", "figure-1.2", "--results", RESULTS)
    assert Image.open("figure-1.2.png").size[0] > 300
    assert "| FID | 115.9 |" in run("reproduce", "table-3.3", "--results", RESULTS)

def test_reproduce_goes_on_with_a_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    began = []
    monkeypatch.setattr("diffusion_nb.cli.train", lambda name, **kw: began.append((name, kw["run"])))
    run("reproduce", "report-cold-rows")
    assert [(n, str(r)) for n, r in began] == [("report-cold-rows", "runs/report-cold-rows")]
    assert "is a training" in run("reproduce", "report-ddpm", "--check", code=2)
    assert "one number of images" in run("reproduce", "real", "--check", "-n", 200, code=2)
    assert "no figure, table or measurement is called 'quick'" in run("reproduce", "quick", code=2)   # a preset, but none of the report's
    assert "nothing to measure" in run("reproduce", "figure-1.1", "--check")

@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_uniform_lines_stay_in_their_range(axis, each):
    "Means between the 5th and 95th percentile (NumPy's) of all lines or of each, spread evenly; and each image is one that D leaves as it is."
    from diffusion_nb.cold import Average
    from diffusion_nb.prior import line_means, uniform_lines
    D, x = Average(axis), to_unit(mnist("train").images[:3000])
    drawn = uniform_lines(D, x, each)(4000, torch.Generator().manual_seed(0))
    m, q = line_means(D, drawn).numpy(), np.quantile(line_means(D, x).numpy(), [.05, .95], axis=0 if each else None)
    assert (m >= q[0] - 1e-6).all() and (m <= q[1] + 1e-6).all() and (D(drawn, D.T) - drawn).abs().max() < 1e-6
    wide = np.broadcast_to(q[1] - q[0], 28) > .02
    assert np.allclose(((m - q[0])/np.maximum(q[1] - q[0], 1e-9)).mean(0)[wide], .5, atol=.03)
