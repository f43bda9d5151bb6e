"What the other tools share: where the chapters are, how a notebook is read, cleaned and written."
from __future__ import annotations
import json, os, re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
WIDGET = "application/vnd.jupyter.widget-view+json"  # means nothing without the kernel that made it


def chapters(root: Path = ROOT) -> list[Path]:
    "The numbered chapters, in reading order (the index and the appendices are not among them)."
    return sorted((root/"nbs").glob("[0-9][0-9]_*.ipynb"))


def notebooks(root: Path = ROOT) -> list[Path]:
    "Every notebook of the course."
    return sorted((root/"nbs").glob("*.ipynb"))


def title(path: Path) -> str:
    "The first heading of a notebook."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if m := re.match(r"# (.+)", "".join(cell["source"])): return m[1].strip()
    return path.stem


def clean(nb: dict) -> dict:
    "Keep what a reader sees; drop counts, volatile metadata, and the part of a widget that only its kernel understands."
    from nbdev.clean import clean_nb
    for cell in nb["cells"]:
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            data.pop(WIDGET, None)
            if "metadata" in out: out["metadata"] = {}
    nb["metadata"] = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    clean_nb(nb, allowed_cell_metadata_keys=["jupyter"])  # which keeps the source of tested solutions folded
    return nb


def text(nb: dict) -> str:
    "A cleaned notebook as the text of its file, just as nbdev writes it."
    return json.dumps(clean(nb), sort_keys=True, indent=1, ensure_ascii=False) + "\n"


def write(nb, path: Path):
    "Clean a notebook (from nbformat, or as JSON) and write it, complete or not at all."
    nb = json.loads(nbformat.writes(nb)) if isinstance(nb, nbformat.NotebookNode) else nb
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    tmp.write_text(text(nb), encoding="utf-8")
    os.replace(tmp, path)
