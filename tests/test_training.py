"The training engine under abuse: killed, starved of disk, fed NaN, lied to, interrupted, and run as two processes."
import errno, inspect, json, math, os, signal, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker

import train_child as child
from diffusion_nb import plots, training
from diffusion_nb.training import Settings, TrainingError, last_checkpoint, load_weights, read_log, train

HERE = Path(__file__).parent
CHILD = [sys.executable, str(HERE/"train_child.py")]


@pytest.fixture(autouse=True)
def quiet_and_quick(monkeypatch, request):
    "The comparisons are bit for bit, so the number of threads must not change between them; one test only needs the loss figure drawn."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    if "folder_log" not in request.node.name: monkeypatch.setattr(plots, "png", lambda ax: plots.plt.close(ax.figure) or b"figure")
    yield
    torch.set_num_threads(n)

@pytest.fixture(scope="module")
def scratch():
    "Where runs are written: in memory if possible. (What is tested here survives a killed process, not a power cut, so fsync may be cheap.)"
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as d: yield Path(d)

@pytest.fixture
def tmp_path(scratch): return Path(tempfile.mkdtemp(dir=scratch))


def last_line(p): return json.loads(p.stdout.splitlines()[-1])

def run_child(*args, launch=(), env=None, code=0):
    p = subprocess.run([*launch, *CHILD[bool(launch):], *map(str, args)], capture_output=True, text=True, timeout=300, env=os.environ | (env or {}))
    assert p.returncode == code, p.stderr[-3000:]
    return p

def same(a, b): return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())

def state(run):
    import safetensors.torch
    return safetensors.torch.load(last_checkpoint(Path(run)/"checkpoints")[1])

def newest(run): return training.checkpoints(Path(run)/"checkpoints")[0]


# ---- killed

def test_killed_at_20_random_instants(tmp_path):
    r = last_line(run_child("kills", tmp_path, 20))
    print(r)
    assert not r["different"] and r["killed"] == 20

def test_killed_at_every_write(tmp_path):
    r = last_line(run_child("writes", tmp_path))
    print(r)
    assert not r["different"] and r["writes"] >= 20


# ---- interrupted

@pytest.fixture(scope="module")
def whole(scratch):
    "A run that nobody touched."
    torch.set_num_threads(1)
    run = scratch/"whole"
    return child.once(run), child.outcome(run)

@pytest.mark.parametrize("stops", [[1], [7, 8, 31], [30], [39], np.random.default_rng().integers(1, 40, 2).tolist()])
def test_stopped_by_ctrl_c_and_resumed(tmp_path, whole, stops):
    "A stop at any step, also in the middle of an epoch (31 steps) and between checkpoints, changes nothing."
    class Stopping(child.GaussianProcess):
        def loss(self, *args, **kwargs):
            self.calls = getattr(self, "calls", -1) + 1   # the first call is the check of the inputs
            if self.calls == self.stop: os.kill(os.getpid(), signal.SIGINT)
            return super().loss(*args, **kwargs)
        def __repr__(self): return repr(child.PROCESS)
    done = 0
    for stop in sorted(set(stops)):
        process = Stopping(child.PROCESS.schedule)
        process.stop = stop - done
        part = child.once(tmp_path/"run", process=process, net=child.tiny(seed=done))
        assert (part.status, part.step, len(part.losses)) == ("interrupted", stop, stop)
        assert json.loads((tmp_path/"run/card.json").read_text())["status"] == "interrupted"
        done = stop
    end = child.once(tmp_path/"run", net=child.tiny(seed=99))
    assert child.outcome(tmp_path/"run") == whole[1]
    assert end.losses == whole[0].losses and same(end.net.state_dict(), whole[0].net.state_dict()) and same(end.ema.state_dict(), whole[0].ema.state_dict())

