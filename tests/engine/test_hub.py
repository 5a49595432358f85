"""From a model's name to its folder. The hub is a server of our own on this machine."""

import http.server
import os
import subprocess
import sys
import threading

import pytest

from jaxserve import hub

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture
def cache(tmp_path):
    """The hub's own cache, with two revisions of org/model."""
    repository = tmp_path / "models--org--model"
    for name, commit in COMMITS.items():
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / name).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def answering_404():
    """A hub that knows no repository."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def resolve_elsewhere(name: str, cache, **environment: str) -> str:
    """The error in a process of its own: the hub's client reads its environment once."""
    script = (
        "import sys; from jaxserve import hub\n"
        "try: print('found', hub.resolve(sys.argv[1], download_dir=sys.argv[2]))\n"
        "except FileNotFoundError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, name, str(cache)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    print(done.stdout, done.stderr[-500:])
    return done.stdout.strip()


def test_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    assert hub.resolve(str(tmp_path)) == str(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/model") == "org/model", "it goes before the hub's of that name"


@pytest.mark.parametrize("name", ["/no/such", "./no", "../no", "~/no", "a/b/c"])
def test_what_can_only_be_a_folder_is_never_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"{name} is no folder"):
        hub.resolve(name)


def test_cached_repository_is_found_without_a_network(cache):
    found = hub.resolve("org/model", download_dir=str(cache))
    assert found == str(cache / "models--org--model" / "snapshots" / COMMITS["main"])
    older = hub.resolve("org/model", revision="v2", download_dir=str(cache))
    assert older.endswith(COMMITS["v2"])


def test_offline_says_what_to_do(tmp_path):
    told = resolve_elsewhere("org/absent", tmp_path, HF_HUB_OFFLINE="1")
    assert told.startswith("org/absent is no folder, is not in the hub's cache")
    assert "HF_HUB_OFFLINE is set" in told and "--model-path" in told


def test_hub_that_cannot_be_reached_says_what_to_do(tmp_path):
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    told = resolve_elsewhere("org/absent", tmp_path, **nobody)
    assert "the hub cannot be reached;" in told and "--model-path" in told


def test_unknown_repository_has_the_words_of_the_documentation(tmp_path, answering_404):
    endpoint, asked = answering_404
    online = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    told = resolve_elsewhere("org/absent", tmp_path, **online)
    assert told.startswith("org/absent (repository not found)")
    assert any("org/absent" in path for path in asked)


@pytest.mark.parametrize("name", ["org/absent model", "model:tag"])
def test_impossible_name_is_an_error_in_words(name, cache):
    with pytest.raises(FileNotFoundError) as refused:
        hub.resolve(name, download_dir=str(cache))
    print(refused.value)
