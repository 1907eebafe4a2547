"""Between the official PyTorch layout of TTT-Linear and TTT-MLP and this package's, in both directions.

Every tensor keeps its values and their order; only names differ, and the learning-rate gate's shape:

    official, in a block                              here
    seq_modeling_block.learnable_ttt_lr_weight [H, 1, D]   ttt.learning_rate_gate.weight [H, D]
    seq_modeling_block.learnable_ttt_lr_bias   [H, 1]      ttt.learning_rate_gate.bias   [H]

so gradients convert by the same functions.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch

from .. import TTTLayersConfig
from ..configuration_ttt_layers import INNER_LEARNERS
from .checks import check_settings, check_tensors

LAYERS = "model.layers."
MIXERS = {"linear": "ttt_linear", "mlp": "ttt_mlp"}
SAME_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads rms_norm_eps initializer_range "
    "hidden_act tie_word_embeddings max_position_embeddings mini_batch_size"
).split()
# official field -> (field here, default of the official code)
RENAMED_FIELDS = {
    "ttt_base_lr": ("ttt_base_learning_rate", 1.0),
    "rope_theta": ("ttt_rope_theta", 10000.0),
    "use_gate": ("ttt_use_gate", False),
    "share_qk": ("ttt_share_qk", False),
    "pre_conv": ("ttt_pre_conv", False),
    "conv_kernel": ("ttt_conv_kernel", 4),
}
TOKEN_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def config_from_official(config: Mapping) -> TTTLayersConfig:
    """The configuration of an official checkpoint, from its `config.json`; fields left out have official defaults.

    Raises:
        ValueError: a setting that the official code does not have, with its name and value.
    """
    kind = config.get("ttt_layer_type", "linear")
    if kind not in MIXERS:
        raise ValueError(f"`ttt_layer_type` is {kind!r}; known: {list(MIXERS)}.")
    for name in ("rope_scaling", "num_key_value_heads"):
        value = config.get(name)
        if value is not None and (name == "rope_scaling" or value != config.get("num_attention_heads")):
            raise ValueError(f"`{name}` is {value}, which the official code does not implement: leave it out.")
    fields = {name: config[name] for name in SAME_FIELDS if name in config}
    fields |= {here: config.get(name, default) for name, (here, default) in RENAMED_FIELDS.items()}
    fields |= {name: config[name] for name in TOKEN_FIELDS if name in config}
    layers = fields.setdefault("num_hidden_layers", TTTLayersConfig.num_hidden_layers)
    return TTTLayersConfig(**fields, mixer_types=[MIXERS[kind]] * layers)


def config_to_official(config: TTTLayersConfig) -> dict:
    """The official configuration of a model, which `config_from_official` reads back.

    Raises:
        ValueError: a setting that the official code does not have, with its name and value.
    """
    _check_is_official(config)
    mixer = config.mixer_types[0]
    fields = {name: getattr(config, name) for name in (*SAME_FIELDS, *TOKEN_FIELDS)}
    fields |= {name: getattr(config, here) for name, (here, _) in RENAMED_FIELDS.items()}
    kind = next(kind for kind, name in MIXERS.items() if name == mixer)
    return fields | {"ttt_layer_type": kind, "ttt_base_lr": config.base_learning_rate(mixer)}


def convert_parameters(parameters: Mapping[str, torch.Tensor], config: TTTLayersConfig) -> dict[str, torch.Tensor]:
    """Official parameters (or gradients) under the names of `TTTLayersForCausalLM.state_dict()`.

    Args:
        parameters: official names to tensors.
        config: of the model that will hold them; a tied head is left out.

    Returns:
        Names to tensors of the same dtype.

    Raises:
        ValueError: naming the tensor that is missing, superfluous or of another shape than `config` says.
    """
    names = official_names(config)
    check_tensors(
        {name: tensor.shape for name, tensor in parameters.items()},
        {name: official for name, (_, official, _) in names.items()},
    )
    return {here: parameters[name].reshape(shape).clone() for name, (here, _, shape) in names.items()}


def parameters_to_official(parameters: Mapping[str, torch.Tensor], config: TTTLayersConfig) -> dict[str, torch.Tensor]:
    """The inverse of `convert_parameters`; a tied head may be there or not, and is left out.

    Raises:
        ValueError: as `convert_parameters`, or a setting that the official code does not have.
    """
    names = official_names(config)
    if config.tie_word_embeddings:
        parameters = {name: tensor for name, tensor in parameters.items() if name != "lm_head.weight"}
    check_tensors(
        {name: tensor.shape for name, tensor in parameters.items()}, {here: shape for here, _, shape in names.values()}
    )
    return {name: parameters[here].reshape(official).clone() for name, (here, official, _) in names.items()}


def official_names(config: TTTLayersConfig) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Every official tensor of a configuration: its name here, its official shape, and its shape here.

    Raises:
        ValueError: a setting that the official code does not have.
    """
    _check_is_official(config)
    size = config.hidden_size
    embedding = (config.vocab_size, size)
    found = {
        "model.embed_tokens.weight": ("model.embed_tokens.weight", embedding, embedding),
        "model.norm.weight": ("model.norm.weight", (size,), (size,)),
    }
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = ("lm_head.weight", embedding, embedding)
    block = _block_names(config)
    for index in range(config.num_hidden_layers):
        prefix = f"{LAYERS}{index}."
        found |= {prefix + name: (prefix + here, *shapes) for name, (here, *shapes) in block.items()}
    return found


