"""What a run changes of the model that it starts from: another length if wanted, and a tokenizer's tokens.

Going on with a saved model is a new run: the weights are loaded, the optimizer and its schedule begin afresh. What may
differ from it is what no weight's shape depends on: the window, the RoPE base, and how the inner loop steps.
"""

import typing

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import RopeParameters

from ..configuration.strict_yaml import check_field_names, merged
from ..configuration_decoder import ATTENTION_TYPES
from ..data.tokenizer import check_vocabulary, separator_id
from ..loading import ModelSource

CHANGEABLE = (
    "rope_parameters max_position_embeddings sliding_window layer_types mini_batch_size inner_learning_rate "
    "inner_max_grad_norm meta_gradient meta_gradient_horizon inner_checkpoint_every inner_checkpoint_offload "
    "test_time_training"
).split()


def changed_config(source: ModelSource, changes: dict, sequence_length: int) -> PreTrainedConfig:
    """The configuration of the model to train: the source's with a recipe's changes, for rows of a given length.

    Args:
        changes: fields of the configuration.
        sequence_length: tokens of context in a row; `max_position_embeddings` is never left below it.

    Raises:
        ValueError: a field does not exist, or would change the shape of a saved weight; a row has no whole mini-batch.
    """
    known = source.config_class().to_dict() | source.fields
    rope_fields = typing.get_type_hints(RopeParameters)
    rope = changes.get("rope_parameters") or {}
    by_type = bool(set(rope) & set(ATTENTION_TYPES))
    check_field_names(rope, ATTENTION_TYPES if by_type else rope_fields, source="model.rope_parameters")
    for kind, own in rope.items() if by_type else ():
        check_field_names(own, rope_fields, source=f"model.rope_parameters.{kind}")
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"model.{name}: a {source.config_class.__name__} has no such field; leave it out")
        if source.folder is not None and name not in CHANGEABLE and known[name] != value:
            raise ValueError(
                f"model.{name}={value!r}: the saved model has {known[name]!r}, and its weights depend on it; what may "
                f"change is {', '.join(CHANGEABLE)}"
            )
    longest = max(known.get("max_position_embeddings") or 0, sequence_length)
    fields = merged(source.fields | {"max_position_embeddings": longest}, changes)
    try:
        config = source.config_class.from_dict(fields)
    except StrictDataclassError as error:  # a value of another type
        raise ValueError(f"model: {' '.join(str(error).split())}; change it in the recipe or with --set") from error
    if getattr(config, "test_time_training", False) and sequence_length < config.mini_batch_size:
        raise ValueError(
            f"data.sequence_length={sequence_length} is shorter than a mini-batch (model.mini_batch_size="
            f"{config.mini_batch_size}), so that no inner step would ever be taken: make the rows longer or the "
            "mini-batch smaller"
        )
    return config


def fit_to_tokenizer(
    source: ModelSource, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, trained: bool
) -> PreTrainedConfig:
    """The configuration with a tokenizer's special tokens and, for a new model, its vocabulary.

    Args:
        trained: the tokenizer was trained for the configuration's vocabulary, which then holds.

    Raises:
        ValueError: the tokenizer has ids that a saved model does not know.
    """
    changes = {
        "bos_token_id": separator_id(tokenizer),  # targets equal to it are not predicted
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if source.folder is None and not trained:
        changes["vocab_size"] = len(tokenizer)
    else:
        check_vocabulary(tokenizer, config.vocab_size)
    return type(config).from_dict(config.to_dict() | changes)
