"""A planted needle is found by who looks for it, and not by chance; prompts keep to their length."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from ttt_e2e import RecurrentHybridConfig, RecurrentHybridForCausalLM, TTTE2EConfig, TTTE2EForCausalLM
from ttt_e2e.data.needles import documentation_texts, needle_prompts, needle_settings, ruler_essays
from ttt_e2e.evaluation.needle_in_a_haystack import (
    continuation_ids,
    needle_in_a_haystack,
    value_losses,
    written_answers,
)
from ttt_e2e.evaluation.subject import Subject, token_losses

NUMBER, UUID = r"\d{7}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NOVEL = ["It was late. " + " ".join(f"Chapter {n} said nothing of use; he left." for n in range(400))]
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "bos_token_id": 257}
SETTINGS = {"answer_tokens": 8, "distractors": 3}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after one that begins the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {name: index for index, name in enumerate([*alphabet, "<pad>", "<begin>", "<end>"])}
    backend = Tokenizer(models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", words["<begin>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<begin>", eos_token="<end>", padding_side="right"
    )


TOKENIZER = byte_tokenizer()


class Oracle:
    """Stands in for a model: reads the needle in the prompt and says its value."""

    device, config = torch.device("cpu"), SimpleNamespace()

    def eval(self):
        return self

    def named_modules(self):
        return iter(())

    def value(self, ids):
        """Ids that follow a prompt: its value; `ids` may go on into the answer."""
        text = TOKENIZER.decode(ids, skip_special_tokens=True)
        return TOKENIZER(" " + re.search(r"One of .* is: (\S+)\.", text)[1], add_special_tokens=False).input_ids

    def generate(self, ids, attention_mask, max_new_tokens, **_):
        values = [self.value(row[mask.bool()])[:max_new_tokens] for row, mask in zip(ids, attention_mask, strict=True)]
        return torch.cat([ids, torch.tensor(values)], dim=1)

    def __call__(self, ids, cache=None, **_):
        """The cache is the list of all ids so far; the prompt's last id begins what is asked of the cache."""
        if cache is None:
            return SimpleNamespace(cache=ids[0].tolist())
        value = torch.tensor(self.value(cache))[: ids.shape[1]]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(value, 300)[None] * 20.0)


def llama(**changes):
    set_seed(0)
    config = LlamaConfig(**TINY, num_hidden_layers=2, eos_token_id=None, initializer_range=0.2, **changes)
    return LlamaForCausalLM(config)


def gpt2():
    """Absolute positions: padding that is counted as text would show."""
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=2048, n_embd=32, n_layer=2, n_head=4, eos_token_id=None)
    )


def learner():
    set_seed(0)
    config = TTTE2EConfig(
        **TINY,
        num_hidden_layers=3,
        num_suffix_layers=1,
        mini_batch_size=16,
        sliding_window=32,
        eos_token_id=None,
        initializer_range=0.1,
    )
    return TTTE2EForCausalLM(config)


def hybrid():
    set_seed(0)
    mixers = ["gated_delta_net", "sliding_attention"]
    config = RecurrentHybridConfig(
        **TINY,
        mixer_types=mixers,
        num_hidden_layers=2,
        sliding_window=32,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        initializer_range=0.2,
        eos_token_id=None,
    )
    return RecurrentHybridForCausalLM(config)


def mamba():
    """Its forward returns no `cache`."""
    set_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4))


def subject(model, **arguments) -> Subject:
    return Subject("model", model, TOKENIZER, arguments)


@pytest.mark.parametrize("task, value", [(1, NUMBER), (2, NUMBER), (3, UUID)])
def test_prompts_are_worded_as_rulers(task, value):
    prompt = needle_prompts(TOKENIZER, task, 1500, 1, seed=3, haystack=NOVEL, distractors=4)[0]
    kind = "uuid" if task == 3 else "number"
    key = re.search(r"for ([a-z]+-[a-z]+) is: ", prompt.text)[1]
    first, *context, last = prompt.text.split("\n")
    assert first == (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {kind} afterwards."
    )
    assert last == (
        f"What is the special magic {kind} for {key} mentioned in the provided text? The special magic {kind} for "
        f"{key} mentioned in the provided text is"
    )
    assert "\n".join(context).count(f"One of the special magic {kind}s for {key} is: {prompt.values[0]}.") == 1
    assert ("The grass is green." in prompt.text) == (task == 1) and ("Chapter" in prompt.text) == (task != 1)
    assert prompt.text.endswith(prompt.question) and prompt.ids == TOKENIZER(prompt.text).input_ids
    assert len(set(prompt.values)) == 5 and all(re.fullmatch(value, shown) for shown in prompt.values)
    assert not any(wrong in prompt.text for wrong in prompt.values[1:])