def _block_names(config: TTTLayersConfig) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    size, width, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    channels, taps, mixer = size // heads, config.ttt_conv_kernel, "seq_modeling_block."
    found = {}

    def add(official: str, here: str, shape: tuple[int, ...], shape_here: tuple[int, ...] | None = None) -> None:
        found[official] = (here, shape, shape if shape_here is None else shape_here)

    def add_convolution(official: str, here: str) -> None:
        add(f"{official}.weight", f"{here}.weight", (size, 1, taps))
        add(f"{official}.bias", f"{here}.bias", (size,))

    add("seq_norm.weight", "input_layernorm.weight", (size,))
    add("ffn_norm.weight", "pre_feedforward_layernorm.weight", (size,))
    for name, shape in {"gate": (width, size), "up": (width, size), "down": (size, width)}.items():
        add(f"mlp.{name}_proj.weight", f"mlp.{name}_proj.weight", shape)
    for name in ("q", "v", "o", *([] if config.ttt_share_qk else ["k"]), *(["g"] if config.ttt_use_gate else [])):
        add(f"{mixer}{name}_proj.weight", f"ttt.{name}_proj.weight", (size, size))
    if config.ttt_share_qk:
        add_convolution(mixer + "conv_q", "ttt.conv_q")
        add_convolution(mixer + "conv_k", "ttt.conv_k")
    if config.ttt_pre_conv:
        add("conv.norm.weight", "conv_norm.weight", (size,))
        add_convolution("conv.conv", "conv")
    add(mixer + "learnable_token_idx", "ttt.token_scale_offset", (config.mini_batch_size,))
    add(mixer + "learnable_ttt_lr_weight", "ttt.learning_rate_gate.weight", (heads, 1, size), (heads, size))
    add(mixer + "learnable_ttt_lr_bias", "ttt.learning_rate_gate.bias", (heads, 1), (heads,))
    for part in ("weight", "bias"):
        add(f"{mixer}ttt_norm_{part}", f"ttt.inner_norm.{part}", (heads, channels))
        add(f"{mixer}post_norm.{part}", f"ttt.post_norm.{part}", (size,))
    sizes = [channels, channels]
    if config.mixer_types[0] == "ttt_mlp":
        sizes.insert(1, config.ttt_intermediate_ratio * channels)
    for index, (ins, outs) in enumerate(pairwise(sizes), start=1):
        add(f"{mixer}W{index}", f"ttt.initial_weight_{index}", (heads, ins, outs))
        add(f"{mixer}b{index}", f"ttt.initial_bias_{index}", (heads, 1, outs))
    return found


def _check_is_official(config: TTTLayersConfig) -> None:
    kinds = set(config.mixer_types)
    always = "ttt_use_bias ttt_learn_initial_weights ttt_layer_norm_residual ttt_learn_learning_rate ttt_token_scale"
    check_settings(
        ("mixer_types", sorted(kinds), "'ttt_linear' or 'ttt_mlp' for all blocks",
         len(kinds) == 1 and kinds <= set(INNER_LEARNERS)),
        ("post_norm", config.post_norm, "False", not config.post_norm),
        ("ttt_intermediate_ratio", config.ttt_intermediate_ratio, "4", config.ttt_intermediate_ratio == 4),
        ("ttt_rope_theta", config.ttt_rope_theta, "a number", config.ttt_rope_theta is not None),
        *((name, getattr(config, name), "True", getattr(config, name)) for name in always.split()),
    )  # fmt: skip
