"""Our equations against other people's code: diffusers' DDPMScheduler, scipy, and data whose best g_t is known exactly.

diffusers counts its steps from 0, so our t in 1..T is its t - 1. It stores float32 betas; `peer` gives it ours in float64,
and `test_betas` compares the betas that it computes by itself."""
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch.testing import assert_close

from diffusion_nb.ddpm import GaussianProcess, mean_from_eps, x_from_eps
from diffusion_nb.forward import diffuse, diffuse_step, posterior
from diffusion_nb.networks import TimeEncoding, gelu
from diffusion_nb.schedule import Schedule, cosine, linear, report

SCHEDULES = {"linear": linear(100), "cosine": cosine(100), "unscaled": linear(10, rescale=False), "short cosine": cosine(10), "long": linear(1000)}
VARIANCES = [("posterior", "fixed_small"), ("beta", "fixed_large")]
each_schedule = pytest.mark.parametrize("s", SCHEDULES.values(), ids=SCHEDULES)

def gen(seed=0): return torch.Generator().manual_seed(seed)

def randn(*shape, seed=0): return torch.randn(shape, dtype=torch.float64, generator=gen(seed))

def near(a, b, tol=1e-6): assert_close(a, b, rtol=tol, atol=tol)

def peer(s:Schedule, **kwargs):
    "diffusers' scheduler over the very numbers of `s`, in float64."
    p = DDPMScheduler(s.T, clip_sample=False, **kwargs)
    p.betas = s.beta[1:].clone()
    p.alphas = 1 - p.betas
    p.alphas_cumprod, p.one = p.alphas.cumprod(0), torch.ones((), dtype=torch.float64)
    return p

class Wavy:
    "A stand-in for a network: no structure that a sign or an index error could hide behind. It notes the time it is told."
    def __init__(self): self.seen = []
    def __call__(self, z, u):
        self.seen.append(u.clone())
        return (1.3*z + 0.7*u.view(-1, *[1]*(z.ndim - 1))).sin() + 0.2*z

# --- schedules

BETAS = [("linear", T, lambda T: linear(T), dict(beta_schedule="linear", beta_start=0.1/T, beta_end=20/T)) for T in (100, 1000, 1500)]
BETAS += [("linear, not rescaled", T, lambda T: linear(T, rescale=False), dict(beta_schedule="linear")) for T in (10, 100, 1000, 1500)]
BETAS += [("cosine", T, lambda T: cosine(T), dict(beta_schedule="squaredcos_cap_v2")) for T in (10, 100, 1000, 1500)]

@pytest.mark.parametrize("name, T, make, kwargs", BETAS, ids=[f"{n} T={T}" for n, T, *_ in BETAS])
def test_betas(name, T, make, kwargs):
    ours, theirs = make(T), DDPMScheduler(T, **kwargs)
    assert ours.T == T and ours.beta[0] == 0 and ours.beta.dtype == torch.float64
    assert_close(ours.beta[1:], theirs.betas.double(), rtol=1e-6, atol=2e-9)  # their float32
    assert_close(ours.alpha[1:], theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-6)  # T roundings of 6e-8 add up
    assert_close(ours.alpha[1:], torch.from_numpy(np.cumprod(1 - ours.beta[1:].numpy())), rtol=1e-12, atol=0)

def test_the_reports_schedule_is_a_linear_one_of_one_step_more():
    assert_close(report(1000).beta, DDPMScheduler(1001).betas.double(), rtol=1e-6, atol=2e-9)
    assert report(1000).alpha[0] == 1 - 1e-4

@each_schedule
@pytest.mark.parametrize("variance, theirs", VARIANCES)
def test_variance(s, variance, theirs):
    p, sigma = peer(s, variance_type=theirs), GaussianProcess(s, variance).sigma
    near(sigma[1:]**2, torch.stack([p._get_variance(t) for t in range(s.T)]), 1e-12)  # they clamp the 0 of our t = 1 to 1e-20
    if variance == "posterior": assert sigma[1] == 0

def test_snr():
    s = cosine(100)
    assert_close(s.snr[1:], torch.from_numpy(s.alpha.numpy()[1:]/(1 - s.alpha.numpy()[1:])), rtol=1e-12, atol=0)

# --- forward

