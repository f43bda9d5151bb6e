"""How fast is a training step, against the plain loop of the report? Both in one process, in alternating rounds.

    python benchmarks/train_speed.py            about 4 minutes on two cores
    python benchmarks/train_speed.py --quick    about 1 minute, noisier
    python benchmarks/train_speed.py --device cuda   on a GPU, fp32 and bf16 (nothing but ratios of one run is comparable)

Plain loop: eager float32, torchvision's MNIST class and a DataLoader with ToTensor and Normalize for each image,
Adam, `loss.item()` after every step. Ours: `diffusion_nb.training.train`, which keeps the images in memory as bytes,
clips gradients, averages the weights and logs the losses besides; in bfloat16 where the hardware has it, and in float32.
Same network (the report's CNN), same batch size, same number of steps. Exit status 1 if a target is missed.
"""
from __future__ import annotations
import argparse, json, os, statistics, subprocess, sys, time
from collections import defaultdict
from functools import cache
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")   # the profiler's own messages

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffusion_nb.data import mnist, to_unit
from diffusion_nb.ddpm import GaussianProcess
from diffusion_nb.networks import CNN, n_params
from diffusion_nb.training import autocast, has_bf16, hardware, train, versions

TARGET = 1.8   # times the images/s of the plain loop, where bfloat16 is there
NOISE = 0.03
LOOPS = {"plain": None, "ours fp32": "fp32", "ours bf16": "bf16"}


@cache
def digits(): return mnist("train")


@cache
def report_dataset():
    "torchvision's own class, filled with the course's images: the same work for each image."
    from torchvision import transforms
    from torchvision.datasets import MNIST
    data = MNIST.__new__(MNIST)
    data.data, data.targets, data.target_transform = digits().images[:, 0], digits().labels, None
    data.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (1.0,))])
    return data


class Plain:
    "The loop as the report writes it, with batches that go on from round to round."
    def __init__(self, batch_size, workers, device):
        self.net, self.device, self.process = CNN().to(device), device, GaussianProcess()
        self.opt = torch.optim.Adam(self.net.parameters(), lr=2e-4)
        self.loader = torch.utils.data.DataLoader(report_dataset(), batch_size, shuffle=True, drop_last=True, num_workers=workers)
        self.batches, self.batch_size, self.losses = iter(self.loader), batch_size, []

    def __call__(self, steps):
        "Take `steps` steps; images a second."
        t0 = time.perf_counter()
        for _ in range(steps):
            try: x, _ = next(self.batches)
            except StopIteration:
                self.batches = iter(self.loader)
                x, _ = next(self.batches)
            self.opt.zero_grad()
            loss = self.process.loss(self.net, x.to(self.device))
            loss.backward()
            self.losses.append(loss.item())
            self.opt.step()
        return steps*self.batch_size/(time.perf_counter() - t0)


class Ours:
    "The course's engine, through its public function."
    def __init__(self, batch_size, precision):
        self.net, self.batch_size, self.precision = CNN(), batch_size, precision

    def __call__(self, steps):
        "Take `steps` steps; images a second."
        done = train(GaussianProcess(), self.net, digits().images, steps=steps, batch_size=self.batch_size, precision=self.precision, progress=False)
        return steps*self.batch_size/done.seconds   # pauses for the log included, as for the plain loop


def make(name, a): return Plain(a.batch_size, a.workers, a.device) if name == "plain" else Ours(a.batch_size, LOOPS[name])


def alternate(a, names):
    "Median images a second of each loop, and every round."
    loops, rates = {n: make(n, a) for n in names}, defaultdict(list)
    for n in names: loops[n](3)   # warm up
    for i in range(a.rounds):
        for n in names[i % len(names):] + names[:i % len(names)]: rates[n].append(loops[n](a.steps))
        print(f"  round {i + 1}: " + ", ".join(f"{n} {rates[n][-1]:,.0f}" for n in names), flush=True)
    return rates


