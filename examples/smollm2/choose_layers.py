"""Which layers of a hybrid should keep full attention: those that copy what has left the window.

    python examples/smollm2/choose_layers.py --released GGUF --converted FOLDER --texts FOLDER

A validation text is read twice, with other text between, and the loss of the second reading is measured with full
attention in one layer at a time, then in the best two, three, ... together. Prints a table; systems.yaml names layers.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from measure import DTYPE, read
from tqdm.auto import tqdm

from ttt_e2e import TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.conversion.pretrained import find_source
from ttt_e2e.conversion.transformer_layout import check_convertible
from ttt_e2e.evaluation.tables import Table

COPIED, BETWEEN = 900, 1200  # tokens; the window is shorter than both together
LAYERS = 5  # of 30: one in six


def with_full_attention(folder: str, layers: Sequence[int]) -> TTTE2EForCausalLM:
    """The converted model, with full attention in some layers and the window in the others."""
    config = TTTE2EConfig.from_pretrained(folder)
    kinds = ["full_attention" if n in layers else "sliding_attention" for n in range(config.num_hidden_layers)]
    config.layer_types, config.num_sink_tokens = (
        kinds,
        0 if "sliding_attention" not in kinds else config.num_sink_tokens,
    )
    return TTTE2EForCausalLM.from_pretrained(folder, config=config, dtype=DTYPE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure which layers copy from beyond the window.")
    parser.add_argument("--released", required=True, help="the GGUF file, for its tokenizer")
    parser.add_argument("--converted", required=True, help="what `ttt-e2e convert transformer` made of it")
    parser.add_argument("--texts", type=Path, required=True, help="folder that texts.py has written")
    asked = parser.parse_args()
    tokenizer = find_source(asked.released, check_convertible).contents().tokenizer
    lines = (asked.texts / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    copied, between = (
        tokenizer(text, return_tensors="pt", split_special_tokens=True).input_ids[:, :count]
        for text, count in zip((json.loads(line)["text"] for line in lines), (COPIED, BETWEEN), strict=True)
    )
    ids = torch.cat([copied, between, copied], dim=1)

    def loss(layers: Sequence[int]) -> float:
        return read(with_full_attention(asked.converted, layers), ids, False)[0][-COPIED:].mean().item()

    count = TTTE2EConfig.from_pretrained(asked.converted).num_hidden_layers
    found = {layer: loss([layer]) for layer in tqdm(range(count), desc="single layers")}
    best = sorted(found, key=found.__getitem__)
    rows = [["none", f"{loss([]):.3f}"], *([str(layer), f"{found[layer]:.3f}"] for layer in best[: 2 * LAYERS])]
    for size in range(2, LAYERS + 1):
        chosen = sorted(best[:size])
        rows.append([", ".join(map(str, chosen)), f"{loss(chosen):.3f}"])
    every = list(range(count // LAYERS - 1, count, count // LAYERS))
    rows.append([", ".join(map(str, every)), f"{loss(every):.3f}"])
    rows.append(["all", f"{loss(range(count)):.3f}"])
    table = Table("", ["layers with full attention", "loss of the second reading"], rows)
    print(table.markdown())


if __name__ == "__main__":
    main()
