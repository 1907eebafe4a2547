"""How a model was trained, read from what its run has written beside it."""

from pathlib import Path

from transformers import PreTrainedConfig
from transformers.utils import logging

from ..loading import model_label
from ..storage.disk import read_json
from ..storage.record import MODEL, RECORD, first_difference
from ..training.checkpoints import compared_settings
from ..training.run import LOG
from .card import TrainingHistory

logger = logging.get_logger(__name__)

STATE = "trainer_state.json"
REMEDY = "repair it, or take it away: the card then says nothing about training"
# What an optimizer does by default is no choice of the run.
CHOICES = {
    "optimizer": "outer optimizer",
    "learning_rate": "learning rate",
    "muon_learning_rate": "learning rate of the matrices that Muon trains",
    "lr_scheduler_type": "schedule of the learning rate",
    "warmup_steps": "warm-up (steps, or their share)",
    "weight_decay": "weight decay",
    "adam_beta2": "beta 2 of AdamW",
    "max_grad_norm": "gradient clipping",
}
EVALUATED = {"eval_loss": "validation loss", "eval_loss_learning_off": "validation loss, learning off"}


def training_history(folder: Path, config: PreTrainedConfig) -> TrainingHistory | None:
    """What the run's record and log say about a saved model.

    Args:
        folder: `model` or `checkpoint-N` in the folder of a run of `ttt-e2e train`.
        config: of the model.

    Returns:
        None where the folder is of no such run. A record of another model is left out with a warning.

    Raises:
        ValueError: the record or the log is damaged.
    """
    path = folder.parent / RECORD
    if not path.is_file() or not (folder.name == MODEL or folder.name.startswith("checkpoint-")):
        return None
    record = read_json(path, REMEDY)
    settings = compared_settings(config)
    compared = record["model"].keys() & settings.keys()
    difference = first_difference({n: record["model"][n] for n in compared}, {n: settings[n] for n in compared})
    if difference is not None:
        name, before, now = difference
        logger.warning(
            f"{path} is the record of another model ({name} is {before!r} there, not {now!r}): the card says nothing "
            "about training."
        )
        return None
    log = read_json(folder / STATE, REMEDY)["log_history"] if (folder / STATE).is_file() else _log_of(folder)
    return TrainingHistory(_sentence(record), _facts(record, log), record["recipe"]["data"]["sequence_length"])


def _log_of(folder: Path) -> list[dict]:
    path = folder.parent / LOG
    return read_json(path, REMEDY) if path.is_file() else []


def _sentence(record: dict) -> str:
    asked, adapter = record["asked"], record["adapter"]
    if record["start"] is None:
        start = f"From random weights (`{_shown(asked['model'])}`)"
    else:
        start = f"From the saved model `{model_label(asked['model'])}`"
    how = f", as adapters of rank {adapter['rank']} on `{adapter['targets']}`" if adapter else ""
    how = ", the prime MLPs alone" if record.get("train") == "prime" else how
    configuration = record["recipe"]["data"].get("configuration")
    part = f" (`{configuration}`)" if configuration else ""
    return f"{start}{how}, with the recipe `{record['recipe']['name']}` on `{_shown(asked['data'])}`{part}."


def _shown(source: str) -> str:
    """A source's name; where it lay on the machine that trained says nothing to others."""
    path = Path(source).expanduser()
    return path.name if path.is_absolute() or path.exists() else source


def _facts(record: dict, log: list[dict]) -> dict[str, str]:
    recipe = record["recipe"]
    rows, length = recipe["batch_size"], recipe["data"]["sequence_length"]
    facts = {"rows in a step": f"{rows:,}", "tokens in a row": f"{length:,}"}
    steps = max((entry["step"] for entry in log), default=None)
    if steps is not None:
        facts |= {"steps": f"{steps:,}", "tokens": f"{steps * rows * length:,}"}
    facts |= {name: str(recipe["training"][key]) for key, name in CHOICES.items() if key in recipe["training"]}
    last = next((entry for entry in reversed(log) if "eval_loss" in entry), {})
    for key, name in EVALUATED.items():
        if key in last:
            facts[f"{name} after step {last['step']:,}"] = f"{last[key]:.3f} nats per token"
    return facts