def test_asked_to_stop_from_outside(tmp_path):
    "What a batch system sends before it takes the machine away."
    run = tmp_path/"run"
    p = subprocess.Popen([*CHILD, "once", str(run), "steps=100_000", "schedule='constant'", "sample_every=0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and not list(run.glob("checkpoints/step-*[1-9].json")): time.sleep(.05)
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0 and "Stopped after step" in out and not err, err
    r = json.loads(out.splitlines()[-1])
    assert r["status"] == "interrupted" and len(read_log(run)) == r["step"] == len(r["losses"])

def test_longer_budget_goes_on_and_finished_run_is_not_repeated(tmp_path):
    a = child.once(tmp_path/"a", schedule="constant", steps=20)
    again = child.once(tmp_path/"a", schedule="constant", steps=20)
    assert again.step == 20 and again.losses == a.losses and again.status == "finished" and again.images_per_second == 0
    b = child.once(tmp_path/"a", schedule="constant", steps=40)
    c = child.once(tmp_path/"c", schedule="constant", steps=40)
    assert same(b.net.state_dict(), c.net.state_dict()) and b.losses == c.losses


# ---- what a folder holds

def test_folder_log_and_card(tmp_path):
    run, extras = tmp_path/"run", {"preset": "tiny", "overrides": {"lr": 0.01}}
    r = train(child.PROCESS, child.tiny(), child.digits(), run=run, extras=extras, progress=False, **child.SETTINGS)
    assert {p.name for p in run.iterdir()} == {"config.json", "log.jsonl", "samples", "weights", "checkpoints", "ema.safetensors", "raw.safetensors", "card.json", "loss.png", "lock"}
    assert [p.name for p in sorted((run/"checkpoints").iterdir())] == [f"step-000000{s}.{e}" for s in (38, 40) for e in ("json", "safetensors")]
    log = read_log(run)
    assert [l["step"] for l in log] == list(range(1, 41)) and [l["epoch"] for l in log] == [1]*31 + [2]*9
    assert [np.float32(l["loss"]) for l in log] == [np.float32(l) for l in r.losses] and set(log[0]) == {"step", "epoch", "loss", "lr", "seconds"}
    card = json.loads((run/"card.json").read_text())
    assert card["status"] == "finished" and card["step"] == 40 and card["epoch"] == round(40/31, 4) and card["overrides"] == {"lr": 0.01} and card["seed"] == 0
    assert {"command", "versions", "hardware", "minutes", "images", "loss", "processes", "preset"} <= set(card) and card["versions"]["torch"] == torch.__version__.split("+")[0]
    assert sorted(p.name for p in (run/"samples").iterdir()) == ["epoch-0000.5.png", "epoch-0001.29.png", "epoch-0001.png"]
    for epoch in (.5, 1): load_weights(child.tiny(), run, epoch=epoch)   # 31 steps an epoch: found by their names all the same
    from PIL import Image
    assert Image.open(run/"samples"/"epoch-0001.29.png").size == (3*(4*29 - 1), 3*28)

def test_weights_load(tmp_path):
    r = child.once(tmp_path/"run")
    for which, net in (("ema", r.ema), ("raw", r.net)): assert same(load_weights(child.tiny(seed=5), tmp_path/"run", which).state_dict(), net.state_dict())
    for p in (tmp_path/"run/checkpoints").iterdir(): p.unlink()
    assert same(load_weights(child.tiny(seed=5), tmp_path/"run").state_dict(), r.ema.state_dict())
    with pytest.raises(TrainingError, match="no weights for this network"): load_weights(torch.nn.Linear(1, 1), tmp_path/"run")
    with pytest.raises(TrainingError, match="no weights for this network"): load_weights(child.tiny(), tmp_path/"nowhere")

def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    r = child.once(None)
    assert r.step == 40 and r.run is None and not list(tmp_path.iterdir())

def test_global_random_state_is_left_alone():
    net = child.tiny()
    torch.manual_seed(7)
    a = torch.rand(3)
    torch.manual_seed(7)
    child.once(None, net=net, steps=2)
    assert torch.equal(a, torch.rand(3))


# ---- another folder, another config

def test_config_of_another_run_names_the_key(tmp_path):
    child.once(tmp_path/"run", steps=4)
    for change in (dict(lr=0.5), dict(batch_size=64), dict(seed=1), dict(ema=0.5), dict(clip=None), dict(warmup=6), dict(precision="bf16")):
        (key, value), = change.items()
        with pytest.raises(TrainingError, match=f"{key} was .* and is now {value!r}"): child.once(tmp_path/"run", steps=4, **change)
    with pytest.raises(TrainingError, match="steps was 4 and is now 5"): child.once(tmp_path/"run", steps=5)   # cosine: the curve would change
    with pytest.raises(TrainingError, match="images was '2000"): child.once(tmp_path/"run", steps=4, images=child.digits(1999))
    with pytest.raises(TrainingError, match="network was 'Tiny.*and is now 'Wrap"): child.once(tmp_path/"run", steps=4, net=Wrap(child.tiny()))
    with pytest.raises(TrainingError, match="process was .*T=40.*T=50"): child.once(tmp_path/"run", steps=4, process=child.GaussianProcess(child.linear(50)))
    with pytest.raises(TrainingError, match="already holds a run"): child.once(tmp_path/"run", steps=4, resume=False)
    child.once(tmp_path/"run", steps=4, sample_every=0, checkpoint_every="1 min", precision="auto")   # these may change

class Wrap(torch.nn.Module):
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, *args): return self.net(*args)

def test_folder_with_other_things_in_it(tmp_path):
    (tmp_path/"thesis.txt").write_text("precious")
    with pytest.raises(TrainingError, match="holds thesis.txt and no run"): child.once(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

def test_users_own_files_in_a_run_folder_stay(tmp_path):
    child.once(tmp_path/"run", steps=4)
    for name in ("notes.v1.txt", "checkpoints/best.safetensors", "config.old.json"): (tmp_path/"run"/name).write_text("mine")
    child.once(tmp_path/"run", steps=4)
    assert all((tmp_path/"run"/n).read_text() == "mine" for n in ("notes.v1.txt", "checkpoints/best.safetensors", "config.old.json"))

def test_two_trainings_in_one_folder(tmp_path):
    with training.locked(tmp_path/"run"), pytest.raises(TrainingError, match="another process is training in"): child.once(tmp_path/"run", steps=2)
    child.once(tmp_path/"run", steps=2)


# ---- damage

@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing", "json"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, whole, damage):
    class Stop(child.GaussianProcess):
        def __repr__(self): return repr(child.PROCESS)
        def loss(self, *a, **k):
            self.calls = getattr(self, "calls", -1) + 1
            if self.calls == 21: os.kill(os.getpid(), signal.SIGINT)
            return super().loss(*a, **k)
    child.once(tmp_path/"run", process=Stop(child.PROCESS.schedule))
    path = newest(tmp_path/"run") if damage == "json" else newest(tmp_path/"run").with_suffix(".safetensors")
    data = bytearray(path.read_bytes())
    if damage == "flip": data[len(data)//2] ^= 1
    if damage == "json": data = data.replace(b'"step": 21', b'"step": 22')
    if damage == "missing": path.unlink()
    else: path.write_bytes(data[:{"truncate": len(data)//2, "empty": 0}.get(damage)])
    with pytest.warns(UserWarning, match="checkpoint step-00000021 .*; going back to step-00000020"): child.once(tmp_path/"run")
    assert child.outcome(tmp_path/"run") == whole[1]

def test_all_checkpoints_damaged(tmp_path):
    child.once(tmp_path/"run", steps=4)
    for p in (tmp_path/"run/checkpoints").glob("*.safetensors"): p.write_bytes(b"x")
    with pytest.raises(TrainingError, match="no other is left"): child.once(tmp_path/"run", steps=4)
    assert len(list((tmp_path/"run/checkpoints").iterdir())) == 4, "nothing was removed"

def test_nothing_is_unpickled(tmp_path, monkeypatch):
    import pickle
    def refuse(*a, **k): raise AssertionError("unpickled")
    for where, name in ((pickle, "load"), (pickle, "loads"), (torch, "load"), (pickle, "Unpickler")): monkeypatch.setattr(where, name, refuse)
    child.once(tmp_path/"run", steps=4, schedule="constant")
    child.once(tmp_path/"run", steps=8, schedule="constant")
    load_weights(child.tiny(), tmp_path/"run")

def test_log_cut_short_or_gone(tmp_path):
    a = child.once(tmp_path/"run", steps=10, schedule="constant")
    log = tmp_path/"run/log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 11, "lo')
    b = child.once(tmp_path/"run", steps=12, schedule="constant")
    assert [r["step"] for r in read_log(tmp_path/"run")] == list(range(1, 13)) and b.losses[:10] == a.losses


# ---- the disk

@pytest.fixture
def small_disk(tmp_path):
    "A file system of its own, of 64 KiB a unit, that can be filled or made read-only."
    if os.geteuid() != 0 or not sys.platform.startswith("linux"): pytest.skip("mounting a tmpfs needs root on Linux")
    disk = tmp_path/"disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("this container may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)

def test_full_disk(small_disk, whole):
    class Filling(child.GaussianProcess):
        "At its 22nd step something else takes all the room that is left."
        def __repr__(self): return repr(child.PROCESS)
        def loss(self, *a, **k):
            self.calls = getattr(self, "calls", -1) + 1
            if self.calls == 22: fill(small_disk/"other")
            return super().loss(*a, **k)
    with pytest.raises(TrainingError, match="No space left on device. Free some space and run the same command again"): child.once(small_disk/"run", process=Filling(child.PROCESS.schedule))
    assert last_checkpoint(small_disk/"run"/"checkpoints")[0]["step"] == 20
    assert not list((small_disk/"run").rglob("*.part")), "no half-written file is left"
    (small_disk/"other").unlink()
    child.once(small_disk/"run")
    assert child.outcome(small_disk/"run") == whole[1]

def fill(path):
    with open(path, "wb", buffering=0) as f:
        try:
            while True: f.write(b"x"*512)
        except OSError as e: assert e.errno == errno.ENOSPC

def test_full_disk_as_the_system_reports_it(tmp_path, monkeypatch, whole):
    "The same without root: the fifth checkpoint's write fails."
    write, count = training.write_atomic, iter(range(10**6))
    def full(path, data):
        if path.suffix == ".safetensors" and next(count) == 5: raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)
    monkeypatch.setattr(training, "write_atomic", full)
    with pytest.raises(TrainingError, match="step-00000010.safetensors: No space left on device. Free some space"): child.once(tmp_path/"run")
    assert last_checkpoint(tmp_path/"run"/"checkpoints")[0]["step"] == 8
    child.once(tmp_path/"run")
    assert child.outcome(tmp_path/"run") == whole[1]

def test_read_only_folder(small_disk):
    (small_disk/"run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for run in (small_disk/"run", small_disk/"new"):
        with pytest.raises(TrainingError, match="cannot use the run folder .*: Read-only file system. Choose another run folder"): child.once(run)

def test_file_in_place_of_a_folder(tmp_path):
    (tmp_path/"file").write_text("")
    for run in (tmp_path/"file", tmp_path/"file"/"run"):
        with pytest.raises(TrainingError, match="cannot use the run folder .*Choose another run folder"): child.once(run)


# ---- numbers that are none

class Sick(child.GaussianProcess):
    "Its loss is NaN at one step."
    calls = -1
    def __repr__(self): return repr(child.PROCESS)
    def loss(self, *args, **kwargs):
        self.calls += 1
        return super().loss(*args, **kwargs)*(math.nan if self.calls == 22 else 1)

def test_nan_loss_stops_and_keeps_the_last_good_state(tmp_path, whole):
    net = child.tiny()
    with pytest.raises(TrainingError, match=r"loss became nan at step 22 \(epoch 1\); the last good state, that of step 20, .* lower lr"): child.once(tmp_path/"run", process=Sick(child.PROCESS.schedule), net=net)
    assert same(net.state_dict(), training.part(state(tmp_path/"run"), "net")) and all(v.isfinite().all() for v in net.state_dict().values())
    assert "nan" in json.loads((tmp_path/"run/card.json").read_text())["status"]
    child.once(tmp_path/"run")   # with the illness gone, the run goes on
    assert child.outcome(tmp_path/"run") == whole[1]

def test_nan_without_a_folder_leaves_the_weights_before_it():
    net, before = child.tiny(), child.tiny()
    child.once(None, net=before, steps=21, schedule="constant")
    with pytest.raises(TrainingError, match="step 22 .*weights before that step"): child.once(None, net=net, process=Sick(child.PROCESS.schedule), schedule="constant")
    assert same(net.state_dict(), before.state_dict())

def test_weights_that_overflow_never_reach_a_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match="became (nan|inf)"): child.once(tmp_path/"run", lr=1e30, clip=None, warmup=0, steps=30)
    assert all(v.isfinite().all() for v in state(tmp_path/"run").values())


# ---- what is asked for

@pytest.mark.parametrize("given, words", [
    (dict(), "exactly one of epochs, steps and minutes, not none"), (dict(epochs=1, steps=10), "not epochs=1 and steps=10"), (dict(steps=1, minutes=1), "exactly one"),
    (dict(steps=0), "steps must be a whole number from 1, not 0"), (dict(epochs=-1), "epochs must be a number above 0"), (dict(minutes=math.nan), "minutes must be"),
    (dict(steps=1.5), "steps must be"), (dict(steps=1, lr=0), "lr must be"), (dict(steps=1, lr=math.inf), "lr must be"), (dict(steps=1, ema=1.), "ema must be"),
    (dict(steps=1, schedule="linear"), 'schedule must be "constant" or "cosine"'), (dict(steps=1, precision="fp16"), "precision must be"),
    (dict(steps=1, batch_size=0), "batch_size must be"), (dict(steps=1, checkpoint_every="often"), 'or minutes such as "2 min"'), (dict(steps=1, clip=-1), "clip must be"),
    (dict(steps=1, learning_rate=1), "no setting is called 'learning_rate'; did you mean"), (dict(steps=1, warm_up=1), "did you mean 'warmup'"), (dict(steps=True), "steps must be")])
def test_bad_settings(tmp_path, given, words):
    with pytest.raises(TrainingError) as e: train(child.PROCESS, child.tiny(), child.digits(), run=tmp_path/"run", **given)
    assert words in str(e.value) and "\n" not in str(e.value) and not (tmp_path/"run").exists()

@pytest.mark.parametrize("images, words", [
    (torch.rand(4, 1, 28, 28), "must be a uint8 tensor"), (torch.zeros(4, 28, 28, dtype=torch.uint8), r"not torch.uint8 \(4, 28, 28\)"), ([1, 2], "not list"),
    (torch.zeros(0, 1, 28, 28, dtype=torch.uint8), "uint8 tensor"), (torch.zeros(4, 3, 28, 28, dtype=torch.uint8), r"cannot take images of shape \(3, 28, 28\)")])
def test_bad_images(tmp_path, images, words):
    with pytest.raises(TrainingError, match=words): child.once(tmp_path/"run", images=images)
    assert not (tmp_path/"run").exists()

def test_networks_that_cannot_be_trained():
    with pytest.raises(TrainingError, match="cannot take images"): child.once(None, net=torch.nn.Linear(3, 3))
    with pytest.raises(TrainingError, match="no parameters"): child.once(None, net=torch.nn.Identity())

def test_every_setting_is_in_the_signature():
    p = inspect.signature(train).parameters
    assert all(p[k].default == getattr(Settings(), k) for k in Settings.__dataclass_fields__) and list(p)[:4] == ["process", "net", "images", "run"]


# ---- budgets, rates, averages

def test_minutes_count_over_sittings(tmp_path):
    kw = dict(steps=None, schedule="constant", sample_every=0, checkpoint_every="1 min")
    t0 = time.time()
    a = child.once(tmp_path/"run", minutes=.02, **kw)
    b = child.once(tmp_path/"run", minutes=.04, **kw)
    assert 1.2 <= a.seconds < 6 and 2.4 <= b.seconds < 8 and b.step > a.step and time.time() - t0 < 20
    c = child.once(tmp_path/"run", minutes=.04, **kw)
    assert c.step == b.step, "the time is used up"

def test_epochs_are_passes_over_all_images():
    seen = torch.cat([training.batch_index(s, 2000, 65, seed=3) for s in range(2*31)]).view(2, 2000)
    assert all(torch.equal(e.sort().values, torch.arange(2000)) for e in seen) and not torch.equal(*seen)
    assert child.once(None, steps=None, epochs=1).step == 31 and child.once(None, steps=None, epochs=.1).step == 4

def test_one_step_is_adam_on_the_clipped_gradient():
    "Against a plain loop with the same images, noise, learning rates."
    net, ema = child.tiny(0.), None
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    avg = [p.detach().clone() for p in net.parameters()]
    x, losses = training.to_unit(child.digits()), []
    for step in range(12):
        for g in opt.param_groups: g["lr"] = training.learning_rate(step, step/12, 1e-2, "cosine", 5)
        loss = child.PROCESS.loss(net, x[training.batch_index(step, 2000, 65, 0)], generator=training.stream(0, "loss", step))
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        opt.step()
        for a, p in zip(avg, net.parameters()): a.lerp_(p.detach(), 1 - min(.9, (1 + step)/(10 + step)))
        losses.append(loss.item())
    r = child.once(None, dropout=0., clip=.1, steps=12)
    assert np.allclose(r.losses, losses, atol=1e-6) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(r.net.parameters(), net.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(r.ema.parameters(), avg))

def test_without_averaging_the_average_is_the_network():
    r = child.once(None, ema=0, steps=5)
    assert same(r.net.state_dict(), r.ema.state_dict())

def test_tensorboard(tmp_path):
    "TensorBoard itself: what it stored is what the log says, and its files do not disturb a resume."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    a = child.once(tmp_path/"run", trackers="tensorboard", schedule="constant", steps=6)
    b = child.once(tmp_path/"run", trackers="tensorboard", schedule="constant", steps=12)
    events = {}
    for folder in {p.parent for p in (tmp_path/"run").rglob("events.out.tfevents.*")}:
        found = EventAccumulator(str(folder)).Reload()
        for tag in found.Tags()["scalars"]:
            for e in found.Scalars(tag): events[tag, e.step] = e.value
    assert (a.status, b.step) == ("finished", 12)
    assert [events["loss", s] for s in range(1, 13)] == pytest.approx(b.losses) and events["lr", 12] == pytest.approx(1e-2)
    assert b.losses == child.once(tmp_path/"other", schedule="constant", steps=12).losses

def test_trackers(tmp_path):
    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "list", False, None
        def store_init_configuration(self, values): self.config = values
        def log(self, values, step=None, **kw): self.rows = [*getattr(self, "rows", []), (step, values["loss"])]
        def finish(self): self.finished = True
    t = Tracker()
    r = child.once(tmp_path/"run", trackers=t, steps=6)
    assert t.rows == list(enumerate(r.losses, 1)) and t.finished and t.config["batch_size"] == 65
    with pytest.raises(TrainingError, match="not installed|Unsupported"): child.once(tmp_path/"b", trackers="no-such-tracker")
    assert not (tmp_path/"b").exists()

def test_progress_bar(capsys):
    train(child.PROCESS, child.tiny(), child.digits(), **(child.SETTINGS | dict(steps=5)))
    out = capsys.readouterr().out
    assert "5/5" in out and "images/s" in out and "loss" in out

def test_losses_are_not_read_every_step(monkeypatch):
    "On a GPU each `.item()` would stall; there must be far fewer reads than steps. (On one CPU process a read is free, and NaN is met at once.)"
    reads, steps = [], 100
    monkeypatch.setattr(training, "check_loss", lambda *a: None)
    monkeypatch.setattr(training, "read_losses", lambda job, f=training.read_losses: reads.append(len(job.pending)) or f(job))
    child.once(None, steps=steps, schedule="constant", checkpoint_every="9 min", sample_every=0)
    assert sum(reads) == steps and len(reads) < steps/2


# ---- two processes

LAUNCH = [str(Path(sys.executable).parent/"accelerate"), "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--main_process_port", "0", "--num_cpu_threads_per_process", "1"]

def test_two_processes_equal_one_with_the_doubled_batch(tmp_path):
    "65 images a step, 32 and 33 of them in each process; the run is stopped half-way, and goes on as one process."
    args = ["dropout=0.", "batch_size=65", "schedule='constant'"]
    r = last_line(run_child("once", tmp_path/"two", "steps=34", *args, launch=LAUNCH, env={"ACCELERATE_USE_CPU": "true"}))
    one = child.once(tmp_path/"one", dropout=0., schedule="constant", steps=34)
    np.testing.assert_allclose(r["losses"], one.losses, atol=2e-6, rtol=2e-5)
    assert [l["step"] for l in read_log(tmp_path/"two")] == list(range(1, 35)), "one log"
    assert [p.name for p in sorted((tmp_path/"two/checkpoints").iterdir())] == [p.name for p in sorted((tmp_path/"one/checkpoints").iterdir())], "one checkpoint"
    assert json.loads((tmp_path/"two/card.json").read_text())["processes"] == 2
    a, b = state(tmp_path/"two"), state(tmp_path/"one")
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    longer = child.once(tmp_path/"two", dropout=0., schedule="constant", steps=40)
    np.testing.assert_allclose(longer.losses, child.once(tmp_path/"one", dropout=0., schedule="constant", steps=40).losses, atol=1e-5, rtol=1e-4)

def test_ctrl_c_with_two_processes(tmp_path):
    "The terminal sends it to all of them, and the launcher sends it once more."
    run = tmp_path/"run"
    p = subprocess.Popen([*LAUNCH, *CHILD[1:], "once", str(run), "steps=100_000", "schedule='constant'", "sample_every=0"], env=os.environ | {"ACCELERATE_USE_CPU": "true"},
                         start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while p.poll() is None and not list(run.glob("checkpoints/step-*[1-9].json")): time.sleep(.05)
    os.killpg(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert out.count("Stopped after step") == 1, err[-3000:]
    card = json.loads((run/"card.json").read_text())
    assert card["status"] == "interrupted" and len(read_log(run)) == card["step"] == int(newest(run).stem[-8:])

def test_two_processes_without_a_gpu_or_the_switch(tmp_path):
    if torch.cuda.device_count(): pytest.skip("there is a GPU")
    with pytest.MonkeyPatch.context() as m, pytest.raises(TrainingError, match="ACCELERATE_USE_CPU=true"):
        m.setenv("WORLD_SIZE", "2")
        child.once(tmp_path/"run")

@pytest.mark.parametrize("n, world", [(65, 2), (64, 4), (3, 4), (1, 2), (7, 3)])
def test_shares_cover_the_batch_and_weigh_alike(n, world):
    parts = [training.share(n, r, world) for r in range(world)]
    assert sorted(i for rows, w in parts if w for i in range(n)[rows]) == list(range(n)) and sum(w for _, w in parts) == pytest.approx(world)
    x = torch.randn(n, 3)
    assert torch.allclose(sum(w*x[rows].mean() for rows, w in parts)/world, x.mean(), atol=1e-6)

def test_draws_are_those_of_the_whole_batch():
    n, rows = 10, slice(3, 7)
    draws = [lambda k, g: torch.randn((k, 2, 2), generator=g), lambda k, g: torch.randn(k, 2, generator=g), lambda k, g: torch.randint(1, 41, (k,), generator=g),
             lambda k, g: torch.rand(size=(k, 3), generator=g), lambda k, g: torch.randint(9, (k,), generator=g), lambda k, g: torch.randn(torch.Size([k, 1]), generator=g)]
    for draw in draws:
        with training.GlobalDraws(rows, n): part = draw(4, training.stream(1))
        assert torch.equal(part, draw(n, training.stream(1))[rows])
    with training.GlobalDraws(rows, n):
        assert torch.rand(4).shape == (4,) and len(torch.randperm(28, generator=training.stream(1))) == 28, "what does not belong to the batch is as ever"
        with pytest.raises(TrainingError, match="not bernoulli"): torch.bernoulli(torch.full((4,), .5), generator=training.stream(1))
