"What must hold for every schedule, every time step and every batch, and what must be refused, with which words."
import dataclasses
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, example, given
from torch.testing import assert_close

from diffusion_nb.data import batches, check_range, to_01, to_uint8, to_unit
from diffusion_nb.ddpm import GaussianProcess, State, last, mean_from_eps, x_from_eps
from diffusion_nb.forward import diffuse, diffuse_step, posterior
from diffusion_nb.networks import CNN, UNet, n_params
from diffusion_nb.schedule import Schedule, at, check_t, cosine, linear, report

def gen(seed=0): return torch.Generator().manual_seed(seed)

def randn(*shape, seed=0, dtype=torch.float64): return torch.randn(shape, dtype=torch.float64, generator=gen(seed)).to(dtype)

def near(a, b, tol=1e-9): assert_close(a, b, rtol=tol, atol=tol)

def net(z, u): return (1.3*z + 0.7*u.view(-1, *[1]*(z.ndim - 1))).sin()

steps = st.integers(1, 60)
linears = st.builds(linear, st.integers(21, 400))
unscaled = st.builds(lambda T, b, ratio: linear(T, b*ratio, b, rescale=False), steps, st.floats(1e-4, 0.5), st.floats(0.01, 1))
cosines = st.builds(cosine, st.integers(1, 400), st.floats(0.001, 0.1))
customs = st.lists(st.floats(1e-6, 0.9), min_size=1, max_size=30).map(lambda b: Schedule(torch.tensor([0., *b], dtype=torch.float64)))
schedules = st.one_of(linears, unscaled, cosines, customs)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
seeds = st.integers(0, 2**32 - 1)

@st.composite
def problems(draw, first=1):
    "A schedule, one time step for each image, images, noise."
    s, shape, seed = draw(schedules.filter(lambda s: s.T >= first)), draw(shapes), draw(seeds)
    t = torch.tensor(draw(st.lists(st.integers(first, s.T), min_size=shape[0], max_size=shape[0])))
    return s, t, randn(*shape, seed=seed), randn(*shape, seed=seed + 1)

# --- schedules

@given(schedules)
def test_alpha_falls_from_one(s):
    assert s.alpha.shape == s.beta.shape == s.sigma.shape == (s.T + 1,)
    assert s.alpha[0] == 1 and s.beta[0] == 0
    assert (s.alpha > 0).all() and (s.alpha.diff() < 0).all()
    near(s.alpha[1:]/s.alpha[:-1], 1 - s.beta[1:])

@given(st.integers(1, 2000))
@example(1)
@example(2)
def test_cosine_exists_for_every_length(T):
    s = cosine(T)
    assert s.T == T and s.alpha[0] == 1 and (s.alpha.diff() < 0).all() and s.beta.max() <= 0.999
    assert s.alpha[-1] < 2e-3

@given(st.integers(21, 2000))
@example(21)
def test_rescaling_keeps_the_end_of_the_linear_schedule(T):
    s = linear(T)
    assert s.T == T and s.alpha[0] == 1 and (s.alpha.diff() < 0).all() and (s.beta.diff() >= 0).all()
    assert s.alpha[-1] < 5e-5  # near 4.0e-5 for long schedules, less for short ones

@given(st.integers(1, 20))
def test_linear_says_when_it_cannot_rescale(T):
    with pytest.raises(ValueError, match=r"need 0 <= beta_1 <= beta_T < 1.*take T > 20"): linear(T)
    assert linear(T, rescale=False).T == T

@given(schedules)
def test_sigma_lies_between_zero_and_beta(s):
    assert (s.sigma >= 0).all() and (s.sigma**2 <= s.beta*(1 + 1e-9)).all()
    assert s.sigma[0] == s.sigma[1] == 0 and (s.sigma[2:] > 0).all()
    near(GaussianProcess(s, "beta").sigma**2, s.beta)
    assert torch.equal(GaussianProcess(s).sigma, s.sigma)

