"""From the official JAX layout to this package's, tensor by tensor.

    official, stacked over blocks          here
    wq, wk      [L, in, out] interleaved   q_proj, k_proj     transposed, rows permuted to RoPE's half-split layout
    q_norm, k_norm  [L, head_dim]          q_norm, k_norm     permuted likewise
    other linear    [L, in, out]           transposed
    norms, embeddings                      unchanged

Values are permuted and transposed but never scaled, so gradients convert by the same functions.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from .configuration_ttt_e2e import TTTE2EConfig

ROOT = "language_model."
BLOCKS = ROOT + "model.h.blocks."
PRIME = ROOT + "model.h.prime_storage."

# official name in a block -> (name here, how the tensor is laid out)
BLOCK_TENSORS = {
    "seq_modeling_block.wq.weight": ("self_attn.q_proj.weight", "rotated"),
    "seq_modeling_block.wk.weight": ("self_attn.k_proj.weight", "rotated"),
    "seq_modeling_block.wv.weight": ("self_attn.v_proj.weight", "linear"),
    "seq_modeling_block.wo.weight": ("self_attn.o_proj.weight", "linear"),
    "seq_norm.weight": ("input_layernorm.weight", "plain"),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", "linear"),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", "linear"),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", "linear"),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "plain"),
}
QK_NORM_TENSORS = {
    "seq_modeling_block.q_norm.weight": ("self_attn.q_norm.weight", "rotated"),
    "seq_modeling_block.k_norm.weight": ("self_attn.k_norm.weight", "rotated"),
}
POST_NORM_TENSORS = {
    "seq_post_norm.weight": ("post_attention_layernorm.weight", "plain"),
    "ffn_post_norm.weight": ("post_feedforward_layernorm.weight", "plain"),
}
PRIME_TENSORS = {
    "feed_forward_prime.w1.weight": ("prime_mlp.gate_proj.weight", "linear"),
    "feed_forward_prime.w3.weight": ("prime_mlp.up_proj.weight", "linear"),
    "feed_forward_prime.w2.weight": ("prime_mlp.down_proj.weight", "linear"),
    "ffn_prime_norm.weight": ("pre_prime_layernorm.weight", "plain"),
}
PRIME_POST_NORM_TENSORS = {"ffn_prime_post_norm.weight": ("post_prime_layernorm.weight", "plain")}


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
    expected = dict(expected_tensors(config))
    missing, superfluous = sorted(expected.keys() - parameters.keys()), sorted(parameters.keys() - expected.keys())
    if missing:
        raise ValueError(f"The parameters lack {missing}.")
    if superfluous:
        raise ValueError(f"The parameters hold {superfluous}, which this configuration has no place for.")
    converted = {}
    for name, (shape, targets, layout) in expected.items():
        array = np.asarray(parameters[name])
        if array.shape != shape:
            raise ValueError(f"`{name}` has shape {array.shape}, but the configuration needs {shape}.")
        stacked = array if len(targets) > 1 or name.startswith((BLOCKS, PRIME)) else array[None]
        for target, one in zip(targets, stacked, strict=True):
            converted[target] = torch.from_numpy(_relayout(one, layout, config.head_dim).copy())
    return converted


def expected_tensors(config: TTTE2EConfig) -> Iterator[tuple[str, tuple[tuple[int, ...], list[str], str]]]:
    """Every official tensor of a configuration: its name, its shape, the names it gets here (one per block), and its
    layout (`plain`, `linear` or `rotated`)."""
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    yield ROOT + "model.wte.weight", ((vocabulary, hidden), ["model.embed_tokens.weight"], "plain")
    yield ROOT + "model.ln_f.weight", ((hidden,), ["model.norm.weight"], "plain")
    if not config.tie_word_embeddings:
        yield ROOT + "lm_head.weight", ((hidden, vocabulary), ["model.lm_head.weight"], "linear")
    tensors = (
        BLOCK_TENSORS | (QK_NORM_TENSORS if config.qk_norm else {}) | (POST_NORM_TENSORS if config.post_norm else {})
    )
    for name, (target, layout) in tensors.items():
        targets = [f"model.layers.{index}.{target}" for index in range(layers)]
        yield BLOCKS + name, ((layers, *_shape(name, config, config.intermediate_size)), targets, layout)
    if config.use_prime_mlp and config.num_suffix_layers:
        tensors = PRIME_TENSORS | (PRIME_POST_NORM_TENSORS if config.post_norm else {})
        for name, (target, layout) in tensors.items():
            targets = [f"model.layers.{index}.{target}" for index in range(config.num_prefix_layers, layers)]
            shape = (config.num_suffix_layers, *_shape(name, config, config.prime_intermediate_size))
            yield PRIME + name, (shape, targets, layout)


def _shape(name: str, config: TTTE2EConfig, width: int) -> tuple[int, ...]:
    hidden = config.hidden_size
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes = {
        "wq": (hidden, queries),
        "wk": (hidden, keys),
        "wv": (hidden, keys),
        "wo": (queries, hidden),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
        "w1": (hidden, width),
        "w3": (hidden, width),
        "w2": (width, hidden),
    }
    return shapes.get(name.split(".")[-2], (hidden,))


def _relayout(array: np.ndarray, layout: str, head_dim: int) -> np.ndarray:
    if layout == "plain":
        return array
    matrix = array.T if array.ndim == 2 else array
    if layout == "linear":
        return matrix
    # Interleaved pairs (0, 1), (2, 3), ... of each head become halves (0, 2, ...), (1, 3, ...).
    order = np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])
    return matrix.reshape(-1, head_dim, *matrix.shape[1:])[:, order].reshape(matrix.shape)
