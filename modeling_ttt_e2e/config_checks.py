"""What the configurations of all families check alike: sizes, numbers, special tokens, RoPE.

Types are the business of `@strict`; these are ranges. Messages name the argument, its value and the remedy.
"""

import math

from transformers.activations import ACT2FN

SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads max_position_embeddings"
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# RoPE variants whose frequencies change with the length of the text cannot serve an endless stream of tokens, and would
# contradict the keys in the cache. By the name of each what it needs, and what it may have besides.
ROPE_KEYS = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}
# "type" is an earlier name of "rope_type"; a partial_rotary_factor of 1 turns whole heads, as is done anyhow.
ROPE_ANYWHERE = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def check_at_least_one(config, names: str, optional: str = "") -> None:
    """Check fields, their names separated by spaces, that count something; the optional ones may be None."""
    for name in (*names.split(), *optional.split()):
        value = getattr(config, name)
        if value is None and name in optional.split():
            continue
        if value < 1:
            or_none = ", or None" if name in optional.split() else ""
            raise ValueError(f"`{name}` must be at least 1{or_none}, got {value}.")


def check_numbers(config) -> None:
    """Check activation, epsilon and initial range of a decoder."""
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` is {config.hidden_act!r}, which transformers does not know: try 'silu'.")
    if not 0 < config.rms_norm_eps < math.inf:
        raise ValueError(f"`rms_norm_eps` must be finite and positive, got {config.rms_norm_eps}: 1e-6 is usual.")
    if not 0 <= config.initializer_range < math.inf:
        raise ValueError(f"`initializer_range` must be finite and not negative, got {config.initializer_range}.")


def leave_out_default_tokens(config) -> None:
    """Special tokens that nobody chose, and that a smaller vocabulary does not hold, become None."""
    for name in SPECIAL_TOKENS:
        value, default = getattr(config, name), getattr(type(config), name)
        if default is not None and value == default >= config.vocab_size:
            setattr(config, name, None)


def check_special_tokens(config) -> None:
    """Check that special tokens are ids of the vocabulary, or None."""
    for name in SPECIAL_TOKENS:
        value = getattr(config, name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"`{name}` is {value}, outside the vocabulary of {config.vocab_size} (0..{config.vocab_size - 1}): "
                    "set it to one of its ids, or None."
                )


def check_rope(rope: dict) -> None:
    """Check the parameters of RoPE."""
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ValueError(f"`rope_parameters` has rope_type {kind!r}; supported are {list(ROPE_KEYS)}.")
    needed, possible = ROPE_KEYS[kind]
    missing, unknown = sorted(needed - rope.keys()), sorted(rope.keys() - needed - possible - ROPE_ANYWHERE)
    if missing or unknown:
        what = f"lack {missing}" if missing else f"have {unknown}, which mean nothing"
        raise ValueError(f"`rope_parameters` of rope_type {kind!r} {what}: got {rope}.")
    for name, value in rope.items():
        if name in ("rope_type", "type", "truncate") or (value is None and name in possible):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"`rope_parameters` has {name} {value!r}: it must be a finite and positive number.")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(
            f"`rope_parameters` has partial_rotary_factor {rope['partial_rotary_factor']}, but whole heads are turned: "
            "leave it out."
        )
    if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise ValueError(
            f"`rope_parameters` has high_freq_factor {rope['high_freq_factor']}, which must be larger than "
            f"low_freq_factor {rope['low_freq_factor']}."
        )


def check_attention_heads(config) -> None:
    """Check that the heads of attention fit one another."""
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"`num_attention_heads` ({config.num_attention_heads}) must be a multiple of `num_key_value_heads` "
            f"({config.num_key_value_heads})."
        )
    if config.head_dim % 2:
        raise ValueError(f"`head_dim` must be even, because RoPE rotates pairs of channels, got {config.head_dim}.")