@given(schedules)
def test_signal_to_noise_falls(s):
    assert (s.snr[1:].diff() < 0).all() and s.snr[0] == float("inf")

@given(st.integers(1, 500), st.floats(1e-5, 0.3), st.floats(0.3, 0.9))
def test_the_reports_indexing(T, beta_1, beta_T):
    s = report(T, beta_1, beta_T)
    t = torch.arange(T + 1).double()
    near(s.beta, (beta_T - beta_1)*t/T + beta_1)
    near(s.alpha[0], torch.tensor(1 - beta_1, dtype=torch.float64))

BAD_BETAS = {"negative": [0, -0.1], "one": [0, 1.], "above one": [0, 0.1, 1.5], "nan": [0, float("nan")], "infinite": [0, float("inf")],
             "a single number": 0.1, "too short": [0.], "empty": [], "two dimensions": [[0, 0.1]]}
@pytest.mark.parametrize("beta", BAD_BETAS.values(), ids=BAD_BETAS)
def test_bad_betas_are_refused(beta):
    what = "one dimension" if torch.tensor(beta).ndim != 1 or len(beta) < 2 else r"must lie in \[0, 1\)"
    with pytest.raises(ValueError, match=what): Schedule(torch.tensor(beta))

@pytest.mark.parametrize("make", [linear, cosine])
@pytest.mark.parametrize("T", [0, -3])
def test_a_schedule_needs_a_step(make, T):
    with pytest.raises(ValueError, match=f"T must be at least 1, got {T}"): make(T)

@pytest.mark.parametrize("beta_1, beta_T", [(-1e-4, 0.02), (0.03, 0.02), (1e-4, 1.), (1e-4, float("nan"))])
def test_linear_refuses_bad_ends(beta_1, beta_T):
    with pytest.raises(ValueError, match="need 0 <= beta_1 <= beta_T < 1, got"): linear(1000, beta_1, beta_T)

def test_a_schedule_is_frozen_and_says_what_it_is():
    s = cosine(50)
    with pytest.raises(dataclasses.FrozenInstanceError): s.beta = torch.zeros(3)
    assert re.fullmatch(r"Schedule\(cosine, T=50, beta_1=.*, beta_T=0\.999, alpha_T=.*\)", repr(s))

@given(schedules, shapes, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.data())
def test_at_gives_each_image_its_own_value(s, shape, dtype, data):
    like = torch.zeros(shape, dtype=dtype)
    t = torch.tensor(data.draw(st.lists(st.integers(0, s.T), min_size=shape[0], max_size=shape[0])))
    v = at(s.alpha, t, like)
    assert v.shape == (shape[0], *[1]*(len(shape) - 1)) and v.dtype == dtype
    assert torch.equal(v.flatten(), s.alpha[t].to(dtype))
    assert at(s.alpha, t[0], like).shape == (1,)*len(shape)

# --- the equations

@given(problems())
def test_no_step_is_the_identity(p):
    s, _, x, eps = p
    assert torch.equal(diffuse(x, 0, s, eps), x)
    assert torch.equal(diffuse(x, torch.zeros(len(x), dtype=torch.long), s), x)

@given(problems(first=0))
def test_a_batch_is_a_loop_over_images(p):
    s, t, x, eps = p
    assert torch.equal(diffuse(x, t, s, eps), torch.cat([diffuse(x[i:i+1], int(t[i]), s, eps[i:i+1]) for i in range(len(x))]))

@given(problems())
def test_every_function_takes_a_time_for_each_image(p):
    s, t, z, x = p
    for f in (lambda z, x, t: diffuse_step(z, t, s, x), lambda z, x, t: posterior(z, x, t, s)[0],
              lambda z, x, t: x_from_eps(z, x, t, s), lambda z, x, t: mean_from_eps(z, x, t, s)):
        near(f(z, x, t), torch.cat([f(z[i:i+1], x[i:i+1], int(t[i])) for i in range(len(z))]))
    assert torch.equal(posterior(z, x, t, s)[1].flatten(), s.sigma[t])

