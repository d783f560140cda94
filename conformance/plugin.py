"""pytest --pyargs conformance --candidate mykernels: every cell of the report as a test, in place of the suite's own tests.

Loaded by every pytest run where the package is installed (entry point pytest11), so it imports nothing of the suite before it is asked to,
and leaves the names of its options to others where it is not.
"""

import contextlib
import os
import shlex
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPTIONS = {
    "candidate": "what to test: pkg.mod or pkg.mod:attr, with functions of ref's names and signatures; with --pyargs conformance",
    "candidate-ops": "operations, comma-separated; default: all",
    "candidate-formats": "formats, comma-separated, or 'generated'; default: the main formats and generated ones",
    "candidate-impl": "values of impl=, comma-separated; default: the candidate's IMPLEMENTATIONS",
    "candidate-profile": "smoke, ci, deep or soak: how many examples a test has; default: ci",
}


def pytest_addoption(parser, pluginmanager):
    if not _asked(pluginmanager.get_plugin("pytestconfig")):
        return
    group = parser.getgroup("conformance", "conformance of kernels to quantref's reference")
    for name, text in OPTIONS.items():
        group.addoption(f"--{name}", metavar=name.rpartition("-")[2].upper(), help=text)


def _asked(config):
    """Whether the command line, PYTEST_ADDOPTS or addopts name both a candidate and this package, or ask for help."""
    given = [str(arg) for arg in config.invocation_params.args] + shlex.split(os.environ.get("PYTEST_ADDOPTS", ""))
    with contextlib.suppress(AttributeError, KeyError, ValueError):  # loaded by -p, before the configuration is read
        given += config.getini("addopts")
    here = any(Path(arg.partition("::")[0]).name == HERE.name for arg in given)
    return "-h" in given or "--help" in given or (here and any(arg.startswith("--candidate") for arg in given))


@pytest.hookimpl(tryfirst=True)
def pytest_collect_directory(path, parent):
    if path == HERE and parent.config.getoption("candidate", None):
        # Installed, it lies outside of the root of the tests, where pytest has no name for it.
        return Cells.from_parent(parent, path=path, nodeid=HERE.name)
    return None


def pytest_unconfigure(config):
    pool = config.stash.get(POOL, None)
    if pool is not None:
        pool.close()


POOL = pytest.StashKey()


class Cells(pytest.Directory):
    """The package's folder: a test for each operation, format and implementation."""

    def collect(self):
        for task in self._tasks():
            for impl in task.impls:
                name = f"{task.op}[{task.label}{f'-{impl}' if impl else ''}]"
                yield Cell.from_parent(self, name=name, task=task, impl=impl)

    def _tasks(self):
        from . import __main__ as command
        from . import environment, worker

        argv = [f"--{name.rpartition('-')[2]}={value}" for name in OPTIONS if (value := self.config.getoption(name.replace("-", "_")))]
        try:
            args = command._parse([*argv, "--jobs=1"])
            pool = self.config.stash[POOL] = worker.Pool(args.device, args.timeout)
            command.settle(args, pool)
            return command._tasks(args, pool.ask(environment.probe, args.device))
        except (command.UsageError, ValueError, worker.Ended, worker.Failed) as error:
            raise self.CollectError(f"conformance: {error}") from None


class Cell(pytest.Item):
    """A cell: passes, fails with the report's words, or is skipped with a reason."""

    def __init__(self, *, task, impl, **kwargs):
        super().__init__(**kwargs)
        self.task, self.impl = task, impl

    def runtest(self):
        from dataclasses import replace

        from . import report
        from .status import FAILING, STATUSES

        (found,) = next(iter(self.config.stash[POOL].run([replace(self.task, impls=(self.impl,))], 1)))
        measured = {"examples": found.examples, "worst": found.worst, "variant": ", ".join(found.variants)}
        self.user_properties += [("status", found.status), *measured.items()]
        if found.status in FAILING:
            raise Failure(report.failure(found))
        if found.status == "xfail":
            pytest.xfail(f"{found.reason} ({found.waiver})")
        if found.status != "pass":
            pytest.skip(f"{found.status}: {found.reason or STATUSES[found.status]}")

    def repr_failure(self, excinfo):
        return str(excinfo.value) if isinstance(excinfo.value, Failure) else super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, None, self.name


class Failure(Exception):
    """A cell that does not pass, in the report's words."""
