"""Between the official JAX layout and this package's, tensor by tensor, in both directions.

    official, stacked over blocks          here
    wq, wk      [L, in, out] interleaved   q_proj, k_proj     transposed, rows permuted to RoPE's half-split layout
    q_norm, k_norm  [L, head_dim]          q_norm, k_norm     permuted likewise
    other linear    [L, in, out]           transposed
    norms, embeddings                      unchanged

Values are permuted and transposed but never scaled, so gradients convert by the same functions.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from .. import TTTE2EConfig, TTTE2EForCausalLM
from .strictness import check_settings, check_tensors, model_shapes

ROOT = "language_model."
BLOCKS = ROOT + "model.h.blocks."
PRIME = ROOT + "model.h.prime_storage."
# name here, within a block -> (official name, how the tensor is laid out)
TENSORS = {
    "model.embed_tokens.weight": (ROOT + "model.wte.weight", "plain"),
    "model.norm.weight": (ROOT + "model.ln_f.weight", "plain"),
    "model.lm_head.weight": (ROOT + "lm_head.weight", "linear"),
    "self_attn.q_proj.weight": (BLOCKS + "seq_modeling_block.wq.weight", "rotated"),
    "self_attn.k_proj.weight": (BLOCKS + "seq_modeling_block.wk.weight", "rotated"),
    "self_attn.v_proj.weight": (BLOCKS + "seq_modeling_block.wv.weight", "linear"),
    "self_attn.o_proj.weight": (BLOCKS + "seq_modeling_block.wo.weight", "linear"),
    "self_attn.q_norm.weight": (BLOCKS + "seq_modeling_block.q_norm.weight", "rotated"),
    "self_attn.k_norm.weight": (BLOCKS + "seq_modeling_block.k_norm.weight", "rotated"),
    "input_layernorm.weight": (BLOCKS + "seq_norm.weight", "plain"),
    "post_attention_layernorm.weight": (BLOCKS + "seq_post_norm.weight", "plain"),
    "mlp.gate_proj.weight": (BLOCKS + "feed_forward.w1.weight", "linear"),
    "mlp.up_proj.weight": (BLOCKS + "feed_forward.w3.weight", "linear"),
    "mlp.down_proj.weight": (BLOCKS + "feed_forward.w2.weight", "linear"),
    "pre_feedforward_layernorm.weight": (BLOCKS + "ffn_norm.weight", "plain"),
    "post_feedforward_layernorm.weight": (BLOCKS + "ffn_post_norm.weight", "plain"),
    "prime_mlp.gate_proj.weight": (PRIME + "feed_forward_prime.w1.weight", "linear"),
    "prime_mlp.up_proj.weight": (PRIME + "feed_forward_prime.w3.weight", "linear"),
    "prime_mlp.down_proj.weight": (PRIME + "feed_forward_prime.w2.weight", "linear"),
    "pre_prime_layernorm.weight": (PRIME + "ffn_prime_norm.weight", "plain"),
    "post_prime_layernorm.weight": (PRIME + "ffn_prime_post_norm.weight", "plain"),
}


@dataclass(frozen=True)
class OfficialTensor:
    """A tensor of the official layout, and what it is here.

    Attributes:
        name: dotted, beginning with `language_model.`.
        shape: of all of it.
        targets: the names here of its slices along the first axis, one per block; of a tensor that is not `stacked`,
            the one name of all of it.
        layout: `plain`, `linear` or `rotated`.
    """

    name: str
    shape: tuple[int, ...]
    targets: list[str]
    layout: str

    @property
    def stacked(self) -> bool:
        """Whether the first axis counts blocks."""
        return self.name.startswith((BLOCKS, PRIME))

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Shape of each tensor here."""
        one = self.shape[1:] if self.stacked else self.shape
        return one if self.layout == "plain" else one[::-1]


def config_from_official(model: Mapping, training: Mapping) -> TTTE2EConfig:
    """The configuration of an official checkpoint.

    Args:
        model, training: the official configuration's two groups, as in the checkpoint's experiment.

    Raises:
        KeyError: a needed field is missing.
        ValueError: a setting that this model does not have, with its name and value.
    """
    if model["seq_modeling_block"] not in ("SWA", "self_attention"):
        raise ValueError(f"`seq_modeling_block` is {model['seq_modeling_block']!r}; known: 'SWA', 'self_attention'.")
    if not model.get("pre_norm", True):
        raise ValueError("`pre_norm` is False; only blocks with pre-norms are supported.")
    if model["output_size"] != model["vocab_size"]:
        raise ValueError(
            f"`output_size` ({model['output_size']}) differs from `vocab_size` ({model['vocab_size']}): the head must "
            "cover the vocabulary."
        )
    slides = model["seq_modeling_block"] == "SWA"
    inner = training.get("optimizer_inner", {})
    learns = training["train_mode"] == "meta"
    if learns and inner.get("optimizer_type", "sgd") != "sgd":
        raise ValueError(f"`optimizer_inner.optimizer_type` is {inner['optimizer_type']!r}; only 'sgd' is supported.")
    layers = model["num_hidden_layers"]
    return TTTE2EConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=model["num_attention_heads"],
        rms_norm_eps=model["rms_norm_eps"],
        initializer_range=model.get("initializer_range", 0.02),
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
        sliding_window=model["sliding_window_size"] if slides else None,
        layer_types=["sliding_attention" if slides else "full_attention"] * layers,
        qk_norm=model["qk_norm"],
        post_norm=model["post_norm"],
        tie_word_embeddings=model["tie_word_embeddings"],
        bos_token_id=model["bos_token_id"],
        eos_token_id=model["eos_token_id"],
        num_suffix_layers=model["suffix_len"],
        use_prime_mlp=model["prime"],
        mini_batch_size=model["mini_batch_size"],
        inner_learning_rate=inner.get("lr", 1.0),
        inner_max_grad_norm=inner.get("clip_gradient", 0.0),
        test_time_training=learns,
    )


