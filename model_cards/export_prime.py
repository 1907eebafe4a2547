"""A folder for the Hub from new weights alone (`ttt-e2e train --train prime`): small, and named after its base.

It holds the new weights, what tells their base from other models, the tokenizer, and a card. The base stays where it is
published; who uses the folder loads it with `PrimeWeights` of this package.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from ..conversion.prime_weights import PRIME_WEIGHTS, PrimeWeights
from ..loading import model_label
from ..storage.disk import check_disk_space, folder_written_whole
from ..storage.dtypes import dtype_named
from ..storage.record import check_output
from .card import ModelCardContents, ResultsSection, write_model_card
from .export import DTYPES, ROOM_FOR_SMALL_FILES, ExportRequest, padded_tokenizer, results_of
from .history import training_history
from .measured import MeasuredResults


@dataclass(frozen=True)
class PrimeExport:
    """A request that has been checked.

    Attributes:
        weights: in the exported dtype, and with the exported name of their base.
        sections: more of the card's evaluation, behind the results of the request.
    """

    request: ExportRequest
    weights: PrimeWeights
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    results: list[MeasuredResults]
    sections: Sequence[ResultsSection] = ()


def prepare_prime_export(request: ExportRequest) -> PrimeExport:
    """Check a request for new weights; nothing is written.

    Raises:
        ValueError, OSError: there are no new weights with a tokenizer in the folder, values are not finite, the output
            is not empty or its disk too small, or results are of another model.
    """
    request = replace(request, output=request.output.expanduser())
    wanted = None if request.dtype is None else dtype_named(request.dtype, DTYPES)
    weights = PrimeWeights.from_pretrained(request.model)
    assert weights.folder is not None  # they come from one
    check_output(request.output, resume=False)
    tokenizer = padded_tokenizer(weights.folder, weights.config.vocab_size)
    saved_dtype = next(iter(weights.tensors.values())).dtype
    dtype = wanted or saved_dtype
    tensors = {name: tensor.to(dtype) for name, tensor in weights.tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"model={request.model!r}: {name} has values that are not finite; export another one")
    size = sum(tensor.nbytes for tensor in tensors.values())
    check_disk_space(request.output, size + ROOM_FOR_SMALL_FILES, "the exported weights")
    results = results_of(request, weights.folder, tokenizer, saved_dtype)
    exported = replace(weights, tensors=tensors, base=request.base or weights.base)
    return PrimeExport(request, exported, dtype, tokenizer, results)


def write_prime_export(export: PrimeExport) -> Path:
    """Write the folder; it appears whole or not at all.

    Returns:
        The folder.

    Raises:
        OSError: it cannot be written.
    """
    with folder_written_whole(export.request.output) as part:
        export.weights.save_pretrained(part)
        export.tokenizer.save_pretrained(part)
        write_model_card(part, _contents(export), needs=PRIME_WEIGHTS)
    return export.request.output


def _contents(export: PrimeExport) -> ModelCardContents:
    request, weights = export.request, export.weights
    assert weights.folder is not None
    return ModelCardContents(
        name=request.name or model_label(weights.folder),
        config=weights.config,
        parameters=sum(tensor.numel() for tensor in weights.tensors.values()),
        dtype=export.dtype,
        base=weights.base,
        training=training_history(weights.folder, weights.config),
        results=[*(measured.section(export.dtype) for measured in export.results), *export.sections],
        eval_results=[entry for measured in export.results for entry in measured.entries()],
        license=request.license,
    )
