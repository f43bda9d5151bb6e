"Metrics against other people's code, closed forms and bad input; results.json; what the classifier's file promises."
import json, math, os, subprocess, sys, time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given
import hypothesis.strategies as st
from scipy import linalg

from diffusion_nb import metrics as M
from diffusion_nb.data import mnist, to_unit
from diffusion_nb.training import read_pretrained, sha256

ROOT = Path(__file__).resolve().parents[1]

def cloud(n, d=8, seed=0, scale=1., shift=0.):
    g = torch.Generator().manual_seed(seed)
    return scale*torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=torch.Generator().manual_seed(99)) + shift

def features(x, seed=0, name="test", data="points"):
    logits = torch.randn(len(x), 10, generator=torch.Generator().manual_seed(seed))
    return M.Features(x, 3*logits, name, data)

class Fixed(torch.nn.Module):
    "A stand-in for a network: hands the 'images' on, so that a library sees exactly our features."
    num_features = 8
    def forward(self, x): return x.flatten(1)

# --- Fréchet distance

def by_sqrtm(a, b):
    (m1, s1), (m2, s2) = ((x.double().mean(0).numpy(), np.cov(x.double().numpy().T)) for x in (a, b))
    return float(((m1 - m2)**2).sum() + np.trace(s1 + s2 - 2*linalg.sqrtm(s1 @ s2).real))

@pytest.mark.parametrize("scale, shift", [(1, 0), (1, .3), (2, 0), (.1, 5)])
def test_fid_agrees_with_torchmetrics_and_with_sqrtm(scale, shift):
    from torchmetrics.image.fid import FrechetInceptionDistance
    x, y = cloud(700, seed=1, scale=scale, shift=shift), cloud(900, seed=2)
    theirs = FrechetInceptionDistance(feature=Fixed(), normalize=True)
    theirs.update(y, real=True), theirs.update(x, real=False)
    ours = M.fid(features(x), features(y), times=0).value
    assert ours == pytest.approx(theirs.compute().item(), rel=1e-4)
    assert ours == pytest.approx(by_sqrtm(x, y), rel=1e-4)

def test_fid_agrees_with_torch_fidelity_on_digit_features():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    x, y = M.real("test")[:2000], M.real("test")[2000:5000]
    stats = [fid_features_to_statistics(f.x.double()) for f in (x, y)]
    assert M.fid(x, y, times=0).value == pytest.approx(fid_statistics_to_metric(*stats, False)["frechet_inception_distance"], rel=1e-4)

@given(st.integers(1, 6), st.integers(0, 10**6))
def test_gaussians_known_exactly(d, seed):
    "Commuting covariances: |m|^2 + sum of (s1 - s2)^2, in any rotation, singular ones included."
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    s1, s2, m = torch.rand(3, d, generator=g, dtype=torch.float64)
    s1[0] = 0
    a, b = M.Moments(2., m, (Q*s1**2) @ Q.T), M.Moments(2., 0*m, (Q*s2**2) @ Q.T)
    exact = (m**2).sum().item() + ((s1 - s2)**2).sum().item()
    assert M.frechet_distance(a, b) == pytest.approx(exact, abs=1e-7)
    assert M.frechet_distance(a, b) == pytest.approx(M.frechet_distance(b, a), abs=1e-7)

def test_nearly_singular_covariances():
    "Condition number 1e16: no complex numbers, no NaN, and the exact value."
    s = torch.logspace(0, -8, 64, dtype=torch.float64)
    a, b = M.Moments(2., torch.zeros(64).double(), torch.diag(s**2)), M.Moments(2., torch.zeros(64).double(), torch.diag(4*s**2))
    assert M.frechet_distance(a, b) == pytest.approx((s**2).sum().item(), rel=1e-6)
    x = cloud(500, 8)
    flat = torch.cat([x, x], 1)
    assert M.frechet_distance(M.moments(flat), M.moments(flat + 1)) == pytest.approx(16, rel=1e-6)
    assert M.frechet_distance(M.moments(flat), M.moments(flat)) < 1e-6

@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(-1e6, 1e6))
def test_streaming_is_the_same_as_all_at_once(sizes, far):
    x = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(len(sizes)), dtype=torch.float64) + far
    m = M.stream_moments(x.split(sizes))
    assert m.n == len(x) and torch.allclose(m.mean, x.mean(0), rtol=1e-12)
    assert torch.allclose(m.scatter, (x - x.mean(0)).T @ (x - x.mean(0)), atol=1e-6*max(1, abs(far)*1e-6)*len(x))