@pytest.mark.parametrize("task, unit", [(1, 90), (2, 20)])
@pytest.mark.parametrize("length", [700, 1024, 3001])
def test_prompts_fill_the_length_and_never_exceed_it(task, unit, length):
    """Whole units: the noise is 90 bytes with its newline, no word of the novel as long as 20."""
    for prompt in needle_prompts(TOKENIZER, task, length, 6, seed=0, haystack=NOVEL, answer_tokens=40):
        assert length - unit < len(prompt.ids) + 40 <= length


def test_the_needle_is_where_it_should_be():
    prompts = needle_prompts(TOKENIZER, 1, 4000, 4, seed=0)
    assert [prompt.depth for prompt in prompts] == [0.125, 0.375, 0.625, 0.875]
    for prompt in prompts:
        lines = prompt.text.split("\n")[1:-1]
        place = next(index for index, line in enumerate(lines) if line.startswith("One of"))
        assert abs(place / (len(lines) - 1) - prompt.depth) <= 0.5 / (len(lines) - 1)
    first = needle_prompts(TOKENIZER, 2, 1500, 1, seed=0, haystack=NOVEL, depth=0.0)[0]
    last = needle_prompts(TOKENIZER, 2, 1500, 1, seed=0, haystack=NOVEL, depth=1.0)[0]
    assert first.text.split("\n")[1].startswith("One of") and re.search(r"One of .* is: \d+\.\n", last.text)


def test_a_needle_never_stands_inside_a_sentence():
    prompt = needle_prompts(TOKENIZER, 2, 3000, 1, seed=0, haystack=NOVEL, depth=0.5)[0]
    assert re.search(r"he left\. One of the special .* is: \d{7}\. Chapter", prompt.text)


def test_the_seed_says_everything():
    one = needle_prompts(TOKENIZER, 3, 1200, 3, seed=5)
    assert needle_prompts(TOKENIZER, 3, 1200, 3, seed=5) == one != needle_prompts(TOKENIZER, 3, 1200, 3, seed=6)
    longer = needle_prompts(TOKENIZER, 3, 2400, 4, seed=5)
    assert [prompt.values for prompt in longer[:3]] == [prompt.values for prompt in one]


def test_offline_prose_is_prose():
    texts = documentation_texts()
    assert sum(len(text.split()) for text in texts) > 15_000
    assert not any("::=" in text or ">>>" in text for text in texts)
    settings = needle_settings()
    assert all(len(settings[name]) == len(set(settings[name])) > 100 for name in ("adjectives", "nouns"))


def test_rulers_essays_are_asked_of_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: asked.append((a, k)) or {"text": ["one", "two"]})
    assert ruler_essays() == ["one", "two"]
    assert asked == [(("baber/paul_graham_essays",), {"split": "train"})]


@pytest.mark.parametrize("task", [1, 2, 3])
def test_an_oracle_finds_the_needle(task):
    measured = needle_in_a_haystack(subject(Oracle()), task, 900, 10, seed=0, haystack=NOVEL, batch_size=10)
    assert measured["accuracy"] == measured["likelihood_accuracy"] == 1 and measured["margin"] > 20
    assert measured["depth"] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9]) and measured["accuracy_by_depth"] == [1.0] * 5
    assert json.loads(json.dumps(measured)) == measured


def test_a_random_model_is_at_chance():
    """Of 40 guesses with chance 1/4, 3 standard deviations are 8.2; writing seven digits by chance does not happen."""
    measured = needle_in_a_haystack(subject(llama()), 1, 460, 40, seed=1, **SETTINGS)
    assert measured["chance"] == 0.25 and measured["accuracy"] == 0
    assert abs(measured["likelihood_accuracy"] - 0.25) <= 8.2 / 40
    assert measured["prompt_tokens"] <= 460 - 8 and len(measured["margin_by_depth"]) == 5


