"""Options that several commands share."""

import os
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ttt-e2e"

Model = Annotated[
    str, typer.Option(help="A saved model's folder, the folder of a run of `ttt-e2e train`, or an id of the Hub.")
]
ContextDtype = Annotated[
    str,
    typer.Option(
        help="Of the weights: float32, bfloat16, float16, or auto: as saved, but float32 on a CPU without bfloat16. "
        "Contexts belong to one."
    ),
]
Device = Annotated[str | None, typer.Option(help="As torch names it. [default: CUDA where there is one]")]
LearnFrom = Annotated[
    str, typer.Option(help="context: learn from all that is read and written; prompt: only from what is read; none.")
]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens that share this probability.")]
Seed = Annotated[int | None, typer.Option(help="Of sampling: the same seed writes the same text.")]
SplitSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--split-special-tokens/--no-split-special-tokens",
        help="Read special tokens that a text spells out, as <|end|>, as these letters, or as the tokens.",
    ),
]
# Of commands that train what an experiment compares.
Rows = Annotated[
    list[str] | None, typer.Option("--row", metavar="LABEL", help="Only this row, and the yardsticks; repeatable.")
]
Processes = Annotated[
    int | None,
    typer.Option(help="Models that are trained at once. [default: 2 on a CPU of several cores, otherwise 1]", min=1),
]
# Of commands that measure.
Documents = Annotated[int, typer.Option(help="Documents that are read, of those that are long enough.")]
BatchSize = Annotated[int, typer.Option(help="Documents side by side; changes only speed and memory.")]
Tokenizer = Annotated[
    str | None, typer.Option(help="A folder or an id of the Hub, for models that have none of their own.")
]
Dtype = Annotated[str, typer.Option(help="Of the weights: auto (as saved), float32, bfloat16, float16.")]
Split = Annotated[str, typer.Option(help="Of a data set.")]
TextColumn = Annotated[str, typer.Option(help="Of the records of --data.")]
Cache = Annotated[Path, typer.Option(help="Where prepared data is kept.", file_okay=False)]


def parse_numbers(text: str, option: str, kind: type) -> list:
    """Numbers from "0.1,1".

    Args:
        kind: int or float.

    Raises:
        ValueError: a part is no such number.
    """
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(kind(part))
        except ValueError as error:
            wrong = f"{part!r} is no {'whole number' if kind is int else 'number'}"
            raise ValueError(f"{option} {text!r}: give numbers with commas between them ({wrong})") from error
    return numbers
