"""`ttt-e2e evaluate`: what models make of long context, as numbers, tables and a picture."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import refusals

# Of `ttt_e2e.evaluation.tasks`, which is not imported before it is needed, because that takes seconds.
TASK_LINES = {
    "loss-by-position": "loss of each token by its position: what the context before it is worth",
    "perplexity": "of the first tokens of each document",
    "context-length": "mean loss against context length: does a longer context keep helping?",
    "bits-per-byte": "loss that models with unlike tokenizers share; lengths count bytes",
    "decoding": "loss of what a model writes after a long context, under a stronger model (--judge)",
    "latency": "seconds to read, milliseconds per written token, memory; needs no --data",
    "needle": "share of needles found again in a long text (RULER's S-NIAH 1 to 3); --data is optional",
}
TASK_LIST = "\n\n".join(f"- **{name}**: {line}" for name, line in TASK_LINES.items())


def measure(
    task: Annotated[str, typer.Argument(help="What to measure; the list is above.")],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="[LABEL=]SPEC",
            help="A saved model's folder, a run's folder, an id of the Hub or a preset; @learning-off behind it reads "
            "without learning. Give it several times to compare.",
        ),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of context, as 1024,4096,16384.")] = "1024",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results: new, or of the same evaluation.", file_okay=False)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A text file, a folder, .jsonl or .parquet files, the name of a data set, or standard-library. For "
            "needles: the text around them, or ruler-essays."
        ),
    ] = None,
    documents: options.Documents = 16,
    batch_size: options.BatchSize = 1,
    baseline: Annotated[
        str | None, typer.Option(metavar="LABEL", help="Show the difference to this model as well.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="SPEC", help="For decoding: the model that scores what the others write.")
    ] = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = "auto",
    split: options.Split = "train",
    text_column: options.TextColumn = "text",
    split_special_tokens: options.SplitSpecialTokens = True,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override a setting of the task, as new_tokens=64."),
    ] = None,
    cache: options.Cache = options.DEFAULT_CACHE,
) -> None:
    # The docstring of the command is put together below, because it names the tasks.
    from rich.console import Console

    from ttt_e2e.evaluation.runs import EvaluationRequest, measure_missing, prepare_evaluation, write_comparison
    from ttt_e2e.evaluation.shares import running_processes

    with refusals("Interrupted. The same command goes on after the last point that was measured."):
        if output is None:
            raise ValueError("--output is missing: give it, as in --output results/first")
        request = EvaluationRequest(
            task=task,
            models=models or (),
            lengths=options.parse_numbers(lengths, "--lengths", int),
            output=output,
            cache=cache,
            data=data,
            documents=documents,
            batch_size=batch_size,
            baseline=baseline,
            judge=judge,
            tokenizer=tokenizer,
            dtype=dtype,
            text_column=text_column,
            split=split,
            split_special_tokens=split_special_tokens,
            settings=overrides or (),
        )
        processes = running_processes()
        first = processes is None or processes.is_main_process
        evaluation = prepare_evaluation(request)
        if first and evaluation.data.documents is not None:
            found, longest = evaluation.data.documents.shape
            typer.echo(f"{found} documents of at least {longest:,} tokens ({documents} were asked for)")
        if first and evaluation.data.texts is not None:
            found, longest = len(evaluation.data.texts), max(request.lengths)
            typer.echo(f"{found} documents of at least {longest:,} bytes ({documents} were asked for)")
        measured = measure_missing(evaluation, processes)
    if not first:
        return
    if not measured:
        typer.echo("All points were measured before; nothing was measured again.")
    tables, files = write_comparison(evaluation)
    console = Console()
    for table in tables:
        console.print(table.rich())
    typer.echo(f"Look at {', '.join(map(str, files))}; the numbers are in {evaluation.results.path}.")


measure.__doc__ = f"""Measure models on long text and compare them.

Tasks:

{TASK_LIST}

Try it: `ttt-e2e evaluate context-length --model runs/mine --model runs/mine@learning-off --data standard-library
--lengths 1024,2048,4096 --output results/context --baseline 'mine, learning off'`

Every measured point is written at once: the same command goes on after an interruption, and one with further models, or
with lengths up to the longest, adds to what is there. All points in the folder appear in its tables and its picture.

Several processes share out the documents: `torchrun --nproc-per-node 2 -m ttt_e2e.cli.main evaluate ...`, or with
`accelerate launch --multi_gpu` (on CPUs as well). The numbers are those of one process; decoding and latency are
measured by the first one alone.

Written to the folder: `results.jsonl`, `results.md`, `results.png`, `results.svg`.
"""