@given(problems())
def test_x_from_eps_undoes_diffuse(p):
    s, t, x, eps = p
    assume(s.alpha[t].min() > 1e-6)  # where any x is left in z_t
    near(x_from_eps(diffuse(x, t, s, eps), eps, t, s), x, 1e-7)

@given(problems())
def test_one_step_is_the_kernel_of_one_step(p):
    s, t, x, eps = p
    near(diffuse_step(x, 1, s, eps), diffuse(x, 1, s, eps))

@given(problems())
def test_mean_from_eps_is_the_posterior_mean(p):
    "Eq. 18.35 is eq. 18.15 with the x of eq. 18.31 put in."
    s, t, z, eps = p
    assume(s.alpha[t].min() > 1e-9)
    near(mean_from_eps(z, eps, t, s), posterior(z, x_from_eps(z, eps, t, s), t, s)[0], 1e-7)

@given(problems(first=2))
def test_posterior_leaves_the_marginal_alone(p):
    "Noise z_{t-1} and then one step more, or draw z_t and go back: mean and variance of z_{t-1} given x are the same."
    s, t, x, _ = p
    a, before, zero = at(s.alpha, t, x), at(s.alpha, t - 1, x), torch.zeros_like(x)
    mean, sigma = posterior(a.sqrt()*x, x, t, s)
    near(mean, before.sqrt()*x)
    slope = posterior(a.sqrt()*x + 1, x, t, s)[0] - mean
    near(slope**2*(1 - a) + sigma**2, (1 - before).expand_as(x))

def test_a_step_without_noise_changes_nothing():
    "beta_t = 0 is allowed: no 0/0 may come of it."
    s, z, x = Schedule(torch.tensor([0, 0, 0, 0.1, 0])), randn(3, 1, 2, 2), randn(3, 1, 2, 2, seed=1)
    for t in (1, 2, 4):
        assert torch.equal(diffuse_step(z, t, s), z)
        near(mean_from_eps(z, x, t, s), z)
    near(posterior(x, x, 1, s)[0], x)
    assert all(state.z_t.isfinite().all() for state in GaussianProcess(s).sample(net, z_T=z))

# --- what is drawn and what is given

@given(problems(), seeds)
def test_noise_is_drawn_from_the_generator(p, seed):
    s, t, x, _ = p
    for f in (lambda **k: diffuse(x, t, s, **k), lambda **k: diffuse_step(x, t, s, **k), lambda **k: GaussianProcess(s).degrade(x, t, **k)):
        with_noise = f(eps=torch.randn(x.shape, dtype=x.dtype, generator=gen(seed)))
        assert torch.equal(f(generator=gen(seed)), with_noise)
        assert not torch.equal(f(generator=gen(seed + 1)), with_noise)

def test_inputs_are_left_alone():
    s, x, eps = linear(50), randn(3, 1, 2, 2), randn(3, 1, 2, 2, seed=1)
    t, copies = torch.tensor([1, 7, 50]), (x.clone(), eps.clone())
    diffuse(x, t, s, eps), diffuse_step(x, t, s, eps), posterior(x, eps, t, s), mean_from_eps(x, eps, t, s), x_from_eps(x, eps, t, s)
    list(GaussianProcess(s).sample(net, z_T=x, generator=gen()))
    assert torch.equal(x, copies[0]) and torch.equal(eps, copies[1])

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [linear, cosine])
def test_dtype_is_kept_and_its_precision_used(make, dtype):
    "alpha_1 = 0.9999 rounds to 1 in half precision and 1 - alpha_1 loses half its digits in float32: coefficients belong in float64."
    s, t = make(1000), torch.arange(1, 1001)
    z, e = randn(1000, 1, 2, 2, dtype=dtype), randn(1000, 1, 2, 2, seed=1, dtype=dtype)
    process = GaussianProcess(s)
    fs = {"diffuse": lambda z, e: diffuse(z, t, s, e), "diffuse_step": lambda z, e: diffuse_step(z, t, s, e),
          "posterior": lambda z, e: posterior(z, e, t, s)[0], "sigma": lambda z, e: posterior(z, e, t, s)[1], "mean": lambda z, e: mean_from_eps(z, e, t, s),
          "x_from_eps": lambda z, e: x_from_eps(z[:500], e[:500], t[:500], s)}
    for name, f in fs.items():
        out, exact = f(z, e), f(z.double(), e.double())
        assert out.dtype == dtype, name
        assert out.isfinite().all(), f"{name} is not finite at t = {t[:len(out)][~out.isfinite().flatten(1).all(1)].tolist()[:5]}"
        # a few roundings of each of the terms
        assert_close(out.double(), exact, rtol=0, atol=8*torch.finfo(dtype).eps*float(exact.abs().max()) + 1e-15, msg=lambda m: f"{name}: {m}")
    assert process.loss(net, z, t, e).dtype == dtype
    state = process.step(net, z, 1)
    assert state.z_t.dtype == state.x_hat.dtype == dtype and state.z_t.isfinite().all()

