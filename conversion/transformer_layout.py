"""From a pretrained Llama, Mistral, Qwen2 or Qwen3 to a TTT-E2E model that can learn: the warm start.

    transformers                               here
    lm_head                                    model.lm_head
    model.layers.N.post_attention_layernorm    model.layers.N.pre_feedforward_layernorm (it stands before the MLP)
    every other tensor                         the same name
    none (Qwen2 has biases on q, k, v only)    self_attn.o_proj.bias = 0
    none                                       pre_prime_layernorm = 1
    none                                       prime_mlp: gate_proj, up_proj ~ N(0, 1 / hidden_size), down_proj = 0

All values are copied. There are no sandwich norms (`post_norm=False`), so a prime MLP whose down_proj is zero adds
exactly nothing: with learning off, and a window that holds the whole text, the logits are the source's. It can learn
nevertheless: the gradient of down_proj is the product of the gradient at the residual stream and of random features
act(gate x) * up x, which are not zero. The first step, inner or outer, moves down_proj; from then on gate_proj and
up_proj have gradients as well. With all three at zero no gradient would ever leave zero. The variance 1 / hidden_size
gives gate x and up x unit variance at any width; the usual 0.02 would leave narrow models with features so small that
the inner loop hardly moves.
"""

import copy
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .. import TTTE2EConfig, TTTE2EForCausalLM
from ..configuration_decoder import ATTENTION_TYPES, ROPE_KEYS
from .strictness import model_shapes

SUPPORTED_MODELS = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DEFAULT_MINI_BATCH = 1024  # that of the paper
SLIDING = "sliding_attention"
DEFAULT_SINKS = 4  # those of arXiv 2309.17453


@dataclass(frozen=True)
class WarmStartSettings:
    """What a TTT-E2E model has and a transformer has not; the names are those of `TTTE2EConfig`.

    Attributes:
        sliding_window: keys that a query of any layer sees, itself included (default: the source's, where all its
            layers slide).
        num_suffix_layers: blocks, counted from the end, that learn (default: a quarter).
        mini_batch_size: tokens of one inner step (default: 1024, or the window where that is smaller).
        use_prime_mlp: the suffix blocks get a second MLP each, whose weights the inner loop updates. `False` makes
            their own MLPs the inner weights, and adds no parameters.
        prime_intermediate_size: width of the prime MLPs (default: `intermediate_size`).
        inner_projections: what learns of an inner MLP, "all" its projections or "down", the last one alone.
        inner_learning_rate, inner_max_grad_norm: of the inner loop.
        num_sink_tokens: attention sinks, the first tokens of a text that stay visible (default: 4 where layers of the
            source see its whole text, whose attention leans on them; none where all of them slide).
        full_attention_every: every so many blocks keep the full attention of the source; the cache then grows with the
            text, by the keys and values of these blocks (default: none does).
        full_attention_layers: instead, which blocks keep it, counted from 0.
        full_attention_yarn: how many times longer than in the source's training the texts are that these blocks are to
            read: their RoPE is scaled by YaRN (arXiv 2309.00071) with this factor. Blocks with a window never meet a
            distance that is new to them, and stay as they are (default: all do).
    """

    sliding_window: int | None = None
    num_suffix_layers: int | None = None
    mini_batch_size: int | None = None
    use_prime_mlp: bool = True
    prime_intermediate_size: int | None = None
    inner_learning_rate: float = 1.0
    inner_max_grad_norm: float = 1.0
    inner_projections: str = "all"
    num_sink_tokens: int | None = None
    full_attention_every: int | None = None
    full_attention_layers: Sequence[int] | None = None
    full_attention_yarn: float | None = None


@dataclass(frozen=True)
class TensorPlan:
    """A tensor of the new model: its name and shape, and the source's name of it; None for one that is made anew."""

    name: str
    shape: tuple[int, ...]
    source: str | None


