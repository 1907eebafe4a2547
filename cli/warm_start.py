"""`ttt-e2e convert transformer` and `ttt-e2e tune-inner-lr`: the first two steps of a warm start."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .errors import refusals


def transformer(
    model: Annotated[
        str, typer.Option(help="A Llama, Mistral, Qwen2 or Qwen3: a folder, a GGUF file, or an id of the Hub.")
    ],
    output: Annotated[Path, typer.Option(help="The new model's folder, new or empty.", file_okay=False)],
    window: Annotated[
        int | None,
        typer.Option(help="sliding_window, in tokens. [default: the source's, where all its layers slide]"),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(
            help="num_sink_tokens: first tokens of a text that stay visible. [default: 4, or 0 for a source all of "
            "whose layers slide]"
        ),
    ] = None,
    full_attention_every: Annotated[
        int | None,
        typer.Option(help="Keep the source's full attention in every so many blocks (hybrid): the cache then grows."),
    ] = None,
    full_attention_layers: Annotated[
        str | None, typer.Option(help="Instead, the blocks that keep it, counted from 0, as in 15,18,20.")
    ] = None,
    full_attention_yarn: Annotated[
        float | None,
        typer.Option(help="Scale the RoPE of these blocks by YaRN, for texts so many times longer than in training."),
    ] = None,
    suffix: Annotated[
        int | None, typer.Option(help="num_suffix_layers: blocks at the end that learn. [default: a quarter]")
    ] = None,
    mini_batch: Annotated[
        int | None,
        typer.Option(help="mini_batch_size: tokens of one inner step. [default: 1024, or the window if smaller]"),
    ] = None,
    prime_size: Annotated[
        int | None,
        typer.Option(help="prime_intermediate_size: width of the prime MLPs. [default: that of the others]"),
    ] = None,
    prime: Annotated[
        bool, typer.Option("--prime/--no-prime", help="Add prime MLPs, or let the suffix's own MLPs learn.")
    ] = True,
    inner_projections: Annotated[
        str, typer.Option(help="What learns of these MLPs: all projections, or down (a third of the memory).")
    ] = "all",
    inner_lr: Annotated[float, typer.Option(help="inner_learning_rate; see ttt-e2e tune-inner-lr.")] = 1.0,
    inner_clip: Annotated[float, typer.Option(help="inner_max_grad_norm: the inner gradient's largest norm.")] = 1.0,
    dtype: options.Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of the prime MLPs' random weights.")] = 0,
    max_shard_size: Annotated[
        str, typer.Option(help="Of a file of weights; the memory that is needed follows it.")
    ] = "5GB",
) -> None:
    """Make a TTT-E2E model from a pretrained transformer.

    Before any training it computes what the transformer computes, as long as the window holds the text and learning is
    off. Its prime MLPs add nothing yet, but can learn. Go on with `ttt-e2e tune-inner-lr`, then `ttt-e2e train --recipe
    warm-start`.

    In Python, for a model in memory: `ttt_e2e.conversion.warm_started_model(source, settings)`.
    """
    from ttt_e2e.conversion import WarmStartRequest, WarmStartSettings, prepare_warm_start, write_warm_start
    from ttt_e2e.storage.claims import claimed

    with refusals("Interrupted. Nothing was left behind."), claimed(output):
        blocks = None
        if full_attention_layers is not None:
            blocks = options.parse_numbers(full_attention_layers, "--full-attention-layers", int)
        settings = WarmStartSettings(
            sliding_window=window,
            num_suffix_layers=suffix,
            mini_batch_size=mini_batch,
            use_prime_mlp=prime,
            prime_intermediate_size=prime_size,
            inner_learning_rate=inner_lr,
            inner_max_grad_norm=inner_clip,
            inner_projections=inner_projections,
            num_sink_tokens=sinks,
            full_attention_every=full_attention_every,
            full_attention_layers=blocks,
            full_attention_yarn=full_attention_yarn,
        )
        start = prepare_warm_start(WarmStartRequest(model, output, settings, dtype, seed, max_shard_size))
        config = start.config
        typer.echo(
            f"{start.parameters:,} parameters, {start.new_parameters:,} of them new; "
            f"{start.total_bytes / 2**20:,.0f} MiB. Window {config.sliding_window:,} and "
            f"{config.num_sink_tokens} attention sinks, mini-batch {config.mini_batch_size:,}, the last "
            f"{config.num_suffix_layers} of {config.num_hidden_layers} blocks learn."
        )
        write_warm_start(start)
    if start.source.tokenizer is None:
        typer.echo("The source has no tokenizer: name one with --tokenizer from here on.")
    typer.echo(
        f"The model is in {output}. Choose its inner learning rate before you use it: ttt-e2e tune-inner-lr --model "
        f"{output} --data ... --output ... --write"
    )


def tune_inner_lr(
    model: Annotated[str, typer.Option(help="A saved model's folder, a run's, a checkpoint's, or an id of the Hub.")],
    data: Annotated[
        str,
        typer.Option(
            help="A text file, a folder, .jsonl or .parquet files, the name of a data set, or standard-library."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder of the results: new, or of the same sweep, which it adds to.", file_okay=False)
    ],
    learning_rates: Annotated[
        str, typer.Option(help="Inner learning rates to try; learning off is always measured.")
    ] = "0.001,0.003,0.01,0.03,0.1,0.3,1,3",
    mini_batches: Annotated[
        str | None, typer.Option(help="Mini-batch sizes to try, as 512,1024. [default: the model's]")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of each document. [default: 8 of the largest mini-batches]")
    ] = None,
    documents: options.Documents = 16,
    batch_size: options.BatchSize = 1,
    write: Annotated[
        bool, typer.Option("--write", help="Write the best into the model's config.json, where it beats learning off.")
    ] = False,
    tokenizer: options.Tokenizer = None,
    dtype: options.Dtype = "auto",
    split: options.Split = "train",
    text_column: options.TextColumn = "text",
    split_special_tokens: options.SplitSpecialTokens = True,
    cache: options.Cache = options.DEFAULT_CACHE,
) -> None:
    """Choose a model's inner learning rate by measurement: its loss on your text, for a grid of them.

    A model that was not meta-trained needs another one than the papers' models. Measure after `ttt-e2e convert
    transformer`, and again on checkpoints while it is trained. The same command goes on after an interruption.

    Written to the folder: `results.jsonl`, `results.md`, `results.png`, `results.svg`, `best.json`.
    """
    from rich.console import Console

    from ttt_e2e.evaluation.inner_learning_rate import SweepRequest, measure_sweep, prepare_sweep, write_sweep

    with refusals("Interrupted. The same command goes on after the last point that was measured."):
        request = SweepRequest(
            model=model,
            data=data,
            output=output,
            cache=cache,
            learning_rates=options.parse_numbers(learning_rates, "--learning-rates", float),
            mini_batch_sizes=[] if mini_batches is None else options.parse_numbers(mini_batches, "--mini-batches", int),
            length=length,
            documents=documents,
            batch_size=batch_size,
            tokenizer=tokenizer,
            dtype=dtype,
            text_column=text_column,
            split=split,
            split_special_tokens=split_special_tokens,
            write=write,
        )
        sweep = prepare_sweep(request)
        typer.echo(f"{len(sweep.data.documents)} documents of {sweep.length:,} tokens ({documents} were asked for)")
        if not measure_sweep(sweep):
            typer.echo("All points were measured before; nothing was measured again.")
        verdict, table, files = write_sweep(sweep)
    Console().print(table.rich())
    for line in verdict.lines():
        typer.echo(line)
    if write and not verdict.helps:
        typer.echo("config.json was left as it is.")
    typer.echo(f"Look at {', '.join(map(str, files))}; the numbers are in {sweep.results.path}.")