def test_a_weight_is_a_repetition():
    x, w = cloud(50), torch.randint(0, 4, (50,))
    a, b = M.moments(x, w), M.moments(x.repeat_interleave(w, 0))
    assert a.n == b.n and torch.allclose(a.cov, b.cov)

@given(st.integers(2, 200), st.integers(1, 64))
def test_too_few_images_are_refused_and_few_are_qualified(n, d):
    x, ref = features(cloud(n, d)), features(cloud(300, d, seed=1))
    if n <= d:
        with pytest.raises(M.MetricError, match="singular"): M.fid(x, ref, 0)
    else: assert ("bias" in M.fid(x, ref, 0).note) == (n < 10*d)

def test_the_bootstrap_interval_holds_what_other_sets_score():
    ref, sets = features(cloud(5000)), [features(cloud(500, seed=s, shift=.5)) for s in range(10, 40)]
    values = torch.tensor([M.fid(x, ref, 0).value for x in sets])
    low, high = M.fid(sets[0], ref, 100).interval
    assert .5 < (high - low)/3.92/values.std() < 2

def test_fid_at_infinity_takes_the_bias_away():
    ref = features(torch.randn(60_000, 16, generator=torch.Generator().manual_seed(0)))
    x = features(torch.randn(4000, 16, generator=torch.Generator().manual_seed(1)) + .1)
    plain, r = M.fid(x, ref, 0).value, M.fid_infinity(x, ref)
    assert abs(r.value - .16) < .6*abs(plain - .16) + .02 and r.interval[0] < r.value < r.interval[1]
    with pytest.raises(M.MetricError, match="at least"): M.fid_infinity(features(cloud(50, 16)), ref)

# --- Inception score

def test_inception_score_agrees_with_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric
    x = features(cloud(1000), seed=3)
    assert M.inception_score(x, splits=1, times=0).value == pytest.approx(isc_features_to_metric(x.logits, splits=1)["inception_score_mean"], rel=1e-6)
    order = torch.randperm(1000, generator=M.stream(0, "splits"))
    theirs = isc_features_to_metric(x.logits[order], splits=10, shuffle=False)
    ours = M.inception_score(x, splits=10, times=0)
    assert ours.value == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert f"{theirs['inception_score_std']*math.sqrt(10/9):.2g}" in ours.note

def test_inception_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore
    x = features(cloud(600), seed=4)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(x.logits)
    assert M.inception_score(x, splits=1, times=0).value == pytest.approx(metric.compute()[0].item(), rel=1e-4)

@given(st.integers(2, 10), st.integers(20, 60))
def test_inception_score_lies_between_one_and_the_number_of_classes(classes, n):
    logits = 10*torch.randn(n, classes, generator=torch.Generator().manual_seed(n))
    v = M.inception_score(M.Features(torch.zeros(n, 2), logits), times=0, splits=2).value
    assert 1 - 1e-9 <= v <= classes + 1e-9

def test_inception_score_needs_images_for_its_splits():
    with pytest.raises(M.MetricError, match="splits"): M.inception_score(features(cloud(19)))
    assert "images a split" in M.inception_score(features(cloud(100)), times=0).note and "images a split" not in M.inception_score(features(cloud(600)), times=0).note

# --- KID

def test_kid_agrees_with_both_libraries():
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torchmetrics.image.kid import KernelInceptionDistance
    x, y = cloud(400, seed=1, shift=.2), cloud(400, seed=2)
    ours = M.kid(features(x), features(y)).value
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=400, verbose=False)["kernel_inception_distance_mean"]
    with pytest.warns(UserWarning, match="buffer"): metric = KernelInceptionDistance(feature=Fixed(), subsets=1, subset_size=400)
    metric.update(y, real=True), metric.update(x, real=False)
    assert ours == pytest.approx(theirs, rel=1e-4) and ours == pytest.approx(metric.compute()[0].item(), rel=1e-3)

def test_kid_is_unbiased_and_its_error_is_right():
    ref = features(cloud(3000))
    rs = [M.kid(features(cloud(60, seed=s)), ref) for s in range(100, 200)]
    v = torch.tensor([r.value for r in rs])
    se = torch.tensor([(r.interval[1] - r.value)/1.96 for r in rs])
    assert v.mean().abs() < 3.5*v.std()/10
    assert .6 < se.median()/v.std() < 1.8