def check_convertible(fields: Mapping) -> None:
    """Check that a source can be converted, from the fields of its config.json.

    Raises:
        ValueError: another architecture, or quantised weights.
    """
    kind = fields.get("model_type")
    if kind == "ttt_e2e":
        raise ValueError("model_type='ttt_e2e': the model learns while it reads already; train it as it is.")
    if kind not in SUPPORTED_MODELS:
        raise ValueError(f"model_type={kind!r} cannot be converted; supported are {', '.join(SUPPORTED_MODELS)}.")
    quantised = fields.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown")
        raise ValueError(
            f"quantization_config: the weights are quantised ({method}), which cannot be trained on; take the model "
            "that they were made from."
        )


def config_from_transformer(source: PreTrainedConfig, settings: WarmStartSettings) -> TTTE2EConfig:
    """The configuration of the new model.

    Layers with full attention become sliding ones, but for those that `full_attention_every` or
    `full_attention_layers` keep: memory then does not grow with the text. Dropout, which this model does not have, is
    left out.

    Args:
        source: of a model of `SUPPORTED_MODELS`.

    Raises:
        ValueError: the source has a setting that this model does not have, or `settings` do not fit together or to it;
            the message names the field.
    """
    check_convertible(source.to_dict())
    _check_source(source)
    own_window, sees_all = _reach(source)
    window = _window(own_window, sees_all, settings.sliding_window)
    sinks = settings.num_sink_tokens
    if sinks is None:
        sinks = min(DEFAULT_SINKS, window) if sees_all else 0
    layers, suffix = source.num_hidden_layers, settings.num_suffix_layers
    if suffix is not None and not 1 <= suffix <= layers:
        raise ValueError(f"`num_suffix_layers`={suffix}: must be between 1 and {layers}, the blocks of the source.")
    if settings.prime_intermediate_size is not None and not settings.use_prime_mlp:
        raise ValueError(
            f"`prime_intermediate_size`={settings.prime_intermediate_size} is of the prime MLPs, but "
            "`use_prime_mlp`=False leaves them out: give one or the other."
        )
    layer_types, mini_batch = _layer_types(source, settings), settings.mini_batch_size
    rope = _rope_parameters(source, layer_types, settings.full_attention_yarn)
    copied = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act "
        "initializer_range rms_norm_eps tie_word_embeddings pad_token_id bos_token_id eos_token_id"
    )
    return TTTE2EConfig(
        **{name: getattr(source, name) for name in copied.split()},
        head_dim=getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        max_position_embeddings=round(source.max_position_embeddings * (settings.full_attention_yarn or 1)),
        rope_parameters=rope,
        sliding_window=window,
        layer_types=layer_types,
        attention_bias=source.model_type == "qwen2" or bool(getattr(source, "attention_bias", False)),
        qk_norm=source.model_type == "qwen3",
        post_norm=False,
        num_suffix_layers=suffix,
        mini_batch_size=min(DEFAULT_MINI_BATCH, window) if mini_batch is None else mini_batch,
        use_prime_mlp=settings.use_prime_mlp,
        prime_intermediate_size=settings.prime_intermediate_size,
        inner_learning_rate=settings.inner_learning_rate,
        inner_max_grad_norm=settings.inner_max_grad_norm,
        inner_projections=settings.inner_projections,
        num_sink_tokens=sinks,
    )


