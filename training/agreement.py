"""One process does what all must agree on."""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def of_one_process(here: bool, work: Callable[[], Result]) -> Result:
    """What one process has found, or its error, on every process.

    Args:
        here: whether this is the process that works (the first one).
        work: its result must be picklable where there are several processes.

    Raises:
        ValueError, OSError: what `work` has raised.
    """
    result: list = [None, None]
    if here:
        try:
            result[0] = work()
        except (ValueError, OSError) as error:
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]
