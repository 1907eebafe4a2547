"""`make test-newest` says what broke, and fails where anything did."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TOOL = HERE.parents[1] / "tools" / "newest.py"


def run(folder, *arguments):
    """The exit status and the tables of the tool, of which its file has a copy."""
    variables = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), "test", "-p", "no:cacheprovider", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    written = (folder / "runs" / "test-newest.md").read_text()
    assert done.stdout.rstrip().endswith(written.rstrip()), done.stdout + done.stderr
    return done.returncode, written


def counts(written, area):
    found = re.search(rf"^\| {area} +\|(.*)\|$", written, re.MULTILINE)
    return [int(cell) for cell in found.group(1).split("|")]


@pytest.mark.slow
def test_a_renamed_argument_of_a_later_transformers_is_reported(tmp_path):
    case = f"{HERE.parent / 'modeling' / 'test_generation.py'}::test_continuing_with_more_text_equals_reading_it_all"
    status, written = run(tmp_path, "-p", "later_transformers", case)
    assert status == 1
    passed, failed, errors, _ = counts(written, "generation")
    assert passed == 0 and failed + errors > 0
    assert "cache" in written.partition("what broke")[2]
    assert re.search(r"^\| transformers +\| \d", written, re.MULTILINE)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "tests" / "serving"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    (folder / "test_passes.py").write_text("def test_a(): pass\n")
    return folder


def test_every_kind_of_breakage_is_counted(tmp_path, folder):
    (folder / "test_fails.py").write_text("def test_a(): assert {'old': 1} == {'new': 1}, 'of a | b'")
    (folder / "test_import.py").write_text("import transformers.no_such_module\ndef test_a(): pass")
    broken = "import pytest\n@pytest.fixture\ndef a(): raise KeyError('gone')\n"
    (folder / "test_fixture.py").write_text(broken + "def test_a(a): pass\ndef test_b(a): pass")
    status, written = run(tmp_path, folder)
    assert status == 1 and counts(written, "serving") == [1, 1, 3, 0]
    broke = written.partition("what broke")[2]
    assert r"AssertionError: of a \| b" in broke and "transformers.no_such_module" in broke
    assert re.search(r"'gone'.* \| 2 +\| tests/serving/test_fixture.py::test_a ", broke)


@pytest.mark.parametrize(
    "contents, arguments, status, last",
    [
        ("def test_b(): pass", [], 0, "Nothing broke."),
        ("import os\ndef test_b(): os._exit(3)", [], 1, "Broken: no test ran."),
        ("def test_b(): pass", ["-k", "nothing"], 1, "Broken: no test ran."),
        ("def test_b(): pass", ["--no-such-option"], 1, "Broken: no test ran."),
    ],
    ids=["passes", "crash", "none", "usage"],
)
def test_all_is_well_only_where_tests_have_passed(tmp_path, folder, contents, arguments, status, last):
    (folder / "test_more.py").write_text(contents)
    ended, written = run(tmp_path, folder, *arguments)
    assert ended == status and written.splitlines()[-1] == last


def test_upper_bounds_are_left_out():
    stripped = runpy.run_path(str(TOOL))["without_upper_bounds"]
    asked = ["a", "b<2", "c>=1.5,<1.6", "d[extra]==3", "e~=1.2,!=1.4; python_version >= '3.11'"]
    assert stripped(asked) == ["a", "b", "c>=1.5", "d[extra]", 'e!=1.4; python_version >= "3.11"']