def config_to_official(config: TTTE2EConfig) -> dict[str, dict]:
    """The official configuration of a model: groups `model` and `training`, which `config_from_official` reads back.

    Settings of training that change no output (`meta_gradient`, checkpointing) and `pad_token_id` have no place there;
    `max_position_embeddings` becomes `seq_len`, which is not read back, because the model reads any length.

    Raises:
        ValueError: a setting that the official model does not have, with its name and value.
    """
    _check_is_official(config)
    slides = config.layer_types[0] == "sliding_attention"
    prime = config.use_prime_mlp and config.num_suffix_layers > 0
    length, (rope, *_) = config.max_position_embeddings, config.rope_of_layer_types().values()
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads mini_batch_size rms_norm_eps "
        "initializer_range bos_token_id eos_token_id tie_word_embeddings qk_norm post_norm"
    )
    model = {name: getattr(config, name) for name in same.split()} | {
        "output_size": config.vocab_size,
        "seq_modeling_block": "SWA" if slides else "self_attention",
        "sliding_window_size": config.sliding_window if slides else length,
        "seq_len": length,
        "rope_theta": rope["rope_theta"],
        "suffix_len": config.num_suffix_layers,
        "prime": prime,
        "feed_forward_prime": "swiglu",
        "pre_norm": True,
    }
    clip = config.inner_max_grad_norm or 0.0
    training = {
        "seq_length": length,
        "train_mode": "meta" if config.test_time_training else "pretrain",
        "optimizer_inner": {"optimizer_type": "sgd", "lr": config.inner_learning_rate, "clip_gradient": clip},
        "spec_inner": [f"language_model.**.suffix_blocks.feed_forward{'_prime' if prime else ''}.**"],
    }
    return {"model": model, "training": training}


def _check_is_official(config: TTTE2EConfig) -> None:
    heads, tokens = config.num_attention_heads, (config.bos_token_id, config.eos_token_id)
    ropes = {rope["rope_type"] for rope in config.rope_of_layer_types().values()}
    check_settings(
        ("hidden_act", config.hidden_act, "'silu'", config.hidden_act == "silu"),
        ("use_attention", config.use_attention, "True", config.use_attention),
        ("num_sink_tokens", config.num_sink_tokens, "0", config.num_sink_tokens == 0),
        ("inner_projections", config.inner_projections, "'all'", config.inner_projections == "all"),
        ("attention_bias", config.attention_bias, "False", not config.attention_bias),
        ("num_key_value_heads", config.num_key_value_heads, f"{heads}, one per query head",
         config.num_key_value_heads == heads),
        ("head_dim", config.head_dim, f"{config.hidden_size / heads:g}, `hidden_size` by `num_attention_heads`",
         config.head_dim * heads == config.hidden_size),
        ("prime_intermediate_size", config.prime_intermediate_size, f"{config.intermediate_size}, `intermediate_size`",
         config.prime_intermediate_size == config.intermediate_size),
        ("layer_types", sorted(set(config.layer_types)), "one type for all blocks", len(set(config.layer_types)) == 1),
        ("rope_parameters", config.rope_parameters, "of rope_type 'default'", ropes == {"default"}),
        ("bos_token_id, eos_token_id", tokens, "one id each", all(isinstance(token, int) for token in tokens)),
    )  # fmt: skip


def convert_parameters(parameters: Mapping[str, np.ndarray], config: TTTE2EConfig) -> dict[str, torch.Tensor]:
    """Official parameters (or gradients, or optimiser moments) under the names of `TTTE2EForCausalLM.state_dict()`.

    Args:
        parameters: dotted official names, beginning with `language_model.`, to arrays; linear weights [in, out],
            blocks stacked on the first axis.
        config: of the model that will hold them; a tied head is left out.

    Returns:
        Names to tensors of the same dtype.

    Raises:
        ValueError: naming the tensor that is missing, superfluous or of another shape than `config` says.
    """
    check_shapes({name: np.shape(array) for name, array in parameters.items()}, config)
    converted = {}
    for official in expected_tensors(config):
        whole = torch.from_numpy(np.array(parameters[official.name]))
        slices = whole if official.stacked else [whole]
        for target, one in zip(official.targets, slices, strict=True):
            converted[target] = tensor_from_official(one.clone(), official.layout, config.head_dim)
    return converted


