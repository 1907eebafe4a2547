"""The published new weights of SmolLM2-135M: whole, small, and of the base that the card names."""

from pathlib import Path

import torch
from huggingface_hub import ModelCard

from ttt_e2e import TTTE2EForCausalLM
from ttt_e2e.conversion import PrimeWeights
from ttt_e2e.conversion.prime_weights import PRIME_WEIGHTS
from ttt_e2e.conversion.sketches import sketch
from ttt_e2e.conversion.strictness import model_shapes

FOLDER = Path(__file__).parents[2] / "model_cards" / "checkpoints" / "smollm2-135m-ttt"


def test_the_new_weights_are_whole_and_small():
    weights = PrimeWeights.from_pretrained(FOLDER)
    assert (FOLDER / PRIME_WEIGHTS).stat().st_size <= 12_000_000
    shapes = model_shapes(TTTE2EForCausalLM, weights.config)
    assert shapes.keys() == weights.tensors.keys() | weights.sketches.keys()
    for name, tensor in weights.tensors.items():
        assert tuple(tensor.shape) == shapes[name] and tensor.dtype == torch.bfloat16 and tensor.isfinite().all()
    size = sketch(torch.ones(3)).shape
    assert all(own.shape == size and own.isfinite().all() for own in weights.sketches.values())


def test_the_card_names_base_and_licence():
    card, weights = ModelCard.load(FOLDER / "README.md"), PrimeWeights.from_pretrained(FOLDER)
    assert card.data.base_model == weights.base == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.license == "apache-2.0" and "No results" not in card.text
