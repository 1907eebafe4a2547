"""`pipeline("text-generation")` from a saved folder, with nothing but the names that transformers knows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from ttt_e2e import TTTE2EForCausalLM

from .helpers import small_model
from .tiny_tokenizer import SENTENCES, byte_level_tokenizer

GREEDY = {"max_new_tokens": 20, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = byte_level_tokenizer()
    model = small_model(vocab_size=len(tokenizer), tie_word_embeddings=False, initializer_range=0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = list(range(3))  # texts, in which no special token appears
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write(folder):
    return pipeline("text-generation", model=str(folder), tokenizer=str(folder))


@pytest.fixture(scope="module")
def expected(folder):
    """What generate() writes after a prompt alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, TTTE2EForCausalLM)

    def text(prompt, **arguments):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, **GREEDY | arguments)
        return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    return text


def test_one_prompt(write, expected):
    (answer,) = write(SENTENCES[0], **GREEDY)
    assert answer["generated_text"] == SENTENCES[0] + expected(SENTENCES[0])


def test_return_full_text(write, expected):
    (answer,) = write(SENTENCES[0], return_full_text=False, **GREEDY)
    assert answer["generated_text"] == expected(SENTENCES[0])


@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_many_prompts(write, expected, batch_size):
    """Batches are padded on the left; each answer is the one to the prompt alone."""
    prompts = [SENTENCES[0], "the mill", SENTENCES[2]]
    answers = write(prompts, batch_size=batch_size, return_full_text=False, **GREEDY)
    assert [answer["generated_text"] for (answer,) in answers] == [expected(prompt) for prompt in prompts]


def test_chat_messages(write, expected, folder):
    messages = [{"role": "user", "content": SENTENCES[1]}]
    (answer,) = write(messages, **GREEDY)
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert answer["generated_text"] == [*messages, {"role": "assistant", "content": expected(prompt)}]


def test_several_chats(write):
    chats = [[{"role": "user", "content": text}] for text in SENTENCES]
    together = write(chats, batch_size=3, **GREEDY)
    assert together == [write(chat, **GREEDY) for chat in chats]


def test_arguments_of_the_model_pass_through(write, expected):
    text = {
        learn_from: write(SENTENCES[0], learn_from=learn_from, return_full_text=False, **GREEDY)[0]["generated_text"]
        for learn_from in ("context", "prompt", "none")
    }
    assert text == {learn_from: expected(SENTENCES[0], learn_from=learn_from) for learn_from in text}
    assert text["context"] != text["none"]


def test_several_samples(write):
    torch.manual_seed(0)
    answers = write(SENTENCES[0], max_new_tokens=20, do_sample=True, num_return_sequences=3)
    assert len({answer["generated_text"] for answer in answers}) == 3
