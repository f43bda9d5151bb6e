"""What tests/test_training.py runs in processes of its own, to kill them, launch two at once, or fill their disk.

    python train_child.py once RUN [name=value ...]   one training; prints a JSON line
    python train_child.py kills FOLDER N              N trainings, each killed at a random instant, then resumed
    python train_child.py writes FOLDER               trainings that die at every single write, before, in the middle and after
"""
import ast, json, os, random, shutil, signal, sys, time, warnings
from pathlib import Path

import accelerate, safetensors.torch, torch
from torch import nn

from diffusion_nb import plots, training
from diffusion_nb.ddpm import GaussianProcess
from diffusion_nb.schedule import linear

torch.set_num_threads(1)
torch.optim.Adam(nn.Linear(1, 1).parameters())  # loads much of torch, once for all forked processes
PROCESS = GaussianProcess(linear(40))
SETTINGS = dict(batch_size=65, steps=40, lr=1e-2, warmup=5, schedule="cosine", ema=0.9, precision="fp32", checkpoint_every=2, sample_every=0.5, n_samples=4, keep_every=0.5)


class Tiny(nn.Module):
    "Like the course's networks, in a few hundred numbers: convolutions, the time, and dropout if asked."
    def __init__(self, dropout=0.2):
        super().__init__()
        self.a, self.b, self.time, self.drop = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1), nn.Linear(1, 2), nn.Dropout(dropout)
    def forward(self, z_t, u): return self.b(self.drop(torch.relu(self.a(z_t) + self.time(u[:, None])[:, :, None, None])))


def tiny(dropout=0.2, seed=0):
    torch.manual_seed(seed)
    return Tiny(dropout)


def digits(n=2000):
    "Stand-ins for digits: bright blots on black, the same every time."
    g = torch.Generator().manual_seed(0)
    return (torch.rand(n, 1, 7, 7, generator=g).repeat_interleave(4, 2).repeat_interleave(4, 3)**3*255).byte()


def once(run, net=None, images=None, process=PROCESS, **changes):
    dropout = changes.pop("dropout", 0.2)
    return training.train(process, net or tiny(dropout), digits() if images is None else images, run=run, progress=False, **(SETTINGS | changes))


def forked(work):
    "Start `work` in a process of its own; nothing of its state comes back. (The loss figure, half of the time, is left out.)"
    plots.png = lambda ax: b"figure"
    pid = os.fork()
    if pid: return pid
    try:
        work()
        os._exit(0)
    except BaseException as e:
        print(f"child: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)


def fate(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(run):
    "Everything a run ends in, as checksums and lists."
    run = Path(run)
    info, data = training.last_checkpoint(run/"checkpoints")
    files = {n: training.sha256((run/f"{n}.safetensors").read_bytes()) for n in ("ema", "raw")}
    log = training.read_log(run)
    return {"step": info["step"], "state": training.sha256(data), "files": files, "steps": [r["step"] for r in log], "losses": [r["loss"] for r in log],
            "lines": len((run/"log.jsonl").read_text().splitlines()), "samples": {p.name: training.sha256(p.read_bytes()) for p in sorted((run/"samples").iterdir())},
            "weights": {p.name: training.sha256(p.read_bytes()) for p in sorted((run/"weights").iterdir())},
            "kept": len(list((run/"checkpoints").iterdir())), "strays": [p.name for p in run.rglob("*.part")]}


def kills(folder, n):
    "Kill -9 at `n` random instants; each run must come to the same end as the one that nobody touched."
    t0 = time.time()
    assert fate(forked(lambda: once(folder/"whole"))) == 0
    seconds, whole, rng = time.time() - t0, outcome(folder/"whole"), random.Random()
    report = {"seconds": seconds, "killed": 0, "reached": [], "different": []}
    while report["killed"] < n and len(report["reached"]) < 10*n:
        i = len(report["reached"])
        pid = forked(lambda: once(folder/f"{i}"))
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        report["killed"] += fate(pid) == -signal.SIGKILL
        found = sorted((folder/f"{i}").glob("checkpoints/step-*.json"))
        report["reached"].append(found[-1].stem if found else None)
        if fate(forked(lambda: once(folder/f"{i}"))) or outcome(folder/f"{i}") != whole: report["different"].append(i)
        shutil.rmtree(folder/f"{i}")
    return report


def writes(folder):
    "Die at each write of a run, at one of three instants; the resumed run must come to the same end."
    small = dict(steps=6, checkpoint_every=2, sample_every=0.125, keep_every=0.125)
    write = training.write_atomic
    def dying(at, how):
        count = 0
        def write_and_die(path, data):
            nonlocal count
            count += 1
            if count != at: return write(path, data)
            if how == "after": write(path, data)
            if how == "middle":
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f".{path.name}.{'0'*32}.part").write_bytes(data[:len(data)//2])
            os.kill(os.getpid(), signal.SIGKILL)
        training.write_atomic = write_and_die
    assert fate(forked(lambda: once(folder/"whole", **small))) == 0
    whole, report, at = outcome(folder/"whole"), {"writes": 0, "different": []}, 0
    while True:
        at += 1
        how = ("before", "middle", "after")[at % 3]
        died = fate(forked(lambda: (dying(at, how), once(folder/f"{at}", **small)))) != 0
        if not died: return report
        if fate(forked(lambda: once(folder/f"{at}", **small))) or outcome(folder/f"{at}") != whole: report["different"].append((at, how))
        report["writes"] = at
        shutil.rmtree(folder/f"{at}")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, folder, *rest = sys.argv[1:]
    if what == "once":
        done = once(folder, **{k: ast.literal_eval(v) for k, v in (r.split("=") for r in rest)})
        if int(os.environ.get("RANK", 0)) == 0: print(json.dumps({"status": done.status, "step": done.step, "seconds": done.seconds, "losses": done.losses}), flush=True)
    if what == "kills": print(json.dumps(kills(Path(folder), int(rest[0]))))
    if what == "writes": print(json.dumps(writes(Path(folder))))