# --- density and coverage

def test_density_and_coverage_as_naeem_et_al_write_them():
    x, y, k = cloud(300, seed=1, shift=.5), cloud(300, seed=2), 5
    d, c = M.density_coverage(features(x), features(y), times=0, k=k)
    r = torch.cdist(y, y).sort(1)[0][:, k]
    inside = torch.cdist(y, x) < r[:, None]
    assert d.value == pytest.approx(inside.sum().item()/k/300) and c.value == pytest.approx(inside.any(1).float().mean().item())

def test_balls_agree_with_torch_fidelitys_precision():
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    x, y = cloud(200, seed=1, shift=.5), cloud(250, seed=2)
    precision, recall = calculate_precision_recall_full(x, y, neighborhood=3)
    caught = lambda centres, points: M.inside(centres, M.radii(centres, 3), points)[1].unique().numel()/len(points)
    assert caught(y, x) == pytest.approx(float(precision)) and caught(x, y) == pytest.approx(float(recall))

def test_expected_coverage_is_what_chance_gives():
    got = [M.density_coverage(features(cloud(200, seed=s)), features(cloud(200, seed=s + 500)), 0) for s in range(30)]
    assert np.mean([d.value for d, _ in got]) == pytest.approx(1, abs=.05)
    assert np.mean([c.value for _, c in got]) == pytest.approx(M.expected_coverage(200, 200), abs=.01)

def test_a_dropped_mode_shows_in_coverage_only():
    centres = torch.eye(8)[:5]*30
    def draw(n, modes, seed): return features(centres[torch.arange(n) % modes] + torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)))
    d, c = M.density_coverage(draw(500, 4, 0), draw(500, 5, 1), 0)
    assert d.value == pytest.approx(1, abs=.15) and c.value == pytest.approx(.8*M.expected_coverage(500, 500), abs=.05)

# --- bad input

@pytest.mark.parametrize("x, says", [
    (torch.zeros(3, 1, 28, 28) + .7, "outside"), (torch.rand(3, 1, 28, 28)*2 - 1, "outside"), (torch.zeros(0, 1, 28, 28), "no images"),
    (torch.zeros(28, 28), "must be a tensor"), (torch.zeros(3, 2, 28, 28), "must be a tensor"), (torch.zeros(3, 1, 28, 28).long(), "int64"),
    (torch.full((3, 1, 28, 28), math.nan), "NaN"), (torch.full((3, 1, 28, 28), math.inf), "infinite"), (torch.ones(3, 1, 28, 28, dtype=torch.uint8), "lost their scale"),
    (np.zeros((3, 1, 28, 28)), "must be a tensor"), (torch.zeros(3, 1, 28, 28, dtype=torch.complex64), "complex")])
def test_images_that_are_refused(x, says):
    with pytest.raises(M.MetricError, match=says): M.pixels(x)
    with pytest.raises(M.MetricError): M.extract(x)

def test_clipping_is_for_overshoots_only():
    x = to_unit(mnist("test").images[:50])
    with pytest.raises(M.MetricError, match="outside"): M.pixels(x*1.02)
    assert M.pixels(x*1.02, clip=True).max() == 255
    for wrong in (x + .5, 2*x, 255*(x + .5)):
        with pytest.raises(M.MetricError, match="another range"): M.pixels(wrong, clip=True)

def test_features_that_do_not_match():
    a = features(cloud(100))
    for b, says in ((features(cloud(100, 5)), "two kinds"), (features(cloud(100), name="other"), "two kinds"), (features(cloud(100)*math.nan), "NaN")):
        for f in (M.fid, M.kid, M.density_coverage):
            with pytest.raises(M.MetricError, match=says): f(a, b)
    with pytest.raises(M.MetricError, match="at least 2"): M.kid(a[:1], a)
    with pytest.raises(M.MetricError, match="at least 6"): M.density_coverage(a[:5], a)
    with pytest.raises(M.MetricError, match="one network"): M.frechet_distance(M.moments(a.x), M.moments(a.x[:, :3]))
    with pytest.raises(M.MetricError, match="takes images"): M.extract(torch.zeros(2, 1, 32, 32))