# --- refusals

S = linear(50)
Z, E = randn(3, 1, 2, 2), randn(3, 1, 2, 2, seed=1)
FROM_0 = {"diffuse": lambda t: diffuse(Z, t, S, E), "degrade": lambda t: GaussianProcess(S).degrade(Z, t, E), "check_t": lambda t: check_t(t, 50, 0)}
FROM_1 = {"diffuse_step": lambda t: diffuse_step(Z, t, S, E), "posterior": lambda t: posterior(Z, E, t, S), "x_from_eps": lambda t: x_from_eps(Z, E, t, S),
          "mean_from_eps": lambda t: mean_from_eps(Z, E, t, S), "loss": lambda t: GaussianProcess(S).loss(net, Z, t, E),
          "predict": lambda t: GaussianProcess(S).predict(net, Z, t), "step": lambda t: GaussianProcess(S).step(net, Z, t), "check_t_1": lambda t: check_t(t, 50)}
TIMED = [(name, f, first) for first, fs in ((0, FROM_0), (1, FROM_1)) for name, f in fs.items()]
timed = pytest.mark.parametrize("name, f, first", TIMED, ids=[n for n, *_ in TIMED])

@timed
def test_times_outside_the_schedule_are_refused(name, f, first):
    f(first), f(50)
    for t in (first - 1, -7, 51, 10**6):
        with pytest.raises(ValueError, match=rf"t must lie in {'[01]' if name == 'loss' else first}\.\.50, got {t}$"): f(t)
    for bad in (first - 1, 51):
        with pytest.raises(ValueError, match=f"got {bad}$"): f(torch.tensor([1, bad, 2])) if name != "step" else f(bad)

@timed
@pytest.mark.parametrize("t", [1., 1.5, True, float("nan"), torch.tensor([1., 2., 3.]), torch.tensor([True, True, False]), torch.tensor(2, dtype=torch.float16)], ids=str)
def test_times_that_are_not_integers_are_refused(name, f, first, t):
    with pytest.raises(TypeError, match=r"t must be an integer in [01]\.\.50, got torch\.(float|bool)"): f(t)

@pytest.mark.parametrize("name", ["diffuse", "degrade", "diffuse_step", "posterior", "x_from_eps", "mean_from_eps", "loss"])
@pytest.mark.parametrize("t", [torch.tensor([1, 2]), torch.tensor([1, 2, 3, 4]), torch.tensor([[1], [2], [3]]), torch.tensor([], dtype=torch.long)], ids=["two", "four", "column", "none"])
def test_times_of_the_wrong_number_are_refused(name, t):
    with pytest.raises(ValueError, match=re.escape(f"one for each of the 3 images, got shape {tuple(t.shape)}")): (FROM_0 | FROM_1)[name](t)

