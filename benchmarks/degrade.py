"""Row averaging with a different t for each image: one masked operation against loops over images and rows, same output.

    python benchmarks/degrade.py            128 images (a batch), 9 rounds

Prints the time of both, side by side in one process, and their ratio; exits with 1 if one of them gains less than 100.
"""
import argparse, statistics, sys, time

import torch

from diffusion_nb.cold import Average


def loops(x, t, order, axis="rows", group=1):
    "The report's pseudocode: for each image, for each line to be averaged, alone or with the mean of its group."
    z = x.clone()
    for i in range(len(x)):
        for j in order[:int(t[i])]:
            lines = slice(j*group, (j + 1)*group)
            for k in range(j*group, (j + 1)*group):
                if axis == "rows": z[i, 0, k] = x[i, 0, lines].mean()
                else: z[i, 0, :, k] = x[i, 0, :, lines].mean()
    return z


def seconds(f, *args, times=1):
    "Of one call, as a mean over `times` calls."
    start = time.perf_counter()
    for _ in range(times): out = f(*args)
    return (time.perf_counter() - start)/times, out


def main(n=128, rounds=9):
    torch.set_num_threads(1)
    g, worst = torch.Generator().manual_seed(0), float("inf")
    x = torch.rand(n, 1, 28, 28, generator=g) - 0.5
    print(f"{n:,} images of 28 x 28, t drawn from 0..T, one thread, median of {rounds} rounds")
    for axis, group in (("rows", 1), ("columns", 1), ("rows", 4), ("columns", 4)):
        D = Average(axis, group)
        t, times = torch.randint(0, D.T + 1, (n,), generator=g), []
        D(x, t)
        for _ in range(rounds):
            slow, a = seconds(loops, x, t, D.order, axis, group)
            fast, b = seconds(D, x, t, times=100)            # a single call takes a tenth of a millisecond
            times.append((slow, fast))
            assert torch.allclose(a, b, atol=1e-6), "the two differ"
        ratio = statistics.median(s/f for s, f in times)
        slow, fast = (statistics.median(v) for v in zip(*times))
        print(f"{axis:8s} in groups of {group}: loops {slow*1e3:8.1f} ms, mask {fast*1e3:6.2f} ms, {ratio:5.0f} times faster, same output")
        worst = min(worst, ratio)
    return worst


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=128)
    p.add_argument("--rounds", type=int, default=9)
    args = p.parse_args()
    sys.exit(main(args.images, args.rounds) < 100)
