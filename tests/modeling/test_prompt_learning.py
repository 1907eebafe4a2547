"""PEFT's prompt tuning, P-tuning and prefix tuning; and that `generate` has no arguments of its own on the way."""

import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import DynamicCache, set_seed

from .generating import generate
from .helpers import BATCH, WINDOW, gradients, random_ids, small_model
from .recurrent import hybrid
from .ttt_layers import layers_model

# PEFT hands its prefix over under the cache's earlier name.
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")

VIRTUAL = 5
METHODS = {
    "prompt tuning": PromptTuningConfig,
    "p tuning": PromptEncoderConfig,
    "prefix tuning": PrefixTuningConfig,
}
SETTINGS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def with_prompt(method, model=None, length=VIRTUAL):
    """A model behind a prompt that is no longer neutral."""
    model = small_model(torch.float64, initializer_range=0.3, tie_word_embeddings=False) if model is None else model
    set_seed(0)
    arguments = {"encoder_hidden_size": 16} if method == "p tuning" else {}
    model = get_peft_model(model, METHODS[method](task_type="CAUSAL_LM", num_virtual_tokens=length, **arguments))
    for parameter in model.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter)
    return model.to(torch.float64).eval()


def left_padded():
    ids, mask = random_ids(2, 2 * WINDOW), torch.ones(2, 2 * WINDOW, dtype=torch.long)
    mask[0, :7] = 0
    return ids, mask


def greedy_by_hand(model, ids, mask, tokens, **arguments):
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, **arguments).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@pytest.mark.parametrize("off", [{"test_time_training": False}, {"learn_from": "none"}], ids=["plain", "learn-from"])
@pytest.mark.parametrize("method", METHODS)
def test_with_learning_off_it_writes_what_its_logits_say(method, off):
    model, (ids, mask) = with_prompt(method), left_padded()
    expected = greedy_by_hand(model, ids, mask, BATCH + 2, test_time_training=False)
    without = small_model(torch.float64, initializer_range=0.3, tie_word_embeddings=False)
    plain = without.generate(ids, attention_mask=mask, max_new_tokens=BATCH + 2, test_time_training=False, **SETTINGS)
    assert not torch.equal(plain, expected), "the prompt matters"
    for arguments in ({}, {"use_cache": False}):
        written = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=BATCH + 2, **SETTINGS, **off, **arguments
        )
        assert torch.equal(written, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["ttt_layers", "recurrent_hybrid"])
def test_the_other_families_write_behind_a_prompt_or_say_why_not(family, method):
    make = layers_model if family == "ttt_layers" else hybrid
    model, (ids, mask) = with_prompt(method, make("everything")), left_padded()
    arguments = {"input_ids": ids, "attention_mask": mask}
    if method == "prefix tuning":
        with pytest.raises((TypeError, ValueError), match=r"`cache`.*DynamicCache"):
            model(**arguments)
        return
    expected = greedy_by_hand(model, ids, mask, 6)
    assert torch.equal(model.generate(**arguments, max_new_tokens=6, **SETTINGS), expected)


@pytest.mark.parametrize("method", METHODS)
def test_with_learning_on_it_is_refused_by_name(method):
    model, (ids, mask) = with_prompt(method), left_padded()
    name = method.capitalize()
    with pytest.raises(ValueError, match=rf"{name} of PEFT.*cannot be learned from.*test_time_training=False.*LoRA"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, **SETTINGS)
    name = "prefix tuning" if method == "prefix tuning" else "prompt tuning"
    with pytest.raises(ValueError, match=rf"{name} of PEFT.*test_time_training=False"):
        model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("length", [VIRTUAL, WINDOW + VIRTUAL])