@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_every_integer_dtype_is_a_time(dtype):
    t = torch.tensor([1, 25, 50])
    assert torch.equal(diffuse(Z, t.to(dtype), S, E), diffuse(Z, t, S, E))
    assert torch.equal(diffuse(Z, [1, 25, 50], S, E), diffuse(Z, t, S, E))

TAKES_IMAGES = {"diffuse": lambda x: diffuse(x, 3, S), "diffuse_step": lambda x: diffuse_step(x, 3, S), "posterior, x": lambda x: posterior(torch.zeros_like(x), x, 3, S),
                "posterior, z_t": lambda x: posterior(x, torch.zeros_like(x), 3, S), "degrade": lambda x: GaussianProcess(S).degrade(x, 3),
                "sample": lambda x: last(GaussianProcess(S).sample(net, z_T=x)), "loss": lambda x: GaussianProcess(S).loss(net, x, 3)}
takes_images = pytest.mark.parametrize("f", TAKES_IMAGES.values(), ids=TAKES_IMAGES)

@takes_images
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_pixels_are_refused(f, dtype):
    with pytest.raises(TypeError, match=rf"must be a float tensor, got {dtype}; `to_unit` converts pixels"): f(torch.zeros(3, 1, 2, 2, dtype=dtype))

@takes_images
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_refused(f, bad):
    x = torch.zeros(3, 1, 2, 2)
    x[1, 0, 1, 1] = x[2, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="holds 2 values that are NaN or infinite"): f(x)

@pytest.mark.parametrize("f", [lambda x: diffuse(x, 3, S), lambda x: diffuse_step(x, 3, S)])
def test_what_is_no_batch_is_refused(f):
    with pytest.raises(ValueError, match="must be a batch"): f(torch.tensor(0.5))
    with pytest.raises(TypeError, match="must be a float tensor, got list"): f([0.5])

SHAPED = {"diffuse": lambda e: diffuse(Z, 3, S, e), "diffuse_step": lambda e: diffuse_step(Z, 3, S, e), "degrade": lambda e: GaussianProcess(S).degrade(Z, 3, e),
          "loss": lambda e: GaussianProcess(S).loss(net, Z, 3, e), "posterior": lambda e: posterior(Z, e, 3, S), "x_from_eps": lambda e: x_from_eps(Z, e, 3, S),
          "mean_from_eps": lambda e: mean_from_eps(Z, e, 3, S), "the network": lambda e: GaussianProcess(S).step(lambda z, u: e, Z, 3)}
@pytest.mark.parametrize("f", SHAPED.values(), ids=SHAPED)
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (3, 2, 2), (3, 1, 1, 1), (2, 2), (3, 3, 2, 2)], ids=str)
def test_noise_of_another_shape_is_refused_not_broadcast(f, shape):
    with pytest.raises(ValueError, match="shape"): f(torch.zeros(shape, dtype=torch.float64))

def test_an_unknown_variance_is_refused():
    with pytest.raises(ValueError, match='"posterior" or "beta", not \'small\''): GaussianProcess(S, "small")

# --- the loss

class Notes:
    "A network that notes what it is asked."
    def __init__(self): self.asked = []
    def __call__(self, z, u):
        self.asked.append((z.clone(), u.clone()))
        return net(z, u)

@given(problems(), st.booleans())
def test_the_loss_is_the_mean_squared_error_of_the_noise(p, one_t):
    s, t, x, eps = p
    if one_t: t = int(t[0])
    notes = Notes()
    loss = GaussianProcess(s).loss(notes, x, t, eps)
    (z, u), = notes.asked
    assert u.shape == (len(x),) and u.dtype == x.dtype
    near(u.double(), torch.as_tensor(t).double().expand(len(x))/s.T, 1e-6)
    assert torch.equal(z, diffuse(x, t, s, eps))
    near(loss, ((net(z, u) - eps)**2).mean())

