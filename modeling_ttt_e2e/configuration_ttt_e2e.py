"""Configuration of the TTT-E2E decoder (arXiv 2512.23675).

One class describes every attention-only system of the paper: TTT-E2E itself, its ablations, and the full-attention,
sliding-window and hybrid baselines (`layer_types` and `test_time_training` tell them apart).
"""

from .configuration_decoder import DecoderConfig  # first: it checks the release of transformers

# isort: split
from huggingface_hub.dataclasses import strict

INNER_ATTENTIONS = ("auto", "triton", "torch")
META_GRADIENTS = ("second_order", "first_order")
INNER_PROJECTIONS = {"all": slice(None), "down": slice(2, None)}  # of an MLP's gate, up and down


@strict
class TTTE2EConfig(DecoderConfig):
    """Sizes and test-time-training settings of a [`TTTE2EModel`]. `TTTE2EConfig()` is the 125M model of the paper.

    The arguments of [`DecoderConfig`], and:

    Args:
        layer_types: per block `"sliding_attention"` or `"full_attention"` (default: all sliding).
        use_attention: `False` leaves the attention out of every block, as in the paper's toy example (Appendix A): a
            token then sees others through the fast weights alone, and windows and layer types mean nothing.
        num_sink_tokens: attention sinks (arXiv 2309.17453): the first so many tokens of a sequence stay visible to
            `sliding_attention` blocks when they have left the window.
        qk_norm: RMSNorm over the channels of each query and key head, before RoPE.
        num_suffix_layers: blocks, counted from the end, that the inner loop updates (default: a quarter).
        use_prime_mlp: suffix blocks hold a second MLP, the prime MLP, whose weights the inner loop updates. `False`
            makes their ordinary MLPs the inner weights.
        prime_intermediate_size: width of the prime MLPs (default: `intermediate_size`).
        inner_projections: what the inner loop updates of these MLPs: `"all"` projections, or `"down"`, the last one
            alone, as In-Place Test-Time Training does (arXiv 2604.06169), with a third of the fast weights.
        mini_batch_size: tokens of one inner step; at most `sliding_window`, or tokens would be forgotten unlearned.
        inner_learning_rate: step size of the inner loop's gradient descent.
        inner_max_grad_norm: the inner gradient of a sequence is clipped to this joint L2 norm (0 or None: never).
        meta_gradient: `"second_order"` differentiates through the inner gradients (exact), `"first_order"` treats
            them as constants.
        meta_gradient_horizon: truncated backpropagation through time: the outer gradient is cut every so many inner
            steps of a sequence, counted from the beginning of a call (None: never).
        inner_checkpoint_every: inner steps in one group of checkpointing through time, which is active together with
            gradient checkpointing (None: about the square root of their number).
        inner_checkpoint_offload: keep the fast weights stored at the beginning of each such group in CPU memory.
        inner_attention: what computes the attention of suffix blocks inside inner steps: `"triton"` kernels, which hold
            no scores and need a GPU, `"torch"`, or `"auto"`: kernels where gradients of gradients are asked for, on
            GPUs on which these were measured to be faster.
        test_time_training: learn while reading, unless a call says otherwise.
    """

    model_type = "ttt_e2e"
    keys_to_ignore_at_inference = ["cache", "inner_loss", "inner_grad_norm", "token_nll"]
    # With FSDP2 only prefix blocks are units of their own, see `TTTE2EPreTrainedModel._expand_parallel_plan`.
    base_model_fsdp_plan = {"layers.*": "free_full_weight"}

    counts = "mini_batch_size prime_intermediate_size"
    counts_or_none = "meta_gradient_horizon inner_checkpoint_every"
    context_fields = (
        "use_attention qk_norm bos_token_id num_suffix_layers use_prime_mlp prime_intermediate_size mini_batch_size "
        "inner_learning_rate inner_max_grad_norm"
    )

    layer_types: list[str] | None = None
    use_attention: bool = True
    num_sink_tokens: int = 0
    qk_norm: bool = True

    num_suffix_layers: int | None = None
    use_prime_mlp: bool = True
    prime_intermediate_size: int | None = None
    inner_projections: str = "all"
    mini_batch_size: int = 1024
    inner_learning_rate: int | float = 1.0
    inner_max_grad_norm: int | float | None = 1.0
    meta_gradient: str = "second_order"
    meta_gradient_horizon: int | None = None
    inner_checkpoint_every: int | None = None
    inner_checkpoint_offload: bool = False
    inner_attention: str = "auto"
    test_time_training: bool = True

    def __post_init__(self, **kwargs):
        if self.layer_types is None:
            self.layer_types = ["sliding_attention"] * self.num_hidden_layers
        if self.num_suffix_layers is None:
            self.num_suffix_layers = max(1, self.num_hidden_layers // 4)
        if self.prime_intermediate_size is None:
            self.prime_intermediate_size = self.intermediate_size
        super().__post_init__(**kwargs)

    @property
    def num_prefix_layers(self) -> int:
        """Blocks that the inner loop never touches."""
        return self.num_hidden_layers - self.num_suffix_layers

    @property
    def inner_matrices(self) -> slice:
        """Which of an inner MLP's gate, up and down the inner loop updates."""
        return INNER_PROJECTIONS[self.inner_projections]

    def check(self) -> None:
        super().check()
        self.validate_sinks()
        self.validate_inner_loop()

    def context_settings(self) -> dict:
        settings = super().context_settings()
        # Contexts of models without these are those of before there were any.
        if self.num_sink_tokens:
            settings |= {"num_sink_tokens": self.num_sink_tokens}
        return settings if self.inner_projections == "all" else settings | {"inner_projections": self.inner_projections}

    def validate_sinks(self):
        """Check that there are blocks that can have attention sinks, and that these fit into the window."""
        if self.num_sink_tokens == 0:
            return
        slides = self.use_attention and "sliding_attention" in self.layer_types
        if not slides or not 0 < self.num_sink_tokens <= self.sliding_window:
            limit = (
                f"it must lie between 0 and `sliding_window` ({self.sliding_window})"
                if slides
                else "but no block has a window (`layer_types`, `use_attention`): set it to 0"
            )
            raise ValueError(f"`num_sink_tokens` is {self.num_sink_tokens}; {limit}.")

    def validate_inner_loop(self):
        """Check the settings of the inner loop, and that a model that learns unless told otherwise can."""
        if not 0 <= self.num_suffix_layers <= self.num_hidden_layers:
            raise ValueError(
                f"`num_suffix_layers` must lie between 0 and `num_hidden_layers` ({self.num_hidden_layers}), "
                f"got {self.num_suffix_layers}."
            )
        self._check_choice("meta_gradient", META_GRADIENTS)
        self._check_choice("inner_attention", INNER_ATTENTIONS)
        self._check_choice("inner_projections", tuple(INNER_PROJECTIONS))
        self._check_not_negative("inner_learning_rate")
        self._check_not_negative("inner_max_grad_norm")
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
