"""Combinations that would train something else than they say: refused before the first step.

Second-order gradients pass through the inner gradients. What hides a gradient from autograd, or computes it outside of
it, would make them first order, or wrong, without a word.
"""

from collections.abc import Sequence

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import DataCollatorWithFlattening, TrainingArguments

from ..sharding import check_tensor_parallelism, check_units


def learning_models(model: nn.Module) -> list[nn.Module]:
    """The [`TTTE2EModel`]s within a model, also one that is wrapped (DDP, FSDP, PEFT) or comes from a Hub folder."""
    return [module for module in model.modules() if hasattr(module, "inner_learning_rate_multiplier")]


def check_collator(models: Sequence[nn.Module], data_collator: object) -> None:
    """Check that rows are not packed by restarting position ids.

    Args:
        models: the `learning_models` of what is trained.

    Raises:
        ValueError: they are.
    """
    if any(part.config.test_time_training for part in models) and isinstance(data_collator, DataCollatorWithFlattening):
        raise ValueError(
            "data_collator=DataCollatorWithFlattening packs documents with position ids that start again, and what is "
            "learned from one would leak into the next: give each document a row of its own."
        )


def check_arguments(args: TrainingArguments, models: Sequence[nn.Module]) -> None:
    """Check the arguments of a run that meta-trains.

    Args:
        models: the `learning_models` of what is trained.

    Raises:
        ValueError: naming the argument, its value and the remedy.
    """
    models = [part for part in models if part.config.test_time_training]
    if not models:
        return
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True: its fused loss computes gradients in the forward pass, which the inner loop cannot "
            "differentiate. Leave it off; MetaTrainer never holds the logits of more than a mini-batch."
        )
    parallel = args.parallelism_config
    if parallel is not None and (parallel.cp_size > 1 or parallel.sp_size > 1):
        raise ValueError(
            f"parallelism_config with cp_size={parallel.cp_size}, sp_size={parallel.sp_size} cuts sequences, but inner "
            "steps follow one another: leave both at 1."
        )
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError(
            "deepspeed with ZeRO stage 3 gathers weights by hooks that inner gradients do not pass: use stage 1 or 2, "
            "or FSDP."
        )
    if args.torch_compile and any(part.config.meta_gradient == "second_order" for part in models):
        raise ValueError(
            "torch_compile=True: a compiled graph has no second derivative, so that meta_gradient='second_order' could "
            "silently become first order. Leave it off, or set meta_gradient='first_order' in the configuration."
        )
    _check_fsdp_classes(args)


def _check_fsdp_classes(args: TrainingArguments) -> None:
    if not args.fsdp:
        return
    prefix = "TTTE2EDecoderLayer"
    wrapped = (args.fsdp_config or {}).get("transformer_layer_cls_to_wrap")
    wrapped = [wrapped] if isinstance(wrapped, str) else wrapped
    if wrapped != [prefix]:
        raise ValueError(
            f"fsdp_config with transformer_layer_cls_to_wrap={wrapped} would make units of the suffix blocks too, "
            f"which cuts the inner loop: set it to [{prefix!r}]."
        )


def check_whole_matrices(model: nn.Module) -> None:
    """Check that every process has the whole of each matrix, as Muon's orthogonal steps need.

    Raises:
        ValueError: a parameter is sharded (FSDP2, tensor parallelism).
    """
    sharded = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
    if sharded:
        raise ValueError(
            f"optimizer='muon' needs whole matrices, but {sharded[0]} is sharded: run one process per device with a "
            "whole model each (DDP), or use optimizer='adamw'."
        )


def check_prepared(model: nn.Module) -> None:
    """Check a model as it is about to be trained, wrapped and sharded.

    Raises:
        ValueError: it is compiled, or sharded within the inner loop.
    """
    for part in learning_models(model):
        if not part.config.test_time_training:
            continue
        second_order = part.config.meta_gradient == "second_order"
        check_units(part)
        if second_order and not any(hasattr(module, "set_requires_gradient_sync") for module in model.modules()):
            check_tensor_parallelism(part)  # with FSDP2 the forward pass checks it, when the weights are whole
        if second_order and any(hasattr(module, "_orig_mod") for module in model.modules()):
            raise ValueError(
                "The model is compiled by torch.compile, and a compiled graph has no second derivative: train it as it "
                "is, or set meta_gradient='first_order' in its configuration."
            )
