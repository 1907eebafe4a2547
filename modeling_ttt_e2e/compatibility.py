"""What depends on the release of transformers: the oldest that works, and names that the newest ones still accept.

Importing this module checks the release, before anything that an older one lacks is asked for.
"""

from collections.abc import Callable

import transformers
from packaging.version import Version

OLDEST_TRANSFORMERS = "5.24.0"

if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"TTT-E2E needs transformers {OLDEST_TRANSFORMERS} or later, and this is {transformers.__version__}: "
        f'pip install "transformers>={OLDEST_TRANSFORMERS}"'
    )

from transformers.utils.deprecation import deprecate_kwarg  # noqa: E402  (after the check)


def accept_earlier_cache_names(function: Callable) -> Callable:
    """Take `past_key_values` and `cache_params` for the argument `cache`, with a FutureWarning.

    Those are its earlier names, which transformers' models take until their release 5.40.
    """
    for name in ("past_key_values", "cache_params"):
        function = deprecate_kwarg(name, "5.40.0", new_name="cache")(function)
    return function