def test_a_found_value_is_counted_where_it_was_planted():
    """A model that knows only needles of the second half: by depth, not on average."""

    class Forgetful(Oracle):
        def value(self, ids):
            ids = list(ids)
            value = super().value(ids)
            text = TOKENIZER.decode(ids, skip_special_tokens=True)
            return value if text.index("One of") > 0.5 * len(text) else [5] * len(value)

    measured = needle_in_a_haystack(subject(Forgetful()), 1, 4000, 10, seed=0, batch_size=10)
    assert measured["accuracy_by_depth"][0] == 0 and measured["accuracy_by_depth"][-1] == 1
    assert measured["likelihood_accuracy_by_depth"] == measured["accuracy_by_depth"]
    assert 0 < measured["accuracy"] < 1


@pytest.mark.parametrize("build", [llama, gpt2, learner, hybrid, mamba])
def test_likelihoods_are_those_of_prompt_and_value_read_together(build):
    model = subject(build())
    prompt = needle_prompts(TOKENIZER, 1, 460, 1, seed=0, **SETTINGS)[0]
    losses = value_losses(model, prompt)
    for value, loss in zip(prompt.values, losses, strict=True):
        ids = torch.tensor([TOKENIZER(f"{prompt.text} {value}").input_ids])
        expected = token_losses(model, ids)[0, -8:].sum().item()  # a space and seven digits
        assert loss == pytest.approx(expected, rel=1e-4)


def test_arguments_reach_the_model():
    prompt = needle_prompts(TOKENIZER, 1, 460, 1, seed=0, **SETTINGS)[0]
    model = learner()
    assert value_losses(subject(model), prompt) != value_losses(subject(model, test_time_training=False), prompt)
    seen = []
    model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["test_time_training"]), with_kwargs=True)
    written_answers(subject(model, test_time_training=False), [prompt], 2)
    assert seen and not any(seen)


@pytest.mark.parametrize("build", [llama, gpt2, learner, hybrid])
def test_batches_and_padding_change_nothing(build):
    model = subject(build())
    whole = needle_prompts(TOKENIZER, 1, 480, 1, seed=0, **SETTINGS)[0]
    prompts = [replace(whole, ids=whole.ids[:length]) for length in (len(whole.ids), 400, 37)]
    alone = [written_answers(model, [prompt], 8)[0] for prompt in prompts]
    assert written_answers(model, prompts, 8) == alone and len(set(alone)) > 1


def test_tokens_of_a_value_are_those_behind_the_question():
    ids = continuation_ids(TOKENIZER, "the text is", " 1234567")
    assert TOKENIZER.decode(ids) == " 1234567" and len(ids) == 8


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": 4}, r"task=4: must be one of \[1, 2, 3\]"),
        ({"length": 0}, "length=0: must be at least 1"),
        ({"length": 300}, r"length=300: too short for the question; .* it must be at least 4\d\d"),
        ({"samples": 0}, "samples=0"),
        ({"distractors": 0}, "distractors=0"),
        ({"answer_tokens": -1}, "answer_tokens=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"depth": 1.5}, "depth=1.5: must be between 0"),
        ({"task": 2, "haystack": []}, "haystack: 0 documents without a word"),
        ({"task": 2, "haystack": "text"}, "haystack: one string; give a list"),
    ],
)
def test_mistakes_are_named_before_any_work(changes, message):
    arguments = {"task": 1, "length": 460, "samples": 1, "seed": 0} | SETTINGS | changes
    with pytest.raises(ValueError, match=message):
        needle_in_a_haystack(subject(Untouchable()), **arguments)


class Untouchable(Oracle):
    """A model that must not be asked."""

    def generate(self, *_, **__):
        raise AssertionError

    __call__ = generate


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="subject: 'plain' has no tokenizer"):
        needle_in_a_haystack(Subject("plain", Untouchable(), None, {}), 1, 460, 1, seed=0)


def test_learned_positions_are_a_limit():
    with pytest.raises(ValueError, match="2048"):
        needle_in_a_haystack(subject(gpt2()), 1, 4096, 1, seed=0)
