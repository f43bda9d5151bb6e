"Degradations against loops, what Algorithm 2 preserves for any restorer, the losses, the process in the engine and on the command line, and what is refused."
import json, math

import numpy as np
import pytest
import torch
from scipy import stats
from hypothesis import given, settings
import hypothesis.strategies as st
from typer.testing import CliRunner

from diffusion_nb import cli, cold as c, experiments as x
from diffusion_nb.data import LO
from diffusion_nb.ddpm import GaussianProcess, State, last
from diffusion_nb.training import TrainingError, load_weights, read_card, save_pretrained

ORDERS = ("random", "outside-in", "inside-out", "backwards")

def gen(seed=0): return torch.Generator().manual_seed(seed)
def some(n=4, seed=0, size=28): return torch.rand(n, 1, size, size, generator=gen(seed)) - 0.5

averages = st.builds(lambda axis, group, order, seed: c.Average(axis, group, c.line_order(order, 28//group, seed)),
                     st.sampled_from(["rows", "columns"]), st.sampled_from([1, 2, 4, 7, 14, 28]), st.sampled_from(ORDERS), st.integers(0, 99))
degradations = st.one_of(averages, st.sampled_from([c.Blur(), c.Blur(5, 2.), c.Pixelate(), c.Pixelate((7, 14)), c.Mask(), c.Mask(3, 2.)]))
projections = st.one_of(averages, st.sampled_from([c.Pixelate(), c.Pixelate((7, 14)), c.Pixelate((2, 14, 28))]))

def loops(x, t, D):
    "The report's pseudocode, image by image and line by line."
    z = x.clone()
    for i, k in enumerate(t.tolist()):
        for j in D.order[:k]:
            lines = slice(j*D.group, (j + 1)*D.group)
            if D.axis == "rows": z[i, 0, lines] = x[i, 0, lines].mean()
            else: z[i, 0, :, lines] = x[i, 0, :, lines].mean()
    return z

# --- orders and degradations

def test_the_reports_orders():
    one = lambda kind: [i + 1 for i in c.line_order(kind)]
    assert one("outside-in")[:6] == [1, 28, 2, 27, 3, 26] and one("inside-out")[:6] == [14, 15, 13, 16, 12, 17]
    assert one("outside-in")[-2:] == [14, 15] and one("inside-out")[-2:] == [1, 28] and one("backwards") == list(range(28, 0, -1))

@given(st.sampled_from(ORDERS), st.integers(1, 40), st.integers(0, 2**31))
def test_an_order_visits_each_line_once(kind, n, seed):
    assert sorted(c.line_order(kind, n, seed)) == list(range(n)) and c.line_order(kind, n, seed) == c.line_order(kind, n, seed)

def test_the_random_order_is_the_one_of_the_shipped_weights():
    "Written down here, so that a torch that shuffles differently is noticed."
    assert c.line_order()[:8] == (4, 10, 3, 13, 23, 7, 21, 17) and c.line_order(n=7) == (4, 0, 5, 3, 2, 6, 1)

@given(averages, st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_the_mask_does_what_the_loops_do(D, seed):
    x, t = some(5, seed), torch.randint(0, D.T + 1, (5,), generator=gen(seed))
    torch.testing.assert_close(D(x, t), loops(x, t, D), atol=1e-6, rtol=0)
    assert torch.equal(D(x, 0), x) and D.T == 28//D.group

@given(degradations, st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_each_image_has_its_own_severity(D, seed):
    x, t = some(3, seed), torch.randint(0, D.T + 1, (3,), generator=gen(seed))
    torch.testing.assert_close(D(x, t), torch.cat([D(x[i:i+1], int(t[i])) for i in range(3)]), atol=1e-6, rtol=0)
    torch.testing.assert_close(D(x, torch.tensor(D.T)), D(x, D.T))
    assert torch.equal(D(x, torch.zeros(3, dtype=torch.long)), x), "step 0 is the image, bit for bit"
    assert D(x, D.T).dtype == x.dtype and D(x.double(), t).dtype == torch.float64

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    for D in (c.Average(), c.Average("columns", 4), c.Blur(), c.Pixelate(), c.Mask()):
        x, t = some(), torch.randint(0, D.T + 1, (4,), generator=gen())
        torch.testing.assert_close(D(x.cuda(), t.cuda()).cpu(), D(x, t), atol=1e-5, rtol=0)
        torch.testing.assert_close(D(x.cuda(), t).cpu(), D(x, t), atol=1e-5, rtol=0)

def test_on_the_meta_device_nothing_is_left_on_the_processor():
    "No GPU here: shapes at least, on a device that is not the processor."
    x = torch.empty(2, 1, 28, 28, device="meta")
    m = c.Average().mask(torch.tensor([3, 5]))
    assert m.shape == (2, 28) and m.sum(1).tolist() == [3, 5] and x.device.type == "meta"

def test_autocast_does_not_blur_the_blur():
    x, D = some(), c.Blur()
    with torch.autocast("cpu", torch.bfloat16): z = D(x, 7)
    assert torch.equal(z, D(x, 7)) and z.dtype == torch.float32

def test_what_the_others_do():
    x = some()
    torch.testing.assert_close(c.Pixelate()(x, 3), x.mean((2, 3), keepdim=True).expand_as(x))
    torch.testing.assert_close(c.Pixelate()(x, 1), torch.nn.functional.avg_pool2d(x, 2).repeat_interleave(2, 2).repeat_interleave(2, 3))
    torch.testing.assert_close(c.Blur()(c.Blur()(x, 3), 4), c.Blur()(x, 7), atol=1e-5, rtol=0)
    flat = torch.full_like(x, 0.25)
    torch.testing.assert_close(c.Blur()(flat, 20), flat)
    z = c.Mask()(x, 20)
    assert (z[:, :, 13:15, 13:15] - LO).abs().max() < 1e-2 and (z >= LO - 1e-6).all()

# --- algorithms

def nonsense(seed): return lambda z, s: torch.randn(z.shape, generator=gen(1000*seed + s))

@given(projections, st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_algorithm_2_keeps_what_it_was_given_for_any_restorer(D, seed):
    "D(z_{s-1}, s) = z_s at every step, and D(z_0, s) = z_s for all s."
    x = some(3, seed)
    path = [(D.T, D(x, D.T))] + [(s.t, s.z_t) for s in c.algorithm_2(nonsense(seed), D, D(x, D.T))]
    assert [t for t, _ in path] == list(range(D.T, -1, -1))
    for (s, z), (_, after) in zip(path, path[1:]): torch.testing.assert_close(D(after, s), z, atol=2e-5, rtol=0)
    for s, z in path: torch.testing.assert_close(D(path[-1][1], s), z, atol=2e-5, rtol=0)

@given(averages, st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_algorithm_1_does_not(D, seed):
    z_T = D(some(3, seed), D.T)
    first = next(c.algorithm_1(nonsense(seed), D, z_T))
    assert (D(first.z_t, D.T) - z_T).abs().max() > 1e-3   # Algorithm 2: below 2e-5

@given(degradations, st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_perfect_restorer_is_exact_with_both(D, seed):
    x = some(2, seed)
    for algorithm in (c.algorithm_1, c.algorithm_2):
        for s in algorithm(lambda z, s: x, D, D(x, D.T)): torch.testing.assert_close(s.z_t, D(x, s.t), atol=1e-5, rtol=0)
        assert isinstance(s, State) and s.t == 0

def test_a_step_changes_one_line_and_uses_its_contrast_only():
    D, x, guess = c.Average(), some(), some(seed=1)
    z = D(x, 20)
    after = next(s for s in [z - D(guess, 20) + D(guess, 19)])
    j = D.order[19]
    assert [i for i in range(28) if (after - z)[:, :, i].abs().max() > 1e-6] == [j]
    torch.testing.assert_close(after[:, :, j], z[:, :, j] + guess[:, :, j] - guess[:, :, j].mean(-1, keepdim=True))

def test_the_algorithms_are_lazy_and_ask_at_their_own_s():
    asked = []
    def R(z, s): asked.append(s); return z
    it = c.algorithm_2(R, c.Average(group=4), some())
    next(it), next(it)
    assert asked == [7, 6] and len(list(it)) == 5 and asked == [7, 6, 5, 4, 3, 2, 1]

# --- process and losses

def test_a_cold_process_offers_what_a_gaussian_one_does():
    offers = lambda p: {n for n in ("T", "degrade", "loss", "predict", "sample") if hasattr(p, n)}
    assert offers(c.ColdProcess()) == offers(GaussianProcess()) and len(offers(c.ColdProcess())) == 5

def test_t_is_drawn_from_1_to_T_inclusive():
    asked = []
    def net(z, u): asked.append((u*7).round().int()); return z
    for seed in range(30): c.ColdProcess(c.Average(group=4)).loss(net, some(32), generator=gen(seed))
    count = torch.cat(asked).bincount(minlength=8).tolist()
    assert count[0] == 0 and len(count) == 8 and min(count[1:]) > 90

def test_losses():
    x, D, t = some(), c.Average(), torch.tensor([1, 9, 20, 28])
    zero = lambda z, u: torch.zeros_like(z)
    torch.testing.assert_close(c.ColdProcess(D, "mse").loss(zero, x, t), x.square().mean())
    torch.testing.assert_close(c.ColdProcess(D, "l1").loss(zero, x, t), x.abs().mean())

@pytest.mark.parametrize("ahead", [1, 3, 28])
def test_the_energy_score_looks_at_the_lines_to_come(ahead):
    "By hand, line by line: those averaged at t, the last `ahead` of them."
    x, D, t, draws = some(), c.Average(), torch.tensor([1, 9, 20, 28]), []
    def net(z, u, noise): draws.append(noise); return noise
    got = c.ColdProcess(D, "energy", ahead=ahead).loss(net, x, t, generator=gen(1))
    (a, b), total = draws[0].chunk(2), 0.
    dev = lambda v, i, j: v[i, 0, j] - v[i, 0, j].mean()
    for i, k in enumerate(t.tolist()):
        lines = D.order[max(k - ahead, 0):k]
        total += sum(((dev(a, i, j) - dev(x, i, j)).norm() + (dev(b, i, j) - dev(x, i, j)).norm() - (dev(a, i, j) - dev(b, i, j)).norm())/2 for j in lines)/len(lines)
    torch.testing.assert_close(got, total/4, atol=1e-4, rtol=1e-4)
    assert not torch.equal(a, b)

def test_the_energy_score_is_proper():
    "Truth: a normal variable. Means and spreads that are wrong score worse."
    n = 200_000
    y, e1, e2 = (torch.randn(n, 1, generator=gen(k)) for k in range(3))
    score = lambda m, s: c.energy_score(m + s*e1, m + s*e2, y).mean().item()
    right = score(0., 1.)
    assert all(score(m, s) > right + 1e-3 for m, s in ((.3, 1.), (0., .7), (0., 1.4), (0., 0.)))
    assert abs(right - 1/math.sqrt(math.pi)) < .01   # E|X-y|/2 = 1/sqrt(pi)

@pytest.mark.parametrize("D", [c.Blur(), c.Pixelate(), c.Mask(), c.Average("columns", 4)], ids=lambda D: type(D).__name__)
def test_every_degradation_trains_and_samples(D):
    torch.manual_seed(0)
    for objective, net in (("mse", x.unet()), ("l1", x.unet()), ("energy", c.NoisyUNet())):
        p = c.ColdProcess(D, objective)
        loss = p.loss(net, some(), generator=gen())
        loss.backward()
        assert loss.isfinite() and any(w.grad is not None and w.grad.abs().sum() > 0 for w in net.parameters())
        states = list(p.sample(net, z_T=p.degrade(some(2), p.T), generator=gen()))
        assert [s.t for s in states] == list(range(p.T - 1, -1, -1)) and states[-1].z_t.shape == (2, 1, 28, 28)

def writer(order=None, axis="rows", **kwargs):
    torch.manual_seed(0)
    net = c.LineWriter(c.line_order() if order is None else order, axis, **kwargs)
    with torch.no_grad():
        for layer in (net.pen.shade, net.pen.recall, net.pen.hint, net.guess, net.idea): layer.weight.mul_(2)   # a character of its own
        net.plans.uniform_(generator=gen())
    return net.eval()

@torch.no_grad()
@pytest.mark.parametrize("order, axis", [((0, 1), "rows"), ((1, 0), "rows"), ((1, 0), "columns")])
def test_a_writer_draws_what_it_scores(order, axis):
    "All 16 images of 2 x 2 pixels: the probabilities add up to 1, and the frequencies follow them."
    net = writer(order, axis, levels=2, past=2, plans=3, cut=0., plan_cut=0.)
    every = torch.tensor([[i >> k & 1 for k in (3, 2, 1, 0)] for i in range(16)]).view(16, 1, 2, 2) + LO
    z = torch.tensor([[-.2, -.2], [.1, .1]])
    z = (z if axis == "rows" else z.T).expand(40_000, 1, 2, 2)
    D = net.degradation
    ink = D.lines(every) - LO
    p = (-2*net.nats(ink, D.lines(z[:16]).mean(2) - LO, every_plan=True).sum(1)).exp()
    assert ((-2*net(z[:16], torch.ones(16), x=every).sum(1)).exp() < p).all(), "what is minimised is a bound"
    drawn = net(z, torch.ones(40_000), torch.randn(z.shape, generator=gen(1)))
    assert abs(p.sum().item() - 1) < 1e-5 and p.max() < .9
    flat = lambda v: (D.lines(v) - D.lines(v).mean(2, keepdim=True)).flatten(1)    # drawn lines have their means put right: 00 and 11 become the same
    for k in flat(every).unique(dim=0):
        said, came = p[(flat(every) - k).abs().amax(1) < .1].sum(), ((flat(drawn) - k).abs().amax(1) < .1).float().mean()
        assert abs(said - came) < .015

@torch.no_grad()
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_writer_looks_only_at_lines_restored_before(axis, order):
    net = writer(c.line_order(order), axis)
    D, x = net.degradation, some()
    net.plans.zero_()                                          # the true plan is a secret of the whole image
    for s in (28, 20, 3):
        z, other = D(x, s), some(seed=1)
        mixed = other - D(other, s) + z                        # the same z_s, other lines below it
        a, b = (net(D(v, 28), torch.ones(4), x=v) for v in (x, mixed))
        due, known = D.order[s - 1], [j for j in range(28) if j not in D.order[:s]]
        torch.testing.assert_close(a[:, known], b[:, known], atol=1e-5, rtol=1e-4)
        states = lambda v, **k: net.reader(D.lines(v) - LO, D.lines(v).mean(2) - LO, **k)[0]
        torch.testing.assert_close(states(x)[:, 28 - s], states(z, only=28 - s)[:, 0], atol=1e-4, rtol=1e-3)
        assert (a[:, due] - b[:, due]).abs().max() > 1e-4

@torch.no_grad()
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_writer_writes_only_what_is_due_and_keeps_means(axis):
    net = writer(axis=axis)
    D, x, t = net.degradation, some(), torch.tensor([1, 9, 20, 28])
    p = c.ColdProcess(D, "likelihood")
    z = D(x, t)
    a = p.predict(net, z, t, generator=gen(1))
    changed = (D.lines(a) - D.lines(z)).abs().amax(2) > 1e-6
    assert torch.equal(changed, D.mask(t)), "what was known stays"
    torch.testing.assert_close(D(a, t), z, atol=1e-6, rtol=0)
    j = D.order[19]
    a = p.predict(net, D(x, 20), 20, generator=gen(1), due=D.mask(20) & ~D.mask(19))
    assert ((D.lines(a) - D.lines(D(x, 20))).abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist() == [j]
    blank = torch.full((2, 1, 28, 28), LO)
    assert torch.equal(last(p.sample(net, z_T=blank, generator=gen())).z_t, blank)

@torch.no_grad()
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_a_writer_plans(axis):
    "Plans are centres of the data, in place; the loss is that of plan and line; lines are drawn with the plan's probabilities."
    net, x = writer((1, 0, 3, 2), axis, levels=2, past=2, plans=3), (torch.rand(300, 1, 4, 4, generator=gen()) > .5)
    net.prepare((x*255).to(torch.uint8))
    as_lines = lambda v: v[:, 0] if axis == "rows" else v[:, 0].mT
    nearest = (as_lines(x).float()[:, None] - net.plans).square().sum((2, 3)).argmin(1)
    assert torch.equal(net.plan(as_lines(x).float()), nearest) and len(nearest.unique()) == 3
    for k in range(3): torch.testing.assert_close(net.plans[k], as_lines(x)[nearest == k].float().mean(0), atol=.15, rtol=0)
    j = net.order[-1]
    i = as_lines(x)[:, j].any(1).nonzero()[0]                # a line without ink would leave no choice
    v, nearest = as_lines(x)[i].float(), nearest[i]
    m = v.mean(2)
    h, near = net.reader(v, m)
    f = net.look(h[0, :1], near[0, :1], torch.tensor([0]), nearest)
    by_hand = net.pen(f, v[:, j], 4*m[:, j])/4 - net.guess(h[0, :1]).log_softmax(1)[:, nearest[0]]/4
    torch.testing.assert_close(net.nats(v, m)[:, 0], by_hand)

def test_choices_follow_the_probabilities_and_leave_a_uniform_number():
    logits, chance = torch.tensor([[0., 1., 2.]]).expand(40_000, 3), torch.rand(40_000, generator=gen())
    def share(cut): return c.choose(logits, chance, cut)[0].bincount(minlength=3)/40_000
    torch.testing.assert_close(share(0.), logits[0].softmax(0), atol=.01, rtol=0)
    torch.testing.assert_close(share(.2), torch.tensor([0., 1/(1 + math.e), math.e/(1 + math.e)]), atol=.01, rtol=0)   # e^-2 is below a fifth
    assert share(1.).tolist() == [0, 0, 1]
    for cut in (0., .2, 1.):
        k, left = c.choose(logits, chance, cut)
        assert all(stats.kstest(left[k == i].numpy(), "uniform").pvalue > .001 for i in k.unique())
    assert c.choose(logits[:2], torch.tensor([0., 1.]))[0].tolist() == [0, 2]
    for k in range(3):                                        # the ends of [0, 1] never take what was cut, and leave a number
        peak = torch.full((1000, 3), -3.) + 6*torch.nn.functional.one_hot(torch.tensor(k), 3) + 1e-3*torch.rand(1000, 3, generator=gen(k))
        for end in (0., 1.):
            took, left = c.choose(peak, torch.full((1000,), end), cut=.2)
            assert (took == k).all() and left.isfinite().all()

@torch.no_grad()
def test_the_likelihood_is_that_of_all_steps():
    net, x = writer(), some()
    p, D = c.ColdProcess(c.Average(), "likelihood"), c.Average()
    nats = net(D(x, 28), torch.ones(4), x=x)
    torch.testing.assert_close(p.loss(net, x), nats.mean())
    t = torch.tensor([1, 9, 20, 28])
    torch.testing.assert_close(p.loss(net, x, t), torch.stack([nats[i, list(D.order[:k])].mean() for i, k in enumerate(t.tolist())]).mean(), atol=1e-5, rtol=1e-5)

def test_a_network_for_another_order_is_refused():
    other = c.Average(order=c.line_order(seed=1))
    for p in (c.ColdProcess(other, "likelihood"), c.ColdProcess(c.Average("columns"), "likelihood")):
        with pytest.raises(ValueError, match="the network restores Average.axis='rows'"): p.loss(writer(), some())
        with pytest.raises(ValueError, match="the network restores"): next(p.sample(writer(), z_T=p.degrade(some(), 28)))
    _, net, _ = c.pretrained("cure-mse")
    with pytest.raises(ValueError, match="the network restores"): next(c.ColdProcess(other).sample(net, z_T=other(some(), 28)))

def test_a_writer_needs_single_lines_and_an_axis():
    with pytest.raises(ValueError, match="must average single lines"): c.ColdProcess(c.Blur(), "likelihood").loss(torch.nn.Identity(), some())
    with pytest.raises(ValueError, match="must average single lines"): c.ColdProcess(c.Average(group=4), "likelihood").loss(torch.nn.Identity(), some())
    with pytest.raises(ValueError, match='"rows" or "columns"'): c.LineWriter(range(28), "diagonals")
    with pytest.raises(ValueError, match="permutation"): c.LineWriter([0]*28)
    with pytest.raises(ValueError, match="from 0 to 1"): c.LineWriter(range(28), cut=7)
    with pytest.raises(ValueError, match="images must be"): writer()(some(size=14), torch.ones(4), some(size=14))

def test_draws_follow_the_generator():
    p, net = c.ColdProcess(objective="energy"), c.NoisyUNet()
    z = p.degrade(some(2), 28)
    with torch.no_grad(): net.out[-1].weight.normal_(generator=gen()), net.stem.weight.normal_(generator=gen())
    a, b, d = (last(p.sample(net, z_T=z, generator=gen(k))).z_t for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, d)

# --- engine and command line

def run(*args, code=0):
    r = CliRunner().invoke(cli.app, [str(a) for a in args], prog_name="diffusion-nb")
    assert r.exit_code == code, f"exit code {r.exit_code}\n{r.output}"
    assert "Traceback" not in r.output
    return r.output

SMALL = ["--set", "data=mnist_small", "--set", "images=128", "--set", "batch_size=32", "--set", "precision=fp32", "--set", "start=mnist_small", "--no-progress"]

@pytest.mark.parametrize("name, axis, group, epochs", [("rows", "rows", 1, 80), ("columns", "columns", 1, 60), ("rows-4", "rows", 4, 80), ("columns-4", "columns", 4, 60)])
def test_the_reports_presets(name, axis, group, epochs):
    "Table 2.1 and the appendix."
    e = x.experiment(f"report-cold-{name}")
    assert [e[k] for k in ("process", "kind", "axis", "group", "order", "loss", "epochs", "lr", "hidden", "batch_size", "act", "clip", "schedule", "optimizer")] == \
           ["cold", "average", axis, group, "random", "mse", epochs, 2e-4, (16, 32, 32, 16), 128, "gelu", None, "constant", "adam"]
    assert x.build("process", e.values).T == 28//group and "betas" not in e.values

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")/"cold"
    run("train", "report-cold-columns-4", *SMALL, "--set", "hidden=4,4", "--set", "sample_every=1", "--steps", 8, "--run", folder)
    return folder

def test_train_sample_evaluate(tiny, tmp_path):
    assert read_card(tiny)["status"] == "finished" and list((tiny/"samples").glob("epoch-*.png"))
    run("sample", tiny, "-n", 4, "-o", tmp_path/"a.png", "--array", tmp_path/"a.npy", "--gif", tmp_path/"a.gif")
    a = torch.from_numpy(np.load(tmp_path/"a.npy"))
    D = c.Average("columns", 4)
    start = c.some_images("mnist_small")(4, torch.Generator().manual_seed(x.load_run and __import__("diffusion_nb.training", fromlist=["seed_for"]).seed_for(0, "samples")))
    torch.testing.assert_close(D(a, 7), D(start, 7), atol=1e-5, rtol=0)
    run("evaluate", tiny, "-n", 40, "--json")
    r = json.loads((tiny/"evaluation.json").read_text())
    assert r["ranges"][-1]["t"][1] == 7 and 0 < r["loss"] < 1

def test_a_run_goes_on_exactly(tmp_path):
    args = ["train", "cold-rows", *SMALL, "--set", "d_model=32", "--set", "schedule=constant", "--set", "keep_every=0"]
    run(*args, "--steps", 4, "--run", tmp_path/"a")
    run(*args, "--steps", 2, "--run", tmp_path/"b"), run(*args, "--steps", 4, "--run", tmp_path/"b")
    assert (tmp_path/"a"/"ema.safetensors").read_bytes() == (tmp_path/"b"/"ema.safetensors").read_bytes()

def test_another_order_is_refused(tiny, tmp_path, monkeypatch):
    "When training goes on, when a run is loaded, and when shipped weights are used."
    assert "belongs to another run: process" in run("train", "report-cold-columns-4", *SMALL, "--set", "hidden=4,4", "--set", "sample_every=1", "--set", "order_seed=1", "--steps", 8, "--run", tiny, code=1)
    x.ship(tiny, "tiny", folder=tmp_path)
    process, net, card = c.pretrained("tiny", folder=tmp_path)
    assert process.degradation == c.Average("columns", 4) and card["step"] == 8
    mine = load_weights(x.new_network(x.read_experiment(tiny).values), tiny)
    for a, b in zip(net.parameters(), mine.parameters()): torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    for other in (c.Average("rows", 4), c.Average("columns", 4, c.line_order("inside-out", 7)), c.Average("columns")):
        with pytest.raises(ValueError, match="was trained with Average.*cannot restore"): c.pretrained("tiny", c.ColdProcess(other), tmp_path)
    monkeypatch.setattr(torch, "randperm", lambda n, generator=None: torch.arange(n))   # a torch that shuffles differently
    with pytest.raises(ValueError, match="and its card now means"): c.pretrained("tiny", folder=tmp_path)
    with pytest.raises(x.ExperimentError, match="the run was trained with"): x.load_run(tiny)

def test_shipped_weights_have_their_cards():
    from diffusion_nb.training import pretrained_folder
    names = sorted(p.stem for p in pretrained_folder().glob("*cold-*.safetensors"))
    assert "cold-rows" in names
    for name in names:
        process, net, card = c.pretrained(name)
        assert {"command", "seed", "minutes", "step", "epoch", "experiment", "sha256", "hardware"} <= set(card), name
        assert (pretrained_folder()/f"{name}.safetensors").stat().st_size < 2e6 and not any(w in json.dumps(card) for w in ("/tmp", "/root", "/work"))
        assert all(p.isfinite().all() for p in net.parameters())

# --- bad input

@pytest.mark.parametrize("f, says", [
    (lambda: c.Average()(some(), 29), "0..28, got 29"), (lambda: c.Average()(some(), -1), "0..28, got -1"), (lambda: c.Average()(some(), 0.5), "must be an integer"),
    (lambda: c.Average()(some(), torch.tensor([1, 2])), "one for each of the 4 images, got 2"), (lambda: c.Blur()(some(), 21), "0..20"), (lambda: c.Mask()(some(), torch.tensor([1, 2, 3])), "4 images, got 3"),
    (lambda: c.Average(order=range(27)), "permutation of 0..27"), (lambda: c.Average(order=[0]*28), "permutation of 0..27"), (lambda: c.Average(order=[*range(27), 28]), "27, 28|27 missing"),
    (lambda: c.Average(order=[*range(27), 0.5]), "permutation"), (lambda: c.Average(group=5), "do not divide 28 rows"), (lambda: c.Average(group=0), "do not divide"), (lambda: c.Average(group=2.), "do not divide"),
    (lambda: c.Average("diagonals"), '"rows" or "columns"'), (lambda: c.Average(size=30)(some(), 1), r"\(B, C, 30, 30\), got \(4, 1, 28, 28\)"), (lambda: c.Average()(some()[0], 1), "must be"),
    (lambda: c.Average()(some()*math.nan, 1), "NaN or infinite"), (lambda: c.line_order("sideways"), "random, outside-in, inside-out"), (lambda: c.Pixelate((3,)), "divide"), (lambda: c.Pixelate(()), "divide"),
    (lambda: c.Blur(0), "T from 1"), (lambda: c.Mask(3, -1.), "width above 0"), (lambda: c.ColdProcess(objective="mae"), "mse, l1, energy or likelihood"), (lambda: c.ColdProcess(algorithm=3), "1 or 2"),
    (lambda: c.ColdProcess(ahead=0), "whole number from 1"), (lambda: c.ColdProcess().loss(lambda z, u: z[:, :, 1:], some()), "must keep it"), (lambda: next(c.ColdProcess().sample(lambda z, u: z)), "starts from degraded images"),
    (lambda: c.ColdProcess().predict(lambda z, u: z, some(), 0), "1..28, got 0"), (lambda: c.cold(T=500), "T cannot be chosen"), (lambda: c.cold(kind="noise"), "kind must be one of"), (lambda: c.cold(start="imagenet"), "start must be")])
def test_bad_input(f, says):
    with pytest.raises((ValueError, TypeError), match=says): f()

@pytest.mark.parametrize("change, says", [("group=5", "groups of 5 do not divide 28"), ("order=0,1,2", "permutation of 0..27"), ("order=outside", "must be random, outside-in"), ("loss=mae", "mse, l1, energy or likelihood"), ("axis=diagonals", "rows"), ("betas=linear", "process=ddpm"), ("T=9", "T cannot be chosen")])
def test_bad_settings_on_the_command_line(change, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in " ".join(run("train", "report-cold-rows", "--set", change, code=2).split()) and not list(tmp_path.iterdir())

def test_a_network_that_does_not_draw_cannot_learn_to(tmp_path):
    assert "cannot take images" in run("train", "report-cold-rows", *SMALL, "--set", "loss=energy", "--steps", 2, "--run", tmp_path/"a", code=1)
