"""The pytest plugin: a test for each cell where it is asked for, and nothing at all elsewhere."""

import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = """
from conformance.wrong import Right, SwappedNibbles

class Both(Right):
    IMPLEMENTATIONS = ("good", "bad", "none")

    def linear(self, x, w, bias=None, *, x_format=None, x_scale=None, impl=None):
        if impl == "none":
            raise NotImplementedError("linear: not on a Sunday")
        return (SwappedNibbles() if impl == "bad" else Right()).linear(x, w, bias, x_format=x_format, x_scale=x_scale)

both = Both()
"""
ASKED = ("--pyargs", "conformance", "--candidate", "kernels:both", "--candidate-formats", "int4_g128", "--candidate-profile", "smoke")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder of another project, in an environment where the plugin is installed."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "installed" / "plugin_test-1.dist-info").mkdir(parents=True)
    (folder / "installed" / "plugin_test-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin_test\nVersion: 1\n")
    (folder / "installed" / "plugin_test-1.dist-info" / "entry_points.txt").write_text("[pytest11]\nconformance = conformance.plugin\n")
    (folder / "kernels.py").write_text(KERNELS)
    (folder / "pytest.ini").write_text("[pytest]\n")
    return folder


def run(project, *args, options=(), **env):
    path = os.pathsep.join(map(str, (project / "installed", project, ROOT)))
    # The plugin under test only, once, as another project would have it.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "", **env}
    env.pop("PYTEST_ADDOPTS", None) if "PYTEST_ADDOPTS" not in env else None
    command = [sys.executable, *options, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *args]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=300)


def test_cells_are_tests(project, tmp_path):
    done = run(project, *ASKED, "--candidate-ops", "linear,pack", "-rfs", f"--junitxml={tmp_path}/junit.xml")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 2 skipped" in done.stdout
    assert "linear[int4_g128-bad]" in done.stdout and "FAIL linear int4_g128 impl bad" in done.stdout
    assert "only, exact" in done.stdout and "--candidate kernels:both --impl bad --case" in done.stdout
    assert "unsupported: linear: not on a Sunday" in done.stdout and "not provided: the candidate has no such function" in done.stdout
    assert "Traceback" not in done.stdout and "runtest" not in done.stdout and "test_oracle" not in done.stdout
    assert "FAILED conformance::linear[int4_g128-bad]" in done.stdout
    cases = {case.get("name"): case for case in xml.etree.ElementTree.parse(tmp_path / "junit.xml").iter("testcase")}
    assert set(cases) == {*(f"linear[int4_g128-{impl}]" for impl in ("good", "bad", "none")), "pack[4 bits]"}
    properties = {p.get("name"): p.get("value") for p in cases["linear[int4_g128-good]"].iter("property")}
    assert properties["status"] == "pass" and int(properties["examples"]) == 10 and float(properties["worst"]) < 1
    assert "exact" in properties["variant"]
    assert "admissible" in cases["linear[int4_g128-bad]"].find("failure").get("message")


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--candidate", "no_such_kernels"), "conformance: candidate: cannot import 'no_such_kernels'"),
        (("--candidate", "kernels:both", "--candidate-ops", "linea"), "conformance: unknown operation 'linea'"),
    ],
)
def test_usage_errors_are_sentences(project, args, text):
    done = run(project, "--pyargs", "conformance", *args)
    assert done.returncode == 2 and text in done.stdout and "Traceback" not in done.stdout, done.stdout + done.stderr


def test_nothing_is_imported_or_taken_where_it_is_not_asked_for(project, tmp_path):
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--candidate')\n")
    (tmp_path / "test_theirs.py").write_text("def test_theirs(request):\n    assert request.config.getoption('candidate') in (None, 'x')\n")
    for args in ((), ("--candidate", "x")):
        done = run(project, str(tmp_path), "--trace-config", *args, options=("-X", "importtime"))
        assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
        assert "conformance.plugin" in done.stdout or "conformance/plugin.py" in done.stdout
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
        assert "_pytest.config" in imported and not {"torch", "ref", "hypothesis.core", "conformance.cell", "conformance.ops"} & imported


def test_options_are_in_the_help_and_in_addopts(project):
    assert "--candidate-profile" in run(project, "--help").stdout
    given = "--candidate kernels:both --candidate-ops linear --candidate-formats int4_g128"
    (project / "other.ini").write_text(f"[pytest]\naddopts = {given}\n")
    done = run(project, "-c", "other.ini", "--pyargs", "conformance", "--collect-only", "-q", "-k", "good or bad")
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert names == ["conformance::linear[int4_g128-good]", "conformance::linear[int4_g128-bad]"], done.stdout + done.stderr
