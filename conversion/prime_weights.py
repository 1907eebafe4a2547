"""New weights alone: the prime MLPs and their norms, kept apart from the pretrained model that they were trained on.

    folder/
      prime_config.json             the whole model's configuration, and the name of its base
      prime_model.safetensors       the new weights
      base_sketches.safetensors     what tells the base from other models, tensor by tensor (`sketches`)

The base is found again by its name, or where the caller says. It is loaded first and compared, so that the new weights
never lie on another model, nor on random weights. A quantised copy of the base differs from it a little and will do.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .. import TTTE2EConfig, TTTE2EForCausalLM
from ..data.sources import path_or_id
from ..data.tokenizer import find_tokenizer
from ..storage.digests import digest
from ..storage.disk import check_disk_space, folder_written_whole, read_json, write_json, written_whole
from ..storage.record import saved_folder
from .pretrained import Source, SourceContents, find_source
from .sketches import Distance, distance, sketch
from .strictness import model_shapes
from .transformer_layout import (
    TensorPlan,
    WarmStartSettings,
    check_convertible,
    config_from_transformer,
    new_tensor,
    plan_tensors,
)

logger = logging.get_logger(__name__)

PRIME_CONFIG, PRIME_WEIGHTS, BASE_SKETCHES = "prime_config.json", "prime_model.safetensors", "base_sketches.safetensors"
# Relative distances to the base up to which a model is taken for it: over all tensors, and of each. Four-bit
# quantisation moves a model by about 0.08; another model of the same size is at 1 and more.
LARGEST_DISTANCE, LARGEST_OF_A_TENSOR = 0.1, 0.3
# What a base and the new weights must agree on; the rest is the new model's own.
ARCHITECTURE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act rms_norm_eps attention_bias qk_norm post_norm"
).split()


def is_new(name: str) -> bool:
    """Whether a tensor belongs to a prime MLP or to one of its norms."""
    return any(part in ("prime_mlp", "pre_prime_layernorm", "post_prime_layernorm") for part in name.split("."))


@dataclass(frozen=True)
class PrimeWeights:
    """New weights, and what they lie on.

    Attributes:
        config: of the whole model.
        base: name of the model below: a folder, a GGUF file, or an id of the Hub.
        vocabulary: digest of the base's vocabulary; None where it has no tokenizer.
        tensors: the new weights, by their names in the whole model.
        sketches: of every other tensor, [128] float32.
        folder: where they were loaded from; None for those of a model in memory.
    """

    config: TTTE2EConfig
    base: str
    vocabulary: str | None
    tensors: Mapping[str, torch.Tensor]
    sketches: Mapping[str, torch.Tensor]
    folder: Path | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "PrimeWeights":
        """New weights from a folder, that of a run that trained them, or an id of the Hub; the base is not loaded yet.

        Raises:
            FileNotFoundError: there are none in the folder.
            ValueError: a file is damaged.
            OSError: they cannot be fetched from the Hub.
        """
        path = path_or_id(str(folder), "folder") or Path(snapshot_download(str(folder)))
        found = saved_folder(path, PRIME_CONFIG)
        if found is None:
            raise FileNotFoundError(
                f"folder={str(folder)!r}: no {PRIME_CONFIG} in it; name a folder that `ttt-e2e train --train prime` "
                "has written"
            )
        remedy = "fetch or save the new weights again"
        fields = read_json(found / PRIME_CONFIG, remedy)
        try:
            tensors, sketches = load_file(found / PRIME_WEIGHTS), load_file(found / BASE_SKETCHES)
            config = TTTE2EConfig.from_dict(fields["config"])
            return cls(config, fields["base_model_name_or_path"], fields["base_vocabulary"], tensors, sketches, found)
        except (SafetensorError, KeyError, TypeError, FileNotFoundError) as error:
            raise ValueError(f"{found} is damaged ({error!r}); {remedy}") from error

    @classmethod
    def of_model(cls, model: TTTE2EForCausalLM, base: str, tokenizer: PreTrainedTokenizerBase | None) -> "PrimeWeights":
        """The new weights of a model in memory, whose other weights are still those of `base`.

        Raises:
            ValueError: the model has no prime MLPs.
        """
        if not isinstance(model, TTTE2EForCausalLM) or not any(is_new(name) for name, _ in model.named_parameters()):
            raise ValueError(
                f"a {type(model).__name__} without prime MLPs has no new weights: convert a transformer with --prime"
            )
        sketches = {name: sketch(tensor) for name, tensor in _own_tensors(model).items() if not is_new(name)}
        return cls(model.config, base, vocabulary_digest(tokenizer), _new_tensors(model), sketches)

    def updated(self, model: TTTE2EForCausalLM) -> "PrimeWeights":
        """Those that the model has now; its other weights have not changed."""
        return PrimeWeights(model.config, self.base, self.vocabulary, _new_tensors(model), self.sketches)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the three files into a folder, each whole or not at all."""
        folder, config = Path(folder), json.loads(self.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)  # of this machine, and `base` says it
        write_json(
            folder / PRIME_CONFIG,
            {"base_model_name_or_path": self.base, "base_vocabulary": self.vocabulary, "config": config},
        )
        for name, tensors in ((PRIME_WEIGHTS, self.tensors), (BASE_SKETCHES, self.sketches)):
            with written_whole(folder / name) as temporary:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary, {"format": "pt"})

    def on_base(
        self, base: str | Path | None = None, config: TTTE2EConfig | None = None, dtype: torch.dtype | None = None
    ) -> TTTE2EForCausalLM:
        """The whole model: the base is loaded first and compared, then the new weights are put on it.

        Args:
            base: where the base is (default: where it was when the weights were trained): the folder of the pretrained
                transformer or of the TTT-E2E model that was converted from it, a GGUF file, or an id of the Hub.
            config: instead of the weights' own.
            dtype: of all weights (default: the new weights' own).

        Returns:
            In evaluation mode, on the CPU.

        Raises:
            ValueError: the base is another model, or cannot be loaded.
        """
        config = self.config if config is None else config
        name = str(self.base if base is None else base)
        contents, plans = self._find_base(name, config)
        weights = {plan.name: contents.weights.read(plan.source) for plan in plans if plan.source is not None}
        self._compare(name, weights)
        dtype = dtype or next(iter(self.tensors.values())).dtype
        model = TTTE2EForCausalLM._from_config(config, dtype=dtype)
        values = {plan.name: self._value(plan, weights, config) for plan in plans}
        if config.tie_word_embeddings:
            values["model.lm_head.weight"] = values["model.embed_tokens.weight"]
        model.load_state_dict(values)
        if contents.generation is not None:
            model.generation_config = GenerationConfig.from_dict(json.loads(contents.generation))
        return model.eval()

    def _value(self, plan: TensorPlan, weights: Mapping[str, torch.Tensor], config: TTTE2EConfig) -> torch.Tensor:
        if is_new(plan.name):
            return self.tensors[plan.name]
        # What neither has are biases that a Qwen2 goes without.
        return new_tensor(plan, config, torch.float32, 0) if plan.source is None else weights[plan.name]

    def _find_base(self, name: str, config: TTTE2EConfig) -> tuple[SourceContents, list[TensorPlan]]:
        """What there is of the base, and its tensor for each one of the whole model."""
        try:
            source = find_source(name, _check_base)
            _check_architecture(source, config)
            contents = source.contents()
            plans = _plans(source, config, contents)
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(f"base={name!r} cannot be used ({error}); {self._remedy()}") from error
        lacking = [plan.name for plan in plans if is_new(plan.name) and plan.name not in self.tensors]
        if lacking:
            raise ValueError(f"{self.folder}: {lacking[0]} is missing from the new weights; fetch or save them again")
        vocabulary = vocabulary_digest(contents.tokenizer)
        if None not in (vocabulary, self.vocabulary) and vocabulary != self.vocabulary:
            raise ValueError(f"base={name!r} has another vocabulary than the base of these weights; {self._remedy()}")
        return contents, plans

    def _compare(self, name: str, weights: Mapping[str, torch.Tensor]) -> Distance:
        """Check by their sketches that tensors are the base's, and report how far they are from it."""
        kept = {own: sketched for own, sketched in self.sketches.items() if own in weights}
        found = distance(((own, weights[own]) for own in kept), kept)
        largest, where = found.largest
        if not (found.relative <= LARGEST_DISTANCE and largest <= LARGEST_OF_A_TENSOR):
            raise ValueError(
                f"base={name!r} is another model than the one that these weights were trained on: its weights are at a "
                f"relative distance of {found.relative:.3g} ({where}: {largest:.3g}; at most {LARGEST_DISTANCE} will "
                f"do); {self._remedy()}"
            )
        if found.relative > 0:
            logger.warning(
                f"base={name!r} differs a little from the model that these weights were trained on (relative distance "
                f"{found.relative:.3g}), as a quantised copy does: losses may differ from those reported."
            )
        return found

    def _remedy(self) -> str:
        where = "base_model_name_or_path" if self.folder is None else f"base_model_name_or_path of {self.folder}"
        return f"these weights lie on {self.base!r}: name where it is as the base, or write it into {where}"


