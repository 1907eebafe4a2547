"""Training only what is new of a warm start: its prime MLPs and their norms, on a pretrained model that stays as it is.

Blocks before the suffix then keep nothing for the backward pass, the optimizer holds moments of the new weights alone,
and checkpoints and the result are as small as these (`conversion.prime_weights`).
"""

import os
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINING_ARGS_NAME

from ..conversion.prime_weights import PRIME_CONFIG, PrimeWeights, is_new
from .arguments import MetaTrainingArguments
from .meta_trainer import MetaTrainer

ALL, PRIME = "all", "prime"
TRAINED = (ALL, PRIME)  # what a run can train


def freeze_all_but_prime(model: PreTrainedModel) -> None:
    """Leave gradients to the prime MLPs and their norms alone.

    Raises:
        ValueError: the model has none.
    """
    if not any(is_new(name) for name, _ in model.named_parameters()):
        raise ValueError(
            f"a {type(model).__name__} without prime MLPs has nothing new to train: train all of it (--train {ALL}), "
            "or convert a transformer with --prime"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_new(name))


def keep_frozen_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Keep frozen matrices in the dtype that they are computed in, so that no call casts them anew.

    What the embeddings give stays in their own dtype: it is what all blocks add to.
    """
    embeddings = model.get_input_embeddings()
    own = embeddings.weight.dtype
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype)
    embeddings.register_forward_hook(lambda module, inputs, output: output.to(own))


def base_of(folder: str | Path) -> str:
    """The model below the new weights of a saved model: what these name, or the model itself where it is whole."""
    return PrimeWeights.from_pretrained(folder).base if (Path(folder) / PRIME_CONFIG).is_file() else str(folder)


class PrimeTrainer(MetaTrainer):
    """`MetaTrainer` of the new weights alone.

    With `bf16=True` the model's frozen matrices are rounded to bfloat16 in place.

    Args:
        model: a warm start, which is frozen but for its new weights.
        args: the arguments; None for the defaults.
        base: where the weights that stay as they are can be found again.
        others, named: as in `MetaTrainer`.

    Raises:
        ValueError: the model has no new weights, or an argument asks for what needs all weights.
    """

    saves_frozen_weights = False

    def __init__(
        self, model: PreTrainedModel, args: MetaTrainingArguments | None = None, *others, base: str | Path, **named
    ):
        freeze_all_but_prime(model)
        super().__init__(model, args, *others, **named)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "under FSDP or DeepSpeed the new weights cannot be told from the others: there are few of them, so run "
                "one process per device with a whole model each (DDP)"
            )
        if self.args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True loads whole models: leave it off, and load the checkpoint you want by "
                "PrimeWeights.from_pretrained"
            )
        self.weights = PrimeWeights.of_model(model, str(base), self.processing_class)  # type: ignore[arg-type]
        if self.args.bf16:
            keep_frozen_in(model, torch.bfloat16)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.weights.updated(self.model).save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved = PrimeWeights.from_pretrained(resume_from_checkpoint)
        for name, kept in self.weights.sketches.items():
            if not torch.equal(saved.sketches.get(name, torch.empty(0)), kept):
                raise ValueError(
                    f"resume_from_checkpoint={resume_from_checkpoint!r} was trained on another model: its {name} "
                    "differs; resume with the model that the run began with"
                )
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in saved.tensors.items():
                own[name].copy_(tensor)
