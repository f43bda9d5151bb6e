"""Scores of our cold models with the shipped weights, for chapters 09 and 10: 2,000 images each, digit features, beside the floor.

Those of the report's own models are measured by `diffusion-nb reproduce NAME --record`.

    python benchmarks/cold_scores.py                       everything (about half an hour on one core), printed
    python benchmarks/cold_scores.py cold-rows prior-rows  only these
    python benchmarks/cold_scores.py --record              also written to results/results.json
"""
import argparse, sys, time
from dataclasses import replace

import torch

from diffusion_nb.cold import ColdProcess, pretrained
from diffusion_nb.data import mnist, to_unit
from diffusion_nb.ddpm import last
from diffusion_nb.metrics import extract, floor, real, record, results_file, score
from diffusion_nb.prior import fit_prior, uniform_lines
from diffusion_nb.training import autocast, has_bf16, pretrained_folder

KEPT = {"FID": "fid", "IS": "is", "confident": "confident"}
PRECISION = "bf16" if has_bf16(torch.device("cpu")) else "fp32"
COMMAND = "python benchmarks/cold_scores.py --record"


def restored(process, net, z_T, seed=0):
    "Algorithm 1 or 2 as the process says, in batches, each with its own seed."
    with torch.no_grad(), autocast(z_T.device, PRECISION):
        return torch.cat([last(process.sample(net, z_T=z, generator=torch.Generator().manual_seed(1000*seed + i))).z_t for i, z in enumerate(z_T.split(500))])


def conditional(name, n):
    "Algorithm 2 from test images, fully degraded; beside it, where the chapter compares them, the direct prediction and Algorithm 1."
    process, net, card = pretrained(name)
    some = torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:n]   # at random: the first half of the test digits is cleaner than the second
    z_T = process.degrade(to_unit(mnist("test").images[some]), process.T)
    if name == "cure-mse":
        with torch.no_grad(): yield f"conditional/{name}/direct", torch.cat([process.predict(net, z, process.T, generator=torch.Generator().manual_seed(0)) for z in z_T.split(250)])
        yield f"conditional/{name}/algorithm-1", restored(replace(process, algorithm=1), net, z_T)
    yield f"conditional/{name}/algorithm-2", restored(process, net, z_T)
    if name.startswith("cold-"):
        net.pen.cut = net.plan_cut = 0.
        yield f"conditional/{name}/exact", restored(process, net, z_T)


def unconditional(axis, n):
    "The drawing model from each prior, and a model that does not draw from the best one."
    process, net, card = pretrained(f"cold-{axis}")
    D, x, g = process.degradation, to_unit(mnist().images), torch.Generator().manual_seed(0)
    starts = {"uniform": uniform_lines(D, x)(n, g)}
    if axis == "rows": starts |= {"uniform-each": uniform_lines(D, x, each=True)(n, g), "gaussian": fit_prior(D, x, k=1)(n, g), "mixture-10": fit_prior(D, x, k=10)(n, g), "mixture-250": fit_prior(D, x, k=250)(n, torch.Generator().manual_seed(0))}
    starts["mixture"] = fit_prior(D, x)(n, g)
    for name, z_T in starts.items(): yield f"unconditional/{axis}/{name}", restored(process, net, z_T)
    if axis == "rows":
        process, net, card = pretrained("cure-mse")
        yield "unconditional/rows/mixture,mse", restored(process, net, fit_prior(process.degradation, x)(n, g))


def main(names, n, write):
    torch.set_num_threads(1)
    base, ref = floor(n), real("test")
    def keep(id, results):
        for k, short in KEPT.items(): record(f"cold/{id}/{short}", results[k], COMMAND, 0, results_file() if write else None)
        print(f"{id:44s} FID {results['FID'].value:8.4f} = {results['FID'].value/base['FID'].value:6.1f} floors   IS {results['IS'].value:5.2f}   confident {results['confident'].value:.3f}", flush=True)
    keep("floor", base)
    for name in names:
        began = time.time()
        for id, x in unconditional(name.removeprefix("prior-"), n) if name.startswith("prior-") else conditional(name, n):
            try: keep(id, score(extract(x.clamp(-.5, .5), data=id.replace("/", " "), clip=True), ref, times=20))
            except ValueError as e: print(f"{id:44s} {e}", flush=True)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = sorted(f.stem for f in pretrained_folder().glob("*.json") if f.stem.startswith(("cold-", "cure-", "short-", "order-"))) + ["prior-rows", "prior-columns"]
    p.add_argument("names", nargs="*", default=everything)
    p.add_argument("-n", type=int, default=2000)
    p.add_argument("--record", action="store_true")
    a = p.parse_args()
    main(a.names or everything, a.n, a.record)