def peak_memory(name, a):
    "Peak resident memory in MB of a process of its own that takes some steps, and of one that only imports and loads the data."
    command = [sys.executable, __file__, "--child", name, "--steps", str(min(a.steps, 12)), "--batch-size", str(a.batch_size), "--device", a.device]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def child(name, a):
    digits()
    if name != "nothing": make(name, a)(a.steps)
    print(peak_mb())


def peak_mb():
    "The most memory this process ever held. Linux's ru_maxrss would count the parent's memory at the moment of the fork as well."
    try: return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])/1024
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024/(1024 if sys.platform == "darwin" else 1)


def matmul_peak(device, dtype, n=2048, seconds=1.):
    "GFLOP/s of a large matrix multiplication: the best of several tries, for it is a ceiling."
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in "xy")
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    torch.mm(x, y); wait()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        t0 = time.perf_counter()
        torch.mm(x, y); wait()
        best = min(best, time.perf_counter() - t0)
    return 2*n**3/best/1e9


def conv_flops(batch_size):
    "Operations of the convolutions in a step, forward and backward: two for each multiply-add, counted by torch."
    net = CNN()
    with FlopCounterMode(display=False) as count: F.mse_loss(net(torch.zeros(batch_size, 1, 28, 28), torch.zeros(batch_size)), torch.zeros(batch_size, 1, 28, 28)).backward()
    return sum(v for op, v in count.get_flop_counts()["Global"].items() if "convolution" in str(op))


GROUPS = {"convolution, backward": ("convolution_backward",), "convolution, forward": ("convolution",), "layer norm": ("layer_norm",), "gelu": ("gelu",), "matrix products (time MLP)": ("aten::mm", "addmm", "bmm"),
          "casts and copies": ("copy_", "to_copy", "contiguous", "clone"), "optimiser, clipping, average": ("foreach", "fused_adam", "norm"),
          "random numbers": ("rand", "normal_")}


def by_group(a, precision, steps=12):
    "Seconds a step in each group of operations: self times of torch.profiler, added up."
    from torch.profiler import ProfilerActivity, profile
    net, process = CNN().to(a.device), GaussianProcess()
    opt, images = torch.optim.Adam(net.parameters(), lr=2e-4), digits().images[:a.batch_size].to(a.device)
    def step():
        with autocast(torch.device(a.device), precision): loss = process.loss(net, to_unit(images))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.)
        opt.step()
        opt.zero_grad()
        loss.item()
    for _ in range(3): step()   # warm up
    gpu = a.device == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA]*gpu) as prof:
        for _ in range(steps): step()
    spent = defaultdict(float)
    for e in prof.key_averages():
        group = next((g for g, words in GROUPS.items() if any(w in e.key for w in words)), "the rest")
        spent[group] += (e.self_device_time_total if gpu else e.self_cpu_time_total)/steps/1e6
    return dict(sorted(spent.items(), key=lambda kv: -kv[1]))


def utilisation(a):
    "Print how far the convolutions stay below the machine's matrix products; the shares by precision."
    shares = {}
    flops = conv_flops(a.batch_size)
    print(f"\nThe convolutions of a step take {flops/1e9:.1f} GFLOP ({flops/a.batch_size/1e6:.0f} MFLOP an image; multiply-adds x 2, forward and backward).")
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if precision == "bf16" and not has_bf16(torch.device(a.device)): continue
        rounds = [(matmul_peak(a.device, dtype), by_group(a, precision, 6)) for _ in range(3 if a.quick else 6)]   # in turns, the best of each: the machine has slow minutes
        peak, spent = max(p for p, _ in rounds), min((s for _, s in rounds), key=lambda s: sum(s.values()))
        total, conv = sum(spent.values()), sum(v for g, v in spent.items() if g.startswith("convolution"))
        print(f"\n{precision}: matrix product {peak:,.0f} GFLOP/s; convolutions reach {flops/conv/1e9:,.0f} = {flops/conv/1e9/peak:.0%} of it; "
              f"whole step {flops/total/1e9:,.0f} = {flops/total/1e9/peak:.0%} (profiler on)")
        for g, s in spent.items(): print(f"  {g:30s} {1e3*s:7.2f} ms  {s/total:5.1%}")
        shares[precision] = flops/conv/1e9/peak
    return shares