def test_training_asks_for_every_t_from_1_to_T_alike():
    "The report drew 1..T-1, and then sampled from T."
    notes, n, T = Notes(), 30_000, 5
    GaussianProcess(linear(T, rescale=False)).loss(notes, torch.zeros(n, 1), generator=gen())
    counts = torch.bincount((notes.asked[0][1]*T).round().long(), minlength=T + 1)
    assert counts[0] == 0 and len(counts) == T + 1
    assert ((counts[1:] - n/T).abs() < 5*(n/T)**.5).all(), counts

def test_the_loss_follows_its_generator():
    process, x = GaussianProcess(S), randn(8, 1, 2, 2)
    assert process.loss(net, x, generator=gen(1)) == process.loss(net, x, generator=gen(1)) != process.loss(net, x, generator=gen(2))

NETWORKS = {"CNN": CNN, "narrow CNN": lambda: CNN(hidden=(3,), d_time=8), "UNet": UNet, "narrow UNet": lambda: UNet((16, 16, 16))}
networks = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)

def awake(make, seed):
    "A network with every parameter off its first value: some start at zero on purpose, and would hide what lies behind them."
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1*torch.randn_like(p))
    return model

@networks
@pytest.mark.parametrize("seed, n", [(0, 1), (1, 3)])
def test_the_gradient_reaches_every_parameter(make, seed, n):
    model = awake(make, seed)
    loss = GaussianProcess(S).loss(model, randn(n, 1, 28, 28, seed=seed, dtype=torch.float32), generator=gen(seed))
    assert loss.isfinite() and loss > 0
    loss.backward()
    for name, p in model.named_parameters(): assert p.grad is not None and p.grad.isfinite().all() and float(p.grad.abs().max()) > 1e-7, name

def test_n_params_counts_what_is_trained():
    model = CNN()
    total, first = sum(p.numel() for p in model.parameters()), next(model.parameters())
    assert n_params(model) == total
    first.requires_grad_(False)
    assert n_params(model) == total - first.numel()

@networks
def test_a_network_keeps_images_apart_and_hears_the_time(make):
    model = awake(make, 0).double().eval()
    z, u = randn(3, 1, 28, 28), torch.tensor([0.1, 0.5, 1.]).double()
    with torch.no_grad():
        out = model(z, u)
        assert out.shape == z.shape
        near(out, torch.cat([model(z[i:i+1], u[i:i+1]) for i in range(3)]))
        assert float((model(z[:1], u[1:2]) - out[:1]).abs().max()) > 1e-3*float(out.std()), "deaf to the time"

def test_a_unet_too_narrow_to_hear_the_time_is_refused():
    "With 8 groups over 8 channels GroupNorm takes out whatever is added to a channel, and the time is added to channels."
    try: model = awake(lambda: UNet((8, 8, 8)), 0).double()
    except ValueError: return
    z = randn(2, 1, 8, 8)
    with torch.no_grad(): a, b = (model(z, torch.full((2,), u).double()) for u in (0.1, 0.9))
    assert float((a - b).abs().max()) > 1e-3*float(a.std()), "deaf to the time"

# --- the sampler

@given(schedules.filter(lambda s: s.T <= 100), shapes, seeds, st.sampled_from(["posterior", "beta"]))
def test_sample_yields_T_states(s, shape, seed, variance):
    process = GaussianProcess(s, variance)
    states = list(process.sample(net, n=shape[0], shape=shape[1:], generator=gen(seed)))
    assert [state.t for state in states] == list(range(s.T - 1, -1, -1))
    for state in states:
        assert isinstance(state, State) and state.z_t.shape == state.x_hat.shape == shape and state.z_t.dtype == torch.float32
        assert not state.z_t.requires_grad
    assert_close(states[-1].z_t, states[-1].x_hat, rtol=1e-3, atol=1e-4)
    again, other = list(process.sample(net, n=shape[0], shape=shape[1:], generator=gen(seed))), last(process.sample(net, n=shape[0], shape=shape[1:], generator=gen(seed + 1)))
    for a, b in zip(states, again, strict=True): assert torch.equal(a.z_t, b.z_t) and torch.equal(a.x_hat, b.x_hat)
    assert not torch.equal(states[-1].z_t, other.z_t)
    assert torch.equal(last(iter(states)).z_t, states[-1].z_t)