def test_one_image():
    e = M.evaluate(mnist("test").images[:1], sets=1)
    assert all(math.isnan(e.scores[k].value) and "refused" in e.scores[k].note for k in ("FID", "KID", "IS", "density", "coverage"))
    json.dumps(e.as_dict(), allow_nan=False)

# --- the classifier

def test_what_is_shipped():
    tensors, card = read_pretrained("digits")
    path = ROOT/"diffusion_nb"/"weights"/"digits.safetensors"
    assert path.stat().st_size < 2_000_000 and card["sha256"] == sha256(path.read_bytes())
    test = mnist("test")
    if len(test.images) < 10_000: pytest.skip("only the small set is here")
    r = M.accuracy(M.shipped_digits(), *test)
    assert r.value >= .994 and r.value == pytest.approx(card["accuracy"], abs=3e-4)

def test_training_learns_and_a_seed_repeats_it():
    x, y = mnist("train").images[:2000], mnist("train").labels[:2000]
    nets = [M.train_digits(x, y, epochs=3, seed=s, progress=False) for s in (0, 0, 1)]
    keys = [M.weights_key(n) for n in nets]
    assert keys[0] == keys[1] != keys[2]
    assert M.accuracy(nets[0], x, y).value > .6 and not nets[0].training

def test_features_do_not_depend_on_the_batch():
    x = mnist("test").images[:100]
    assert torch.allclose(M.extract(x, batch_size=100).x, M.extract(x, batch_size=7).x, atol=1e-4)

def test_the_cache_is_keyed_by_images_and_weights(tmp_path, monkeypatch):
    x, seen = mnist("test").images[:30], []
    monkeypatch.setattr(M, "cache_dir", lambda: tmp_path)
    def extractor(key): return M.Extractor("e", 2, lambda b: seen.append(len(b)) or (torch.ones(len(b), 2), torch.ones(len(b), 10)), key)
    for images, key, computed in ((x, "a", 1), (x, "a", 1), (x, "b", 2), (x.flip(0), "b", 3), (x, "a", 3)):
        assert len(M.kept(images, extractor(key), "x")) == 30 and len(seen) == computed
    for f in (tmp_path/"features").iterdir(): f.write_bytes(f.read_bytes()[:50])
    assert len(M.kept(x, extractor("a"), "x")) == 30 and len(seen) == 4, "a damaged file is computed again"
    assert M.kept(x[:3], extractor("a"), "x", make=False) is None

def test_shares():
    r = M.share("s", 0, 10)
    assert r.value == 0 and r.interval[0] == 0 and .2 < r.interval[1] < .3
    f = M.Features(torch.zeros(40, 2), 20*torch.eye(10)[torch.arange(40) % 4], "e", "d")
    assert [r.value for r in M.digit_shares(f)] == [.25]*4 + [0]*6 and M.confident_digits(f).value == 1

# --- floors and evaluation

def test_the_floor_falls_and_every_result_says_what_it_is():
    small, large = (M.floor(n, sets=2) for n in (100, 400))
    assert small["FID"].value > 1.5*large["FID"].value
    for k, r in large.items(): assert r.n == 400 and r.features.startswith("digits") and "MNIST train" in r.data and r.interval[0] <= r.value <= r.interval[1]
    assert abs(large["KID"].value) < .02

@given(st.lists(st.floats(-5, 5), min_size=2, max_size=14))
def test_the_next_value(values):
    from scipy import stats
    mean, (low, high) = M.next_value(values)
    t = stats.t.ppf(.975, len(values) - 1)
    assert mean == pytest.approx(np.mean(values), abs=1e-9) and high - mean == pytest.approx(t*np.std(values, ddof=1)*math.sqrt(1 + 1/len(values)), rel=.01, abs=1e-9)

def test_evaluate_tells_digits_from_noise():
    x = to_unit(mnist("train").images[:200])
    good, bad = M.evaluate(x, "digits", sets=2), M.evaluate(torch.rand(200, 1, 28, 28) - .5, "noise", sets=2)
    assert good.scores["FID"].value < 2*good.floors["FID"].value and bad.scores["FID"].value > 20*bad.floors["FID"].value
    assert bad.scores["density"].value < .1 < good.scores["density"].value
    text = repr(good)
    assert all(k in text for k in M.METRICS) and "floor" in text and "200 images" in text and "digits   0:" in text
    json.dumps(good.as_dict(), allow_nan=False)

# --- Inception v3, of the right shape, with random weights

