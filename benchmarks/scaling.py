"""Images a second of the engine on the devices it is launched on, each with a batch of its own (weak scaling).

    accelerate launch --num_processes 1 benchmarks/scaling.py                                  one GPU, or the processor
    accelerate launch --multi_gpu --num_processes 8 benchmarks/scaling.py                      eight GPUs
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 benchmarks/scaling.py --steps 10   two processes on the processor

The ratio of two outputs over the ratio of their devices is the efficiency that chapter 14 works out on paper.
"""
from __future__ import annotations
import argparse

from accelerate import PartialState
import torch

from diffusion_nb.data import mnist
from diffusion_nb.ddpm import GaussianProcess
from diffusion_nb.networks import CNN, n_params
from diffusion_nb.training import hardware, train


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--per-device", type=int, default=128, help="images in the batch of one device")
    p.add_argument("--width", type=int, default=1, help="factor on the channels of the report's CNN")
    p.add_argument("--steps", type=int, default=40, help="steps in a round")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    a = p.parse_args()

    state, net, images = PartialState(), CNN(tuple(a.width*c for c in (16, 32, 32, 16))), mnist("train").images
    def go(steps): return train(GaussianProcess(), net, images, steps=steps, batch_size=a.per_device*state.num_processes, precision=a.precision, progress=False)
    go(3)   # warm up
    done = [go(a.steps) for _ in range(a.rounds)]
    if not state.is_main_process: return
    print(", ".join(f"{k} {v}" for k, v in hardware(state.device).items()))
    best = max(d.images_per_second for d in done)
    print(f"{state.num_processes} x batch {a.per_device}, {n_params(net):,} parameters, {done[0].precision}: {best:,.0f} images/s (best of {a.rounds} rounds of {a.steps} steps), "
          f"{a.per_device*state.num_processes/best*1e3:.1f} ms a step")


if __name__ == "__main__": main()
