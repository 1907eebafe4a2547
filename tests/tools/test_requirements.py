"""setup.py's ranges, the lock, and what the code uses agree."""

import ast
import importlib
import re
import runpy
from importlib.metadata import distributions
from itertools import chain
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ttt_e2e.transformers_release import OLDEST_TRANSFORMERS

from .packaged import DESCRIBED, ROOT

LOCK_TOOL = runpy.run_path(str(ROOT / "tools" / "lock.py"))
EXTRAS = {extra: [Requirement(text) for text in texts] for extra, texts in DESCRIBED.extras_require.items()}
REQUIRED = [Requirement(text) for text in DESCRIBED.install_requires]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCKED = dict(line.split("==") for line in LINES)
CODE = [path for folder in set(DESCRIBED.package_dir.values()) for path in (ROOT / folder).rglob("*.py")]


def test_every_line_is_one_exact_version():
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", line) for line in LINES)
    assert sorted(LOCKED) == list(LOCKED)
    assert not [name for name in LOCKED if LOCK_TOOL["OF_CUDA"].match(name)]


def test_every_extra_is_locked_but_the_one_that_needs_cuda():
    assert set(LOCK_TOOL["EXTRAS"].split(",")) == set(EXTRAS) - {"flash"}


def test_the_lock_is_closed_and_within_all_ranges():
    """What a package of the lock asks for is in the lock, in a version that it takes."""
    direct = [*REQUIRED, *(requirement for extra, asked in EXTRAS.items() if extra != "flash" for requirement in asked)]
    asked = {("ttt-e2e", requirement) for requirement in direct}
    extras = {canonicalize_name(requirement.name): requirement.extras for requirement in direct if requirement.extras}
    for distribution in distributions():
        name = canonicalize_name(distribution.metadata["Name"])
        if Version(LOCKED.get(name, "0")).public != Version(distribution.version).public:
            continue  # says nothing about the locked one
        for requirement in map(Requirement, distribution.requires or ()):
            contexts = [{"extra": extra} for extra in ("", *extras.get(name, ()))]
            if requirement.marker is None or any(map(requirement.marker.evaluate, contexts)):
                asked.add((name, requirement))
    wrong = [
        f"{name} asks for {requirement}, the lock has {LOCKED.get(needed)}"
        for name, requirement in asked
        if not LOCK_TOOL["OF_CUDA"].match(needed := canonicalize_name(requirement.name))
        and (needed not in LOCKED or not requirement.specifier.contains(LOCKED[needed], prereleases=True))
    ]
    assert not wrong


@pytest.mark.parametrize("build", ["2.13.0", "2.13.0+cpu", "2.13.0+cu130"])
def test_every_build_of_torch_gives_the_same_lock(build):
    of_cuda = [("nvidia-cublas", "13.1"), ("cuda-toolkit", "13.0"), ("triton", "3.7")] if build != "2.13.0+cpu" else []
    resolved = [("torch", build), *of_cuda, ("ttt-e2e", "0.1.0"), ("numpy", "2.4.6")]
    assert LOCK_TOOL["lines"](resolved) == ["numpy==2.4.6", "torch==2.13.0"]


def test_transformers_has_bounds_at_the_oldest_and_the_next_minor_version():
    transformers = [asked for asked in REQUIRED if asked.name == "transformers"]
    bounds = {part.operator: Version(part.version) for part in transformers[0].specifier}
    oldest, locked = Version(OLDEST_TRANSFORMERS), Version(LOCKED["transformers"])
    assert bounds.keys() == {">=", "<"} and bounds[">="] == oldest
    assert bounds["<"].release == (locked.major, locked.minor + 1)


def test_the_readme_names_the_oldest_transformers_and_the_citation_this_version():
    named = re.findall(r"transformers (\d[\d.]*) or later", (ROOT / "README.md").read_text())
    assert named and {Version(text) for text in named} == {Version(OLDEST_TRANSFORMERS)}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == DESCRIBED.get_version()


@pytest.mark.parametrize("package", ["accelerate", "datasets", "peft", "trl", "lm_eval"])
def test_a_package_is_bounded_where_more_of_it_is_used_than_it_documents(package):
    requirements = [asked for asked in [*REQUIRED, *chain(*EXTRAS.values())] if asked.name == package]
    inner = {name for path in CODE for name in _named_in(path, package) if _is_inner(name, package)}
    if inner:
        locked = Version(LOCKED[canonicalize_name(package)])
        bounds = {str(asked.specifier) for asked in requirements}
        assert bounds == {f"<{locked.major}.{locked.minor + 1}"}, f"used: {sorted(inner)}"


def _named_in(path, package):
    """Dotted names that begin with the package: imported, written out, or given as a text to `import_module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        else:
            continue
        yield from (name for name in names if re.fullmatch(rf"{package}(\.\w+)+", name))


def _is_inner(name, package):
    """Whether a name lies deeper than in the package itself and its `utils`, or begins with an underscore."""
    parts = name.split(".")[1:]
    if any(part.startswith("_") for part in parts):
        return True
    try:
        face = importlib.import_module(package)
    except ImportError:
        return False
    value = getattr(face, parts[0], None)
    if value is None:  # a module that the package does not import
        return True
    return isinstance(value, ModuleType) and parts[0] != "utils"


def test_what_runs_by_itself_names_jobs_that_there_are():
    jobs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    commands = [(ROOT / ".ci" / "run").read_text()]
    for workflow in workflows:
        steps = [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]
        commands += [step["run"] for step in steps if "run" in step]
    named = re.findall(r"\bmake ([a-z-]+)", "\n".join(commands))
    assert {"test", "test-newest"} <= set(named) <= jobs
    assert [workflow.name for workflow in workflows] == ["nightly.yml", "tests.yml"]
