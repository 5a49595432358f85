"""CPU seconds of processes, with processes that burn known amounts."""

import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxserve.bench import cpu_time
from tests.server.serving import wait_for

if not cpu_time.PROC.is_dir():
    pytest.skip("other processes' times are read in Linux's /proc", allow_module_level=True)

BURN = "import time\nwhile time.process_time() < {}: sum(range(10_000))\n"
WAIT = "print(flush=True)\nimport sys\nsys.stdin.read()\n"
# A parent that burns 0.2 s, with a child that burns 0.3 s and ends, and one that burns 0.4 s.
FAMILY = f"""
import subprocess, sys
python, pipe = [sys.executable, "-c"], subprocess.PIPE
subprocess.run([*python, {BURN.format(0.3)!r}])
child = subprocess.Popen([*python, {BURN.format(0.4) + WAIT!r}], stdin=pipe, stdout=pipe)
{BURN.format(0.2)}
child.stdout.readline()
print("burnt", flush=True)
input()
"""


@pytest.fixture
def family():
    process = subprocess.Popen(
        [sys.executable, "-c", FAMILY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate("\n")


def test_a_tree_counts_children_that_run_and_that_have_ended(family):
    assert family.stdout.readline() == "burnt\n"
    spent = cpu_time.of_tree(family.pid)
    root, child = cpu_time.tree(family.pid)
    print(f"{spent}; {root} and {child}")
    assert root == family.pid
    assert 0.85 <= spent.total < 1.6, "0.2 + 0.3 + 0.4, and what Python needs to start"
    assert spent.user > spent.system
    assert cpu_time.command_of(root)[:2] == [sys.executable, "-c"]
    before = cpu_time.of_tree(family.pid)
    time.sleep(0.1)
    assert (cpu_time.of_tree(family.pid) - before).total <= 0.02, "it sleeps"


def test_a_process_that_is_gone():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert cpu_time.tree(done.pid) == []
    assert cpu_time.of_tree(done.pid).total == 0
    assert cpu_time.command_of(done.pid) == []


def test_own_time_counts_threads_that_have_ended():
    def burn() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    before = cpu_time.own()
    thread = threading.Thread(target=burn)
    thread.start()
    thread.join()
    spent = cpu_time.own() - before
    print(spent)
    assert 0.19 < spent.total < 0.6


LISTEN = """
import socket
server = socket.create_server((HOST, 0), family=FAMILY)
print(server.getsockname()[1], flush=True)
connection, _ = server.accept()
connection.recv(1)
"""


@pytest.mark.parametrize("host,kind", [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6")])
def test_who_is_at_the_other_end_of_a_connection(host, kind):
    if kind == "AF_INET6" and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this machine has no IPv6")
    script = LISTEN.replace("HOST", repr(host)).replace("FAMILY", f"socket.{kind}")
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    port = int(process.stdout.readline())
    with socket.create_connection((host, port)) as connection:
        ours = connection.getsockname()[1]
        assert wait_for(lambda: cpu_time.peer_of(ours, port), 5) == process.pid
        assert cpu_time.peer_of(ours, port + 1) is None
    process.wait(5)
    assert cpu_time.peer_of(ours, port) is None
