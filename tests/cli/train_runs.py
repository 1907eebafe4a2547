"""`ttt-e2e train` at a size of seconds."""

import random

import yaml
from typer.testing import CliRunner

from ttt_e2e.cli.main import app

SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mini_batch_size": 4,
    "sliding_window": 8,
}
SETTINGS = {
    "batch_size": 4,
    "data.sequence_length": 16,
    "data.validation_rows": 8,
    "training.max_steps": 6,
    "training.logging_steps": 1,
    "training.save_steps": 2,
    "training.eval_steps": 3,
    "training.disable_tqdm": "true",
}
WORDS = "the a little old machine reads writes learns forgets quickly slowly and then again".split()


def fill_place(folder):
    """A folder gets texts, a small model's configuration, and nothing else."""
    choose = random.Random(0)
    (folder / "texts").mkdir()
    for number in range(16):
        text = " ".join(choose.choices(WORDS, k=80))
        (folder / "texts" / f"{number:02}.txt").write_text(text)
    (folder / "small.yaml").write_text("# small\n" + yaml.safe_dump(SIZES))
    return folder


def train(place, *options, output="run", **changes):
    """Run the command; `changes` with __ for dots replace those of SETTINGS."""
    settings = SETTINGS | {name.replace("__", "."): value for name, value in changes.items()}
    arguments = {"--model": place / "small.yaml", "--recipe": "pretrain-tiny", "--data": place / "texts"}
    arguments |= {"--output": place / output, "--cache": place / "cache"}
    given = dict(zip(options[::2], options[1::2], strict=True)) if len(options) % 2 == 0 else {}
    flags = [] if given or not options else list(options)
    line = [str(part) for pair in (arguments | given).items() if pair[1] is not None for part in pair]
    for name, value in settings.items():
        line += ["--set", f"{name}={value}"]
    return CliRunner().invoke(app, ["train", *line, *flags], env={"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1"})


def everything_below(folder):
    """Every file with its contents and time of change."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def refusal(result) -> str:
    """The message of a refused command, its box and line breaks taken away."""
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())
