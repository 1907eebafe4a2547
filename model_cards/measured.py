"""Results of `ttt-e2e evaluate` for a model card: tables, and entries for the Hub's metadata.

Which lines of a results file are of the model at hand is told by their content hashes, never by their labels.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from huggingface_hub import EvalResult
from transformers import PreTrainedTokenizerBase

from ..data.tokenizer import tokenizer_digest
from ..evaluation.comparison import comparison_tables
from ..evaluation.results import Point, ResultsFile, folder_digest
from ..evaluation.runs import RESULTS
from ..evaluation.tasks import TASKS
from ..storage.digests import digest
from .card import ResultsSection

# Numbers of a point that go into the metadata, with what they are.
METRICS = {
    "loss": "Loss (nats per token)",
    "bits_per_byte": "Loss (bits per byte)",
    "perplexity": "Perplexity",
    "accuracy": "Needles written (share)",
}
LEARNING = {None: "", True: ", learning on", False: ", learning off"}


@dataclass(frozen=True)
class MeasuredResults:
    """The points of one results file.

    Attributes:
        data: what was read, in words.
        folder: of the file.
        points: of all models in it.
        saved_dtype: of the weights before they are exported, which an evaluation with `--dtype auto` has used.
        labels: of the points that are of the model at hand, with what it was told about learning.
    """

    data: str
    folder: Path
    points: list[Point]
    saved_dtype: torch.dtype
    labels: dict[str, bool | None]

    def of_model(self, identities: dict[str, bool | None], folder: Path) -> Self:
        """The same, with the labels of a model.

        Args:
            identities: as `model_identities` returns them; folder: of that model, for the message.

        Raises:
            ValueError: no point is of that model.
        """
        found = {p.label: identities[p.identity["model"]] for p in self.points if p.identity["model"] in identities}
        if not found:
            labels = ", ".join(dict.fromkeys(repr(point.label) for point in self.points))
            raise ValueError(
                f"results={str(self.folder)!r} are of {labels}, none of which is the model in {folder} as it is there: "
                "its files have changed since, or it is another model. Evaluate this one, or leave the results out."
            )
        return dataclasses.replace(self, labels=found)

    def section(self, dtype: torch.dtype) -> ResultsSection:
        """The points as tables, for the card of a model whose weights are exported in a dtype."""
        first = self.points[0]
        task = TASKS[first.task]
        settings = "".join(
            f", {name.replace('_', ' ')} {value}"
            for name, value in first.settings.items()
            if name not in ("dtype", "judge") and value is not None
        )
        ours = ", ".join(f"**{label}**" for label in self.labels)
        machines = {
            f"torch {point.environment['torch']}, transformers {point.environment['transformers']}, "
            f"{point.environment['device']}"
            for point in self.points
        }
        text = f"`ttt-e2e evaluate {task.name}` on {self.data}{settings}. Of this model: {ours}"
        measured = getattr(torch, str(first.settings.get("dtype")), self.saved_dtype)
        if measured == dtype:
            text += f"; its weights were {_name(dtype)} as they are here."
        else:
            text += f"; its weights were {_name(measured)} then and are {_name(dtype)} here."
        text += f" Measured with {'; '.join(sorted(machines))}."
        return ResultsSection(text, comparison_tables(self.points, task.quantities, baseline=None))

    def entries(self) -> list[EvalResult]:
        """The points of the model at hand as the Hub's metadata has them; numbers that depend on the device are not."""
        mine = [point for point in self.points if point.label in self.labels]
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=re.sub(r"[^a-z0-9]+", "-", self.data.lower()).strip("-"),
                dataset_name=self.data,
                metric_type=key,
                metric_value=point.numbers[key],
                metric_name=f"{name}, {_conditions(point)}{LEARNING[self.labels[point.label]]}",
            )
            for point in mine
            if not TASKS[point.task].depends_on_device
            for key, name in METRICS.items()
            if point.numbers.get(key) is not None
        ]


def read_results(text: str, saved_dtype: torch.dtype) -> MeasuredResults:
    """The results in a folder, of whichever models.

    Args:
        text: "FOLDER" or "DATA=FOLDER"; without DATA it is the folder's name.
        saved_dtype: of the weights that are going to be exported.

    Raises:
        ValueError: the folder holds no results, damaged ones, or those of a task that is not known here.
    """
    data, separator, named = text.partition("=")
    if not separator or Path(text).expanduser().is_dir():
        data, named = Path(text).name, text
    folder = Path(named).expanduser()
    path = folder / f"{RESULTS}.jsonl"
    if not data or not path.is_file():
        raise ValueError(
            f"results={text!r}: there is no {path}; name a folder that ttt-e2e evaluate has written, as in --results "
            "results/context or --results 'standard library=results/context'"
        )
    points = ResultsFile(path).points
    if not points:
        raise ValueError(f"results={text!r}: {path} holds no measured point; repeat the evaluation")
    unknown = sorted({point.task for point in points} - TASKS.keys())
    if unknown:
        raise ValueError(f"results={text!r}: {path} is of the task {unknown[0]!r}; known are {', '.join(TASKS)}")
    return MeasuredResults(data, folder, points, saved_dtype, labels={})


def model_identities(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, bool | None]:
    """The hashes under which results of a saved model are recorded, with what the model was told about learning.

    Args:
        folder: of the model; all its weights are read.
        tokenizer: the one in it.
    """
    weights = folder_digest(folder)
    # A task without text has no tokenizer in its hash.
    kinds = itertools.product((tokenizer_digest(tokenizer), None), LEARNING)
    return {digest([weights, text, learning]): learning for text, learning in kinds}


def _conditions(point: Point) -> str:
    return f"{point.task}, at {point.length} {'bytes' if TASKS[point.task].own_tokens else 'tokens'}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
