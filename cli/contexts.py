"""`ttt-e2e read` and `ttt-e2e generate`: read documents once, keep what was learned, and write on from it."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import refusals, refuse


def say_loading(model: str) -> None:
    """Said before torch is imported, which alone takes seconds; on the standard error, so that it is no output."""
    typer.echo(f"Loading {model} ...", err=True)


def read(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder of the learned context; new or empty. With --documents: of one folder for each document.",
            file_okay=False,
        ),
    ],
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--document",
            help="A text file (UTF-8), of any length, or - for standard input. Several are read one after the other, "
            "into one context.",
        ),
    ] = None,
    documents: Annotated[
        str | None,
        typer.Option(
            help="Many documents, each read into a context of its own: a folder, .jsonl or .parquet files, or the name "
            "of a data set."
        ),
    ] = None,
    context: Annotated[
        Path | None, typer.Option(help="A learned context to read on from; it stays as it is.", file_okay=False)
    ] = None,
    rows: Annotated[
        int, typer.Option(help="Of --documents: read so many side by side. It changes contexts by rounding.", min=1)
    ] = 1,
    split: options.Split = "train",
    text_column: Annotated[str, typer.Option(help="Of the rows of --documents.")] = "text",
    split_special_tokens: options.SplitSpecialTokens = True,
    dtype: options.ContextDtype = "auto",
    device: options.Device = None,
    cache: options.Cache = options.DEFAULT_CACHE,
) -> None:
    """Read documents once and keep what was learned as a folder.

    Try it: `ttt-e2e read --model runs/tiny --document book.txt --output book.context`

    The folder's size does not depend on how much was read. `ttt-e2e generate`, `ttt-e2e chat` and `ttt-e2e serve` go on
    from it, with the same model; in Python `TTTE2ECache.from_pretrained(folder, model)` does.

    Many documents: `ttt-e2e read --model runs/tiny --documents library/ --output contexts`, by several processes
    with `torchrun --nproc-per-node 4 -m ttt_e2e.cli.main read ...` or `accelerate launch --multi_gpu` (on CPUs as
    well). What is there already is not read again, so that the same command goes on after an interruption. A document
    that cannot be read is reported and left out, and the command ends with an error.
    """
    with refusals():
        if (files is None) == (documents is None):
            raise ValueError("Give either --document, once or more often, or --documents")
    say_loading(model)
    if documents is not None:
        from .read_steps import read_many

        read_many(
            model=model,
            documents=documents,
            output=output,
            cache=cache,
            context=context,
            rows=rows,
            dtype=dtype,
            device=device,
            text_column=text_column,
            split=split,
            split_special_tokens=split_special_tokens,
        )
        return
    import time

    from ttt_e2e.serving import (
        StoredContext,
        check_room,
        document_name,
        document_text,
        load_text_model,
        open_context,
        read_documents,
        text_tokens,
        write_context,
    )
    from ttt_e2e.storage.claims import claimed
    from ttt_e2e.storage.record import check_output

    with refusals("Interrupted; nothing was written."):
        check_output(output, resume=False)
        texts = [(document_name(path), document_text(path)) for path in files]
        with claimed(output):
            text_model = load_text_model(model, dtype=dtype, device=device)
            start = StoredContext.new(text_model.model) if context is None else open_context(context, text_model.model)
            tokens = [
                (name, text_tokens(text, text_model.tokenizer, True, split_special_tokens)) for name, text in texts
            ]
            check_room(output, text_model.model, start.tokens + sum(len(ids) for _, ids in tokens))
            started = time.perf_counter()
            learned = read_documents(text_model, start, tokens)
            seconds = time.perf_counter() - started
            write_context(output, learned)
    count = learned.tokens - start.tokens
    before = f" after {start.tokens:,} read before" if start.tokens else ""
    typer.echo(f"{output}: {count:,} tokens{before}, {count / seconds:,.0f} a second; {learned.cache.nbytes:,} bytes.")


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Option(help="The text to write on from.")] = None,
    prompt_file: Annotated[
        typer.FileText | None, typer.Option(help="A file (UTF-8) with it, or - for standard input.", encoding="utf-8")
    ] = None,
    context: Annotated[
        Path | None,
        typer.Option(help="A learned context that the prompt follows; it stays as it is.", file_okay=False),
    ] = None,
    save_context: Annotated[
        Path | None,
        typer.Option(help="Folder for the learned context after all that was read and written.", file_okay=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest text that is written.", min=1)] = 256,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.95,
    seed: options.Seed = None,
    learn_from: options.LearnFrom = "context",
    split_special_tokens: options.SplitSpecialTokens = True,
    dtype: options.ContextDtype = "auto",
    device: options.Device = None,
) -> None:
    """Write on from a prompt, after a learned context if wanted; the text appears as it is written.

    Try it: `ttt-e2e generate --model runs/tiny --context book.context --prompt "In the last chapter"`
    """
    with refusals():
        text = given_prompt(prompt, prompt_file)
    say_loading(model)
    from contextlib import nullcontext
    from dataclasses import replace

    from transformers import TextStreamer, set_seed

    from ttt_e2e.serving import (
        ReadDocument,
        StoredContext,
        check_room,
        load_text_model,
        open_context,
        text_tokens,
        write,
        write_context,
        writing_arguments,
    )
    from ttt_e2e.storage.claims import claimed
    from ttt_e2e.storage.record import check_output

    try:
        arguments = writing_arguments(temperature, top_p, learn_from)
        if save_context is not None:
            check_output(save_context, resume=False)
        with nullcontext() if save_context is None else claimed(save_context):
            text_model = load_text_model(model, dtype=dtype, device=device)
            start = StoredContext.new(text_model.model) if context is None else open_context(context, text_model.model)
            ids = text_tokens(text, text_model.tokenizer, start.tokens == 0, split_special_tokens).tolist()
            if save_context is not None:
                check_room(save_context, text_model.model, start.tokens + len(ids) + max_new_tokens)
            if seed is not None:
                set_seed(seed)
            streamer = TextStreamer(text_model.tokenizer, skip_prompt=True, skip_special_tokens=True)
            after = start.fork()
            written = write(
                text_model.model,
                ids,
                after.cache,
                streamer=streamer,
                max_new_tokens=max_new_tokens,
                **arguments,
            )
            if save_context is not None:
                document = ReadDocument("prompt and what was written", len(ids) + len(written))
                write_context(save_context, replace(after, documents=(*after.documents, document), answer_end=None))
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and save_context is not None:
            typer.echo("No context was saved.", err=True)
        refuse(error)
    except KeyboardInterrupt:
        typer.echo("\nInterrupted." + ("" if save_context is None else " No context was saved."), err=True)
        raise typer.Exit(130) from None


def given_prompt(prompt: str | None, file: typer.FileText | None) -> str:
    """The prompt, from one place.

    Raises:
        ValueError: given twice or not at all, not text, or empty.
    """
    if (prompt is None) == (file is None):
        raise ValueError("Give either --prompt or --prompt-file")
    name = "--prompt" if file is None else f"--prompt-file {file.name}"
    try:
        text = prompt if file is None else file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error}); convert it") from error
    if not text:
        raise ValueError(f"{name} is empty: give a text to write on from")
    return text