@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_a_prefix_is_keys_and_values_of_a_text_before(kind, length):
    """Those of a real beginning, given as prefix tuning gives them, are that beginning; a window cuts them."""
    model = small_model(torch.float64, layer_types=[kind] * 4, num_key_value_heads=2)
    ids, off = random_ids(2, 3 * WINDOW), {"test_time_training": False}
    ids[1, :length] = ids[0, :length]
    read = model(ids[:1, :length], use_cache=True, **off).cache.layers
    expected = model(ids, **off).logits[:, length:]
    model = with_prompt("prefix tuning", model, length)
    rows = [states[0].transpose(0, 1).flatten(1) for layer in read for states in (layer.keys, layer.values)]
    with torch.no_grad():
        weight = model.prompt_encoder["default"].embedding.weight
        weight[length - len(rows[0]) :] = torch.cat(rows, dim=1)  # before them what no query sees
    found = model(input_ids=ids[:, length:], attention_mask=torch.ones(2, 3 * WINDOW - length), **off)
    torch.testing.assert_close(found.logits, expected, rtol=1e-9, atol=1e-9)
    assert found.cache.columns == 3 * WINDOW and not found.cache.has_learned


def test_keys_and_values_of_another_model_are_refused():
    ids, off = random_ids(1, 9), {"test_time_training": False}
    with pytest.raises(ValueError, match=r"`cache` is a DynamicCache with keys of the shapes.*4 times \(4, 4, 8\)"):
        small_model()(ids, cache=DynamicCache([(torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 8))] * 4), **off)
    attention_free = small_model(use_attention=False)
    with pytest.raises(ValueError, match="`cache` is a DynamicCache with keys"):
        attention_free(ids, cache=DynamicCache([(torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8))] * 4), **off)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_prompts_are_trained_with_learning_off(method, checkpointing):
    """The slope of the loss along a random direction."""
    model, (ids, mask) = with_prompt(method), left_padded()
    if checkpointing:
        model.train().get_base_model().activation_checkpointing_enable()

    def loss():
        return model(input_ids=ids, attention_mask=mask, labels=ids, test_time_training=False).loss

    loss().backward()
    found = gradients(model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == parameters.keys()
    generator, step, values = torch.Generator().manual_seed(0), 1e-6, []
    moves = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in parameters.items()}
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += sign * step * moves[name]
            values.append(loss().item())
    slope = sum((found[name] * moves[name]).sum().item() for name in parameters)
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


# ------------------------------------------------------------------------------------------------ arguments of generate


def test_the_steps_of_generate_get_arguments_of_the_model_alone(two_blocks, monkeypatch):
    seen = set()
    prepare = type(two_blocks).prepare_inputs_for_generation

    def noted(self, *args, **kwargs):
        seen.update(kwargs)
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(type(two_blocks), "prepare_inputs_for_generation", noted)
    generate(two_blocks, random_ids(2, 20), max_new_tokens=3, learn_from="prompt")
    transformers_own = {"next_sequence_length", "is_first_iteration"}
    assert seen - transformers_own <= set(inspect.signature(two_blocks.forward).parameters)


def test_calls_in_several_threads_keep_their_own_ends(two_blocks):
    """Rows that end at different ids, and what is learned after their ends, do not meet."""
    calls = [(random_ids(2, 18 + 3 * seed, seed=seed), seed) for seed in range(4)]

    def written(ids, seed):
        plain = generate(two_blocks, ids, max_new_tokens=4 * BATCH).sequences
        ends = [int(plain[0, ids.shape[1] + 2 + seed])]  # the first row ends early
        output = generate(
            two_blocks, ids, max_new_tokens=4 * BATCH, eos_token_id=ends, pad_token_id=0, return_dict_in_generate=True
        )
        return output.sequences, output.cache.context.tokens

    alone = [written(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: written(*call), calls))
    for (ids, tokens), (expected, expected_tokens) in zip(together, alone, strict=True):
        assert torch.equal(ids, expected) and tokens == expected_tokens
    assert any(len(set(tokens)) > 1 for _, tokens in alone), "some row stops being read"
