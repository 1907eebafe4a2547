"""The earlier names of the argument `cache`, which transformers' models take until their release 5.40."""

from collections.abc import Callable

from transformers.utils.deprecation import deprecate_kwarg


def accept_earlier_cache_names(function: Callable) -> Callable:
    """Take `past_key_values` and `cache_params` for `cache`, with a FutureWarning."""
    for name in ("past_key_values", "cache_params"):
        function = deprecate_kwarg(name, "5.40.0", new_name="cache")(function)
    return function
