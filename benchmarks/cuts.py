"""Which shades and plans should a line writer leave out? The two cuts of chapter 08, chosen on training digits, so that the test digits stay a test.

    python benchmarks/cuts.py cold-rows               the grid below (about 15 s a cell on one core)
    python benchmarks/cuts.py cold-rows -n 1000 --cut 0 .05 --plan-cut 0 1
"""
import argparse

import torch

from cold_scores import restored
from diffusion_nb.cold import pretrained
from diffusion_nb.data import mnist, to_unit
from diffusion_nb.metrics import extract, fid, floor, real


def main(name, n, cuts, plan_cuts):
    torch.set_num_threads(1)
    process, net, card = pretrained(name)
    some = torch.randperm(60_000, generator=torch.Generator().manual_seed(1))[:n]
    z_T, ref, base = process.degrade(to_unit(mnist("train").images[some]), process.T), real("test"), floor(n)["FID"].value
    print(f"{name}, {n:,} training digits; FID in floors ({base:.4f})\n{'cut':>8s}" + "".join(f"   plan_cut {p:<5g}" for p in plan_cuts))
    for net.pen.cut in cuts:
        print(f"{net.pen.cut:8g}", end="", flush=True)
        for net.plan_cut in plan_cuts:
            print(f"{fid(extract(restored(process, net, z_T).clamp(-.5, .5), data='restored', clip=True), ref, times=0).value/base:13.1f}    ", end="", flush=True)
        print()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name")
    p.add_argument("-n", type=int, default=2000)
    p.add_argument("--cut", nargs="+", type=float, default=[0., .03, .05, .1, .2])
    p.add_argument("--plan-cut", nargs="+", type=float, default=[0., .3, 1.])
    a = p.parse_args()
    main(a.name, a.n, a.cut, a.plan_cut)
