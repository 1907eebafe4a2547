"""Questions about a document that has left the window: what is still answered, and how likely the right answer is.

    python examples/smollm2/ask.py --texts FOLDER --output FOLDER --released GGUF --converted FOLDER [--trained FOLDER]

    OUTPUT/answers.jsonl    one line per system and question, written as soon as it is answered
    OUTPUT/answers.md       a table of the systems, and all that they wrote

The document and then the question are one message of the user; answers are greedy. The same command goes on after an
interruption. "no document" is the released model, asked without it: what it knows anyhow.
"""

import argparse
import copy
import json
import statistics
from pathlib import Path

import torch
import yaml
from measure import HERE, SHORT, SYSTEMS, load, measured
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.conversion.pretrained import find_source
from ttt_e2e.conversion.transformer_layout import check_convertible
from ttt_e2e.evaluation.tables import Table
from ttt_e2e.storage.disk import write_text

QUESTIONS = yaml.safe_load((HERE / "questions.yaml").read_text(encoding="utf-8"))
NO_DOCUMENT = "no document"
ASKED = (
    "window and sinks",
    "meta-trained, learning off",
    "meta-trained, learning on",
    "full attention",
    "hybrid with YaRN, meta-trained, learning on",
    NO_DOCUMENT,
)
DOCUMENT_TOKENS, ANSWER_TOKENS, SEGMENT = 4096, 32, 1024


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, expected: str, learning: bool | None
) -> tuple[str, float]:
    """What is written after prompt [1, length], at most `ANSWER_TOKENS` long, and nats per token of the expected."""
    arguments = {"test_time_training": learning} if isinstance(model, TTTE2EForCausalLM) else {}
    output = None
    for piece in prompt.split(SEGMENT, 1):
        output = model(piece, cache=None if output is None else output.cache, use_cache=True, **arguments)
    ids = tokenizer(expected, return_tensors="pt", add_special_tokens=False).input_ids
    last = output.logits[:, -1:]
    read = model(ids[:, :-1], cache=copy.deepcopy(output.cache), use_cache=True, **arguments).logits
    nll = torch.nn.functional.cross_entropy(torch.cat([last, read], 1)[0].float(), ids[0]).item()
    written: list[int] = []
    while len(written) < ANSWER_TOKENS and (token := int(output.logits[0, -1].argmax())) != tokenizer.eos_token_id:
        written.append(token)
        output = model(torch.tensor([[token]]), cache=output.cache, use_cache=True, **arguments)
    return tokenizer.decode(written, skip_special_tokens=True).strip(), nll


def prompt_ids(tokenizer: PreTrainedTokenizerBase, document: str | None, question: str) -> torch.Tensor:
    """ids [1, length] of a chat with one message: the document's first `DOCUMENT_TOKENS`, and the question."""
    text = question
    if document is not None:
        ids = tokenizer(document, add_special_tokens=False, split_special_tokens=True).input_ids[:DOCUMENT_TOKENS]
        text = f"{tokenizer.decode(ids)}\n\nQuestion about the text above: {question} Answer in a few words."
    chat = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids


def ask(asked: argparse.Namespace, sources: dict[str, str]) -> None:
    tokenizer = find_source(sources["released"], check_convertible).contents().tokenizer
    lines = (asked.texts / f"evaluation-{SHORT}.jsonl").read_text(encoding="utf-8").splitlines()
    documents = {record["path"]: record["text"] for record in map(json.loads, lines)}
    path = asked.output / "answers.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in asked.system or ASKED:
        system = SYSTEMS["full attention" if name == NO_DOCUMENT else name]
        done = {line["question"] for line in measured(path) if line["system"] == name}
        todo = [(text, one) for text, some in QUESTIONS.items() for one in some if one["question"] not in done]
        if not todo or system["source"] not in sources:
            continue
        model = load(system, sources)
        for text, one in tqdm(todo, desc=name, unit=" questions"):
            document = None if name == NO_DOCUMENT else documents[text]
            prompt = prompt_ids(tokenizer, document, one["question"])
            written, nll = answer(model, tokenizer, prompt, one["answer"], system.get("learning"))
            line = {"system": name, "text": text, "question": one["question"], "written": written, "nll": nll}
            line["found"] = one["found"].lower() in written.lower()
            with path.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line, ensure_ascii=False) + "\n")


def tables(lines: list[dict]) -> list[Table]:
    names = list(dict.fromkeys(line["system"] for line in lines))
    rows, said = [], []
    for name in names:
        own = [line for line in lines if line["system"] == name]
        right = f"{sum(line['found'] for line in own)} of {len(own)}"
        rows.append([name, right, f"{statistics.fmean(line['nll'] for line in own):.2f}"])
        said += [[line["question"], name, line["written"].replace("\n", " ").replace("|", "/")] for line in own]
    said.sort(key=lambda row: row[0])
    header = ["", "answers that name it", "loss of the right answer"]
    return [
        Table(f"Questions after {DOCUMENT_TOKENS:,} tokens of a document", header, rows),
        Table("What was written", ["question", "system", "answer"], said),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask questions about documents that have left the window.")
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py has written")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    for source in ("released", "converted", "trained"):
        parser.add_argument(f"--{source}", required=source == "released", help="see systems.yaml")
    parser.add_argument("--system", action="append", choices=ASKED, help="only this one; may be repeated")
    asked = parser.parse_args()
    ask(asked, {name: getattr(asked, name) for name in ("released", "converted", "trained") if getattr(asked, name)})
    found = tables(measured(asked.output / "answers.jsonl"))
    text = "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in found)
    write_text(asked.output / "answers.md", text)
    print(found[0].markdown())


if __name__ == "__main__":
    main()
