"""Data and scores of the harness' tasks over local texts.

The file is a JSON Lines file of objects with a `text`, named by `--metadata '{"file": "texts.jsonl"}'`.
"""

import json
from pathlib import Path

import datasets

QUARTERS = 4


def texts(file: str | None = None, characters: int | None = None, **_) -> dict[str, datasets.Dataset]:
    """Split `test` with column `text`.

    Args:
        file: JSON Lines, one object with `text` in each line.
        characters: leave out shorter texts and cut longer ones to this many; None takes all as they are.

    Raises:
        ValueError: no file is named, or it holds no text that is long enough.
        FileNotFoundError: there is no such file.
    """
    if file is None:
        raise ValueError("""file: not given; name one: --metadata '{"file": "texts.jsonl"}'""")
    if not Path(file).is_file():
        raise FileNotFoundError(f"file={file}: there is no such file")
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line)["text"] for line in lines if line.strip()]
    kept = [text[:characters] for text in found if text.strip() and len(text) >= (characters or 1)]
    if not kept:
        raise ValueError(f"file={file}: none of its {len(found)} texts has {characters or 1} characters; give another")
    return {"test": datasets.Dataset.from_dict({"text": kept}, split=datasets.Split.TEST)}


def quarters(**settings) -> dict[str, datasets.Dataset]:
    """Split `test` of the quarters of each text: `quarter` from 1, `before` and `part`; arguments as for `texts`.

    A quarter begins with the white space that is nearest behind an even cut, so that no word is cut; one that
    would be empty is left out.
    """
    rows = []
    for text in texts(**settings)["test"]["text"]:
        cuts = [0, *(_next_space(text, len(text) * cut // QUARTERS) for cut in range(1, QUARTERS)), len(text)]
        for quarter in range(QUARTERS):
            start, end = cuts[quarter], cuts[quarter + 1]
            if start < end:
                rows.append({"quarter": quarter + 1, "before": text[:start], "part": text[start:end]})
    return {"test": datasets.Dataset.from_list(rows, split=datasets.Split.TEST)}


def whole_text_results(doc: dict, results: list[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood of the text and its bytes, for the weighted means of the harness."""
    scored = (results[0], len(doc["text"].encode()))
    return {"bits_per_byte": scored, "byte_perplexity": scored}


def quarter_results(doc: dict, results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """Log-likelihood of the quarter and its bytes, under the name of its quarter."""
    log_likelihood, _ = results[0]
    return {f"bits_per_byte_quarter_{doc['quarter']}": (log_likelihood, len(doc["part"].encode()))}


def _next_space(text: str, start: int) -> int:
    while start < len(text) and not text[start].isspace():
        start += 1
    return start
