"""What the configurations of all families share: the sizes of a decoder, and the checks of its settings.

Types are the business of `@strict`; the checks are of ranges and of settings that contradict one another. They are
`validate_*` methods, which transformers runs when a configuration is made and when it is saved. It wraps what they
raise, so `check` runs them first, for a plain ValueError.
"""

from .transformers_release import OLDEST_TRANSFORMERS  # noqa: F401  (first: an older release lacks names below)

# isort: split
import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

ATTENTION_TYPES = ("sliding_attention", "full_attention")
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
CONTEXT_SETTINGS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act rms_norm_eps rope_parameters sliding_window attention_bias post_norm"
)


@strict
class DecoderConfig(PreTrainedConfig):
    """The settings that decoders of all families have; a family adds its own.

    Args:
        vocab_size: number of token ids.
        hidden_size, num_hidden_layers, num_attention_heads: the usual sizes of a decoder.
        intermediate_size: width of the ordinary gated MLPs.
        num_key_value_heads: key and value heads of attention (default: as many as query heads).
        head_dim: channels of one attention head (default: `hidden_size // num_attention_heads`).
        hidden_act: activation of the gated MLPs.
        initializer_range: standard deviation of random weights.
        rms_norm_eps: epsilon of the RMSNorms.
        rope_parameters: of attention, `{"rope_type": ..., "rope_theta": ...}`; types `default`, `linear`, `llama3`,
            `yarn`. Or one such dictionary by layer type, `{"full_attention": {...}, "sliding_attention": {...}}`.
        max_position_embeddings: a hint for tools that need a length; the model itself reads any length.
        sliding_window: keys that a query of a `sliding_attention` block sees, itself included.
        attention_bias: biases on the four attention projections.
        post_norm: a second RMSNorm after each mixer (or attention) and each MLP, before the residual addition.
        tie_word_embeddings: the head is the embedding's matrix.
        pad_token_id, bos_token_id, eos_token_id: ids of the vocabulary, or None.

    Raises:
        ValueError: a value is out of range or contradicts another one.
        StrictDataclassFieldValidationError: a value has the wrong type.

    Class attributes, for a family to set:
        block_types: the setting that names the kind of each block.
        known_types: the kinds that it may name.
        counts, counts_or_none: its settings that must be at least 1, the latter unless None; separated by spaces.
        context_fields: its settings that a learned context depends on.
        rope_by_layer_type: whether its layer types may differ in RoPE.
    """

    default_theta = 500000.0
    block_types = "layer_types"
    known_types = ATTENTION_TYPES
    counts = ""
    counts_or_none = ""
    context_fields = ""
    rope_by_layer_type = True
    num_sink_tokens = 0  # a setting where a family has attention sinks

    vocab_size: int = 128256
    hidden_size: int = 768
    intermediate_size: int = 1664
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    initializer_range: int | float = 0.02
    rms_norm_eps: int | float = 1e-6
    rope_parameters: dict | None = None
    max_position_embeddings: int = 131072
    sliding_window: int | None = 8192
    attention_bias: bool = False
    post_norm: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001

    def __post_init__(self, **kwargs):
        self._check_counts(SIZES)  # before anything is calculated from them
        self._leave_out_default_tokens()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self._auto_class is None:
            kwargs.pop("auto_map", None)  # it promises code beside the weights, which only remote code saves along
        super().__post_init__(**kwargs)
        self.check()

    def context_settings(self) -> dict:
        """The settings that a learned context depends on; models that differ in one cannot share it."""
        names = f"{CONTEXT_SETTINGS} {self.block_types} {self.context_fields}"
        return {name: getattr(self, name) for name in names.split()}

    def rope_of_layer_types(self) -> dict[str, dict]:
        """The parameters of RoPE by layer type of attention: the same dictionary where they do not differ."""
        kinds = sorted(set(self.layer_types) & set(ATTENTION_TYPES))
        if not self.nested_rope_parameter_keys(self.rope_parameters):
            return dict.fromkeys(kinds, self.rope_parameters)
        return {kind: self.rope_parameters[kind] for kind in kinds}

    def check(self) -> None:
        """Check that the settings fit together.

        Raises:
            ValueError: naming the argument, its value and the remedy.
        """
        self.validate_architecture()
        self.validate_layer_type()
        self.validate_rope_parameters()
        self.validate_token_ids()

    def validate_architecture(self):
        """Check sizes, numbers, and that the heads of attention fit one another."""
        self._check_counts(f"{SIZES} num_key_value_heads head_dim {self.counts}")
        self._check_counts(f"sliding_window {self.counts_or_none}", or_none=True)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}, which transformers does not know: try 'silu'.")
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"`rms_norm_eps` must be finite and positive, got {self.rms_norm_eps}: 1e-6 is usual.")
        self._check_not_negative("initializer_range")
        if not set(self.layer_types) & set(ATTENTION_TYPES):
            return
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, because RoPE rotates pairs of channels, got {self.head_dim}.")

    def validate_layer_type(self):
        """Check that every block is of a known kind, and has the window that it needs."""
        kinds = getattr(self, self.block_types)
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"`{self.block_types}` has {len(kinds)} entries, but `num_hidden_layers` is {self.num_hidden_layers}: "
                "give one per block."
            )
        unknown = sorted(set(kinds) - set(self.known_types))
        if unknown:
            raise ValueError(f"`{self.block_types}` has {unknown}; the known types are {list(self.known_types)}.")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError(
                f"`sliding_window` is None but `{self.block_types}` has blocks with a window: set the window."
            )

    def validate_token_ids(self):
        """Check that special tokens are ids of the vocabulary, or None."""
        for name in SPECIAL_TOKENS:
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"`{name}` is {value}, outside the vocabulary of {self.vocab_size} (0..{self.vocab_size - 1}): "
                        "set it to one of its ids, or None."
                    )

    def validate_rope_parameters(self):
        """Check the variants of RoPE and their numbers, beyond what transformers' `validate_rope` looks at."""
        if not self.nested_rope_parameter_keys(self.rope_parameters):
            self._check_rope(self.rope_parameters)
            return
        kinds, given = set(self.layer_types) & set(ATTENTION_TYPES), self.rope_parameters
        if not self.rope_by_layer_type:
            raise ValueError(
                f"`rope_parameters` has parameters by layer type ({sorted(given)}), but a {self.model_type} model "
                "turns all its layers alike: give one set of them."
            )
        missing, unknown = sorted(kinds - given.keys()), sorted(given.keys() - set(ATTENTION_TYPES))
        if missing or unknown:
            what = f"lack those of {missing}" if missing else f"have {unknown} beside them"
            raise ValueError(f"`rope_parameters` by layer type {what}: give a dictionary for each of {sorted(kinds)}.")
        for rope in given.values():
            if not isinstance(rope, dict):
                raise ValueError(f"`rope_parameters` by layer type must be dictionaries, got {rope!r}.")
            self._check_rope(rope)

    def _check_rope(self, rope: dict) -> None:
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
            if not _is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"`rope_parameters` has {name} {value!r}: it must be a finite and positive number.")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise ValueError(
                f"`rope_parameters` has partial_rotary_factor {rope['partial_rotary_factor']}, but whole heads are "
                "turned: leave it out."
            )
        if kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
            raise ValueError(
                f"`rope_parameters` has high_freq_factor {rope['high_freq_factor']}, which must be larger than "
                f"low_freq_factor {rope['low_freq_factor']}."
            )

    def _check_counts(self, names: str, or_none: bool = False):
        for name in names.split():
            value = getattr(self, name)
            if value is None and or_none:
                continue
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1{', or None' if or_none else ''}, got {value}.")

    def _check_not_negative(self, name: str):
        value = getattr(self, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be finite and not negative, got {value}.")

    def _check_choice(self, name: str, choices: tuple[str, ...]):
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"`{name}` must be one of {list(choices)}, got {value!r}.")

    def _leave_out_default_tokens(self):
        """Special tokens that nobody chose, and that a smaller vocabulary does not hold, become None."""
        for name in SPECIAL_TOKENS:
            value, default = getattr(self, name), getattr(type(self), name)
            if default is not None and value == default >= self.vocab_size:
                setattr(self, name, None)


@strict
class MixerConfig(DecoderConfig):
    """A decoder whose blocks mix tokens by attention or in a way that transformers does not know.

    Class attributes, for a family to set:
        layer_type_of: by the name of each mixer the one that transformers has for its kind of memory.
    """

    block_types = "mixer_types"
    layer_type_of = {}

    mixer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        if "layer_types" in kwargs:
            raise ValueError("`layer_types` follows from `mixer_types`: leave it out and set `mixer_types`.")
        self._check_counts(SIZES)
        self.validate_layer_type()  # transformers would rename or refuse types that it does not know
        super().__post_init__(**kwargs)

    @property
    def known_types(self) -> tuple[str, ...]:
        return tuple(self.layer_type_of)

    @property
    def layer_types(self) -> list[str]:
        """Per block the name by which transformers chooses its cache and its mask."""
        return [self.layer_type_of.get(mixer, mixer) for mixer in self.mixer_types]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


__all__ = ["DecoderConfig", "MixerConfig"]
