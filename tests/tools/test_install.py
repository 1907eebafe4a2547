"""`make install-dev` gives what the lock says, keeps what must be kept, and asks no index where all is there.

The index is a folder of empty packages: each one of the lock in its version there and in a later one.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution

import pytest

from .packaged import ROOT, copy_sources

LATER = "99999"


def write_wheel(folder, name, version, files=None):
    """A package without contents and needs, or with those given."""
    stem = f"{name.replace('-', '_')}-{version}"
    files = dict(files or {})
    files[f"{stem}.dist-info/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    files[f"{stem}.dist-info/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=") for path, data in files.items()
    }
    record = "".join(f"{path},sha256={digests[path].decode()},{len(files[path])}\n" for path in files)
    files[f"{stem}.dist-info/RECORD"] = f"{record}{stem}.dist-info/RECORD,,\n".encode()
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, data in files.items():
            wheel.writestr(path, data)


def setuptools_files():
    """The build backend of this environment, which must be a true one."""
    files = [path for path in distribution("setuptools").files if path.suffix != ".pyc" and path.name != "RECORD"]
    return {str(path): path.read_binary() for path in files}


class Clone:
    """A copy of the repository, an index for it, and the environment that its Makefile makes."""

    def __init__(self, folder):
        self.folder, self.index = folder / "clone", folder / "index"
        self.index.mkdir()
        copy_sources(self.folder, "tools", "Makefile")
        backend = distribution("setuptools").version
        lock = (ROOT / "requirements.lock").read_text()
        lock = re.sub(r"^setuptools==.*", f"setuptools=={backend}", lock, flags=re.MULTILINE)
        (self.folder / "requirements.lock").write_text(lock)
        self.locked = dict(line.split("==") for line in lock.splitlines() if not line.startswith("#"))
        for name, version in self.locked.items():
            write_wheel(self.index, name, version, setuptools_files() if name == "setuptools" else None)
            if name != "setuptools":
                write_wheel(self.index, name, LATER)
        write_wheel(self.index, "torch", "2.11.0")
        # In no lock, because a CUDA build of torch pins it: what the index has.
        self.locked["triton"] = "3.9.0"
        write_wheel(self.index, "triton", self.locked["triton"])

    def make(self, *arguments, online):
        """What make printed, with the index of this test or without any."""
        places = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_INDEX_URL": "http://127.0.0.1:9/",
            "PIP_NO_COMPILE": "1",
        }
        others = ("PIP_", "MAKE", "VENV", "TORCH")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        variables |= places | ({"PIP_FIND_LINKS": str(self.index)} if online else {})
        command = ["make", f"PYTHON={sys.executable}", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def pip(self, *arguments):
        command = [self.folder / ".venv" / "bin" / "python", "-m", "pip", "--isolated", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def get(self, *packages):
        """Install packages of the index past the lock, and let the stamps be old."""
        self.pip("install", "--no-index", f"--find-links={self.index}", *packages)
        (self.folder / "requirements.lock").touch()

    def installed(self):
        """Names and versions, without pip and the package itself."""
        listed = json.loads(self.pip("list", "--format=json"))
        names = {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"] for entry in listed}
        assert names.pop("ttt-e2e")
        names.pop("pip")
        return names


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    clone = Clone(tmp_path_factory.mktemp("clone"))
    clone.make("install-dev", online=True)
    return clone


@pytest.fixture
def locked(clone):
    """What an environment with the extra `dev` holds, as the lock has it."""
    names = clone.installed().keys()
    assert {"torch", "transformers", "pytest", "trl", "setuptools"} <= names
    return {name: clone.locked[name] for name in names}


@pytest.mark.slow  # it makes an environment, from an index of empty packages
def test_our_own_environment_has_the_versions_of_the_lock(clone, locked):
    assert clone.installed() == locked
    assert "Nothing to be done" in clone.make("install-dev", online=False)
    clone.get(f"numpy=={LATER}")
    clone.make("install-dev", online=True)
    assert clone.installed() == locked
    # Everything is there: no index is asked for it, nor for what builds the package.
    (clone.folder / "setup.py").touch()
    clone.make("install-dev", online=False)
    assert clone.installed() == locked


@pytest.mark.slow  # it makes an environment, from an index of empty packages
def test_an_environment_that_is_named_keeps_its_torch_and_is_left_alone_where_nothing_is_missing(clone, locked):
    clone.get("torch==2.11.0", f"numpy=={LATER}")
    clone.make("install-dev", "VENV=.venv", online=False)
    assert clone.installed() == locked | {"torch": "2.11.0", "numpy": LATER}
    clone.pip("uninstall", "--yes", "rich")
    (clone.folder / "setup.py").touch()
    clone.make("install-dev", "VENV=.venv", online=True)
    assert clone.installed() == locked | {"torch": "2.11.0"}


@pytest.mark.slow  # it makes an environment, from an index of empty packages
def test_the_lock_is_renewed_within_the_ranges_and_with_the_torch_that_was_asked_for(clone):
    lock = clone.folder / "requirements.lock"
    before = lock.read_text()
    clone.make("lock", "TORCH=torch==2.11.0", online=True)
    renewed = dict(line.split("==") for line in lock.read_text().splitlines() if not line.startswith("#"))
    lock.write_text(before)
    bounded = {"setuptools", "transformers", "datasets", "peft", "lm-eval", "mkdocs"}
    assert {"torch", "accelerate", "gcsfs", "trl", "openai", *bounded} <= renewed.keys()
    expected = {name: clone.locked[name] if name in bounded else LATER for name in renewed}
    assert renewed == expected | {"torch": "2.11.0"}
