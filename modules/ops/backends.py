"""Which implementation of an operator runs: asked for by the user, or the first that can."""

import contextlib
import functools
import importlib
import logging
import os
from dataclasses import dataclass
from types import ModuleType

import torch

from modules.errors import UserError

logger = logging.getLogger(__name__)

OK = "ok"


@dataclass(frozen=True)
class Call:
    """What a backend must know of a call to say whether it can run it.

    `width` is the number of states N of the scan, the kernel size K of the convolution.
    """

    device: str
    dtype: torch.dtype
    width: int
    needs_grad: bool
    initial_state: bool
    return_state: bool


class Backends:
    """The implementations of one operator and the choice among them.

    modules: name -> module, in the order in which "auto" tries them. Every module has
    `availability()` and `supports(call)`, both returning "ok" or the reason against it (the first
    with the way to get it), and a function named like the operator.
    reference: the name of the slow, readable one, which "auto" never takes.
    """

    def __init__(
        self, operator: str, variable: str, modules: dict[str, ModuleType], reference: str
    ):
        self.operator = operator
        self.variable = variable
        self.modules = modules
        self.reference = reference
        self.default = "auto"
        self.required: str | None = None
        self.logged: set[tuple[str, str]] = set()

    def available(self) -> dict[str, str]:
        """Name -> "ok", or why the backend is missing and how to get it."""
        return {name: module.availability() for name, module in self.modules.items()}

    def set_default(self, name: str) -> None:
        """Force a backend for the whole process, "auto" to undo; raises UserError if it cannot."""
        if name != "auto":
            self._check(name, "set_backend")
        self.default = name

    @contextlib.contextmanager
    def forced(self, name: str):
        """Run a backend and no other within, whatever is asked for: for exported graphs."""
        self._check(name, "forced")
        before, self.required = self.required, name
        try:
            yield
        finally:
            self.required = before

    def pick(self, argument: str, call: Call) -> ModuleType:
        """The module to run: forced, argument, environment, `set_default`, automatic, in order."""
        name, source = self._requested(argument)
        if name == "auto":
            name = self._automatic(call)
        else:
            self._check(name, source)
            reason = self.modules[name].supports(call)
            if reason != OK:
                raise self._error(name, source, f"cannot run this call: {reason}")
        if (call.device, name) not in self.logged:
            self.logged.add((call.device, name))
            note = getattr(self.modules[name], "FIRST_CALL", "")
            text = "%s on %s: %s backend (%s)" + (note and f"; {note}")
            logger.info(text, self.operator, call.device, name, source)
        return self.modules[name]

    def _requested(self, argument: str) -> tuple[str, str]:
        if self.required is not None:
            return self.required, "forced"
        if argument != "auto":
            return argument, "the backend argument"
        if name := os.environ.get(self.variable):
            return name, f"the environment variable {self.variable}"
        return self.default, "chosen automatically" if self.default == "auto" else "set_backend"

    def _automatic(self, call: Call) -> str:
        for name, module in self.modules.items():
            if name == self.reference:
                continue
            # supports() first: it is cheap, and spares a CPU run the search for CUDA packages.
            if module.supports(call) == OK and module.availability() == OK:
                return name
        raise AssertionError(f"{self.operator}: no backend takes {call}")

    def _check(self, name: str, source: str) -> None:
        if name not in self.modules:
            raise self._error(name, source, "does not exist")
        reason = self.modules[name].availability()
        if reason != OK:
            raise self._error(name, source, f"is not available: {reason}")

    def _error(self, name: str, source: str, problem: str) -> UserError:
        names = ", ".join(n for n, reason in self.available().items() if reason == OK)
        return UserError(
            f"{self.operator} backend '{name}' (from {source}) {problem}. "
            f"Available here: auto, {names}; use one of these or leave the choice to 'auto'."
        )


@functools.cache
def extension_availability(extension: str, package: str, install: str) -> str:
    """Say "ok" if a CUDA device, a compiled extension and its Python package are here."""
    if not torch.cuda.is_available():
        return "needs a CUDA device, and torch sees none"
    for name in (extension, package):
        try:
            importlib.import_module(name)
        except ImportError as error:  # absent, or built against another torch
            return f"{name} cannot be imported ({error}); {install}"
    return OK
