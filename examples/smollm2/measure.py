"""Loss by position of long passages: what the window forgets, what learning wins back, and what attention keeps.

    python examples/smollm2/measure.py --texts FOLDER --output FOLDER --released GGUF --converted FOLDER \
        [--trained FOLDER] [--static FOLDER] [--system NAME ...]

    OUTPUT/passages.jsonl    one line per system and passage, written as soon as it is measured
    OUTPUT/results.md        table, with standard errors over passages; OUTPUT/results.png, results.svg: its picture

The same command goes on after an interruption. Losses are nats per token; up to 8K they are of the shorter passages,
beyond of the longer ones. A token is a repeated one where the 13 tokens that end with it stood in the passage before.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.conversion import PrimeWeights
from ttt_e2e.conversion.pretrained import find_source
from ttt_e2e.conversion.transformer_layout import check_convertible
from ttt_e2e.evaluation.latency import cache_bytes
from ttt_e2e.evaluation.plots import Panel, plot_panels
from ttt_e2e.evaluation.tables import Table
from ttt_e2e.storage.disk import write_text

HERE = Path(__file__).parent
SYSTEMS = yaml.safe_load((HERE / "systems.yaml").read_text(encoding="utf-8"))
SOURCES = ("released", "converted", "trained", "static")
EDGES = (0, 1024, 2048, 4096, 8192, 16384, 32768)  # of the positions in tables and pictures
SHORT, LONG = 8192, 32768  # tokens of the passages
BASELINE = "window and sinks"
NGRAM = 13
SHOWN = 0.3  # nats above the baseline up to which a picture shows a loss
SEGMENT = 1024  # tokens that a plain transformer reads at once
DTYPE = torch.bfloat16


def load(system: Mapping, sources: Mapping[str, str]) -> PreTrainedModel:
    """The model of a system, in bfloat16."""
    name = sources[system["source"]]
    if system["source"] == "released":
        return _released(name, system.get("rope"))
    if system["source"] == "converted":
        config = _changed(TTTE2EConfig.from_pretrained(name), system)
        return TTTE2EForCausalLM.from_pretrained(name, config=config, dtype=DTYPE)
    weights = PrimeWeights.from_pretrained(name)
    return weights.on_base(sources["released"], config=_changed(weights.config, system), dtype=DTYPE)


def _released(name: str, rope: Mapping | None) -> PreTrainedModel:
    source = find_source(name, check_convertible)
    config, weights = copy.deepcopy(source.config), source.contents().weights
    if rope is not None:
        config.rope_parameters = dict(config.rope_parameters) | dict(rope)
        config.max_position_embeddings = LONG
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    given = {own: weights.read(own) for own in weights.shapes}
    lacking = set(model.state_dict()) - set(given) - set(model.all_tied_weights_keys)
    if lacking:
        raise SystemExit(f"{name} lacks {sorted(lacking)}")
    model.load_state_dict(given, strict=False)
    model.tie_weights()
    return model.eval()


def _changed(config: TTTE2EConfig, system: Mapping) -> TTTE2EConfig:
    config = copy.deepcopy(config)
    config.inner_learning_rate = system.get("inner_learning_rate", config.inner_learning_rate)
    for layer in system.get("full_attention_layers", ()):
        config.layer_types[layer] = "full_attention"
    if "rope" in system:
        own = dict(config.rope_parameters)
        config.rope_parameters = {"full_attention": own | system["rope"], "sliding_attention": own}
    return config


@torch.no_grad()
def read(model: PreTrainedModel, ids: torch.Tensor, learning: bool | None) -> tuple[torch.Tensor, int]:
    """Losses of ids [1, length] from the second token on, [length - 1] float32, and bytes kept after the last."""
    if isinstance(model, TTTE2EForCausalLM):
        output = model(ids, labels=ids, use_cache=True, skip_logits=True, test_time_training=learning)
        return output.token_nll[0].float(), cache_bytes(output)
    losses, cache = [], None
    for piece, expected in zip(ids[:, :-1].split(SEGMENT, 1), ids[:, 1:].split(SEGMENT, 1), strict=True):
        output = model(piece, cache=cache, use_cache=True)
        cache = output.cache
        losses.append(torch.nn.functional.cross_entropy(output.logits[0].float(), expected[0], reduction="none"))
    return torch.cat(losses), cache_bytes(output)


def repeated(ids: torch.Tensor, size: int = NGRAM) -> torch.Tensor:
    """Of ids [length], bool [length - 1]: whether the n-gram that ends with a token, from the second on, is not new."""
    seen, found, tokens = set(), [], ids.tolist()
    for end in range(2, len(tokens) + 1):
        gram = tuple(tokens[max(0, end - size) : end])
        found.append(len(gram) == size and gram in seen)
        seen.add(gram)
    return torch.tensor(found)


def by_bucket(losses: torch.Tensor, old: torch.Tensor) -> list[dict]:
    """Tokens and summed losses between neighbouring edges, of new and of repeated tokens."""
    buckets = []
    for begin, end in itertools.pairwise(EDGES):
        if begin > len(losses):
            break
        part, again = losses[max(begin - 1, 0) : end - 1].double(), old[max(begin - 1, 0) : end - 1]
        buckets.append(
            {
                "new": [int((~again).sum()), part[~again].sum().item()],
                "repeated": [int(again.sum()), part[again].sum().item()],
            }
        )
    return buckets


def passages(texts: Path, tokenizer: PreTrainedTokenizerBase, length: int) -> list[tuple[str, torch.Tensor]]:
    """Name and ids [1, length] of each passage."""
    found = []
    for line in (texts / f"evaluation-{length}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        ids = tokenizer(record["text"], return_tensors="pt", split_special_tokens=True).input_ids[:, :length]
        if ids.shape[1] < length:
            raise SystemExit(f"{record['path']} has {ids.shape[1]} tokens, not {length}: make longer passages")
        found.append((f"{record['path']}-{length}", ids))
    return found


def measured(path: Path) -> list[dict]:
    """The lines that are there; a torn last one is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def measure(asked: argparse.Namespace, sources: Mapping[str, str]) -> None:
    tokenizer = find_source(sources["released"], check_convertible).contents().tokenizer
    texts = {length: passages(asked.texts, tokenizer, length) for length in (SHORT, LONG)}
    path = asked.output / "passages.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in asked.system or SYSTEMS:
        system = SYSTEMS[name]
        if system["source"] not in sources:
            print(f"{name}: left out, --{system['source']} is not given")
            continue
        done = {line["passage"] for line in measured(path) if line["system"] == name}
        lengths = system.get("lengths", (SHORT, LONG))
        todo = [pair for length in lengths for pair in texts[length] if pair[0] not in done]
        if not todo:
            continue
        model = load(system, sources)
        for passage, ids in tqdm(todo, desc=name, unit=" passages"):
            begin = time.perf_counter()
            losses, kept = read(model, ids, system.get("learning"))
            line = {
                "system": name,
                "passage": passage,
                "length": ids.shape[1],
                "seconds": round(time.perf_counter() - begin, 2),
                "bytes": kept,
                "buckets": by_bucket(losses, repeated(ids[0])),
            }
            with path.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(line) + "\n")


