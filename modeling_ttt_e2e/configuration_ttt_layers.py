"""Configuration of TTT-Linear and TTT-MLP (arXiv 2407.04620) and TTT-KVB, alone or mixed with attention blocks."""

from .configuration_decoder import ATTENTION_TYPES, MixerConfig  # first: it checks the release of transformers

# isort: split
import math

from huggingface_hub.dataclasses import strict

INNER_LEARNERS = ("ttt_linear", "ttt_mlp")
KEY_VALUE_BINDING = "ttt_kvb"  # has sliding-window attention inside
OUTPUT_RULES = ("query", "key")
BASE_LEARNING_RATES = {"ttt_linear": 1.0, "ttt_mlp": 0.1}


@strict
class TTTLayersConfig(MixerConfig):
    """Sizes and switches of a [`TTTLayersModel`]. `TTTLayersConfig()` is the 1.3B TTT-Linear model of the paper.

    The rows of the paper's Table 1, each a switch (from the last to the first): the Mamba backbone (`ttt_use_gate`,
    `ttt_share_qk`, `ttt_pre_conv`), `ttt_learn_learning_rate`, `mini_batch_size` 16 instead of 2048,
    `ttt_layer_norm_residual`, `ttt_learn_initial_weights`. Without all of them and with a mini-batch as long as the
    text, `ttt_token_scale=False`, `ttt_use_bias=False` and `ttt_base_learning_rate` equal to the size of a head,
    TTT-Linear is causal linear attention without normalisation.

    `head_dim` is of attention blocks; heads of TTT blocks have `hidden_size / num_attention_heads` channels. Their
    LayerNorms have an epsilon of 1e-6.

    The arguments of [`DecoderConfig`], and:

    Args:
        mixer_types: per block `"ttt_linear"`, `"ttt_mlp"`, `"ttt_kvb"`, `"sliding_attention"` or `"full_attention"`
            (default: all `ttt_linear`).
        qk_norm: RMSNorm over the channels of each query and key head of attention blocks, before RoPE.
        mini_batch_size: tokens of one inner step; their gradients are taken at the same weights.
        ttt_base_learning_rate: inner learning rate before its division by the size of a head (None: 1.0 for
            `ttt_linear`, 0.1 for `ttt_mlp`). 0 leaves the initial weights as they are.
        ttt_rope_theta: RoPE base of queries and keys, by position within the mini-batch (None: no positions).
        ttt_use_gate: multiply a TTT block's output by a gate.
        ttt_share_qk: one projection for queries and keys, told apart by two short convolutions.
        ttt_pre_conv: a short convolution with its own residual before the TTT layer.
        ttt_conv_kernel: taps of these convolutions.
        ttt_intermediate_ratio: hidden channels of the inner MLP of `ttt_mlp`, as a multiple of a head's.
        ttt_use_bias: the inner learner has biases, which it learns like its weights.
        ttt_learn_initial_weights: its initial weights are parameters; otherwise they are zero.
        ttt_layer_norm_residual: the learner is f(x) = x + LN(f_res(x)); otherwise f(x) = f_res(x).
        ttt_learn_learning_rate: multiply the inner learning rate of every token by sigmoid(w x + b).
        ttt_token_scale: scale the running sum of gradients at position j of a mini-batch by 1 / (j + 1) and a learned
            correction; otherwise by 1.
        ttt_kvb_num_heads: heads of the fast weights of `ttt_kvb` blocks.
        ttt_kvb_intermediate_ratio: hidden channels of their SwiGLU, as a multiple of a head's.
        ttt_kvb_output_rule: `"query"` answers queries; `"key"` answers keys, the simplified output rule of
            arXiv 2512.23675, Table 1.
        ttt_kvb_weight_norm: keep each row of the fast weights at the norm that it had at first.
        ttt_kvb_momentum: steps with momentum.
        inner_checkpoint_every: mini-batches in one group of checkpointing through time, which is active together with
            activation checkpointing (None: about the square root of their number).
    """

    model_type = "ttt_layers"
    keys_to_ignore_at_inference = ["cache", "token_nll"]
    layer_type_of = (
        dict.fromkeys(INNER_LEARNERS, "linear_attention")
        | {KEY_VALUE_BINDING: "sliding_attention"}
        | {name: name for name in ATTENTION_TYPES}
    )
    counts = "mini_batch_size ttt_conv_kernel ttt_intermediate_ratio ttt_kvb_num_heads ttt_kvb_intermediate_ratio"
    counts_or_none = "inner_checkpoint_every"
    context_fields = (
        "qk_norm mini_batch_size ttt_base_learning_rate ttt_rope_theta ttt_use_gate ttt_share_qk ttt_pre_conv "
        "ttt_conv_kernel ttt_intermediate_ratio ttt_use_bias ttt_learn_initial_weights ttt_layer_norm_residual "
        "ttt_learn_learning_rate ttt_token_scale ttt_kvb_num_heads ttt_kvb_intermediate_ratio ttt_kvb_output_rule "
        "ttt_kvb_weight_norm ttt_kvb_momentum"
    )

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5504
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    qk_norm: bool = True
    post_norm: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    mini_batch_size: int = 16
    ttt_base_learning_rate: int | float | None = None
    ttt_rope_theta: int | float | None = 10000.0
    ttt_use_gate: bool = False
    ttt_share_qk: bool = False
    ttt_pre_conv: bool = False
    ttt_conv_kernel: int = 4
    ttt_intermediate_ratio: int = 4
    ttt_use_bias: bool = True
    ttt_learn_initial_weights: bool = True
    ttt_layer_norm_residual: bool = True
    ttt_learn_learning_rate: bool = True
    ttt_token_scale: bool = True
    ttt_kvb_num_heads: int = 4
    ttt_kvb_intermediate_ratio: int = 1
    ttt_kvb_output_rule: str = "query"
    ttt_kvb_weight_norm: bool = True
    ttt_kvb_momentum: bool = True
    inner_checkpoint_every: int | None = None

    def __post_init__(self, **kwargs):
        if self.mixer_types is None:
            self.mixer_types = ["ttt_linear"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def num_fast_weights(self) -> int:
        """Numbers that the inner loops of all blocks change, per sequence."""
        channels = self.hidden_size // self.num_attention_heads
        hidden, bias = self.ttt_intermediate_ratio * channels, int(self.ttt_use_bias)
        per_head = {
            "ttt_linear": channels * (channels + bias),
            "ttt_mlp": hidden * (channels + bias) + channels * (hidden + bias),
        }
        bound = self.hidden_size // self.ttt_kvb_num_heads
        by_mixer = {mixer: self.num_attention_heads * count for mixer, count in per_head.items()}
        by_mixer[KEY_VALUE_BINDING] = 3 * self.ttt_kvb_intermediate_ratio * bound * self.hidden_size
        return sum(by_mixer.get(mixer, 0) for mixer in self.mixer_types)

    def base_learning_rate(self, mixer: str) -> float:
        """Inner learning rate of blocks `mixer`, before its division by the size of a head."""
        given = self.ttt_base_learning_rate
        return BASE_LEARNING_RATES[mixer] if given is None else float(given)

    def check(self) -> None:
        super().check()
        self.validate_inner_learner()
        self.validate_key_value_binding()

    def validate_key_value_binding(self):
        """Check the settings of `ttt_kvb` blocks, where there is one."""
        if KEY_VALUE_BINDING not in self.mixer_types:
            return
        size = self.hidden_size
        if self.num_attention_heads * self.head_dim != size or self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) times `head_dim` ({self.head_dim}) must be "
                f"`hidden_size` ({size}), and `num_key_value_heads` ({self.num_key_value_heads}) equal to "
                "`num_attention_heads`: 'ttt_kvb' uses the keys and values of attention twice."
            )
        if size % self.ttt_kvb_num_heads:
            raise ValueError(f"`ttt_kvb_num_heads` ({self.ttt_kvb_num_heads}) must divide `hidden_size` ({size}).")
        self._check_choice("ttt_kvb_output_rule", OUTPUT_RULES)
        if self.mini_batch_size > self.sliding_window:
            raise ValueError(
                f"`mini_batch_size` ({self.mini_batch_size}) is larger than `sliding_window` ({self.sliding_window}): "
                "tokens would leave the window before 'ttt_kvb' has learned them. Make one of them fit the other."
            )

    def validate_inner_learner(self):
        """Check the settings of `ttt_linear` and `ttt_mlp` blocks, where there is one."""
        if not set(self.mixer_types) & set(INNER_LEARNERS):
            return
        size, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest or (size % 2 and self.ttt_rope_theta is not None):
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) divided by `num_attention_heads` ({self.num_attention_heads}) "
                "must be an even number, the channels of a TTT head (odd ones need `ttt_rope_theta=None`)."
            )
        self._check_not_negative("ttt_base_learning_rate")
        theta = self.ttt_rope_theta
        if theta is not None and not 0 < theta < math.inf:
            raise ValueError(f"`ttt_rope_theta` must be finite and positive, or None, got {theta}.")
        if "ttt_mlp" in self.mixer_types and not self.ttt_learn_initial_weights:
            raise ValueError(
                "`ttt_learn_initial_weights` is False but `mixer_types` has 'ttt_mlp': the weights of an MLP that "
                "starts from zero have no gradient. Learn them, or use 'ttt_linear'."
            )


__all__ = ["TTTLayersConfig"]