@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception")/"random.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    torch.save(net.state_dict(), path)
    return path

class Coloured(torch.utils.data.Dataset):
    "uint8 images (3, H, W), as torch-fidelity wants them."
    def __init__(self, x): self.x = x.expand(-1, 3, -1, -1).contiguous()
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i]

@pytest.mark.slow
def test_inception_is_torch_fidelitys_own_pipeline(random_inception, tmp_path):
    from torch_fidelity import calculate_metrics
    a, b = mnist("test").images[:24], torch.randint(0, 256, (24, 1, 28, 28), dtype=torch.uint8)
    e = M.inception_extractor(random_inception, layer="64")
    x, y = M.extract(a, e, batch_size=8), M.extract(b, e, batch_size=8)
    theirs = calculate_metrics(input1=Coloured(a), input2=Coloured(b), fid=True, kid=True, isc=True, feature_layer_fid="64", feature_layer_kid="64", cuda=False, verbose=False,
                               feature_extractor_weights_path=str(random_inception), kid_subsets=1, kid_subset_size=24, isc_splits=1, cache=False, batch_size=8)
    assert M.frechet_distance(M.moments(x.x), M.moments(y.x)) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3, abs=1e-6)
    assert M.kid(x, y, 0).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3, abs=2e-6)  # theirs is computed in float32
    assert M.inception_score(x, splits=1, times=0).value == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert theirs["kernel_inception_distance_mean"] > 1e-4 and "inception-v3 shape" in x.extractor and M.inception_score(x, splits=1, times=0).features.endswith("(1008 classes)")

@pytest.mark.slow
def test_inception_features_are_the_networks_own_with_its_own_resize(random_inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torchmetrics.image.fid import NoTrainInceptionV3
    a = mnist("test").images[:4]
    ours = M.extract(to_unit(a), M.inception_extractor(random_inception)).x
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(random_inception))(a.expand(-1, 3, -1, -1))[0]
    same, other = (NoTrainInceptionV3("inception-v3-compat", ["2048"], str(random_inception), antialias=v)(a.expand(-1, 3, -1, -1)) for v in (False, True))
    assert ours.shape == (4, 2048) and torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(ours, same, atol=1e-5)
    assert M.extract(a, M.inception_extractor(random_inception)).extractor != "inception-v3", "other weights are not called by its name"

def test_inception_offline(monkeypatch):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    def offline(*_, **__): raise URLError("unreachable")
    monkeypatch.setattr(module, "load_state_dict_from_url", offline)
    with pytest.raises(M.MetricError, match="weights-inception-2015-12-05-6726825d.pth.*Remedy.*inception_extractor"): M.inception_extractor()

def test_inception_files_that_are_none(tmp_path):
    pytest.importorskip("torch_fidelity")
    (tmp_path/"text.pth").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path/"other.pth")
    for name, says in (("nowhere.pth", "there is no"), ("text.pth", "cannot be read"), ("other.pth", "holds other weights")):
        with pytest.raises(M.MetricError, match=says): M.inception_extractor(tmp_path/name)

def test_without_torch_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(M.MetricError, match=r"pip install 'diffusion_nb\[inception\]'"): M.inception_extractor()

# --- results.json

@pytest.fixture
def row():
    return {"id": "a/b", "metric": "FID", "value": 1.5, "interval": [1., 2.], "n": 10, "features": None, "data": "x against y", "command": "make course", "seed": 0,
            "versions": {"python": "3", "torch": "2"}, "hardware": "2 cores", "date": "2026-11-22"}

def test_the_results_of_the_course_are_valid():
    assert M.validate_results(json.loads((ROOT/"results"/"results.json").read_text(encoding="utf-8"))) == []

@pytest.mark.parametrize("field, bad", [("id", "no-slash"), ("id", "a b/c"), ("metric", ""), ("value", math.nan), ("value", "1"), ("value", True), ("interval", [2, 1]), ("interval", [1]),
    ("interval", 3), ("n", 0), ("n", 1.5), ("features", ""), ("data", 3), ("command", None), ("seed", "0"), ("versions", {}), ("versions", {"python": 3, "torch": "2"}), ("hardware", ""),
    ("date", "22.11.2026")])
def test_entries_that_are_refused(row, field, bad):
    assert M.check_row(row) == []
    (said,) = M.check_row(row | {field: bad})
    assert field in said

