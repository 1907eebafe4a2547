"""A script: run `ttt-e2e export` several times in one process, which has its own idea of where the Hub is.

    python pushing.py CASES ANSWERS

CASES is a JSON file with a list of {"arguments", "token"}; ANSWERS becomes a list of {"status", "output"}.
"""

import json
import os
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from ttt_e2e.cli.export import export


def main(cases: str, answers: str) -> None:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(export)
    found = []
    for case in json.loads(Path(cases).read_text()):
        os.environ.pop("HF_TOKEN", None)
        if case["token"] is not None:
            os.environ["HF_TOKEN"] = case["token"]
        result = CliRunner().invoke(app, case["arguments"], env={"COLUMNS": "400", "NO_COLOR": "1", "TERM": "dumb"})
        found.append({"status": result.exit_code, "output": " ".join(result.output.replace("│", " ").split())})
    Path(answers).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
