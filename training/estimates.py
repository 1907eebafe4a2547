"""What a training run will need: parameters, steps, tokens and memory, without building the model or running a step.

Peak memory is an estimate. Parameters, gradients, optimizer moments and fast weights are counted. What autograd keeps
is computed from the sizes of the model, with bytes per token that were fitted to what torch's allocator hands out on a
CPU (float32 and bfloat16, second-order meta-gradients, SDPA attention). For small models of other shapes, on a CPU, the
sum lay between the measured peak and a third above it; expect larger errors elsewhere. Not included: what a device
keeps for its own kernels, what an allocator loses between blocks, and the data. `meta_gradient="first_order"` and a
`meta_gradient_horizon` need less.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .. import TTTE2EConfig, TTTE2EForCausalLM, TTTLayersConfig
from ..attention import block_size
from ..configuration import Recipe
from .lora import add_lora
from .muon import muon_matrices
from .prime_trainer import ALL, PRIME, freeze_all_but_prime

FLOAT32 = 4  # bytes
# Attention weights of one mini-batch that exist at once in the second derivative: see `attention.py`.
SCORE_MATRICES = 7


# Bytes that autograd keeps per token for each channel of what the name says, in float32 and in bfloat16. Least squares
# over 40 models each: hidden sizes 64 to 256, 3 to 6 blocks, mini-batches of 32 to 128 tokens.
SAVED = {
    "block_hidden": (86, 74),  # of a block outside the inner loop, per hidden channel
    "block_mlp": (20, 10),  # the same, per channel of its MLP
    "ends_hidden": (16, 14),  # of embedding and final norm, per hidden channel
    "first_attention_hidden": (36, 30),  # of the first suffix block's attention, which the inner loop does not reach
    "logits": (4.5, 4.5),  # per word of the vocabulary, without inner loop
    "inner_hidden": (120, 111),  # of a suffix block in the inner loop
    "inner_mlp": (45, 24),
    "inner_prime_mlp": (34, 15),
    "inner_attention_hidden": (68, 67),  # of the attention of each suffix block but the first
    "inner_logits": (12, 10),  # per word of the vocabulary, in the inner loop
    "fast_weight": (10, 7),  # per fast weight and inner step (not per token)
    "value": (4, 2),  # of one value in the computing dtype
}


@dataclass(frozen=True)
class RunEstimate:
    """What a run will need.

    Attributes:
        parameters: of the model, tied ones once.
        trained_parameters: those that the outer loop changes: all of them, the prime MLPs', or an adapter's.
        fast_weight_bytes_per_sequence: one copy of all fast weights, in float32; 0 where there are none.
        steps: outer steps; None when the recipe counts epochs.
        tokens: steps x batch size x sequence length; None when the steps are unknown.
        mini_batches_per_sequence: inner loop's mini-batches in a row; 0 where there is no inner loop.
        memory_parts: bytes of one process at the peak of an outer step, by name (see `estimate_run`); empty where they
            are not known.
    """

    parameters: int
    trained_parameters: int
    fast_weight_bytes_per_sequence: int
    steps: int | None
    tokens: int | None
    mini_batches_per_sequence: int
    memory_parts: dict[str, int]

    @property
    def peak_memory_bytes(self) -> int | None:
        """Sum of `memory_parts`; None where there are none."""
        return sum(self.memory_parts.values()) if self.memory_parts else None

    def lines(self) -> list[str]:
        """ "name: value" lines with all digits; the parts of the peak follow it as peak_memory_bytes.PART."""
        names = [field.name for field in fields(self) if field.name != "memory_parts"]
        values = {name: getattr(self, name) for name in (*names, "peak_memory_bytes")}
        values |= {f"peak_memory_bytes.{part}": count for part, count in self.memory_parts.items()}
        return [f"{name}: {'unknown' if value is None else value}" for name, value in values.items()]


def estimate_run(
    config: PreTrainedConfig,
    recipe: Recipe,
    processes: int = 1,
    lora: tuple[str, int] | None = None,
    train: str = ALL,
) -> RunEstimate:
    """Count what can be counted and estimate the peak memory of one process, parameters in float32 on its device.

    Parts of the peak, in bytes:
        parameters, gradients, optimizer_moments: 4 for each parameter; 4 for each trained one, and 8, or 4 by Muon.
        gradient_buckets: 4 for each trained parameter, when there are several processes.
        bfloat16_copies: 2 for each parameter, under `bf16`.
        gradients_in_transit: of the head and, with activation checkpointing, of the suffix, before they are added up.
        boundary_fast_weights: fast weights at the beginning of each group of inner steps; without activation
            checkpointing none, and none on the device with `inner_checkpoint_offload`.
        boundary_keys: keys and values that consecutive groups share.
        saved_activations: what the blocks outside the inner loop keep; with activation checkpointing their inputs.
        graph: of the inner steps, all of them or, with activation checkpointing, one group, or one block outside the
            inner loop, whichever is larger, because they are never recomputed at the same time.
        logits: of the tokens in that graph, and their gradients in one mini-batch.
        attention: masks, and the scores of one suffix block's attention.

    Args:
        config: of the model that is trained, with the recipe's changes already in it.
        processes: data-parallel processes, each with a whole copy of the model.
        lora: targets and rank of adapters, which alone are trained then; None: what `train` says.
        train: "all" parameters, or the "prime" MLPs alone.

    Returns:
        The estimate; without `memory_parts` for a model that is none of ours.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = _Sizes(model, recipe, processes) if isinstance(config, TTTE2EConfig) else None
    parameters = model.num_parameters()
    if lora is not None:
        with torch.device("meta"):
            model = add_lora(model, *lora, alpha=1)
    if train == PRIME:
        freeze_all_but_prime(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = recipe.training.get("max_steps")
    steps = steps if steps is not None and steps > 0 else None
    tokens = None if steps is None else steps * recipe.batch_size * recipe.data.sequence_length
    fast_weights, mini_batches = (0, 0) if sizes is None else (sizes.fast_weights, sizes.mini_batches)
    if isinstance(config, TTTLayersConfig) and config.num_fast_weights:
        fast_weights = config.num_fast_weights
        mini_batches = math.ceil(recipe.data.sequence_length / config.mini_batch_size)
    moments = 2 * trained - (_trained_by_muon(model, recipe) if recipe.training.get("optimizer") == "muon" else 0)
    memory_parts = {} if sizes is None else _memory_parts(sizes, trained, moments, processes)
    return RunEstimate(
        parameters=parameters,
        trained_parameters=trained,
        fast_weight_bytes_per_sequence=FLOAT32 * fast_weights,
        steps=steps,
        tokens=tokens,
        mini_batches_per_sequence=mini_batches,
        memory_parts={name: round(count) for name, count in memory_parts.items()},
    )


class _Sizes:
    """What the memory depends on.

    Attributes:
        suffix_layers, mini_batches, fast_weights: 0 without test-time training.
        group: inner steps whose graph exists at once.
        prefix_layers: blocks outside the inner loop.
        saved: `SAVED` in the computing dtype.
    """

    def __init__(self, model: TTTE2EForCausalLM, recipe: Recipe, processes: int):
        self.config, training, self.length = model.config, recipe.training, recipe.data.sequence_length
        suffix = model.model.layers[self.config.num_prefix_layers :] if self.config.test_time_training else []
        self.parameters = model.num_parameters()
        self.suffix_parameters = sum(p.numel() for layer in suffix for p in layer.parameters())
        self.fast_weights = sum(out * size for layer in suffix for out, size in layer.inner_mlp.shapes)
        self.suffix_layers, self.prefix_layers = len(suffix), self.config.num_hidden_layers - len(suffix)
        self.rows = recipe.rows_at_once(processes)
        self.tokens = self.rows * self.length
        self.mini_batch_tokens = self.rows * min(self.config.mini_batch_size, self.length)
        self.mini_batches = math.ceil(self.length / self.config.mini_batch_size) if suffix else 0
        self.checkpointing = bool(training.get("activation_checkpointing"))
        every = self.config.inner_checkpoint_every or max(1, round(math.sqrt(self.mini_batches)))
        self.group = min(every, self.mini_batches) if self.checkpointing else self.mini_batches
        self.bf16 = bool(training.get("bf16"))
        self.saved = {name: both[self.bf16] for name, both in SAVED.items()}


def _trained_by_muon(model: nn.Module, recipe: Recipe) -> int:
    """How many values Muon trains, which keeps one moment of each."""
    parameters = dict(model.named_parameters())
    return sum(parameters[name].numel() for name in muon_matrices(model, recipe.training.get("muon_excludes") or ()))


def _memory_parts(sizes: _Sizes, trained: int, moments: int, processes: int) -> dict[str, float]:
    head = sizes.config.vocab_size * sizes.config.hidden_size
    in_transit = head + (sizes.suffix_parameters if sizes.checkpointing else 0)
    boundary_fast_weights, boundary_keys = _boundaries(sizes)
    return {
        "parameters": FLOAT32 * sizes.parameters,
        "gradients": FLOAT32 * trained,
        "optimizer_moments": FLOAT32 * moments,
        "gradient_buckets": FLOAT32 * trained if processes > 1 else 0,
        "bfloat16_copies": sizes.saved["value"] * sizes.parameters if sizes.bf16 else 0,
        "gradients_in_transit": FLOAT32 * in_transit,
        "boundary_fast_weights": boundary_fast_weights,
        "boundary_keys": boundary_keys,
        "saved_activations": _saved_activations(sizes),
        "graph": _graph(sizes),
        "logits": _logits(sizes),
        "attention": _attention(sizes),
    }


def _boundaries(sizes: _Sizes) -> tuple[float, float]:
    if not (sizes.checkpointing and sizes.suffix_layers):
        return 0, 0
    groups = math.ceil(sizes.mini_batches / sizes.group)
    stored = 0 if sizes.config.inner_checkpoint_offload else groups
    keys = sizes.config.num_key_value_heads * sizes.config.head_dim
    return (
        FLOAT32 * stored * sizes.rows * sizes.fast_weights,
        2 * sizes.saved["value"] * sizes.tokens * (sizes.suffix_layers - 1) * keys,
    )


def _block(sizes: _Sizes) -> float:
    """Activations of one block outside the inner loop."""
    per_token = sizes.saved["block_hidden"] * sizes.config.hidden_size
    return sizes.tokens * (per_token + sizes.saved["block_mlp"] * sizes.config.intermediate_size)


def _saved_activations(sizes: _Sizes) -> float:
    hidden = sizes.tokens * sizes.config.hidden_size
    if sizes.checkpointing:
        # Inputs of the blocks; embedding, input of the inner loop, final norm and angles are about four more.
        return FLOAT32 * hidden * (sizes.prefix_layers + 4)
    ends = sizes.saved["ends_hidden"] + (sizes.saved["first_attention_hidden"] if sizes.suffix_layers else 0)
    return hidden * ends + sizes.prefix_layers * _block(sizes)


def _graph(sizes: _Sizes) -> float:
    config, saved, layers = sizes.config, sizes.saved, sizes.suffix_layers
    per_token = layers * (saved["inner_hidden"] * config.hidden_size + saved["inner_mlp"] * config.intermediate_size)
    if config.use_prime_mlp:
        per_token += layers * saved["inner_prime_mlp"] * config.prime_intermediate_size
    per_token += max(0, layers - 1) * saved["inner_attention_hidden"] * config.hidden_size
    step = sizes.mini_batch_tokens * per_token + saved["fast_weight"] * sizes.rows * sizes.fast_weights
    return max(sizes.group * step, _block(sizes) if sizes.checkpointing else 0)


def _logits(sizes: _Sizes) -> float:
    mini_batch, vocabulary = sizes.mini_batch_tokens, sizes.config.vocab_size
    gradients = 2 * FLOAT32 * mini_batch * vocabulary
    if sizes.suffix_layers:
        return gradients + sizes.group * sizes.saved["inner_logits"] * mini_batch * vocabulary
    tokens = mini_batch if sizes.checkpointing else sizes.tokens
    return gradients + sizes.saved["logits"] * tokens * vocabulary


def _attention(sizes: _Sizes) -> float:
    config, window = sizes.config, sizes.config.sliding_window
    masks = scores = 0
    if "sliding_attention" in config.layer_types and window < sizes.length:
        block = block_size(window)
        # As bool, and as numbers in the computing dtype while it is used.
        pairs = 2 * block * (window + block) if sizes.length > 2 * block else sizes.length**2
        masks = (1 + sizes.saved["value"]) * pairs
    if sizes.suffix_layers > 1:
        slides = "full_attention" not in config.layer_types[-sizes.suffix_layers + 1 :]
        keys = min(sizes.length, window + config.mini_batch_size) if slides else sizes.length
        scores = SCORE_MATRICES * FLOAT32 * sizes.mini_batch_tokens * config.num_attention_heads * keys
    return masks + scores
