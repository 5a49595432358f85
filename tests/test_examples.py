"""The examples do what they say."""

import pathlib
import re
import subprocess
import sys

from tests.server.serving import free_port

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / name), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    print(done.stdout)
    return done.stdout


def test_embed_step_answers_more_questions_than_it_has_rows():
    found = run("embed_step.py")
    assert "The capital of France is Paris." in found and "The capital of Chile is" in found


def test_rollout_compiles_nothing_after_the_first_iteration():
    found = run("rollout.py", "--iterations", "3")
    assert len(re.findall(r"mean reward 0\.\d+", found)) == 3
    assert "'compiled_after_ready': 0" in found and "'traced_after_ready': 0" in found


def test_every_cell_of_the_documentation_page_runs():
    """What the page asserts, the example asserts itself."""
    found = run("native_api_page.py")
    assert re.search(r"Text embedding \(first 10\): \[-?0\.\d+", found)
    assert len(re.findall(r"^reward: -?\d+\.\d+", found, re.MULTILINE)) == 2
    assert len(re.findall(r"^\| [01] +\| [0-7] +\| \d+ +\|$", found, re.MULTILINE)) == 9


def test_answers_improve_while_a_server_is_reloaded():
    port = str(free_port())
    found = run("train_and_reload.py", "--rounds", "3", "--steps", "5", "--port", port)
    right = [int(count) for count in re.findall(r"(\d) of 6 right", found)]
    assert right[0] == 0 and right[-1] == 6 and len(right) == 4
    assert found.count("reloaded in") == 3
