"""Another process that writes to a folder."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HOLDER = """
import sys
from pathlib import Path
from ttt_e2e.storage import claims
with getattr(claims, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_elsewhere(claim: Callable, folder: Path) -> Iterator[subprocess.Popen]:
    """A process that has claimed a folder; at the end of the block it is killed, and never lets go by itself."""
    line = [sys.executable, "-c", HOLDER, claim.__name__, str(folder)]
    process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()
