"""After editing notebooks: export the library, clean the notebooks, make README.md from the index.

    python tools/prepare.py           do it
    python tools/prepare.py --check   change nothing; fail, and say where, if doing it would change a file
                                      or if a notebook is not fit to be read (a missing output, a stored error, ...)
"""
from __future__ import annotations
import argparse, ast, base64, difflib, hashlib, json, re, shutil, subprocess, sys, tempfile
from pathlib import Path

import nbio

MAX_BYTES = 2_000_000
SILENT = {"test_eq", "test_ne", "test_close", "test_fail", "test", "test_is", "equals", "use_style", "nbdev_export", "filterwarnings",
          "manual_seed", "set_num_threads", "append", "update", "mkdir", "write_text", "seed", "backward", "eval", "save", "close"}


def readme(index: Path) -> tuple[str, dict[str, bytes]]:
    "The index notebook as GitHub Markdown (text as it is, code fenced, results below it, links into nbs/), and its pictures by path."
    pictures = {}
    parts = ["<!-- Made from nbs/index.ipynb by `make prepare`; edit that. -->"]
    for cell in json.loads(index.read_text(encoding="utf-8"))["cells"]:
        src = "".join(cell["source"]).strip()
        if not src or re.match(r"#\|\s*(hide|default_exp)", src): continue
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", src).replace("](../", "]("))
            continue
        parts.append("```python\n" + "\n".join(l for l in src.splitlines() if not l.startswith("#|")) + "\n```")
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "image/png" in data:
                path = f"assets/readme-{len(pictures) + 1}.png"
                pictures[path] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![output of the cell above]({path})")
            elif "text/markdown" in data: parts.append("".join(data["text/markdown"]).strip())
            elif text := "".join(out.get("text") or data.get("text/plain", "")).rstrip(): parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n", pictures


def prepare(root: Path):
    "Export, clean and write README.md in a checkout."
    subprocess.run([str(Path(sys.executable).parent/"nbdev_export")], cwd=root, check=True)
    for path in nbio.notebooks(root):
        new = nbio.text(json.loads(path.read_text(encoding="utf-8")))
        if new != path.read_text(encoding="utf-8"): nbio.write(json.loads(new), path)
    subprocess.run([str(Path(sys.executable).parent/"nbdev_clean")], cwd=root, check=True)
    text, pictures = readme(root/"nbs"/"index.ipynb")
    (root/"README.md").write_text(text, encoding="utf-8")
    shutil.rmtree(root/"assets", ignore_errors=True)
    for name, data in pictures.items():
        (root/name).parent.mkdir(exist_ok=True)
        (root/name).write_bytes(data)


def files(root: Path) -> dict[str, str]:
    "What prepare may change."
    paths = [*nbio.notebooks(root), *sorted((root/"diffusion_nb").rglob("*.py")), root/"README.md"]
    texts = {str(p.relative_to(root)): p.read_text(encoding="utf-8") for p in paths if p.exists()}
    return texts | {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((root/"assets").glob("*"))}


def out_of_step(root: Path) -> list[str]:
    "Files that prepare would change, each with the first lines of the difference."
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/root.name
        shutil.copytree(root, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv*", ".git", "_*", "runs", "build", "*.egg-info"))
        for name in ("_quarto.yml",): shutil.copyfile(root/name, copy/name)
        for init in (root/"diffusion_nb").glob("_*.py"): shutil.copyfile(init, copy/"diffusion_nb"/init.name)
        before = files(copy)
        prepare(copy)
        after = files(copy)
    changed = [n for n in sorted(before.keys() | after.keys()) if before.get(n) != after.get(n)]
    return [f"{n} is out of step with its source (make prepare):\n    " + "\n    ".join(l[:160] for l in list(difflib.unified_diff(
        before.get(n, "").splitlines(), after.get(n, "").splitlines(), "stored", "made", lineterm="", n=0))[2:8]) for n in changed]


def shows(src: str) -> bool:
    "Does this code end in a value or a printed line that a reader should see?"
    if re.search(r"^#\|\s*(export|exporti|exports|hide|default_exp|eval:\s*false)", src, re.M): return False
    try: body = ast.parse(re.sub(r"^[%!].*$", "", src, flags=re.M)).body
    except SyntaxError: return False
    if not body or src.rstrip().endswith(";") or not isinstance(body[-1], ast.Expr): return False
    call = body[-1].value
    if isinstance(call, ast.Constant): return isinstance(call.value, (int, float))
    if not isinstance(call, ast.Call): return True
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name not in SILENT


def unfit(path: Path) -> list[str]:
    "What a reader of this notebook would stumble over."
    said, size = [], path.stat().st_size
    if size > MAX_BYTES: said.append(f"{size/1e6:.1f} MB with its outputs; at most {MAX_BYTES/1e6:.0f}")
    private = {str(nbio.ROOT), str(Path.home()), str(Path(sys.executable).parent.parent)} - {"/"}
    for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code": continue
        src, outs = "".join(cell["source"]), cell["outputs"]
        if shows(src) and not outs: said.append(f"cell {n} should show something and stores no output: {src.strip().splitlines()[-1][:80]}")
        if any(o["output_type"] == "error" for o in outs): said.append(f"cell {n} stores an error")
        if any(p in json.dumps(outs) for p in private): said.append(f"cell {n} shows a path of the machine it ran on")
    return [f"{path.name}: {s}" for s in said]


def results_out_of_step(root: Path) -> list[str]:
    "Chapters without measured minutes, minutes without a chapter, and minutes that the index shows otherwise."
    rows = {r["id"]: r for r in json.loads((root/"results"/"results.json").read_text(encoding="utf-8"))}
    have, want = {k.split("/")[1] for k in rows if k.startswith("course/")}, {"all", *(p.stem for p in nbio.chapters(root))}
    said = [f"results.json: minutes of {n} are {'missing' if n in want else 'left over'} (tools/course.py --store)" for n in sorted(have ^ want)]
    text = readme(root/"nbs"/"index.ipynb")[0]
    return said + [f"index.ipynb: does not show {rows[f'course/{n}/minutes']['value']:.1f} min for {n} (tools/course.py index --force --store)" for n in sorted(have & want)
                   if not re.search(rf"^{'together' if n == 'all' else n} +{rows[f'course/{n}/minutes']['value']:.1f} min", text, re.M)]


def numbers_out_of_step(root: Path) -> list[str]:
    "What is wrong with results.json, and numbers that pages quote from it and it does not have."
    from diffusion_nb.metrics import check_quotes, validate_results
    rows = json.loads((root/"results"/"results.json").read_text(encoding="utf-8"))
    if said := validate_results(rows): return [f"results.json: {s}" for s in said]
    known = {r["id"]: r for r in rows}
    return [f"{p.name}: {s}" for p in nbio.notebooks(root) for s in check_quotes(json.loads(p.read_text(encoding="utf-8")), known)]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="change nothing, only say what is wrong")
    if not p.parse_args().check: return prepare(nbio.ROOT)
    said = out_of_step(nbio.ROOT) + results_out_of_step(nbio.ROOT) + numbers_out_of_step(nbio.ROOT) + [s for path in nbio.notebooks() for s in unfit(path)]
    print("\n".join(said) or "Library, notebooks, results and README are in step; every cell that should show something does.")
    sys.exit(bool(said))


if __name__ == "__main__": main()