@given(schedules.filter(lambda s: s.T <= 100), seeds)
def test_sample_is_its_steps(s, seed):
    "`sample` with a given z_T is `step` at t = T, T-1, ..., 1, each fed with the one before."
    process, z, g = GaussianProcess(s), randn(2, 1, 2, 2, seed=seed), gen(seed)
    for t, state in zip(range(s.T, 0, -1), process.sample(net, z_T=z, generator=gen(seed)), strict=True):
        expected = process.step(net, z, t, g)
        z = expected.z_t
        assert state.t == expected.t == t - 1 and torch.equal(state.z_t, z) and torch.equal(state.x_hat, expected.x_hat)

def test_sample_works_only_when_asked_and_tracks_no_gradient():
    notes = Notes()
    states = GaussianProcess(S).sample(notes, n=2, shape=(1, 2, 2), generator=gen())
    assert notes.asked == []
    next(states), next(states)
    assert [float(u[0])*50 for _, u in notes.asked] == pytest.approx([50, 49])
    model = CNN(hidden=(2,), d_time=4)
    state = next(GaussianProcess(S).sample(model, n=2, generator=gen()))
    assert state.z_t.shape == (2, 1, 28, 28) and not state.z_t.requires_grad and not state.x_hat.requires_grad
    assert torch.is_grad_enabled()

def test_sample_starts_from_unit_noise():
    notes = Notes()
    next(GaussianProcess(S).sample(notes, n=500, shape=(1, 6, 6), generator=gen(4)))
    z = notes.asked[0][0]
    assert torch.equal(z, torch.randn(500, 1, 6, 6, generator=gen(4)))
    assert abs(float(z.mean())) < 0.04 and abs(float(z.std()) - 1) < 0.03

def test_without_a_generator_the_global_one_is_used():
    run = lambda: last(GaussianProcess(S).sample(net, n=2, shape=(1, 2, 2))).z_t
    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first) and not torch.equal(first, second)

# --- images

def test_all_256_levels_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_unit(pixels)
    assert x.dtype == torch.float32 and x.min() == -0.5 and x.max() == 0.5
    assert torch.equal(to_uint8(x), pixels)
    assert_close(to_01(x), pixels.float()/255)

@given(st.floats(0.501, 1e6), st.booleans())
def test_what_is_out_of_range_is_refused_or_clipped(v, negative):
    x = torch.tensor([0.1, -v if negative else v])
    for f in (check_range, to_01, to_uint8):
        with pytest.raises(ValueError, match=r"outside \[-0.5, 0.5\]; clip=True"): f(x)
    assert to_uint8(x, clip=True)[1] == (0 if negative else 255)
    assert check_range(x, clip=True).abs().max() == 0.5
    with pytest.raises(ValueError, match="1 of 2 values are NaN"): check_range(torch.tensor([0., float("nan")]), clip=True)

@given(st.integers(1, 50), st.integers(1, 20), st.booleans(), st.booleans(), seeds)
def test_batches_show_every_image_once(n, size, shuffle, drop_last, seed):
    images, labels = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1), torch.arange(n)
    seen = list(batches(images, labels, size, shuffle, drop_last, gen(seed)))
    assert [len(y) for _, y in seen] == [size]*(n//size) + ([n%size] if n%size and not drop_last else [])
    order = torch.cat([y for _, y in seen]) if seen else torch.empty(0).long()
    assert torch.equal(order.sort()[0].unique(), order.sort()[0])
    if not shuffle: assert torch.equal(order, torch.arange(len(order)))
    for x, y in seen: assert torch.equal(x, to_unit(images[y]))
    for x, (again, _) in zip(batches(images, None, size, shuffle, drop_last, gen(seed)), seen, strict=True): assert torch.equal(x, again)
