"""Damaged folders of caches: whatever is in the place of a file, it is missed, and made anew."""

import errno
import hashlib
import os
import random
import shutil
import tempfile
import threading
import time

import pytest
import torch
from torch import nn

from torch2rt import torch2rt
from torch2rt.backend import disk_cache
from torch2rt.engine import build as build_file
from torch2rt.engine import engine_cache

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
DIGEST = hashlib.sha256().digest_size


class Parts(nn.Module):
    """Two engines, and a call of torch's between them."""

    def __init__(self, width):
        super().__init__()
        torch.manual_seed(width)
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x):
        y = torch.tanh(self.first(x)) * 2 + 1
        return self.last(y * torch.linalg.svdvals(y)[0]).softmax(-1)


OPTIONS = dict(fallback=True, min_segment_calls=1, verify=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH2RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH2RT_CACHE_ENGINES")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Files of every kind, some of each: their names and contents."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as context:
        context.setenv("TORCH2RT_CACHE", str(folder))
        context.delenv("TORCH2RT_CACHE_ENGINES")
        for width in (4, 5):
            torch2rt(Parts(width), [X], **OPTIONS)
            for kind in ("kernels", "timings"):
                assert disk_cache.write(folder / f"{width}.{kind}", os.urandom(900 * width))
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {os.path.splitext(name)[1] for name in found} == set(disk_cache.KINDS)
    return found


@pytest.fixture
def files(contents, folder):
    """Files of every kind with their contents."""
    folder.mkdir()
    found = {folder / name: content for name, content in contents.items()}
    for file, content in found.items():
        file.write_bytes(content)
    return found


def is_read(file):
    """Whether a file is taken for what it was."""
    found = engine_cache.read(file) if file.suffix == ".engine" else disk_cache.read(file)
    return found is not None


def flipped(data, draw, other):
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def span(data, draw):
    start = draw.randrange(len(data))
    return start, min(len(data), start + draw.choice((1, 16, 512, 4096)))


def zeroed(data, draw, other):
    start, end = span(data, draw)
    return data[:start] + bytes(end - start) + data[end:]


def spliced(data, draw, other):
    start, end = span(data, draw)
    return data[:start] + other[start:end] + data[end:]


def swapped(data, draw, other):
    a, b, c = sorted(draw.sample(range(len(data)), 3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


DAMAGES = [
    flipped,
    zeroed,
    spliced,
    swapped,
    lambda data, draw, other: data[: draw.randrange(len(data))],
    lambda data, draw, other: data[draw.randrange(1, len(data)) :],
    lambda data, draw, other: data + draw.randbytes(draw.choice((1, 32, 5000))),
    lambda data, draw, other: b"",
    lambda data, draw, other: other,  # another file under this name
    lambda data, draw, other: data[:DIGEST] + other[DIGEST:],
    lambda data, draw, other: other[:DIGEST] + data[DIGEST:],
    lambda data, draw, other: hashlib.sha256(data[DIGEST:]).digest() + data[DIGEST:],  # of an earlier version
    lambda data, draw, other: b"no file of ours" * draw.randrange(1, 99),
]


def test_damaged_files_are_missed(files, request):
    draw, names, count = random.Random(7), sorted(files), 0
    while count < request.config.getoption("--corruptions"):
        file, other = draw.sample(names, 2)
        damage = draw.choice(DAMAGES)
        changed = damage(files[file], draw, files[other])
        if changed == files[file]:
            continue
        count += 1
        file.write_bytes(changed)
        assert not is_read(file), (damage, file)
        assert file.exists() == (file.suffix != ".engine"), "an engine's file is removed at once"
        file.write_bytes(files[file])
    assert all(map(is_read, names))


def link(target):
    return lambda file: file.symlink_to(target(file) if callable(target) else target)


def non_empty(file):
    file.mkdir()
    (file / "some").write_text("some")


OBSTACLES = {
    "folder": lambda file: file.mkdir(),
    "folder with files": non_empty,
    "pipe": lambda file: os.mkfifo(file),
    "endless": link("/dev/zero"),
    "loop": link(lambda file: file),
    "dangling": link("/nowhere/at/all"),
    "not readable": lambda file: file.write_bytes(b"") or file.chmod(0),
}


@pytest.mark.skipif(os.name != "posix", reason="makes what POSIX knows")
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_is_in_the_place_of_a_file(obstacle, files, monkeypatch):
    builds, serialize = [], build_file._serialize
    monkeypatch.setattr(build_file, "_serialize", lambda *args: builds.append(1) or serialize(*args))
    for file in files:
        file.unlink()
        OBSTACLES[obstacle](file)
        assert not is_read(file)
    ours = Parts(4)
    model_trt = torch2rt(ours, [X], **OPTIONS)
    assert len(builds) == len(model_trt.engines)
    torch.testing.assert_close(model_trt.reference()(X), ours(X))
    with disk_cache.locked(next(iter(files)).parent):
        pass
    for file in files:
        content = b"new" * 9
        assert not disk_cache.write(file, content) or bytes(disk_cache.read(file)) == content


@pytest.mark.skipif(os.name != "posix", reason="makes a pipe")
@pytest.mark.parametrize("what", ["folder", "pipe", "rubbish"])
def test_what_is_in_the_place_of_the_lock(what, folder, monkeypatch):
    monkeypatch.setattr(disk_cache, "PATIENCE", 0.2)
    folder.mkdir()
    lock = folder / "lock"
    {"folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock), "rubbish": lambda: lock.write_bytes(os.urandom(99))}[what]()
    start = time.monotonic()
    with disk_cache.locked(folder):
        assert disk_cache.write(folder / "a.timings", b"some")
    assert time.monotonic() - start < 5


def test_a_full_disk(folder):
    resource = pytest.importorskip("resource")
    file = folder / "a.engine"
    assert disk_cache.write(file, b"old")
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, most[1]))
        is_written = disk_cache.write(file, bytes(4000), bytes(4000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert not is_written and bytes(disk_cache.read(file)) == b"old"
    assert [f.name for f in folder.iterdir()] == ["a.engine"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("call", ["replace", "make", "scandir", "utime", "unlink"])
def test_calls_that_fail(call, number, folder, monkeypatch):
    """As those of a network's folders may at any time."""
    file = folder / "a.engine"
    assert disk_cache.write(file, b"old")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    where = {"make": (tempfile, "NamedTemporaryFile")}.get(call, (os, call))
    with monkeypatch.context() as context:
        context.setattr(*where, fail)
        is_written = disk_cache.write(file, b"new")
        disk_cache.files(folder), disk_cache.remove(folder / "b.engine")
        assert bytes(disk_cache.read(file)) == (b"new" if is_written else b"old")
    assert is_written == (call not in ("replace", "make"))


def test_a_folder_that_comes_and_goes(folder):
    stop, errors = threading.Event(), []

    def use(number):
        file = folder / f"{number}.engine"
        while not stop.is_set():
            try:
                disk_cache.write(file, bytes([number]) * 999)
                found = disk_cache.read(file)
                if found is not None and bytes(found) != bytes([number]) * 999:
                    errors.append("wrong")
                with disk_cache.locked(folder):
                    disk_cache.files(folder)
            except BaseException as error:
                errors.append(repr(error))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        shutil.rmtree(folder, ignore_errors=True)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors, errors[:3]
