"""Files that new weights may be read from, and all that is none of them."""

import os
import pathlib
import socket
import threading

import pytest

from jaxserve import weights_root
from jaxserve.weights_root import WeightsRoot, root_of


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A root with a file, beside a secret."""
    (tmp_path / "root" / "model").mkdir(parents=True)
    (tmp_path / "root" / "model" / "file").write_text("inside")
    (tmp_path / "outside" / "model").mkdir(parents=True)
    (tmp_path / "outside" / "model" / "file").write_text("secret")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2" / "file").write_text("secret")
    return tmp_path


@pytest.fixture
def root(folder) -> WeightsRoot:
    return WeightsRoot([folder / "root"])


def test_file_below_the_root_is_read(root, folder):
    assert root.read_text(folder / "root/model/file") == "inside"
    assert root.read_text(folder / "root" / ".." / "root" / "model" / "file") == "inside"
    (folder / "root/link").symlink_to(folder / "root/model")
    assert root.read_text(folder / "root/link/file") == "inside", "a link that stays inside"


@pytest.mark.parametrize(
    "path", ["outside/model/file", "root/../outside/model/file", "root-2/file"]
)
@pytest.mark.parametrize("system_tells", [True, False])
def test_file_elsewhere_is_not(root, folder, path, system_tells, monkeypatch):
    """Also where the system does not tell what a descriptor is."""
    if not system_tells:
        monkeypatch.setattr(weights_root, "OPENED", folder / "none")
    with pytest.raises(ValueError, match="is not below --weights-root"):
        root.read_text(folder / path)


@pytest.mark.parametrize("target", ["outside/model", "outside/model/file"])
def test_link_that_leads_out_is_not_followed(root, folder, target):
    link = folder / "root/link"
    link.symlink_to(folder / target)
    path = link / "file" if (folder / target).is_dir() else link
    with pytest.raises(ValueError, match="is not below --weights-root"):
        root.read_text(path)
    with pytest.raises(ValueError, match="is not below --weights-root"):
        root.find(str(link)) if path != link else root.open(link)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket"])
def test_what_is_no_regular_file_is_refused_at_once(folder, kind):
    root = WeightsRoot(["/"])
    path = folder / "root" / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        listener = socket.socket(socket.AF_UNIX)
        here = os.getcwd()
        os.chdir(path.parent)  # the whole path may be too long for a socket
        listener.bind(kind)
        os.chdir(here)
        listener.close()
    with pytest.raises(ValueError, match="is no regular file"):
        root.open(path)


def swap_after_the_check(monkeypatch, swap) -> None:
    """`swap` runs between the last look at the path and its opening."""

    def open_later(path, flags, open_now=os.open):
        swap()
        return open_now(path, flags)

    monkeypatch.setattr(os, "open", open_later)


def test_file_swapped_for_a_link_is_not_followed(root, folder, monkeypatch):
    path = folder / "root/model/file"

    def swap():
        path.unlink()
        path.symlink_to(folder / "outside/model/file")

    with monkeypatch.context() as patched:
        swap_after_the_check(patched, swap)
        with pytest.raises(OSError, match="symbolic link"):
            root.open(path)


@pytest.mark.timeout(20)
def test_file_swapped_for_a_pipe_keeps_nobody_waiting(root, folder, monkeypatch):
    path = folder / "root/model/file"

    def swap():
        path.unlink()
        os.mkfifo(path)

    with monkeypatch.context() as patched:
        swap_after_the_check(patched, swap)
        with pytest.raises(ValueError, match="is no regular file"):
            root.open(path)


def test_folder_swapped_for_a_link_is_noticed(root, folder, monkeypatch):
    model = folder / "root/model"

    def swap():
        model.rename(folder / "root/old")
        model.symlink_to(folder / "outside/model")

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        swap_after_the_check(patched, swap)
        with pytest.raises(ValueError, match="is not below --weights-root"):
            root.open(model / "file")
    assert len(os.listdir("/proc/self/fd")) == before


def test_link_that_flips_all_the_time_never_gives_the_secret(root, folder):
    link, stop = folder / "root/flip", threading.Event()
    targets = [folder / "root/model", folder / "outside/model"]
    link.symlink_to(targets[0])

    def flip():
        for i in range(100_000):
            if stop.is_set():
                return
            (folder / "root/next").symlink_to(targets[i % 2])
            os.replace(folder / "root/next", link)

    flipping = threading.Thread(target=flip)
    flipping.start()
    found = {"inside": 0, "refused": 0}
    for _ in range(2000):
        try:
            found[root.read_text(link / "file")] += 1
        except (ValueError, OSError):
            found["refused"] += 1
    stop.set()
    flipping.join()
    print(found)
    assert found["inside"] and found["refused"]


def test_large_file_is_not_read_whole(root, folder):
    path = folder / "root/large"
    path.write_bytes(b"x" * 1001)
    assert len(root.read_text(path, most_bytes=1001)) == 1001
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        root.read_text(path, most_bytes=1000)


def test_folder_that_is_asked_for(root, folder, monkeypatch):
    real = folder / "root/model"
    assert root.find(str(real))[0] == real
    monkeypatch.chdir(folder / "root")
    assert root.find("model")[0] == real and root.find("./model")[0] == real
    for name in ("/etc", "..", "../outside", str(folder / "outside"), "/no/such/folder"):
        with pytest.raises(ValueError, match="is not below --weights-root"):
            root.find(name)
    for name in ("org/name", "name", str(folder / "root/none"), "./none", "a/b/c/d"):
        with pytest.raises(FileNotFoundError) as error:
            root.find(name)
        assert str(error.value) == f"{name} (repository not found)"


def test_name_in_the_hubs_cache_is_found_without_asking_anybody(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("an outbound connection"))
    repository = tmp_path / "cache/models--org--name"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    (repository / "blobs").mkdir()
    (repository / "blobs/1").write_text("content")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    root = WeightsRoot([tmp_path / "elsewhere"], str(tmp_path / "cache"))
    found, inside = root.find("org/name")
    assert found == snapshot and inside.read_text(found / "config.json") == "content"
    with pytest.raises(FileNotFoundError, match=r"org/other \(repository not found\)"):
        root.find("org/other")


@pytest.mark.parametrize(
    "model,root",
    [
        ("/data/models/llama", "/data/models"),
        ("/model", "/model"),
        ("/data/models--o--n/snapshots/abc", "/data/models--o--n"),
    ],
)
def test_default_root_is_the_folder_that_holds_the_models(model, root):
    assert str(root_of(model)) == root
