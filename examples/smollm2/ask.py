"""What is still answered about a text that has left the window: questions about documents, and RULER's needles.

    python examples/smollm2/ask.py --texts FOLDER --output FOLDER --released GGUF --converted FOLDER [--trained FOLDER]

    OUTPUT/answers.jsonl    one line per system and question, written as soon as it is answered
    OUTPUT/answers.md       a table of the systems, and all that they wrote about the documents

A document and then the question are one message of the user; a needle (S-NIAH 1 to 3, arXiv 2404.06654) hides in a text
that is to be completed. Answers are greedy. The same command goes on after an interruption. "no document" is the
released model, asked without the document: what it knows anyhow.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from measure import HERE, SHORT, SYSTEMS, load, measured
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.conversion.pretrained import find_source
from ttt_e2e.conversion.transformer_layout import check_convertible
from ttt_e2e.data.needles import needle_prompts
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
DOCUMENTS = "documents"  # the name of the questions about them
DOCUMENT_TOKENS, SEGMENT = 4096, 1024
NEEDLE_LENGTHS, NEEDLES, SEED = (1024, 2048, 4096), 10, 0
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """Attributes:
    group: of the table: "documents", or a task of needles with its length.
    name: within the group.
    ids: [1, length], what is read before the answer.
    expected: the right answer, for its loss.
    found: how a written answer must name it, in any case.
    """

    group: str
    name: str
    ids: torch.Tensor
    expected: str
    found: str


def about_documents(tokenizer: PreTrainedTokenizerBase, documents: Mapping[str, str] | None) -> Iterator[Question]:
    """The questions of questions.yaml, behind the first `DOCUMENT_TOKENS` of their documents or without them."""
    for path, some in QUESTIONS.items():
        if documents is not None:
            ids = tokenizer(documents[path], add_special_tokens=False, split_special_tokens=True).input_ids
            document = tokenizer.decode(ids[:DOCUMENT_TOKENS])
        for one in some:
            text = one["question"]
            if documents is not None:
                text = f"{document}\n\nQuestion about the text above: {text} Answer in a few words."
            chat = [{"role": "user", "content": text}]
            read = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            ).input_ids
            yield Question(DOCUMENTS, one["question"], read, one["answer"], one["found"])


def needles(tokenizer: PreTrainedTokenizerBase, haystack: list[str]) -> Iterator[Question]:
    """`NEEDLES` of each task and length, with their answers' tokens in the length."""
    for length in NEEDLE_LENGTHS:
        for task in (1, 2, 3):
            made = needle_prompts(
                tokenizer, task, length, NEEDLES, SEED, haystack if task > 1 else None, answer_tokens=ANSWER_TOKENS
            )
            for index, prompt in enumerate(made):
                value = prompt.values[0]
                name = f"S-NIAH-{task}, {length / 1024:g}K"
                yield Question(name, str(index), torch.tensor([prompt.ids]), f" {value}", value)


@torch.no_grad()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: Question, learning: bool | None
) -> tuple[str, float]:
    """What is written, at most `ANSWER_TOKENS` long, and nats per token of the right answer."""
    arguments = {"test_time_training": learning} if isinstance(model, TTTE2EForCausalLM) else {}
    output = None
    for piece in question.ids.split(SEGMENT, 1):
        output = model(piece, cache=None if output is None else output.cache, use_cache=True, **arguments)
    ids = tokenizer(question.expected, return_tensors="pt", add_special_tokens=False).input_ids
    last = output.logits[:, -1:]
    read = model(ids[:, :-1], cache=copy.deepcopy(output.cache), use_cache=True, **arguments).logits
    nll = torch.nn.functional.cross_entropy(torch.cat([last, read], 1)[0].float(), ids[0]).item()
    written: list[int] = []
    while len(written) < ANSWER_TOKENS and (token := int(output.logits[0, -1].argmax())) != tokenizer.eos_token_id:
        written.append(token)
        output = model(torch.tensor([[token]]), cache=output.cache, use_cache=True, **arguments)
    return tokenizer.decode(written, skip_special_tokens=True).strip(), nll


def ask(asked: argparse.Namespace, sources: Mapping[str, str]) -> None:
    tokenizer = find_source(sources["released"], check_convertible).contents().tokenizer
    lines = (asked.texts / f"evaluation-{SHORT}.jsonl").read_text(encoding="utf-8").splitlines()
    documents = {record["path"]: record["text"] for record in map(json.loads, lines)}
    about = list(about_documents(tokenizer, documents))
    hidden = list(needles(tokenizer, [documents[path] for path in QUESTIONS]))
    # Without learning there is no need to look for needles a second time.
    questions = {NO_DOCUMENT: list(about_documents(tokenizer, None)), "meta-trained, learning off": about}
    path = asked.output / "answers.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in asked.system or ASKED:
        system = SYSTEMS["full attention" if name == NO_DOCUMENT else name]
        if system["source"] not in sources:
            print(f"{name}: left out, --{system['source']} is not given")
            continue
        done = {(line["group"], line["name"]) for line in measured(path) if line["system"] == name}
        todo = [one for one in questions.get(name, about + hidden) if (one.group, one.name) not in done]
        if not todo:
            continue
        model = load(system, sources)
        for one in tqdm(todo, desc=name, unit=" questions"):
            written, nll = answer(model, tokenizer, one, system.get("learning"))
            line = {"system": name, "group": one.group, "name": one.name, "found": one.found.lower() in written.lower()}
            line |= {"nll": nll, "written": written}
            with path.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line, ensure_ascii=False) + "\n")


def tables(lines: list[dict]) -> list[Table]:
    """Right answers, losses of the right answers, and what was written about the documents."""
    present = dict.fromkeys(line["system"] for line in lines)
    names = sorted(present, key=lambda name: ASKED.index(name) if name in ASKED else len(ASKED))
    groups = list(dict.fromkeys(line["group"] for line in lines))
    own = {
        (name, group): [line for line in lines if (line["system"], line["group"]) == (name, group)]
        for name in names
        for group in groups
    }

    def rows(cell):
        return [[name, *(cell(own[name, group]) if own[name, group] else "" for group in groups)] for name in names]

    found = rows(lambda some: f"{sum(line['found'] for line in some)} of {len(some)}")
    losses = rows(lambda some: f"{statistics.fmean(line['nll'] for line in some):.2f}")
    said = [line for line in lines if line["group"] == DOCUMENTS]
    said.sort(key=lambda line: line["name"])
    words = [[line["name"], line["system"], line["written"].replace("\n", " ").replace("|", "/")] for line in said]
    return [
        Table("Answers that name what was asked for", ["", *groups], found),
        Table("Loss of the right answers, nats per token", ["", *groups], losses),
        Table("What was written about the documents", ["question", "system", "answer"], words),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask about texts that have left the window.")
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py has written")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    for source in ("released", "converted", "trained"):
        parser.add_argument(f"--{source}", required=source == "released", help="see systems.yaml")
    parser.add_argument("--system", action="append", choices=ASKED, help="only this one; may be repeated")
    asked = parser.parse_args()
    ask(asked, {name: getattr(asked, name) for name in ("released", "converted", "trained") if getattr(asked, name)})
    made = tables(measured(asked.output / "answers.jsonl"))
    write_text(asked.output / "answers.md", "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in made))
    print(*(table.markdown() for table in made[:2]), sep="\n")


if __name__ == "__main__":
    main()