@each_schedule
def test_diffuse_is_add_noise(s):
    x, eps, t = randn(s.T, 1, 4, 4), randn(s.T, 1, 4, 4, seed=1), torch.arange(1, s.T + 1)
    expected = peer(s).add_noise(x, eps, t - 1)
    near(diffuse(x, t, s, eps), expected, 1e-12)
    near(torch.cat([diffuse(x[i:i+1], i + 1, s, eps[i:i+1]) for i in range(s.T)]), expected, 1e-12)

@each_schedule
def test_steps_add_up_to_the_kernel(s):
    "Image 0 is 1 and gets no noise, image k is 0 and gets a 1 as the noise of step k alone: T steps show every weight."
    z, p = torch.zeros(s.T + 1, 1, dtype=torch.float64), peer(s)
    z[0] = 1
    for t in range(1, s.T + 1):
        eps = torch.zeros_like(z)
        eps[t] = 1
        z = diffuse_step(z, t, s, eps)
        near(z[0, 0]**2, p.alphas_cumprod[t-1], 1e-12)
        near((z[1:]**2).sum(), 1 - p.alphas_cumprod[t-1], 1e-12)
        assert (z[t+1:] == 0).all() and z[t, 0] > 0

# --- posterior

@each_schedule
def test_posterior_against_diffusers(s):
    p, x = peer(s), randn(3, 1, 4, 4)
    for t in {1, 2, 3, s.T//2, s.T - 1, s.T}:
        z = diffuse(x, t, s, randn(3, 1, 4, 4, seed=t))
        a = p.alphas_cumprod[t-1]
        mean, sigma = posterior(z, x, t, s)
        out = p.step((z - a.sqrt()*x)/(1 - a).sqrt(), t - 1, z, generator=gen(t))
        near(mean + (sigma*randn(3, 1, 4, 4, seed=t) if t > 1 else 0), out.prev_sample)
        near(sigma.flatten()**2, p._get_variance(t - 1).expand(1), 1e-12)

@each_schedule
@pytest.mark.parametrize("x, z_t", [(0.3, -1.2), (-0.5, 0.1)])
def test_posterior_is_bayes_on_a_grid(s, x, z_t):
    "q(z_{t-1}|z_t,x) from its definition, q(z_t|z_{t-1}) q(z_{t-1}|x) over its integral, without any algebra."
    beta = s.beta.numpy()
    for t in {2, 3, s.T//2, s.T}:
        alpha = np.prod(1 - beta[1:t])  # alpha_{t-1}
        mean, sigma = (float(v) for v in posterior(torch.full((1,), z_t).double(), torch.full((1,), x).double(), t, s))
        centre, width = math.sqrt(alpha)*x, math.sqrt(1 - alpha)
        grid = np.linspace(min(centre, mean) - 9*width, max(centre, mean) + 9*width, 200_001)
        log = scipy.stats.norm.logpdf(z_t, math.sqrt(1 - beta[t])*grid, math.sqrt(beta[t])) + scipy.stats.norm.logpdf(grid, centre, width)
        density = np.exp(log - log.max())
        density /= scipy.integrate.simpson(density, x=grid)
        near(mean, scipy.integrate.simpson(grid*density, x=grid))
        near(sigma**2, scipy.integrate.simpson((grid - mean)**2*density, x=grid))
        near(scipy.stats.norm.pdf(grid, mean, sigma)*sigma, density*sigma)
    mean, sigma = posterior(torch.full((1,), z_t).double(), torch.full((1,), x).double(), 1, s)
    near(mean, torch.full((1,), x).double(), 1e-12)  # one step from x there is nothing left to guess
    assert sigma == 0

# --- sampler

@each_schedule
@pytest.mark.parametrize("variance, theirs", VARIANCES)
def test_step(s, variance, theirs):
    process, p, net = GaussianProcess(s, variance), peer(s, variance_type=theirs), Wavy()
    for t in range(1, s.T + 1) if s.T <= 100 else [1, 2, 3, 500, 999, 1000]:
        z = randn(2, 1, 3, 3, seed=t)
        ours = process.step(net, z, t, gen(t))
        u = net.seen[-1]
        assert ours.t == t - 1
        assert_close(u, torch.full((2,), t/s.T, dtype=torch.float64), rtol=0, atol=1e-7)  # t/T is rounded to float32 on the way
        expected = p.step(Wavy()(z, u), t - 1, z, generator=gen(t))
        near(ours.z_t, expected.prev_sample)
        near(ours.x_hat, expected.pred_original_sample)

@each_schedule
def test_mean_and_x_from_eps(s):
    "Each image at its own t, against diffusers' step without noise."
    p, z, eps = peer(s, variance_type="learned"), randn(s.T, 1, 3, 3), randn(s.T, 1, 3, 3, seed=1)
    p._get_variance = lambda *args, **kwargs: torch.zeros((), dtype=torch.float64)
    outs = [p.step(eps[i:i+1], i, z[i:i+1]) for i in range(s.T)]
    t = torch.arange(1, s.T + 1)
    near(mean_from_eps(z, eps, t, s), torch.cat([o.prev_sample for o in outs]))
    near(x_from_eps(z, eps, t, s), torch.cat([o.pred_original_sample for o in outs]))

@pytest.mark.parametrize("variance, theirs", VARIANCES)
def test_the_last_step_adds_no_noise(variance, theirs):
    s, z = linear(50), randn(2, 1, 3, 3)
    process, p, g = GaussianProcess(s, variance), peer(s, variance_type=theirs), gen(3)
    before = g.get_state()
    out = process.step(Wavy(), z, 1, g)
    assert torch.equal(g.get_state(), before), "the step to t = 0 drew noise"
    near(out.z_t, p.step(Wavy()(z, torch.full((2,), 1/50, dtype=torch.float64)), 0, z, generator=gen(9)).prev_sample)
    near(out.z_t, out.x_hat)  # eq. 18.35 at t = 1 is eq. 18.31

@pytest.mark.parametrize("variance, theirs", VARIANCES)
@pytest.mark.parametrize("make", [linear, cosine])
def test_a_whole_run(make, variance, theirs):
    s, z_T, g, h = make(100), randn(4, 1, 3, 3), gen(5), gen(5)
    p, z, net = peer(s, variance_type=theirs), z_T, Wavy()
    states = list(GaussianProcess(s, variance).sample(net, z_T=z_T, generator=g))
    for state, t in zip(states, p.timesteps, strict=True):
        out = p.step(Wavy()(z, torch.full((4,), (int(t) + 1)/s.T).double()), int(t), z, generator=h)
        z = out.prev_sample
        assert state.t == t
        near(state.z_t, z)
        near(state.x_hat, out.pred_original_sample)
    assert_close(torch.stack(net.seen)[:, 0], torch.arange(100, 0, -1).double()/100, rtol=0, atol=1e-7)

@pytest.mark.parametrize("make", [linear, cosine])
def test_float32_is_close_to_float64(make):
    s, z, eps = make(1000), randn(1000, 1, 3, 3), randn(1000, 1, 3, 3, seed=1)
    t = torch.arange(1, 1001)
    assert_close(mean_from_eps(z.float(), eps.float(), t, s).double(), mean_from_eps(z, eps, t, s), rtol=1e-5, atol=1e-5)
    assert_close(diffuse(z.float(), t, s, eps.float()).double(), diffuse(z, t, s, eps), rtol=1e-5, atol=1e-5)

# --- Gaussian data, for which the best g_t has a closed form

def exact(s:Schedule, m:float, sd:float):
    "E[eps | z_t] for x ~ Norm[m, sd^2]."
    def net(z, u):
        a = s.alpha[(u*s.T).round().long()].view(-1, *[1]*(z.ndim - 1))
        return (1 - a).sqrt()*(z - a.sqrt()*m)/(a*sd**2 + 1 - a)
    return net

def moments(process, net, mean=0., var=1.):
    """Mean and variance of z_t, t = T-1..0, from those of z_T, when the net is linear: exact, with no sampling.
    The slope, the offset and the noise of each step are read off `process.step` itself."""
    out = []
    for t in range(process.T, 0, -1):
        at = lambda z, seed: float(process.step(net, torch.full((1, 1), z, dtype=torch.float64), t, gen(seed)).z_t)
        n1, n2 = (float(torch.randn(1, 1, dtype=torch.float64, generator=gen(seed))) for seed in (1, 2))
        slope, noise = at(1., 1) - at(0., 1), (at(0., 1) - at(0., 2))/(n1 - n2)
        mean, var = slope*mean + at(0., 1) - noise*n1, slope**2*var + noise**2
        out.append((t - 1, mean, var))
    return np.array(out).T

@pytest.mark.parametrize("s", [linear(100), cosine(100), linear(30)], ids=["linear", "cosine", "short"])
def test_posterior_variance_is_exact_for_a_single_image(s):
    "x is always m: from q(z_T|x) on, z_t must follow q(z_t|x) at every t, and end at m."
    m, a_T = 0.4, float(s.alpha[-1])
    t, mean, var = moments(GaussianProcess(s, "posterior"), exact(s, m, 0.), math.sqrt(a_T)*m, 1 - a_T)
    a = s.alpha.numpy()[t.astype(int)]
    near(mean, np.sqrt(a)*m)
    near(var, 1 - a)
    assert abs(mean[-1] - m) < 1e-12 and abs(var[-1]) < 1e-12

@pytest.mark.parametrize("s", [linear(100), cosine(100), linear(30)], ids=["linear", "cosine", "short"])
def test_beta_variance_is_exact_for_unit_noise(s):
    "x ~ Norm[0, 1]: so is every z_t, except that the last step leaves its noise out, and with it beta_1 of the variance."
    t, mean, var = moments(GaussianProcess(s, "beta"), exact(s, 0., 1.))
    near(mean, np.zeros(s.T), 1e-12)
    near(var[:-1], np.ones(s.T - 1))
    near(var[-1], 1 - float(s.beta[1]))

@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_many_steps_reach_the_data(variance):
    "Whatever the variance: as T grows the sampler's mean and standard deviation approach those of the data, m and sd."
    m, sd, errors = 0.3, 0.2, []
    for T in (50, 200, 800):
        s = cosine(T)
        _, mean, var = moments(GaussianProcess(s, variance), exact(s, m, sd))
        errors.append(abs(math.sqrt(var[-1]) - sd))
        assert abs(mean[-1] - m) < 1e-3
    assert errors[0] > 2*errors[1] > 4*errors[2] and errors[2] < 0.003, errors

@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_sample_has_the_moments_it_should(variance):
    "The same moments from 40,000 runs of `sample`, at every step, within 5 standard errors."
    s, n = linear(40), 40_000
    process, net = GaussianProcess(s, variance), exact(s, 0.3, 0.2)
    z_T = torch.randn(n, 1, dtype=torch.float64, generator=gen(0))
    for state, (t, mean, var) in zip(process.sample(net, z_T=z_T, generator=gen(1)), moments(process, net).T, strict=True):
        assert state.t == t
        assert abs(float(state.z_t.mean()) - mean) < 5*math.sqrt(var/n)
        assert abs(float(state.z_t.var()) - var) < 5*var*math.sqrt(2/n)

@pytest.mark.parametrize("t", [1, 10, 40])
def test_loss_of_the_best_network(t):
    "With the exact g_t the loss is the variance that z_t leaves in eps, alpha_t sd^2/(alpha_t sd^2 + 1 - alpha_t)."
    s, m, sd, n = linear(40), 0.3, 0.2, 200_000
    x = m + sd*torch.randn(n, 1, dtype=torch.float64, generator=gen(0))
    a = float(s.alpha[t])
    expected = a*sd**2/(a*sd**2 + 1 - a)
    loss = float(GaussianProcess(s).loss(exact(s, m, sd), x, t, generator=gen(1)))
    assert abs(loss - expected) < 5*expected*math.sqrt(2/n)

# --- networks

def test_gelu():
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    near(gelu(x), F.gelu(x), 1e-12)
    near(gelu(x), x*torch.from_numpy(scipy.stats.norm.cdf(x.numpy())), 1e-12)

def test_time_encoding():
    u, n = torch.linspace(0, 1, 11), 6
    f = 2*np.pi*np.array([0, *1.5**np.arange(n - 1)])
    phase = u.numpy()[:, None]*f
    out = TimeEncoding(n)(u)
    assert out.shape == (11, 2*n)
    near(out.double(), torch.from_numpy(np.concatenate([np.sin(phase), np.cos(phase) - 1], 1)), 1e-5)
