"""The table of invariants is whole, and what it names is there."""

import importlib
import pathlib
import re

README = pathlib.Path(__file__).with_name("README.md").read_text()


def test_every_invariant_is_checked_somewhere():
    rows = dict(re.findall(r"^\| (I\d+) \|.*\|(.*)\|$", README, re.MULTILINE))
    assert list(rows) == [f"I{i}" for i in range(1, 28)]
    for number, places in rows.items():
        names = re.findall(r"`(\w+)\.([\w.]+)`", places)
        assert names or re.search(r"the same|I\d+", places), number
        for module, path in names:
            found = importlib.import_module(f"tests.engine.{module}")
            for name in path.split("."):
                found = getattr(found, name)
            assert callable(found)
