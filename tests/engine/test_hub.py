"""From a model's name to its folder. The hub is a server of our own on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import urllib.parse

import pytest

from jaxserve import hub
from jaxserve.config import EngineConfig
from jaxserve.model_loader import needed_parts

COMMITS = {"main": "a" * 40, "v2": "b" * 40}
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = json.dumps({"weight_map": {f"layer.{i}": shard for i, shard in enumerate(SHARDS)}})
FILES = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "model.safetensors.index.json": INDEX,
    "README.md": "a model",
} | dict.fromkeys(SHARDS, "weights")
ALL = {"config", "weights", "tokenizer"}


def fill(cache, names, commit: str = COMMITS["main"]):
    """The hub's own cache, with these files of org/model."""
    repository = cache / "models--org--model"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    for name, known in COMMITS.items():
        (repository / "refs" / name).write_text(known)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in names:
        (snapshot / name).write_text(FILES[name])
    return snapshot


class Hub(http.server.BaseHTTPRequestHandler):
    """Knows org/model alone."""

    def do_GET(self):
        path = urllib.parse.urlparse(self.path).path
        self.server.asked.append((self.command, path))
        if path.startswith("/api/models/org/model/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": self._hash(content)}
                for name, content in FILES.items()
            ]
            return self._send(json.dumps(entries))
        if path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "org/model", "sha": COMMITS["main"], "siblings": siblings}
            return self._send(json.dumps(info))
        content = FILES.get(path.rpartition("/")[2])
        if path.startswith("/org/model/resolve/") and content is not None:
            return self._send(content, "application/octet-stream")
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def _send(self, content: str, kind: str = "application/json") -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{self._hash(content)}"')
        self.send_header("X-Repo-Commit", COMMITS["main"])
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content.encode())

    @staticmethod
    def _hash(content: str) -> str:
        return hashlib.sha1(content.encode()).hexdigest()

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def resolve_elsewhere(name: str, cache, parts=ALL, server=None, **environment: str) -> str:
    """What it says in a process of its own: the hub's client reads its environment once."""
    script = (
        "import sys; from jaxserve import hub\n"
        "name, cache, *parts = sys.argv[1:]\n"
        "try: print('found', hub.resolve(name, set(parts), download_dir=cache))\n"
        "except FileNotFoundError as error: print(error)"
    )
    if server is not None:
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    done = subprocess.run(
        [sys.executable, "-c", script, name, str(cache), *parts],
        env=os.environ | {"HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(done.stdout, done.stderr[-500:])
    return done.stdout.strip()


def test_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    assert hub.resolve(str(tmp_path), ALL) == str(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model", ALL) == "org/model", "it goes before the hub's of that name"


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no", "a/b/c"])
def test_what_can_only_be_a_folder_is_never_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"{name} is no folder"):
        hub.resolve(name, ALL)


def test_cached_repository_is_found_without_a_network(tmp_path):
    snapshots = {name: fill(tmp_path, FILES, commit) for name, commit in COMMITS.items()}
    assert hub.resolve("org/model", ALL, download_dir=str(tmp_path)) == str(snapshots["main"])
    older = hub.resolve("org/model", ALL, revision="v2", download_dir=str(tmp_path))
    assert older == str(snapshots["v2"])


SMALL = ["config.json", "tokenizer.json", "model.safetensors.index.json"]
INCOMPLETE = [
    (["tokenizer.json"], "config.json"),
    (["config.json", "tokenizer.json"], "*.safetensors"),
    (SMALL, f"{SHARDS[0]} (3 of 3 shards)"),
    ([*SMALL, SHARDS[0], SHARDS[2]], f"{SHARDS[1]} (1 of 3 shards)"),
    ([*(FILES.keys() - {"tokenizer.json", "README.md"})], "tokenizer"),
]


@pytest.mark.parametrize("names,missing", INCOMPLETE[:4], ids=[row[1] for row in INCOMPLETE[:4]])
def test_interrupted_download_is_no_model_without_a_network(tmp_path, names, missing):
    fill(tmp_path, names)
    told = resolve_elsewhere("org/model", tmp_path, HF_HUB_OFFLINE="1")
    assert f"org/model is no folder, is in the hub's cache without its {missing}, " in told
    assert "HF_HUB_OFFLINE is set" in told and "--model-path" in told


@pytest.mark.parametrize("names,missing", INCOMPLETE[1:], ids=[row[1] for row in INCOMPLETE[1:]])
def test_interrupted_download_is_completed(tmp_path, endpoint, names, missing):
    snapshot = fill(tmp_path, names)
    assert resolve_elsewhere("org/model", tmp_path, server=endpoint) == f"found {snapshot}"
    assert {path.name for path in snapshot.iterdir()} == FILES.keys() - {"README.md"}
    asked = len(endpoint.asked)
    assert resolve_elsewhere("org/model", tmp_path, server=endpoint) == f"found {snapshot}"
    assert len(endpoint.asked) == asked, "what is whole needs no network"


def test_link_whose_target_is_gone_is_missing(tmp_path):
    snapshot = fill(tmp_path, [*SMALL, *SHARDS[1:]])
    (snapshot / SHARDS[0]).symlink_to(tmp_path / "blobs" / "gone")
    told = resolve_elsewhere("org/model", tmp_path, HF_HUB_OFFLINE="1")
    assert f"without its {SHARDS[0]}" in told


@pytest.mark.parametrize("parts", [{"config", "tokenizer"}, {"tokenizer"}], ids=sorted)
def test_weights_are_not_downloaded_where_none_are_needed(tmp_path, endpoint, parts):
    told = resolve_elsewhere("org/model", tmp_path, parts, endpoint)
    assert told.startswith("found ")
    names = {path.rpartition("/")[2] for _, path in endpoint.asked}
    print(names)
    assert {"config.json", "tokenizer.json"} <= names
    assert not any(name.endswith(".safetensors") for name in names)
    whole = resolve_elsewhere("org/model", tmp_path, ALL, endpoint)
    assert whole == told, "later it is completed"
    assert {path.rpartition("/")[2] for _, path in endpoint.asked} >= set(SHARDS)


@pytest.mark.parametrize(
    "options,parts",
    [
        ({}, ALL),
        ({"load_format": "dummy"}, {"config", "tokenizer"}),
        ({"skip_tokenizer_init": True}, {"config", "weights"}),
        ({"tokenizer_path": "other", "load_format": "dummy"}, {"config"}),
    ],
    ids=str,
)
def test_what_a_start_needs_of_a_model(options, parts):
    assert needed_parts(EngineConfig(model_path="x", **options)) == parts


def test_offline_says_what_to_do(tmp_path):
    told = resolve_elsewhere("org/absent", tmp_path, HF_HUB_OFFLINE="1")
    assert told.startswith("org/absent is no folder, is not cached, and the hub cannot be reached")
    assert "HF_HUB_OFFLINE is set" in told and "--model-path" in told


def test_hub_that_cannot_be_reached_says_what_to_do(tmp_path):
    told = resolve_elsewhere("org/absent", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub cannot be reached or" in told and "--model-path" in told
    fill(tmp_path, SMALL)
    told = resolve_elsewhere("org/model", tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert SHARDS[0] in told and "the hub cannot be reached" in told


def test_unknown_repository_has_the_words_of_the_documentation(tmp_path, endpoint):
    told = resolve_elsewhere("org/absent", tmp_path, server=endpoint)
    assert told.startswith("org/absent (repository not found)")
    assert any("org/absent" in path for _, path in endpoint.asked)


@pytest.mark.parametrize("name", ["org/absent model", "model:tag"])
def test_impossible_name_is_an_error_in_words(name, tmp_path):
    with pytest.raises(FileNotFoundError) as refused:
        hub.resolve(name, ALL, download_dir=str(tmp_path))
    print(refused.value)
