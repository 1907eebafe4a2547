"""Decoding loss is the judge's loss of what was written, and of nothing else."""

import math

import pytest
import torch

from ttt_e2e.data.tokenizer import train_tokenizer
from ttt_e2e.evaluation import Subject, decoding_loss

from .subjects import learner, losses_by_hand, mistral, random_documents, subject

GREEDY = {"do_sample": False}


@torch.no_grad()
def written_greedily(model, prompts, new_tokens, **arguments):
    """The likeliest token again and again, each from a full pass over all before it."""
    ids = prompts
    for _ in range(new_tokens):
        ids = torch.cat([ids, model.eval()(ids, **arguments).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("kind", ["ours", "hybrid", "mistral"])
def test_a_model_that_judges_its_own_likeliest_tokens(kind):
    tested, documents = subject(kind), random_documents(3, 20)
    measured = decoding_loss(tested, tested, documents, 13, 10, sampling=GREEDY, batch_size=2, buckets=3)
    written = written_greedily(tested.model, documents[:, :13], 10)
    losses = losses_by_hand(tested.model, written)[:, 12:]
    by_bucket = [losses[:, :4].mean().item(), losses[:, 4:7].mean().item(), losses[:, 7:].mean().item()]
    assert measured["loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert measured["loss_by_bucket"] == pytest.approx(by_bucket, rel=1e-4)
    assert measured["bucket_starts"] == [0, 4, 7] and measured["tokens"] == 30


def test_the_judge_is_another_model_and_learning_off_is_kept():
    writer, judge = subject("ours", test_time_training=False), subject("mistral")
    documents = random_documents(2, 13)
    measured = decoding_loss(writer, judge, documents, 13, 6, sampling=GREEDY, buckets=1)
    written = written_greedily(writer.model, documents, 6, test_time_training=False)
    assert measured["loss"] == pytest.approx(losses_by_hand(judge.model, written)[:, 12:].mean().item(), rel=1e-4)


def test_samples_depend_on_the_seed_alone():
    tested, documents = subject("ours"), random_documents(2, 13)

    def measure(seed):
        return decoding_loss(tested, tested, documents, 13, 12, seed=seed)["loss"]

    first = measure(1)
    torch.rand(1)
    outside = torch.get_rng_state()
    assert first == measure(1) != measure(2)
    assert torch.equal(torch.get_rng_state(), outside)


def test_every_row_gets_all_its_tokens():
    """The likeliest token ends the text, so that `generate` would stop at once."""
    model = mistral()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(40))
    model.lm_head.bias.data[[7, 9]] = 5.0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [7], 9
    tested = Subject("ends", model)
    measured = decoding_loss(tested, tested, random_documents(2, 5), 5, 6, sampling=GREEDY, buckets=2)
    # Two tokens at e^5 and 38 at 1, of which the first of the 38 is written.
    expected = math.log(2 * math.exp(5) + 38)
    assert measured["loss_by_bucket"] == pytest.approx([expected] * 2, rel=1e-5)


def test_more_buckets_than_tokens():
    tested = subject("mistral")
    measured = decoding_loss(tested, tested, random_documents(1, 5), 5, 3, sampling=GREEDY)
    assert measured["bucket_starts"] == [0, 1, 2] and len(measured["loss_by_bucket"]) == 3


def test_a_judge_with_another_vocabulary_is_an_error():
    judge = Subject("judge", mistral(vocab_size=41))
    with pytest.raises(ValueError, match="judge='judge': it knows 41 tokens, but 'mistral' 40"):
        decoding_loss(subject("mistral"), judge, random_documents(1, 5), 5, 3)


def test_a_judge_with_other_tokens_reads_the_text():
    """Its total loss of the written text is what it gives that text when it cuts it itself."""
    first, second = (train_tokenizer([text], 280) for text in ("some text some text", "another thing another thing"))
    one, two = (Subject(name, learner(vocab_size=280), tokens) for name, tokens in (("one", first), ("two", second)))
    given = "some text"
    documents = torch.tensor([first(given, add_special_tokens=False).input_ids])
    length, new_tokens = documents.shape[1], 12
    measured = decoding_loss(one, two, documents, length, new_tokens, sampling=GREEDY, buckets=new_tokens)
    written = written_greedily(one.model, documents, new_tokens)
    text = first.decode(written[0], skip_special_tokens=True)
    encoded = second(text, return_offsets_mapping=True)
    losses = losses_by_hand(two.model, torch.tensor([encoded.input_ids]))[0]
    behind = [start >= len(given) for start, _ in encoded.offset_mapping[1:]]
    assert measured["loss"] * new_tokens == pytest.approx(losses[behind].sum().item(), rel=1e-4)
    assert sum(measured["loss_by_bucket"]) == pytest.approx(measured["loss"] * new_tokens, rel=1e-6)


def test_a_judge_that_cannot_say_where_its_tokens_stand_is_an_error():
    class Slow:
        is_fast = False

        def get_vocab(self):
            return {}

    one = Subject("one", learner(), train_tokenizer(["some text some text"], 280))
    with pytest.raises(ValueError, match="judge='two': its tokenizer is not that of 'one', and does not tell"):
        decoding_loss(one, Subject("two", learner(), Slow()), random_documents(1, 5), 5, 3)


@pytest.mark.parametrize("wrong", [{"length": 0}, {"length": 6}, {"new_tokens": 0}, {"buckets": 0}, {"batch_size": 0}])
def test_numbers_out_of_range_are_errors(wrong):
    tested, right = subject("mistral"), {"length": 5, "new_tokens": 3}
    with pytest.raises(ValueError, match="=".join(map(str, *wrong.items()))):
        decoding_loss(tested, tested, random_documents(1, 5), **right | wrong)
