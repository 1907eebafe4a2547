"""Names of dtypes, as commands take them."""

from collections.abc import Collection

import torch

# By the name that commands take; "auto" is the dtype that the weights were saved in.
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str, choices: Collection[str] = tuple(DTYPES)) -> torch.dtype | None:
    """The dtype of a name; None for "auto".

    Args:
        choices: those keys of `DTYPES` that will do.

    Raises:
        ValueError: another name.
    """
    if name not in choices:
        raise ValueError(f"dtype={name!r}: choose one of {', '.join(choices)}")
    return DTYPES[name]