def remember(rates, memory, shares, a):
    "Keep the figures where pages may quote them. (The smallest and the largest of seven rounds hold the median with 98 %.)"
    from diffusion_nb.metrics import Result, record
    def keep(name, metric, value, interval=None, n=1):
        record(f"benchmark/train_speed/{name}", Result(metric, value, interval, n, data="the report's CNN, batch 128"), "python benchmarks/train_speed.py --record", path=Path(__file__).parent.parent/"results"/"results.json")
    for n in ("ours fp32", "ours bf16"):
        if n not in rates: continue
        p = n.split()[1]
        r = [x/y for x, y in zip(rates[n], rates["plain"])]
        keep(f"ratio_{p}", "times the plain loop's images/s", statistics.median(r), (min(r), max(r)), len(r))
        keep(f"memory_{p}", "times the plain loop's peak memory", memory[n]/memory["plain"], n=5)
        keep(f"peak_share_{p}", "share of the matrix product's speed reached by the convolutions", shares[p])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--steps", type=int, default=12, help="steps in a round")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--workers", type=int, default=0, help="processes of the plain loop's DataLoader (the faster one on a machine with few cores is 0)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--json", help="also write the numbers into this file")
    p.add_argument("--record", action="store_true", help="write the figures into results/results.json")
    p.add_argument("--child", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.device == "cpu": os.environ["ACCELERATE_USE_CPU"] = "true"
    if a.child: return child(a.child, a)
    if a.quick: a.steps, a.rounds = 8, 3

    hw = hardware(torch.device(a.device))
    print(", ".join(f"{k} {v}" for k, v in {**hw, **versions()}.items()))
    print(f"network: the report's CNN, {n_params(CNN()):,} parameters; batch {a.batch_size}; {a.rounds} rounds of {a.steps} steps; images/s")
    names = [n for n in LOOPS if n != "ours bf16" or has_bf16(torch.device(a.device))]
    rates = alternate(a, names)
    median = {n: statistics.median(r) for n, r in rates.items()}
    ratio = {n: statistics.median(x/y for x, y in zip(rates[n], rates["plain"])) for n in names}
    memory = {n: statistics.median(peak_memory(n, a) for _ in range(5)) for n in ["nothing", *names]} if a.device == "cpu" else {}
    print(f"\n{'':12s}{'images/s':>10s}{'ratio':>8s}{'peak MB':>10s}{'epochs/min':>12s}  (ratio: median over rounds; peak: of a process of its own, median of five)")
    for n in names: print(f"{n:12s}{median[n]:10,.0f}{ratio[n]:8.2f}{memory.get(n, float('nan')):10,.0f}{60*median[n]/60_000:12.2f}")
    if memory: print(f"{'no training':12s}{'':18s}{memory['nothing']:10,.0f}")
    shares = utilisation(a)
    if a.record: remember(rates, memory, shares, a)

    wanted = {f"bf16 at least {TARGET} times the plain loop": ratio.get("ours bf16", TARGET) >= TARGET, f"fp32 not slower (within the {NOISE:.0%} that rounds differ by)": ratio["ours fp32"] >= 1 - NOISE,
              "memory of the default precision at most the plain loop's": not memory or memory[names[-1]] <= memory["plain"]*(1 if len(names) > 2 else 1 + NOISE),
              f"memory of fp32 at most the plain loop's (within {NOISE:.0%}; two runs of one loop differ by as much)": not memory or memory["ours fp32"] <= memory["plain"]*(1 + NOISE)}
    print()
    for what, met in wanted.items(): print(f"{'met   ' if met else 'MISSED'}  {what}")
    if a.json:
        with open(a.json, "w") as f: json.dump({"hardware": hw, "versions": versions(), "images_per_second": rates, "median": median, "ratio": ratio, "peak_mb": memory, "met": wanted}, f, indent=1)
    sys.exit(not all(wanted.values()))


if __name__ == "__main__": main()