def test_missing_and_foreign_fields(row):
    for k in row:
        if k != "data": assert any(k in s for s in M.check_row({i: v for i, v in row.items() if i != k}))
    assert "comment is not a field" in M.check_row(row | {"comment": 1})[0]
    assert M.check_row(3) and M.validate_results(3) and M.validate_results([row, row]) and M.validate_results([row, row | {"id": "a/a"}])

def test_record_and_quote(tmp_path, monkeypatch):
    path = tmp_path/"r.json"
    monkeypatch.setenv("DIFFUSION_NB_RESULTS", str(path))
    r = M.Result("FID", 1.23456789, (1, 2), 500, "digits (64)", "x against y")
    monkeypatch.delenv("DIFFUSION_NB_RECORD", raising=False)
    M.record("m/fid", r, "make course")
    assert not path.exists(), "a reader's run writes nothing"
    monkeypatch.setenv("DIFFUSION_NB_RECORD", "1")
    for i in ("m/fid", "a/fid", "m/fid"): M.record(i, r, "make course", seed=3)
    rows = json.loads(path.read_text())
    assert [x["id"] for x in rows] == ["a/fid", "m/fid"] and rows[0]["value"] == 1.2346 and M.validate_results(rows) == []
    assert str(M.quote("m/fid")) == repr(M.quote("m/fid")) == "FID 1.235 (95 %: 1 to 2, n = 500) [m/fid]"
    with pytest.raises(M.MetricError, match="no number 'm/fix'.*near: m/fid"): M.quote("m/fix")
    with pytest.raises(M.MetricError, match="value"): M.record("m/x", M.Result("FID", math.nan), "c")
    path.write_text("[{}]")
    with pytest.raises(M.MetricError, match="id is missing"): M.record("m/fid", r, "make course")
    assert path.read_text() == "[{}]", "what is not understood is not written over"

def page(source="", shown=""): return {"cells": [{"cell_type": "code", "source": [source], "outputs": [{"data": {"text/plain": [shown]}}]}]}

def test_pages_are_compared_with_the_results(row):
    rows = {"a/b": row}
    good = str(M.as_quote(row))
    assert M.check_quotes(page("quote('a/b')", good), rows) == []
    assert "'a/c'" in M.check_quotes(page('print(quote("a/c"))'), rows)[0]
    assert "another number" in M.check_quotes(page("", good.replace("1.5", "1.4")), rows)[0]
    assert "not in results" in M.check_quotes(page("", good.replace("a/b]", "a/c]")), rows)[0]
    assert M.check_quotes(page("x[1/2]", "n = 3 [no/id]"), rows) == []

def test_no_page_quotes_what_is_not_there():
    rows = M.read_results(ROOT/"results"/"results.json")
    said = {p.name: M.check_quotes(json.loads(p.read_text(encoding="utf-8")), rows) for p in sorted((ROOT/"nbs").glob("*.ipynb"))}
    assert not any(said.values()), said

def test_results_are_found_from_below(tmp_path, monkeypatch):
    monkeypatch.delenv("DIFFUSION_NB_RESULTS", raising=False)
    (tmp_path/"results").mkdir(), (tmp_path/"nbs").mkdir()
    (tmp_path/"results"/"results.json").write_text("[]")
    monkeypatch.chdir(tmp_path/"nbs")
    assert M.results_file() == tmp_path/"results"/"results.json" and M.read_results() == {}

# --- cost

def test_importing_it_is_light():
    code = "import sys, torch; before = set(sys.modules); import diffusion_nb.metrics; print(*sorted({m.split('.')[0] for m in set(sys.modules) - before} & {'scipy', 'torchvision', 'torchmetrics', 'torch_fidelity', 'matplotlib', 'pandas'}))"
    p = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert p.returncode == 0 and p.stdout.strip() == "", p.stdout + p.stderr

@pytest.mark.slow
def test_ten_thousand_images_in_a_minute():
    "The promise is 60 s on two free cores; the limit leaves room for a busy machine. Features of the real set are kept already."
    if len(mnist("train").images) < 60_000: pytest.skip("only the small set is here")
    x = mnist("train").images[:10_000]
    M.evaluate(x[:100], sets=4)
    M.floor(10_000, sets=1)
    start = time.process_time()
    e = M.evaluate(x, "training digits")
    assert e.scores["FID"].n == 10_000 and time.process_time() - start < 120
