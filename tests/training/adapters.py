"""LoRA on the tiny model: by hand, as with any model of transformers, and by `add_lora`."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from ttt_e2e.training.lora import add_lora

from .helpers import tiny_model

RANK, ALPHA = 3, 6.0
# Of the inner weights in the two suffix blocks of three.
BY_HAND = {
    ("all-linear", True): "all-linear",
    ("all-linear", False): "all-linear",
    ("prime", True): r".*\.prime_mlp\.(gate|up|down)_proj",
    ("prime", False): r".*\.layers\.[12]\.mlp\.(gate|up|down)_proj",
}


def hand_made(model, targets: str, rank: int = RANK, alpha: float = ALPHA, dropout: float = 0.0) -> PeftModel:
    modules = BY_HAND[targets, model.config.use_prime_mlp]
    settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": modules}
    return get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))


WAYS = {"by hand": hand_made, "add_lora": add_lora}


def adapted(targets: str, dtype=torch.float32, dropout: float = 0.0, random: bool = True, **fields) -> PeftModel:
    """The tiny model with adapters; with `random` ones they add something from the start."""
    model = add_lora(tiny_model(dtype, **fields), targets, RANK, ALPHA, dropout)
    if random:
        fill(model)
    return model


def fill(model: PeftModel, seed: int = 5) -> None:
    """Random adapters, in place."""
    set_seed(seed)
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.normal_(std=0.2)


def adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapters' own parameters."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def saved_base(folder, dtype=torch.float32, **fields):
    """The tiny model as it is loaded from a folder, so that adapters know where it lies."""
    if not folder.exists():
        tiny_model(dtype, **fields).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)