def mean_and_error(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def losses_of(lines: list[dict], system: str, bucket: int, kind: str) -> dict[str, float]:
    """Mean loss of each passage at a bucket, of all, new or repeated tokens."""
    length = SHORT if EDGES[bucket + 1] <= SHORT else LONG
    found = {}
    for line in lines:
        if line["system"] == system and line["length"] == length:
            kinds = ("new", "repeated") if kind == "all" else (kind,)
            tokens, total = (sum(line["buckets"][bucket][each][n] for each in kinds) for n in (0, 1))
            if tokens:
                found[line["passage"]] = total / tokens
    return found


def cell(lines: list[dict], system: str, bucket: int, kind: str = "all") -> str:
    """Mean loss, and its difference to the baseline with a standard error over the passages that both have read."""
    own, base = losses_of(lines, system, bucket, kind), losses_of(lines, BASELINE, bucket, kind)
    if not own:
        return ""
    mean = statistics.fmean(own.values())
    both = own.keys() & base.keys()
    if system == BASELINE or not both:
        return f"{mean:.3f}"
    difference, error = mean_and_error([own[passage] - base[passage] for passage in sorted(both)])
    return f"{mean:.3f} ({difference:+.3f}{'' if math.isnan(error) else f' ± {error:.3f}'})"


def cost(lines: list[dict], system: str) -> list[str]:
    """Seconds per 1K tokens (None in a line: the machine was busy) and MiB kept, after 8K and after 32K."""
    cells = []
    for length in (SHORT, LONG):
        own = [line for line in lines if line["system"] == system and line["length"] == length]
        seconds = [line["seconds"] / length * 1024 for line in own if line["seconds"] is not None]
        cells.append(f"{statistics.median(seconds):.2f}" if seconds else "")
        cells.append(f"{own[0]['bytes'] / 2**20:.1f}" if own else "")
    return cells


def tables(lines: list[dict]) -> list[Table]:
    names = [name for name in SYSTEMS if any(line["system"] == name for line in lines)]
    spans = [f"{begin // 1024}-{end // 1024}K" for begin, end in itertools.pairwise(EDGES)]
    made = []
    for kind in ("all", "new", "repeated"):
        rows = [[name, *(cell(lines, name, bucket, kind) for bucket in range(len(spans)))] for name in names]
        made.append(Table(f"Loss of {kind} tokens by position (difference to {BASELINE})", ["", *spans], rows))
    header = ["", "8K: s per 1K tokens", "8K: MiB kept", "32K: s per 1K tokens", "32K: MiB kept"]
    made.append(Table("Time and memory", header, [[name, *cost(lines, name)] for name in names]))
    shares = []
    for passage in dict.fromkeys(line["passage"] for line in lines):
        buckets = next(line["buckets"] for line in lines if line["passage"] == passage)
        again, new = (sum(bucket[kind][0] for bucket in buckets) for kind in ("repeated", "new"))
        shares.append([passage, f"{100 * again / (again + new):.1f} %"])
    made.append(Table(f"Tokens that end a repeated {NGRAM}-gram", ["", "share"], shares))
    return made


def picture(lines: list[dict], path: Path) -> None:
    """Difference to the baseline by position, of all tokens and of new ones; far above it a curve has a gap."""
    ends = EDGES[1:]
    panels = []
    for kind in ("all", "new"):
        curves = {}
        for name in SYSTEMS:
            values = []
            for bucket in range(len(ends)):
                own, base = losses_of(lines, name, bucket, kind), losses_of(lines, BASELINE, bucket, kind)
                both = own.keys() & base.keys()
                difference = statistics.fmean(own[p] - base[p] for p in both) if both else math.nan
                values.append(difference if difference < SHOWN else math.nan)
            if not all(map(math.isnan, values)):
                curves[name] = (ends, values)
        panels.append(Panel(f"{kind} tokens", "up to position", f"nats above {BASELINE}", curves, ends))
    plot_panels([panels], path, f"SmolLM2-135M on long documents (losses more than {SHOWN} above are not shown)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the systems of systems.yaml on long passages.")
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py has written")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, new or of the same texts")
    for source in SOURCES:
        parser.add_argument(f"--{source}", required=source == "released", help="see systems.yaml")
    parser.add_argument("--system", action="append", choices=list(SYSTEMS), help="only this one; may be repeated")
    asked = parser.parse_args()
    measure(asked, {source: getattr(asked, source) for source in SOURCES if getattr(asked, source)})
    lines = measured(asked.output / "passages.jsonl")
    text = "\n".join(f"## {table.title}\n\n{table.markdown()}" for table in tables(lines))
    write_text(asked.output / "results.md", text)
    picture(lines, asked.output / "results")
    print(text)


if __name__ == "__main__":
    main()
