"""Everything that can happen, for five minutes; two hours by hand (tests/recipes/soak.py)."""

import json
import sys

from tests.recipes import runs


def test_five_minutes():
    command = [sys.executable, "-m", "tests.recipes.soak", "--minutes", "5", "--every", "15"]
    done = runs.run(command, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert not figures["wrong"]
    assert min(figures["faults"].values()) >= 1
    for name in ("kill", "stop"):
        assert figures["ended the run"][name] == figures["faults"][name]
    assert figures["ended the run"]["worker"] == figures["ended the run"]["NaN"] == 0, done.stderr
