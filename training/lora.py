"""LoRA by peft: adapters on all linear layers, or only on the weights that the inner loop starts from.

The fast weights lie beside the adapted slow ones, so that an adapter is meta-trained as a weight is: its gradient goes
through the inner steps.
"""

import difflib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..data.tokenizer import find_tokenizer
from ..storage.disk import check_disk_space, folder_written_whole
from ..storage.record import saved_folder
from .checkpoints import ADAPTER_CONFIG, BASE_CONFIG

if TYPE_CHECKING:
    from peft import PeftModel

ALL_LINEAR, PRIME = "all-linear", "prime"


def inner_projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers whose weights the inner loop updates, for `LoraConfig(target_modules=...)`.

    They are gate, up and down of each suffix block's prime MLP, or of its MLP where `config.use_prime_mlp` is False.

    Raises:
        ValueError: the model has no suffix block.
    """
    blocks = [module for module in model.modules() if hasattr(module, "inner_mlp")]
    if not blocks:
        raise ValueError(
            f"a {type(model).__name__} without suffix blocks has no weights that an inner loop could update: adapt "
            f"targets={ALL_LINEAR!r}, or take a TTT-E2E model with num_suffix_layers of at least 1."
        )
    inner = {id(layer) for block in blocks for layer in block.inner_mlp.projections}
    return [name for name, module in model.named_modules() if id(module) in inner]


def add_lora(model: PreTrainedModel, targets: str, rank: int, alpha: float, dropout: float = 0.0) -> "PeftModel":
    """Freeze a causal language model and put LoRA adapters on it, which start as no change at all.

    Args:
        model: changed in place.
        targets: `"all-linear"` (every linear layer but the head) or `"prime"` (those of `inner_projections`).
        rank: r of the adapters A [r, in] and B [out, r].
        alpha: the product B A is scaled by alpha / r.
        dropout: of the adapters' inputs, in training.

    Raises:
        ImportError: peft is not installed.
        ValueError: an argument is out of range, or the model has adapters already.
    """
    peft = check_lora(targets, rank, alpha, dropout)
    adapted = any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in model.modules())
    if adapted or isinstance(model, peft.PeftModel):
        raise ValueError(
            "model has adapters already: merge them first (model.merge_and_unload() or ttt-e2e merge), or give its "
            "PeftModel a second one by add_adapter."
        )
    names = ALL_LINEAR if targets == ALL_LINEAR else inner_projections(model)
    settings = {"target_modules": names, "r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
    return peft.get_peft_model(model, peft.LoraConfig(**settings, task_type=peft.TaskType.CAUSAL_LM))


def check_lora(targets: str, rank: int, alpha: float, dropout: float = 0.0):
    """Check the settings of `add_lora` before there is a model.

    Returns:
        The package peft.

    Raises:
        ImportError: peft is not installed.
        ValueError: an argument is out of range.
    """
    peft = _import_peft()
    if targets not in (ALL_LINEAR, PRIME):
        near = difflib.get_close_matches(str(targets), (ALL_LINEAR, PRIME), n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"give {ALL_LINEAR!r} or {PRIME!r}."
        raise ValueError(f"targets={targets!r} is unknown; {meant}")
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1.")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha={alpha}: must be positive and finite; it scales what the adapters add.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: must be at least 0 and below 1.")
    return peft


def merge_lora(adapter_folder: str | Path, output: str | Path) -> None:
    """Add an adapter to the model that it belongs to and save the sum as a plain model, with the tokenizer if any.

    The model is the one that the adapter names (`base_model_name_or_path`), under its own configuration or, where there
    is one, the `base_config.json` beside the adapter. The dtype stays the saved model's.

    Args:
        adapter_folder: with `adapter_config.json`, in it or in its folder `model` (as `ttt-e2e train` writes it).
        output: of the new model; appears whole or not at all.

    Raises:
        ImportError: peft is not installed.
        FileExistsError: `output` exists.
        ValueError: the folder holds no LoRA adapter, or its model cannot be loaded.
        OSError: the disk has no room.
    """
    peft = _import_peft()
    output = Path(output).expanduser()
    if output.exists():
        raise FileExistsError(f"output={str(output)!r} exists: name a new folder. Nothing was overwritten.")
    folder = saved_folder(Path(adapter_folder).expanduser(), ADAPTER_CONFIG)
    if folder is None:
        raise ValueError(
            f"adapter_folder={str(adapter_folder)!r}: no {ADAPTER_CONFIG} in it; name a folder that a PeftModel, or a "
            "trainer of one, has saved."
        )
    settings = peft.PeftConfig.from_pretrained(folder)
    if settings.peft_type != peft.PeftType.LORA:
        raise ValueError(f"adapter_folder={str(folder)!r} holds a {settings.peft_type.value} adapter, not a LoRA.")
    model = _load_base(folder, settings)
    tokenizer = find_tokenizer(folder, settings.base_model_name_or_path)
    # safe_merge refuses adapters whose values are not finite.
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload(safe_merge=True)
    check_disk_space(output, sum(p.numel() * p.element_size() for p in merged.parameters()), "the merged model")
    with folder_written_whole(output) as part:
        merged.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)


def _load_base(folder: Path, settings) -> PreTrainedModel:
    name = settings.base_model_name_or_path
    remedy = f"write its folder, or its id on the Hub, into base_model_name_or_path of {folder / ADAPTER_CONFIG}."
    if not name:
        raise ValueError(f"adapter_folder={str(folder)!r} does not say which model it belongs to: {remedy}")
    # Without it the adapter would be merged into the settings from before its training.
    config = None
    if (folder / BASE_CONFIG).is_file():
        config = AutoConfig.for_model(**json.loads((folder / BASE_CONFIG).read_text(encoding="utf-8")))
    try:
        return AutoModelForCausalLM.from_pretrained(name, config=config, revision=settings.revision or "main")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"adapter_folder={str(folder)!r} belongs to the model {name!r}, which cannot be loaded ({error}): {remedy}"
        ) from error


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise ImportError('LoRA needs the package peft: pip install "ttt-e2e[peft]"') from error
    return peft
