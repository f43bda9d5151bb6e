"""Which shades and plans should a line writer leave out, and does it help to draw several times and keep the likeliest? Chosen on training digits, so that the test digits stay a test.

    python benchmarks/cuts.py cold-rows               the cuts of chapter 08 (about 15 s a cell on one core)
    python benchmarks/cuts.py cold-rows --cut .02 .05 --plan-cut 1 --best-of 1 2 4 -n 1000
    python benchmarks/cuts.py cold-rows --record      also written to results/results.json
"""
import argparse

import torch

from cold_scores import PRECISION, restored
from diffusion_nb.cold import pretrained
from diffusion_nb.data import mnist, to_unit
from diffusion_nb.metrics import extract, fid, floor, real, record, results_file
from diffusion_nb.training import autocast


@torch.no_grad()
def nats(net, z_T, x):
    "What each image costs under the model, as it was trained."
    with autocast(z_T.device, PRECISION): return torch.cat([net(z, torch.ones(len(z)), x=v).sum(1) for z, v in zip(z_T.split(500), x.split(500))])


def main(name, n, cuts, plan_cuts, best_of, write):
    torch.set_num_threads(1)
    process, net, card = pretrained(name)
    some = torch.randperm(60_000, generator=torch.Generator().manual_seed(1))[:n]
    z_T, ref, base = process.degrade(to_unit(mnist("train").images[some]), process.T), real("test"), floor(n)["FID"].value
    print(f"{name}, {n:,} training digits; FID in floors ({base:.4f})")
    for cut in cuts:
        for plan_cut in plan_cuts:
            net.pen.cut, net.plan_cut = cut, plan_cut
            draws = torch.stack([restored(process, net, z_T, seed) for seed in range(max(best_of))])
            cost = torch.stack([nats(net, z_T, x) for x in draws]) if max(best_of) > 1 else torch.zeros(1, n)
            for k in best_of:
                kept = draws[cost[:k].argmin(0), torch.arange(n)].clamp(-.5, .5)
                r = fid(extract(kept, data=f"{name}, {n:,} training digits restored", clip=True), ref, times=0)
                record(f"cold/tried/{name}/cut={cut:g},plan_cut={plan_cut:g},best-of={k},n={n}/fid", r, f"python benchmarks/cuts.py {name} -n {n} --cut {cut:g} --plan-cut {plan_cut:g} --best-of {k} --record", 0, results_file() if write else None)
                print(f"cut {cut:<5g} plan_cut {plan_cut:<4g} best of {k}: {r.value/base:6.1f} floors", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name")
    p.add_argument("-n", type=int, default=2000)
    p.add_argument("--cut", nargs="+", type=float, default=[0., .03, .05, .1, .2])
    p.add_argument("--plan-cut", nargs="+", type=float, default=[0., .3, 1.])
    p.add_argument("--best-of", nargs="+", type=int, default=[1])
    p.add_argument("--record", action="store_true")
    a = p.parse_args()
    main(a.name, a.n, a.cut, a.plan_cut, a.best_of, a.record)
