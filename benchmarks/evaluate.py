"""How long does it take to score images? Every metric with its floor, part by part; and the Fréchet distance beside torchmetrics' on the same features.

    python benchmarks/evaluate.py              10,000 images; under a minute on two free cores
    python benchmarks/evaluate.py --n 2000     fewer
"""
from __future__ import annotations
import argparse, time

import torch

from diffusion_nb.data import mnist, to_unit
from diffusion_nb.metrics import (confident_digits, density_coverage, digit_extractor, evaluate, extract, fid, floor, inception_score, kid, real)


def timed(what, f):
    "Run, print the seconds, hand the value on."
    start = time.perf_counter()
    v = f()
    seconds = time.perf_counter() - start
    print(f"  {what:44s} {seconds:7.2f} s", flush=True)
    return v, seconds


def frechet_by_torchmetrics(x, ref):
    "FID by torchmetrics, which is handed our features as if they were images."
    from torchmetrics.image.fid import FrechetInceptionDistance
    class Features(torch.nn.Module):
        num_features = x.shape[1]
        def forward(self, v): return v
    metric = FrechetInceptionDistance(feature=Features(), normalize=True)
    for f, is_real in ((ref, True), (x, False)):
        for b in f.split(250): metric.update(b, real=is_real)
    return metric.compute().item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, default=10_000, help="images to score")
    n = p.parse_args().n
    print(f"{n:,} images, {torch.get_num_threads()} threads\nonce, then kept in the cache:")
    test, _ = timed("features of the test images", lambda: real("test"))
    timed("features for the floor", lambda: real("train", None))
    x = (to_unit(mnist("train").images[:n]) + .05*torch.randn(n, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    print("parts, intervals included:")
    f, _ = timed("features", lambda: extract(x, digit_extractor(), "noisy digits", clip=True))
    for name, g in (("FID", fid), ("KID", kid), ("Inception score", inception_score), ("density and coverage", density_coverage), ("confident digits", confident_digits)):
        timed(name, lambda: g(f, test))
    timed("floor, 4 sets", lambda: floor(n))
    print("all of it:")
    e, seconds = timed("evaluate", lambda: evaluate(x, "noisy digits"))
    print(e)
    print(f"{n:,} images in {seconds:.0f} s" + (f", {'within' if seconds <= 60 else 'MORE THAN'} the 60 s promised for two free cores" if n == 10_000 else ""))
    frechet_by_torchmetrics(f.x[:100], test.x[:100])   # its import takes seconds that are not meant
    ours, a = timed("Fréchet distance, ours", lambda: fid(f, test, times=0).value)
    theirs, b = timed("Fréchet distance, torchmetrics", lambda: frechet_by_torchmetrics(f.x, test.x))
    print(f"  ours/torchmetrics: value {ours/theirs:.6f}, seconds {a/b:.2f}")


if __name__ == "__main__": main()
