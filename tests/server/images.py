"""A Dockerfile's steps in a scratch folder, for machines without a Docker engine.

What an engine does by isolation is missing: FROM's system is this machine, and `python` and
`useradd` in RUN are stand-ins. COPY, .dockerignore, ENV, WORKDIR, RUN's shell lines, HEALTHCHECK,
ENTRYPOINT and CMD are as in an image.
"""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

KNOWN = {
    *("ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "STOPSIGNAL"),
    *("HEALTHCHECK", "ENTRYPOINT", "CMD"),
}


def instructions(path):
    """[(instruction, its text)], continued lines joined."""
    lines = [
        x for x in path.read_text().splitlines() if x.strip() and not x.lstrip().startswith("#")
    ]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [tuple(line.split(None, 1)) for line in joined.splitlines()]
    assert all(name in KNOWN for name, _ in found), found
    return found


def stages(path):
    """What stands before the first FROM, and {stage: (its base, its instructions)}."""
    before, found, name = [], {}, None
    for instruction, text in instructions(path):
        if instruction == "FROM":
            base, _, name = text.partition(" AS ")
            name = name or "the last"
            found[name] = (base, [])
        else:
            (found[name][1] if found else before).append((instruction, text))
    return before, found


class Image:
    """A stage of a Dockerfile, built below `root`."""

    def __init__(self, context, root, path, target="the last", **arguments):
        self.context, self.root = Path(context), Path(root)
        self.environment = {"PATH": path, "HOME": str(root), "TMPDIR": str(root / "tmp")}
        self.given, self.arguments, self.workdir, self.user = arguments, {}, "/", "root"
        self.health = self.entrypoint = self.command = None
        (self.root / "tmp").mkdir(parents=True)
        self.ignored = (self.context / ".dockerignore").read_text().splitlines()
        before, self.stages = stages(self.context / "Dockerfile")
        for _, text in before:
            self.declare(text)
        self.build(target)
        unknown = arguments.keys() - self.arguments.keys()
        assert not unknown, f"--build-arg {unknown} is not declared"

    def build(self, name):
        base, steps = self.stages[name]
        if base in self.stages:
            self.build(base)
        for instruction, text in steps:
            getattr(self, f"do_{instruction.lower()}")(text)

    def expand(self, text):
        values = {**self.environment, **self.arguments}
        return re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], text)

    def declare(self, text):
        name, _, default = text.partition("=")
        self.arguments[name] = self.given.get(name, default)

    do_arg = declare

    def do_env(self, text):
        self.environment |= dict(pair.split("=", 1) for pair in shlex.split(self.expand(text)))

    def do_workdir(self, text):
        self.workdir = self.expand(text)
        self.place(self.workdir).mkdir(parents=True, exist_ok=True)

    def do_copy(self, text):
        *sources, target = shlex.split(self.expand(text))
        into = self.place(target)
        for source in sources:
            origin = self.context / source
            assert self.included(source), f"{source} is kept out by .dockerignore"
            if origin.is_dir():
                shutil.copytree(origin, into, ignore=self.left_out, dirs_exist_ok=True)
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy(origin, into)

    def do_run(self, text):
        done = subprocess.run(
            ["sh", "-c", text],
            cwd=self.place(self.workdir),
            env=self.environment | self.arguments,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"RUN {text}\n{done.stdout}{done.stderr}"

    def do_user(self, text):
        self.user = text

    def do_healthcheck(self, text):
        self.health = json.loads(text.partition("CMD ")[2])

    def do_entrypoint(self, text):
        self.entrypoint = json.loads(text)

    def do_cmd(self, text):
        self.command = json.loads(text)

    def do_expose(self, text):
        assert text.isdigit()

    def do_stopsignal(self, text):
        assert text == "SIGTERM"

    def place(self, path):
        """A path of the image below the root."""
        return self.root / os.path.join(self.workdir, path).lstrip("/")

    def included(self, name):
        """Whether .dockerignore lets a path of the context through: the last rule that fits."""
        found = True
        for rule in self.ignored:
            if rule.startswith("#") or not rule:
                continue
            pattern = rule.removeprefix("!")
            parts = Path(name).parts
            ways = ["/".join(parts[: i + 1]) for i in range(len(parts))]
            if pattern.startswith("**/"):
                ways, pattern = list(parts), pattern.removeprefix("**/")
            if any(fnmatch.fnmatch(way, pattern) for way in ways):
                found = rule.startswith("!")
        return found

    def left_out(self, folder, names):
        below = Path(folder).relative_to(self.context)
        return [n for n in names if not self.included(str(below / n))]
