"""Between the official PyTorch layout of TTT-Linear and TTT-MLP and this package's, in both directions.

Every tensor keeps its values and their order; only names differ, and the learning-rate gate's shape:

    official, in a block                              here
    seq_modeling_block.learnable_ttt_lr_weight [H, 1, D]   ttt.learning_rate_gate.weight [H, D]
    seq_modeling_block.learnable_ttt_lr_bias   [H, 1]      ttt.learning_rate_gate.bias   [H]

so gradients convert by the same functions.
"""

import re
from collections.abc import Mapping

import torch

from .. import TTTLayersConfig, TTTLayersForCausalLM
from ..configuration_ttt_layers import INNER_LEARNERS
from .strictness import check_settings, check_tensors, model_shapes

MIXER = "seq_modeling_block."
# name here, in a block -> official name; the others are the same but for `ttt.`, which is `seq_modeling_block.`
RENAMED_TENSORS = {
    "input_layernorm.weight": "seq_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "conv_norm.weight": "conv.norm.weight",
    "conv.weight": "conv.conv.weight",
    "conv.bias": "conv.conv.bias",
    "ttt.token_scale_offset": MIXER + "learnable_token_idx",
    "ttt.learning_rate_gate.weight": MIXER + "learnable_ttt_lr_weight",
    "ttt.learning_rate_gate.bias": MIXER + "learnable_ttt_lr_bias",
    "ttt.inner_norm.weight": MIXER + "ttt_norm_weight",
    "ttt.inner_norm.bias": MIXER + "ttt_norm_bias",
    "ttt.initial_weight_1": MIXER + "W1",
    "ttt.initial_weight_2": MIXER + "W2",
    "ttt.initial_bias_1": MIXER + "b1",
    "ttt.initial_bias_2": MIXER + "b2",
}
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


def ttt_layers_config_from_official(config: Mapping) -> TTTLayersConfig:
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


def ttt_layers_config_to_official(config: TTTLayersConfig) -> dict:
    """The official configuration of a model, which `ttt_layers_config_from_official` reads back.

    Raises:
        ValueError: a setting that the official code does not have, with its name and value.
    """
    _check_ttt_layers(config)
    mixer = config.mixer_types[0]
    fields = {name: getattr(config, name) for name in (*SAME_FIELDS, *TOKEN_FIELDS)}
    fields |= {name: getattr(config, here) for name, (here, _) in RENAMED_FIELDS.items()}
    kind = next(kind for kind, name in MIXERS.items() if name == mixer)
    return fields | {"ttt_layer_type": kind, "ttt_base_lr": config.base_learning_rate(mixer)}


def ttt_layers_from_official(
    parameters: Mapping[str, torch.Tensor], config: TTTLayersConfig
) -> dict[str, torch.Tensor]:
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


def ttt_layers_to_official(parameters: Mapping[str, torch.Tensor], config: TTTLayersConfig) -> dict[str, torch.Tensor]:
    """The inverse of `ttt_layers_from_official`; a tied head may be there or not, and is left out.

    Raises:
        ValueError: as `ttt_layers_from_official`, or a setting that the official code does not have.
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
    _check_ttt_layers(config)
    found = {}
    for here, shape in model_shapes(TTTLayersForCausalLM, config).items():
        official_shape = (shape[0], 1, *shape[1:]) if "learning_rate_gate" in here else shape
        found[_official_name(here)] = (here, official_shape, shape)
    return found


def _official_name(here: str) -> str:
    block, part = re.fullmatch(r"(model\.layers\.\d+\.)?(.+)", here).groups(default="")
    return block + RENAMED_TENSORS.get(part, re.sub(r"^ttt\.", MIXER, part))


def _check_ttt_layers(config: TTTLayersConfig) -> None:
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
