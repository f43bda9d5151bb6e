"""How long does `diffusion-nb --help` take? The wish is an answer before one loses patience: under 1.5 s, median of several calls.

    python benchmarks/help_time.py

Prints the median beside that of a Python that imports nothing. Exit status 1 if it is too slow, 0 (and says so) if the command is not installed.
"""
from __future__ import annotations
import os, platform, shutil, statistics, subprocess, sys, time
from pathlib import Path

LIMIT, CALLS = 1.5, 7


def seconds(command):
    "Wall time of a command, which must succeed."
    t0 = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - t0


def main():
    here = Path(sys.executable).parent
    command = shutil.which("diffusion-nb", path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}")
    if not command: return print("SKIPPED: the command diffusion-nb is not installed; pip install the package first")
    commands = {"python -c pass": [sys.executable, "-c", "pass"], "diffusion-nb --help": [command, "--help"]}
    times = {name: [] for name in commands}
    for c in commands.values(): seconds(c)   # fill the disk cache and write the .pyc files
    for _ in range(CALLS):
        for name, c in commands.items(): times[name].append(seconds(c))
    print(f"python {platform.python_version()}, {os.cpu_count()} cores, {CALLS} alternating calls")
    for name, t in times.items(): print(f"{name:22s} median {statistics.median(t):.2f} s, {min(t):.2f} to {max(t):.2f}")
    met = statistics.median(times["diffusion-nb --help"]) < LIMIT
    print(f"{'met   ' if met else 'MISSED'}  under {LIMIT} s")
    sys.exit(not met)


if __name__ == "__main__": main()