def plan_tensors(config: TTTE2EConfig, model_type: str, available: Mapping[str, tuple[int, ...]]) -> list[TensorPlan]:
    """Every tensor of the new model, in the order of its modules; a tied head is left out.

    Args:
        config: of the new model.
        model_type: of the source.
        available: shapes of the source's tensors by name.

    Raises:
        ValueError: naming the tensor that the source lacks, that has no place here, or that has another shape.
    """
    shapes = model_shapes(TTTE2EForCausalLM, config)
    plans = [TensorPlan(name, shape, _source_name(name, model_type)) for name, shape in shapes.items()]
    used = {plan.source: plan for plan in plans if plan.source is not None}
    # Kept by old versions of transformers, and computed from the configuration.
    ignored = {name for name in available if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        ignored.add(HEAD)
    missing, superfluous = sorted(used.keys() - available.keys()), sorted(available.keys() - used.keys() - ignored)
    if missing:
        raise ValueError(f"The source lacks {_shortened(missing)}: save it again as a causal language model.")
    if superfluous:
        raise ValueError(f"The source holds {_shortened(superfluous)}, which a {model_type} model does not have.")
    for name, plan in used.items():
        if tuple(available[name]) != plan.shape:
            raise ValueError(
                f"`{name}` has shape {tuple(available[name])}, but the source's configuration says {plan.shape}."
            )
    return plans


def new_tensor(plan: TensorPlan, config: TTTE2EConfig, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor that the source does not have, so that the model computes what the source computes.

    Args:
        seed: of the random ones; each depends on it and on its own name only.
    """
    module, kind = plan.name.split(".")[-2:]
    if module == "pre_prime_layernorm":
        return torch.ones(plan.shape, dtype=dtype)
    if kind == "bias" or module == "down_proj":
        return torch.zeros(plan.shape, dtype=dtype)
    own_seed = int.from_bytes(hashlib.sha256(f"{seed} {plan.name}".encode()).digest()[:7])
    random = torch.randn(plan.shape, generator=torch.Generator().manual_seed(own_seed))
    return (config.hidden_size**-0.5 * random).to(dtype)


def warm_started_model(source: PreTrainedModel, settings: WarmStartSettings, seed: int = 0) -> TTTE2EForCausalLM:
    """A TTT-E2E model from a transformer in memory, of the same dtype, in evaluation mode, with tensors of its own.

    For models on the disk `ttt-e2e convert transformer` needs less memory.

    Args:
        source: of one of `SUPPORTED_MODELS`, with a head.
        seed: of the prime MLPs' random weights.

    Raises:
        ValueError: as `config_from_transformer` and `plan_tensors`.
    """
    config = config_from_transformer(source.config, settings)
    tensors = source.state_dict()
    if config.tie_word_embeddings and not torch.equal(tensors[EMBEDDINGS], tensors[HEAD]):
        config.tie_word_embeddings = False  # as transformers reads such a model
    plans = plan_tensors(config, source.config.model_type, {name: tuple(t.shape) for name, t in tensors.items()})
    values = {
        plan.name: new_tensor(plan, config, source.dtype, seed) if plan.source is None else tensors[plan.source]
        for plan in plans
    }
    if config.tie_word_embeddings:
        values["model.lm_head.weight"] = values["model.embed_tokens.weight"]
    # Not `.to(dtype)`, which would round RoPE's frequencies as well.
    model = TTTE2EForCausalLM._from_config(config, dtype=source.dtype).to(source.device)
    model.load_state_dict(values)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.eval()


def _check_source(source: PreTrainedConfig) -> None:
    if getattr(source, "mlp_bias", False):
        raise ValueError("`mlp_bias` is True in the source: this model has no biases in its MLPs.")
    unknown = set(getattr(source, "layer_types", None) or ()) - set(ATTENTION_TYPES)
    if unknown:
        raise ValueError(f"`layer_types` of the source has {sorted(unknown)}; supported are {list(ATTENTION_TYPES)}.")
    rope = source.rope_parameters
    if source.nested_rope_parameter_keys(rope):
        raise ValueError(
            f"`rope_parameters` of the source differ by layer type ({sorted(rope)}), and its layers with full "
            "attention would get a window: write the parameters of all layers into the source's config.json."
        )
    if rope.get("rope_type", "default") not in ROPE_KEYS:
        raise ValueError(
            f"`rope_parameters` of the source has rope_type {rope['rope_type']!r}, whose frequencies change with the "
            f"length of the text; supported are {list(ROPE_KEYS)}. Write one of them into the source's config.json "
            "('default' is the same up to the length of pretraining)."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"`rope_parameters` of the source has partial_rotary_factor {rope['partial_rotary_factor']}; only 1.0 is "
            "supported: this model rotates whole heads."
        )


def _own_layer_types(source: PreTrainedConfig) -> list[str]:
    """What each block of the source sees."""
    kind = {"llama": "full_attention", "mistral": "sliding_attention"}.get(source.model_type)
    return list(source.layer_types) if kind is None else [kind] * source.num_hidden_layers


def _reach(source: PreTrainedConfig) -> tuple[int | None, bool]:
    """The window of the source's sliding layers, if it has some, and whether layers of it see the whole text."""
    kinds = set(_own_layer_types(source))
    own = source.sliding_window if "sliding_attention" in kinds else None
    return own, own is None or "full_attention" in kinds


def _layer_types(source: PreTrainedConfig, settings: WarmStartSettings) -> list[str]:
    """Sliding blocks, but for those that are to keep full attention."""
    layers, own = source.num_hidden_layers, _own_layer_types(source)
    every, chosen = settings.full_attention_every, settings.full_attention_layers
    if every is not None and chosen is not None:
        raise ValueError(
            f"`full_attention_every`={every} and `full_attention_layers`={list(chosen)}: give one or the other."
        )
    if every is not None and not 2 <= every <= layers:
        raise ValueError(
            f"`full_attention_every`={every}: must be between 2 and {layers}, the blocks of the source, so that blocks "
            "of both kinds are left."
        )
    name = "full_attention_layers" if every is None else "full_attention_every"
    full = set(range(every - 1, layers, every) if every is not None else chosen or ())
    if not full <= set(range(layers)) or len(full) == layers:
        raise ValueError(
            f"`{name}`={sorted(full)}: must be some of the source's blocks, 0 to {layers - 1}, and not all of them."
        )
    if full and "full_attention" not in own:
        raise ValueError(
            f"`{name}`: no layer of the source sees its whole text, so that none can keep it: leave it out."
        )
    return [kind if index in full else SLIDING for index, kind in enumerate(own)]


def _rope_parameters(source: PreTrainedConfig, layer_types: Sequence[str], factor: float | None) -> dict:
    """Those of the source; with a factor, scaled ones for blocks with full attention."""
    own = dict(source.rope_parameters)
    if factor is None:
        return own
    if not 1 < factor < math.inf:
        raise ValueError(
            f"`full_attention_yarn`={factor}: must be greater than 1, as in 4 for texts four times longer."
        )
    if "full_attention" not in layer_types:
        raise ValueError(
            f"`full_attention_yarn`={factor} is for blocks with full attention, but none keeps it: choose some with "
            "`full_attention_every` or `full_attention_layers`, or leave it out."
        )
    if own.get("rope_type", "default") != "default":
        raise ValueError(
            f"`full_attention_yarn`={factor}: the source's RoPE is scaled already (rope_type {own['rope_type']!r}): "
            "leave it out."
        )
    known = source.max_position_embeddings
    scaled = own | {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": known}
    return {"full_attention": scaled, SLIDING: own}


def _window(own: int | None, sees_all: bool, asked: int | None) -> int:
    """The window of the new model, which is never wider than that of the source's sliding layers."""
    if asked is not None and asked < 1:
        raise ValueError(f"`sliding_window`={asked}: must be at least 1, and at least the mini-batch.")
    if asked is None and sees_all:
        raise ValueError(
            "`sliding_window` is missing: layers of the source see its whole text, so that the window must be chosen, "
            "as in --window 8192 (at least the mini-batch)."
        )
    if asked is not None and own is not None and asked > own:
        raise ValueError(
            f"`sliding_window`={asked} is wider than the source's own ({own}), for which it was trained: give at most "
            f"{own}."
        )
    return own if asked is None else asked


def _source_name(name: str, model_type: str) -> str | None:
    if "prime" in name or (model_type == "qwen2" and name.endswith("o_proj.bias")):
        return None
    if name == "model.lm_head.weight":
        return HEAD
    return name.replace("pre_feedforward_layernorm", "post_attention_layernorm")


def _shortened(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