def merge_prime(folder: str | Path, output: str | Path, base: str | None = None) -> None:
    """Put new weights on their base and save a plain model, with the tokenizer beside the weights if there is one.

    Args:
        folder: as `PrimeWeights.from_pretrained` takes it; output: of the new model, appears whole or not at all.
        base: as in `PrimeWeights.on_base`.

    Raises:
        FileExistsError: `output` exists.
        ValueError, OSError: as in `PrimeWeights`, or the disk has no room.
    """
    output = Path(output).expanduser()
    if output.exists():
        raise FileExistsError(f"output={str(output)!r} exists: name a new folder. Nothing was overwritten.")
    weights = PrimeWeights.from_pretrained(folder)
    model, tokenizer = weights.on_base(base), find_tokenizer(str(weights.folder))
    check_disk_space(output, sum(p.numel() * p.element_size() for p in model.parameters()), "the merged model")
    with folder_written_whole(output) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """SHA-256 of a tokenizer's vocabulary."""
    return None if tokenizer is None else digest(tokenizer.get_vocab())


def _own_tensors(model: TTTE2EForCausalLM) -> dict[str, torch.Tensor]:
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def _new_tensors(model: TTTE2EForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in _own_tensors(model).items() if is_new(name)}


def _check_base(fields: Mapping) -> None:
    if fields.get("model_type") != TTTE2EConfig.model_type:
        check_convertible(fields)


def _check_architecture(source: Source, config: TTTE2EConfig) -> None:
    own = source.config
    if not isinstance(own, TTTE2EConfig):
        window = min(config.sliding_window, getattr(own, "sliding_window", None) or config.sliding_window)
        own = config_from_transformer(own, WarmStartSettings(sliding_window=window, mini_batch_size=1))
    for field in ARCHITECTURE:
        if getattr(own, field) != getattr(config, field):
            raise ValueError(
                f"its `{field}` is {getattr(own, field)!r}, but that of the new weights' model is "
                f"{getattr(config, field)!r}"
            )


def _plans(source: Source, config: TTTE2EConfig, contents: SourceContents) -> list[TensorPlan]:
    if not isinstance(source.config, TTTE2EConfig):
        return plan_tensors(config, source.config.model_type, contents.weights.shapes)
    plans = []
    for name, shape in model_shapes(TTTE2EForCausalLM, config).items():
        if not is_new(name) and contents.weights.shapes.get(name) != shape:
            raise ValueError(f"`{name}` has shape {contents.weights.shapes.get(name)}, but {shape} is needed")
        plans.append(TensorPlan(name, shape, None if is_new(name) else name))
    return plans