def check_shapes(shapes: Mapping[str, tuple[int, ...]], config: TTTE2EConfig) -> None:
    """Check that official tensors are those of a configuration.

    Args:
        shapes: of all tensors by their dotted official names.

    Raises:
        ValueError: naming the tensor that is missing, superfluous or of another shape than `config` says.
    """
    check_tensors(shapes, {official.name: official.shape for official in expected_tensors(config)})


def sizes_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The fields of a configuration that the shapes of official tensors tell, as far as those tensors are there."""
    places = {
        "vocab_size": (ROOT + "model.wte.weight", 0),
        "hidden_size": (ROOT + "model.wte.weight", 1),
        "num_hidden_layers": (BLOCKS + "seq_norm.weight", 0),
        "intermediate_size": (BLOCKS + "feed_forward.w1.weight", -1),
        "head_dim": (BLOCKS + "seq_modeling_block.q_norm.weight", -1),
        "num_suffix_layers": (PRIME + "ffn_prime_norm.weight", 0),
        "prime_intermediate_size": (PRIME + "feed_forward_prime.w1.weight", -1),
    }
    return {
        field: shapes[name][axis] for field, (name, axis) in places.items() if len(shapes.get(name, ())) > max(axis, 0)
    }


def expected_tensors(config: TTTE2EConfig) -> Iterator[OfficialTensor]:
    """Every official tensor of a configuration; a tied head is none."""
    shapes = model_shapes(TTTE2EForCausalLM, config)
    targets: dict[tuple[str, str], list[str]] = {}
    for target in shapes:
        targets.setdefault(TENSORS[re.sub(r"^model\.layers\.\d+\.", "", target)], []).append(target)
    for (name, layout), own in targets.items():
        one = shapes[own[0]] if layout == "plain" else shapes[own[0]][::-1]
        stacked = name.startswith((BLOCKS, PRIME))
        yield OfficialTensor(name, (len(own), *one) if stacked else one, own, layout)


def empty_leaves(config: TTTE2EConfig) -> list[str]:
    """Dotted names of the leaves that are None in the official tree of parameters: unused biases and placeholders."""
    post_norms, prime = config.post_norm, config.use_prime_mlp and config.num_suffix_layers
    leaves = ["step_index.init", ROOT + "model.ln_f.bias"]
    leaves += [ROOT + "lm_head"] if config.tie_word_embeddings else []
    norms = {"seq_norm": True, "ffn_norm": True, "seq_post_norm": post_norms, "ffn_post_norm": post_norms}
    norms |= dict.fromkeys(("seq_modeling_block.q_norm", "seq_modeling_block.k_norm"), config.qk_norm)
    leaves += [BLOCKS + (f"{norm}.bias" if used else norm) for norm, used in norms.items()]
    # Suffix blocks take these from the storage below.
    leaves += [BLOCKS + part for part in ("feed_forward_prime", "ffn_prime_norm", "ffn_prime_post_norm")]
    if config.layer_types[0] == "sliding_attention":
        leaves += [f"{BLOCKS}seq_modeling_block.{index}.init" for index in ("chunk_index", "kv_cache_index")]
    if not prime:
        return [*leaves, PRIME.rstrip(".")]
    return [*leaves, PRIME + "ffn_prime_norm.bias", PRIME + "ffn_prime_post_norm" + (".bias" if post_norms else "")]


def tensor_from_official(one: torch.Tensor, layout: str, head_dim: int) -> torch.Tensor:
    """An official tensor, of one block, in the layout that it has here: contiguous, and a copy only where it changes.

    Args:
        one: a vector or a matrix, [in, out] if it is a linear weight.
        layout: `plain`, `linear` or `rotated`.
    """
    matrix = one.mT if layout != "plain" and one.ndim == 2 else one
    if layout == "rotated":
        matrix = matrix.reshape(-1, head_dim, *matrix.shape[1:])[:, _half_split(head_dim)].reshape(matrix.shape)
    return matrix.contiguous()


def tensor_to_official(one: torch.Tensor, layout: str, head_dim: int) -> torch.Tensor:
    """The inverse of `tensor_from_official`."""
    matrix = one
    if layout == "rotated":
        order = _half_split(head_dim).argsort()
        matrix = one.reshape(-1, head_dim, *one.shape[1:])[:, order].reshape(one.shape)
    matrix = matrix.mT if layout != "plain" and one.ndim == 2 else matrix
    return matrix.contiguous()


def _half_split(head_dim: int) -> torch.Tensor:
    """Interleaved pairs (0, 1), (2, 3), ... of a head become halves (0, 2, ...), (1, 3, ...)."""
    return torch.cat([torch.arange(0, head_dim, 2), torch.arange(1, head_dim, 2)])
