"""Configuration of the TTT-E2E decoder (arXiv 2512.23675).

One class describes every attention-only system of the paper: TTT-E2E itself, its ablations, and the full-attention,
sliding-window and hybrid baselines (`layer_types` and `test_time_training` tell them apart).
"""

from .transformers_version import OLDEST_TRANSFORMERS  # noqa: F401  (first: an older release lacks names below)

# isort: split
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .config_checks import (
    SIZES,
    check_at_least_one,
    check_attention_heads,
    check_numbers,
    check_rope,
    check_special_tokens,
    leave_out_default_tokens,
)

META_GRADIENTS = ("second_order", "first_order")
LAYER_TYPES = ("sliding_attention", "full_attention")

CONTEXT_SETTINGS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act rms_norm_eps rope_parameters sliding_window layer_types use_attention attention_bias qk_norm post_norm "
    "bos_token_id num_suffix_layers use_prime_mlp prime_intermediate_size mini_batch_size inner_learning_rate "
    "inner_max_grad_norm"
).split()


@strict
class TTTE2EConfig(PreTrainedConfig):
    """Sizes and test-time-training settings of a [`TTTE2EModel`]. `TTTE2EConfig()` is the 125M model of the paper.

    Args:
        vocab_size: number of token ids.
        hidden_size, num_hidden_layers, num_attention_heads: the usual sizes of a decoder.
        intermediate_size: width of the ordinary MLPs.
        num_key_value_heads: key and value heads (default: as many as query heads).
        head_dim: channels of one head (default: `hidden_size // num_attention_heads`).
        hidden_act: activation of the gated MLPs.
        rms_norm_eps: epsilon of every RMSNorm.
        rope_parameters: `{"rope_type": ..., "rope_theta": ...}`; types `default`, `linear`, `llama3`, `yarn`.
        max_position_embeddings: a hint for tools that need a length; the model itself reads any length.
        sliding_window: keys that a query of a `sliding_attention` layer sees, itself included.
        layer_types: per block `"sliding_attention"` or `"full_attention"` (default: all sliding).
        use_attention: `False` leaves the attention out of every block, as in the paper's toy example (Appendix A): a
            token then sees others through the fast weights alone, and windows and layer types mean nothing.
        attention_bias: biases on the four attention projections.
        qk_norm: RMSNorm over the channels of each query and key head, before RoPE.
        post_norm: a second RMSNorm after attention and after each MLP, before the residual addition.
        num_suffix_layers: blocks, counted from the end, that the inner loop updates (default: a quarter).
        use_prime_mlp: suffix blocks hold a second MLP, the prime MLP, whose weights the inner loop updates. `False`
            makes their ordinary MLPs the inner weights.
        prime_intermediate_size: width of the prime MLPs (default: `intermediate_size`).
        mini_batch_size: tokens of one inner step; at most `sliding_window`, or tokens would be forgotten unlearned.
        inner_learning_rate: step size of the inner loop's gradient descent.
        inner_max_grad_norm: the inner gradient of a sequence is clipped to this joint L2 norm (0 or None: never).
        meta_gradient: `"second_order"` differentiates through the inner gradients (exact), `"first_order"` treats
            them as constants.
        meta_gradient_horizon: the outer gradient is cut every so many inner steps of a sequence, counted from the
            beginning of a call (None: never).
        inner_checkpoint_every: inner steps in one group of checkpointing through time, which is active together with
            gradient checkpointing (None: about the square root of their number).
        inner_checkpoint_offload: keep the fast weights stored at the beginning of each such group in CPU memory.
        test_time_training: learn while reading, unless a call says otherwise.

    Raises:
        ValueError: a value is out of range or contradicts another one.
        StrictDataclassFieldValidationError: a value has the wrong type.
    """

    model_type = "ttt_e2e"
    keys_to_ignore_at_inference = ["cache", "inner_loss", "inner_grad_norm", "token_nll"]
    default_theta = 500000.0
    # With FSDP2 only prefix blocks are units of their own, see `TTTE2EPreTrainedModel._expand_parallel_plan`.
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

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
    layer_types: list[str] | None = None
    use_attention: bool = True
    attention_bias: bool = False
    qk_norm: bool = True
    post_norm: bool = True
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 128000
    eos_token_id: int | list[int] | None = 128001

    num_suffix_layers: int | None = None
    use_prime_mlp: bool = True
    prime_intermediate_size: int | None = None
    mini_batch_size: int = 1024
    inner_learning_rate: int | float = 1.0
    inner_max_grad_norm: int | float | None = 1.0
    meta_gradient: str = "second_order"
    meta_gradient_horizon: int | None = None
    inner_checkpoint_every: int | None = None
    inner_checkpoint_offload: bool = False
    test_time_training: bool = True

    def __post_init__(self, **kwargs):
        check_at_least_one(self, SIZES)
        leave_out_default_tokens(self)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            self.layer_types = ["sliding_attention"] * self.num_hidden_layers
        if self.num_suffix_layers is None:
            self.num_suffix_layers = max(1, self.num_hidden_layers // 4)
        if self.prime_intermediate_size is None:
            self.prime_intermediate_size = self.intermediate_size
        if self._auto_class is None:
            kwargs.pop("auto_map", None)  # it promises code beside the weights, which only remote code saves along
        super().__post_init__(**kwargs)
        self.check()

    @property
    def num_prefix_layers(self) -> int:
        """Blocks that the inner loop never touches."""
        return self.num_hidden_layers - self.num_suffix_layers

    def context_settings(self) -> dict:
        """The settings that a learned context depends on; models that differ in one cannot share it."""
        return {name: getattr(self, name) for name in CONTEXT_SETTINGS}

    def check(self) -> None:
        """Check that the settings fit together.

        Raises:
            ValueError: naming the argument, its value and the remedy.
        """
        self._check_sizes()
        self._check_layers()
        self._check_inner_loop()

    def _check_sizes(self):
        check_at_least_one(
            self,
            f"{SIZES} num_key_value_heads head_dim mini_batch_size prime_intermediate_size",
            optional="sliding_window meta_gradient_horizon inner_checkpoint_every",
        )
        check_attention_heads(self)
        check_rope(self.rope_parameters)
        check_numbers(self)
        check_special_tokens(self)

    def _check_layers(self):
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self.layer_types)} entries, but `num_hidden_layers` is "
                f"{self.num_hidden_layers}: give one per block."
            )
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        if unknown:
            raise ValueError(f"`layer_types` has {unknown}; the known types are {list(LAYER_TYPES)}.")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("`sliding_window` is None but `layer_types` has 'sliding_attention': set the window.")
        if not 0 <= self.num_suffix_layers <= self.num_hidden_layers:
            raise ValueError(
                f"`num_suffix_layers` must lie between 0 and `num_hidden_layers` ({self.num_hidden_layers}), "
                f"got {self.num_suffix_layers}."
            )

    def _check_inner_loop(self):
        if self.meta_gradient not in META_GRADIENTS:
            raise ValueError(f"`meta_gradient` must be one of {list(META_GRADIENTS)}, got {self.meta_gradient!r}.")
        for name in ("inner_learning_rate", "inner_max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be finite and not negative, got {value}.")
        if self.test_time_training:
            self.check_can_learn()

    def check_can_learn(self):
        """Check that this model can learn while reading.

        Raises:
            ValueError: there is no suffix block, or the mini-batch is larger than the window of a suffix block.
        """
        if self.num_suffix_layers == 0:
            raise ValueError(
                "`num_suffix_layers` is 0, so there is nothing to learn with: set it to at least 1, or "
                "`test_time_training=False`."
            )
        slides = self.use_attention and "sliding_attention" in self.layer_types[self.num_prefix_layers :]
        if slides and self.mini_batch_size > self.sliding_window:
            raise ValueError(
                f"`mini_batch_size` ({self.mini_batch_size}) is larger than `sliding_window` "
                f"({self.sliding_window}): tokens would leave the window before they are learned. Make the "
                "mini-batch smaller or the window larger."
            )


__all__ = ["TTTE2EConfig"]
