"""An output that is cut off, as by `| head`."""

import contextlib
import os
import sys


@contextlib.contextmanager
def nobody_reads():
    """The standard output as it is when `head` has left."""
    reader, writer = os.pipe()
    os.close(reader)
    file = open(writer, "w")  # noqa: SIM115  closing it fails
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(sys.stderr):  # typer replaces both
            yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            file.close()
