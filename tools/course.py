"""Execute the chapters in order, on real data, with a line of progress for each; say at the end what came out.

    python tools/course.py                     every chapter, into _course/; what is up to date is reused
    python tools/course.py 01_schedule --force only this one, whether or not it is up to date
    python tools/course.py --store             also write the outputs back into nbs/ (for whoever edits the book)
"""
from __future__ import annotations
import argparse, hashlib, json, os, shutil, sys, time
from pathlib import Path

import nbio

OUT = nbio.ROOT/"_course"
RUNS = nbio.ROOT/"_course"/"runs"


def fingerprint(path: Path) -> str:
    "Changes when the chapter's code or text changes, or the library under it."
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    h = hashlib.sha256(repr(cells).encode())
    for f in sorted((nbio.ROOT/"diffusion_nb").glob("*.py")): h.update(f.read_bytes())
    return h.hexdigest()


def clock(seconds: float) -> str: return f"{int(seconds)//60}:{int(seconds)%60:02d}"


def execute(path: Path, line) -> "NotebookNode":
    "Run every cell of a notebook in a fresh kernel; `line` is told how far it is."
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(path, as_version=4)
    n = sum(c.cell_type == "code" for c in nb.cells)
    done = 0
    def tell(cell, cell_index):
        nonlocal done
        done += cell.cell_type == "code"
        line(f"cell {done}/{n}")
    client = NotebookClient(nb, timeout=None, kernel_name="python3", store_widget_state=False, coalesce_streams=True,
                            extra_arguments=["--IPKernelApp.log_level=ERROR"],
                            resources={"metadata": {"path": str(nbio.NBS)}}, on_cell_execute=tell)
    client.execute()
    return nb


def run(path: Path, number: str, store: bool, force: bool) -> float:
    "Execute one chapter unless it is up to date; its seconds, as measured when it ran."
    out, card = OUT/path.name, OUT/f"{path.stem}.json"
    head, key, t0 = f"[{number}] {nbio.title(path)[:44]:44s}", fingerprint(path), time.time()
    if not force and out.exists() and card.exists():
        known = json.loads(card.read_text())
        if known["fingerprint"] == key:
            print(f"{head} {clock(known['seconds'])} (up to date, reused)", flush=True)
            return known["seconds"]
    live = sys.stdout.isatty()
    def line(text):
        if live: print(f"\r{head} {clock(time.time() - t0)} {text:16s}", end="", flush=True)
    if not live: print(f"{head} ...", end="", flush=True)
    from nbclient.exceptions import CellExecutionError
    try: nb = execute(path, line)
    except CellExecutionError as e:
        print(f"\n{path.name} failed:\n{e}", file=sys.stderr)
        sys.exit(1)
    seconds = time.time() - t0
    nbio.write(nb, out)
    if store: shutil.copyfile(out, path)
    card.write_text(json.dumps({"fingerprint": key, "seconds": round(seconds, 1)}))
    print(f"\r{head} {clock(seconds)} {'done':16s}" if live else f" {clock(seconds)} done", flush=True)
    return seconds


def report(times: dict[str, float]):
    "What a reader wants to know at the end."
    print(f"\nThe course ran in {clock(sum(times.values()))} minutes:")
    for name, s in times.items(): print(f"  {name:16s} {s/60:5.1f} min")
    print(f"Executed notebooks: {OUT.relative_to(nbio.ROOT)}/*.ipynb")
    for card in sorted(RUNS.glob("*/summary.json")):
        s = json.loads(card.read_text())
        print(f"{s['what']}: {s['network']}, {s['images']:,} images in {s['seconds']:.0f} s, loss {s['loss']:.4f}")
        print(f"  samples: {(card.parent/s['samples']).relative_to(nbio.ROOT)}")
    print("Read on: `make lab` opens the notebooks, `make site` renders the pages.")


def remember(times: dict[str, float]):
    "Keep the minutes of chapters whose outputs were stored where pages may quote them: results/results.json."
    from diffusion_nb.metrics import Result, read_results, record
    path = nbio.ROOT/"results"/"results.json"
    known, times = read_results(path), {p.stem: times[p.stem] for p in nbio.chapters() if p.stem in times}
    if not times: return
    old = {p.stem: 60*known[f"course/{p.stem}/minutes"]["value"] for p in nbio.chapters() if f"course/{p.stem}/minutes" in known}
    for name, s in [*times.items(), ("all", sum((old | times).values()))]:
        record(f"course/{name}/minutes", Result("minutes", round(s/60, 2)), "make course", path=path)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("chapters", nargs="*", help="names such as 01_schedule (all unless given)")
    p.add_argument("--store", action="store_true", help="write the outputs back into nbs/")
    p.add_argument("--force", action="store_true", help="execute even what is up to date")
    p.add_argument("--data-only", action="store_true", help="only make sure the data are there")
    a = p.parse_args()

    os.environ.setdefault("DIFFUSION_NB_RUNS", str(RUNS))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait must not burn the core another needs
    if a.store: os.environ["DIFFUSION_NB_RECORD"] = "1"  # chapters keep what they measured in results.json
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    OUT.mkdir(exist_ok=True)
    t0 = time.time()
    from diffusion_nb.data import cache_dir, mnist
    print("MNIST ...", end="", flush=True)
    n = len(mnist("train").images)
    print(f" {n:,} training images, {clock(time.time() - t0)} ({'small set' if n < 60_000 else cache_dir().name + '/mnist'})", flush=True)
    if a.data_only: return
    wanted = [nbio.NBS/f"{c.removesuffix('.ipynb')}.ipynb" for c in a.chapters] or nbio.chapters()
    for path in wanted:
        if not path.exists(): sys.exit(f"no chapter {path.name}; there are {', '.join(c.stem for c in nbio.chapters())}")
    times = {p.stem: run(p, f"{i}/{len(wanted)}", a.store, a.force) for i, p in enumerate(wanted, 1)}
    report(times)
    if a.store: remember(times)


if __name__ == "__main__": main()
