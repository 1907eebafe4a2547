"""`learn_from`: what `generate` learns from, the whole text, the prompt alone or nothing."""

import pytest
import torch

from .by_hand import ReadingByHand
from .generating import CLOSE, CLOSE_LOGITS, LEARN, NEW, WAYS, endless, generate, left_padded
from .helpers import BATCH, random_ids


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no-cache"])
@pytest.mark.parametrize("learn_from", LEARN)
@pytest.mark.parametrize("length", [BATCH, BATCH + 1, 3 * BATCH - 2])
def test_learning_from_a_part_equals_a_loop_by_hand(two_blocks, learn_from, length, use_cache):
    """A step needs its tokens and its targets in what is learned from: floor((N - 1) / b) steps for a prompt of N."""
    prompt = random_ids(1, length)
    output = generate(two_blocks, prompt, learn_from=learn_from, use_cache=use_cache)
    by_hand = ReadingByHand(two_blocks)
    written = by_hand.write(prompt[0].tolist(), NEW, LEARN[learn_from])
    assert output.sequences[0, length:].tolist() == written
    assert by_hand.steps == {"context": length + NEW - 1, "prompt": length - 1, "none": 0}[learn_from] // BATCH
    if use_cache:
        assert output.cache.has_learned == (by_hand.steps > 0)
        if by_hand.steps and learn_from == "prompt":
            fast = [tensor[0] for tensor in output.cache.context.fast.own_copies().tensors]
            torch.testing.assert_close(fast, by_hand.fast_weights, **CLOSE)


@pytest.mark.parametrize("learn_from", LEARN)
def test_learning_from_a_part_of_padded_rows(two_blocks, learn_from):
    ids, mask, rows = left_padded()
    output = generate(two_blocks, ids, attention_mask=mask, learn_from=learn_from)
    for index, row in enumerate(rows):
        alone = generate(two_blocks, row, learn_from=learn_from)
        assert torch.equal(output.sequences[index, -NEW:], alone.sequences[0, -NEW:])


@pytest.mark.parametrize("new_only", [False, True], ids=["whole-sequence", "new-ids"])
@pytest.mark.parametrize("learn_from", LEARN)
def test_learning_from_a_part_on_continuation(two_blocks, learn_from, new_only):
    """The prompt of a continuation is what this call adds; what was read before stays as it was learned."""
    text, question = random_ids(1, 2 * BATCH + 3), random_ids(1, 2 * BATCH + 1, seed=1)
    with torch.no_grad():
        cache = two_blocks(text, use_cache=True).cache
    whole = torch.cat([text, question], dim=1)
    given = question if new_only else whole
    mask = torch.ones_like(whole)
    output = generate(two_blocks, given, attention_mask=mask, cache=cache, learn_from=learn_from)
    by_hand = ReadingByHand(two_blocks)
    for token in text[0].tolist():
        by_hand.read(token)
    if learn_from != "context":
        by_hand.restart()
    written = by_hand.write(question[0].tolist(), NEW, LEARN[learn_from])
    assert output.sequences[0, -NEW:].tolist() == written


def test_learning_from_nothing_uses_what_was_learned(two_blocks):
    """The fast weights of a context stay the same tensors; they still matter."""
    text, question = random_ids(1, 3 * BATCH), random_ids(1, 5, seed=1)
    with torch.no_grad():
        cache = two_blocks(text, use_cache=True).cache
    before = [tensor.clone() for tensor in cache.context.fast.tensors]
    output = generate(two_blocks, torch.cat([text, question], 1), cache=cache, learn_from="none")
    assert all(map(torch.equal, cache.context.fast.tensors, before))
    assert cache.context.pending is None
    plain = generate(two_blocks, torch.cat([text, question], 1), learn_from="none")
    assert not torch.allclose(output.logits[0], plain.logits[0])


@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["beams"]], ids=["greedy", "beams"])
def test_generating_without_test_time_training_is_the_plain_model(two_blocks, way):
    plain = endless(test_time_training=False)
    plain.load_state_dict(two_blocks.state_dict())
    ids, mask, _ = left_padded()
    expected = generate(plain, ids, attention_mask=mask, **way)
    output = generate(two_blocks, ids, attention_mask=mask, test_time_training=False, **way)
    learned = generate(two_blocks, ids, attention_mask=mask, **way)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), **CLOSE_LOGITS)
    assert torch.equal(output.sequences, expected.sequences)
    assert not output.cache.has_learned
    assert not torch.equal(learned.sequences, expected.sequences)
