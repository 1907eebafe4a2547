"""Configuration of the recurrent baselines: sliding-window attention with Mamba 2 or Gated DeltaNet blocks.

Their mixers are those of transformers; this page only says which block has which one, and how large they are.
"""

from .configuration_decoder import ATTENTION_TYPES, MixerConfig  # first: it checks the release of transformers

# isort: split
from huggingface_hub.dataclasses import strict
from transformers import Mamba2Config

RECURRENT_MIXERS = ("mamba2", "gated_delta_net")


@strict
class RecurrentHybridConfig(MixerConfig):
    """Sizes of a [`RecurrentHybridModel`]. `RecurrentHybridConfig()` is the preset 125m-gated-delta-net.

    `hidden_act` is also that of the mixers' short convolutions. Recurrent blocks have no positions.

    The arguments of [`DecoderConfig`], and:

    Args:
        mixer_types: per block `"sliding_attention"`, `"full_attention"`, `"mamba2"` or `"gated_delta_net"`, at least
            one of them attention (default: three `gated_delta_net`, then one `sliding_attention`, and so on).
        attention_dropout: dropout of the attention weights while training.
        mamba_expand: channels of a Mamba 2 mixer, as a multiple of `hidden_size`.
        mamba_head_dim: channels of one of its heads.
        mamba_state_size: state per channel.
        mamba_num_groups: groups of heads that share their input and output maps (B and C).
        mamba_conv_kernel: width of its short convolution.
        mamba_chunk_size: tokens that its scan handles at once; changes speed and memory, not the result.
        linear_num_key_heads: heads of a Gated DeltaNet mixer.
        linear_num_value_heads: its value heads, a multiple of the former (default: as many).
        linear_key_head_dim: channels of a query or key head.
        linear_value_head_dim: channels of a value head (default: twice those of a key head).
        linear_conv_kernel_dim: width of its short convolution.
        linear_allow_neg_eigval: let the state's transition have negative eigenvalues (not in the paper).
    """

    model_type = "recurrent_hybrid"
    keys_to_ignore_at_inference = ["cache", "token_nll"]
    rope_by_layer_type = False
    layer_type_of = {name: name for name in ATTENTION_TYPES} | dict.fromkeys(RECURRENT_MIXERS, "linear_attention")
    counts = (
        "mamba_expand mamba_head_dim mamba_state_size mamba_num_groups mamba_conv_kernel mamba_chunk_size "
        "linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim"
    )
    # Ranges of the initial decay and time step of Gated DeltaNet, read by its mixer in transformers.
    linear_a_log_min = 0.0
    linear_a_log_max = 16.0
    linear_dt_min = 0.001
    linear_dt_max = 0.1
    linear_dt_init_floor = 1e-4

    attention_dropout: int | float = 0.0

    mamba_expand: int = 2
    mamba_head_dim: int = 64
    mamba_state_size: int = 128
    mamba_num_groups: int = 1
    mamba_conv_kernel: int = 4
    mamba_chunk_size: int = 256

    linear_num_key_heads: int = 9
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int = 64
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int = 4
    linear_allow_neg_eigval: bool = False

    def __post_init__(self, **kwargs):
        if self.linear_num_value_heads is None:
            self.linear_num_value_heads = self.linear_num_key_heads
        if self.linear_value_head_dim is None:
            self.linear_value_head_dim = 2 * self.linear_key_head_dim
        if self.mixer_types is None:
            pattern = ["gated_delta_net"] * 3 + ["sliding_attention"]
            self.mixer_types = [pattern[index % 4] for index in range(self.num_hidden_layers)]
            self.mixer_types[-1:] = ["sliding_attention"]
        super().__post_init__(**kwargs)

    def mamba2_config(self) -> Mamba2Config:
        """The configuration from which transformers builds a Mamba 2 mixer."""
        return Mamba2Config(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            hidden_act=self.hidden_act,
            layer_norm_epsilon=self.rms_norm_eps,
            expand=self.mamba_expand,
            num_heads=self.mamba_expand * self.hidden_size // self.mamba_head_dim,
            head_dim=self.mamba_head_dim,
            state_size=self.mamba_state_size,
            n_groups=self.mamba_num_groups,
            conv_kernel=self.mamba_conv_kernel,
            chunk_size=self.mamba_chunk_size,
        )

    def check(self) -> None:
        super().check()
        self.validate_recurrent_mixers()

    def validate_layer_type(self):
        """Also that a block of attention is there."""
        super().validate_layer_type()
        if not set(self.mixer_types) & set(ATTENTION_TYPES):
            raise ValueError(
                "`mixer_types` has no attention block, which is where transformers' cache counts tokens: make at "
                f"least one block one of {list(ATTENTION_TYPES)}."
            )

    def validate_recurrent_mixers(self):
        """Check dropout, and that the heads of the recurrent blocks fit their sizes."""
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"`attention_dropout` must be at least 0 and less than 1, got {self.attention_dropout}.")
        values, keys = self.linear_num_value_heads, self.linear_num_key_heads
        if "gated_delta_net" in self.mixer_types and values % keys:
            raise ValueError(
                f"`linear_num_value_heads` ({values}) must be a multiple of `linear_num_key_heads` ({keys})."
            )
        if "mamba2" in self.mixer_types:
            self._check_mamba_heads()

    def _check_mamba_heads(self):
        channels = self.mamba_expand * self.hidden_size
        if channels % self.mamba_head_dim:
            raise ValueError(
                f"`mamba_head_dim` ({self.mamba_head_dim}) must divide `mamba_expand * hidden_size` ({channels})."
            )
        heads = channels // self.mamba_head_dim
        if heads % self.mamba_num_groups:
            raise ValueError(
                f"`mamba_num_groups` ({self.mamba_num_groups}) must divide the number of Mamba 2 heads ({heads}), "
                "which is `mamba_expand * hidden_size / mamba_head_dim`."
            )


__all__ = ["RecurrentHybridConfig"]
