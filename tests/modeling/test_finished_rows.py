"""A row that has ended is not read any further, and can be continued as if it had been alone."""

import pytest
import torch
from transformers import (
    set_seed,
)

from ttt_e2e import TTTE2ECache

from .by_hand import ReadingByHand
from .generating import CLOSE_LOGITS, NEW, WAYS, assert_contexts_equal, generate, left_padded
from .helpers import random_ids


def ending_batch(model, padding_id, prompt_lengths=(7, 12), new=NEW, **arguments):
    """Two prompts, of which the first ends early and the second goes on to the end."""
    ids, mask, rows = left_padded(prompt_lengths)
    free = generate(model, ids, attention_mask=mask, max_new_tokens=new).sequences[:, ids.shape[1] :]
    place = next(n for n in range(3, new - 4) if free[0, n] not in free[1] and free[0, n] not in free[0, :n])
    end = int(free[0, place])
    special = {"eos_token_id": end, "pad_token_id": end if padding_id is None else padding_id}
    output = generate(model, ids, attention_mask=mask, max_new_tokens=new, **special, **arguments)
    written = output.sequences[:, ids.shape[1] :]
    assert written[0, : place + 1].tolist() == free[0, : place + 1].tolist()
    assert set(written[0, place + 1 :].tolist()) == {special["pad_token_id"]}
    assert torch.equal(written[1], free[1])
    return output, mask, rows, special, place


@pytest.mark.parametrize(
    "padding_id, use_cache, pass_mask",
    [(0, True, True), (0, True, False), (None, True, True), (0, False, True), (None, False, True)],
    ids=["padding", "padding-no-mask", "padding-is-end", "padding-no-cache", "padding-is-end-no-cache"],
)
def test_what_follows_a_generated_end_is_not_read(two_blocks, padding_id, use_cache, pass_mask):
    """A finished row goes on, after more text, as if it had been generated alone and then continued."""
    output, mask, rows, special, place = ending_batch(two_blocks, padding_id, use_cache=use_cache)
    question = random_ids(2, 10, seed=3)
    if use_cache:
        assert output.cache.context.tokens == (rows[0].shape[1] + place + 1, rows[1].shape[1] + NEW - 1)
    conversation = torch.cat([output.sequences, question], dim=1)
    full_mask = torch.cat([mask, torch.ones(2, NEW + 10, dtype=torch.long)], dim=1)
    if not use_cache:
        # Without a context nobody remembers where the rows ended; the mask has to say it.
        full_mask[0, mask.shape[1] + place + 1 : mask.shape[1] + NEW] = 0
    rest = generate(
        two_blocks,
        conversation,
        attention_mask=full_mask if pass_mask else None,
        cache=output.cache,
        **special | {"eos_token_id": None},
    )
    for row, length in enumerate((place + 1, NEW)):
        alone = generate(two_blocks, rows[row], **special)
        text = alone.sequences[:, : rows[row].shape[1] + length]
        both = torch.cat([text, question[row : row + 1]], dim=1)
        cache = alone.cache if use_cache else None
        arguments = special | {"eos_token_id": None, "attention_mask": torch.ones_like(both)}
        expected = generate(two_blocks, both, cache=cache, **arguments)
        assert torch.equal(rest.sequences[row, -NEW:], expected.sequences[0, -NEW:])
        if use_cache:
            own = rest.cache.fork()
            own.batch_select_indices(torch.tensor([row]))
            assert_contexts_equal(own, expected.cache)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_rows_and_beams_that_end_at_different_steps(two_blocks, way):
    """With and without cache, and, where nothing is drawn at random, as each prompt alone."""
    ids, mask, rows = left_padded()
    ends = {"eos_token_id": list(range(3, 24)), "min_new_tokens": 3, **way, "length_penalty": 1.0}
    output, without = (generate(two_blocks, ids, attention_mask=mask, use_cache=use, **ends) for use in (True, False))
    assert torch.equal(output.sequences, without.sequences)
    written = output.sequences[:, ids.shape[1] :]
    assert len({int((row < 24).long().argmax()) for row in written}) > 1
    if not way["do_sample"] and "num_return_sequences" not in way:
        for index, row in enumerate(rows):
            alone = generate(two_blocks, row, **ends).sequences[0, row.shape[1] :]
            assert torch.equal(written[index, : len(alone)], alone)
            assert bool((written[index, len(alone) :] < 24).all())


def test_new_ids_after_a_finished_row(two_blocks):
    """The same with only the new ids and a full-length mask, read in chunks."""
    output, mask, rows, special, place = ending_batch(two_blocks, 0)
    question = random_ids(2, 10, seed=3)
    cache = output.cache
    new = torch.cat([output.sequences, question], dim=1)[:, cache.get_seq_length() :]
    full_mask = torch.cat([mask, torch.ones(2, NEW + 10, dtype=torch.long)], dim=1)
    arguments = {"attention_mask": full_mask, "cache": cache, "prefill_chunk_size": 3}
    rest = generate(two_blocks, new, **arguments, **special | {"eos_token_id": None})
    text = torch.cat([rows[0], output.sequences[:1, mask.shape[1] :][:, : place + 1], question[:1]], dim=1)
    expected = generate(two_blocks, text, **special | {"eos_token_id": None})
    assert torch.equal(rest.sequences[0, -NEW:], expected.sequences[0, -NEW:])


def test_a_finished_row_stays_finished_through_selection_and_files(two_blocks, tmp_path):
    output, *_ = ending_batch(two_blocks, 0)
    cache = output.cache
    assert (cache.finished, cache.padding_id) == ((True, False), 0)
    cache.batch_repeat_interleave(2)
    assert cache.finished == (True, True, False, False)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.save_pretrained(tmp_path / "context")
    loaded = TTTE2ECache.from_pretrained(tmp_path / "context", model=two_blocks)
    assert (loaded.finished, loaded.padding_id) == ((False, True), 0)


def test_ends_inside_a_prompt_finish_nothing(two_blocks):
    """Chat templates put end tokens, which may be the padding too, between turns."""
    prompt = random_ids(2, 20)
    prompt[0, [4, 11, 19]], prompt[1, 9] = 2, 2
    mask = torch.ones_like(prompt)
    special = {"eos_token_id": 2, "pad_token_id": 2, "suppress_tokens": [0, 2], "attention_mask": mask}
    set_seed(0)
    output = two_blocks.generate(
        prompt, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True, **special
    )
    assert output.cache.context.tokens == (20 + NEW - 1,) * 2
    assert output.cache.finished is None
    for row in range(2):
        by_hand = ReadingByHand(two_blocks)
        for token in output.sequences[row].tolist()[:-1]:
            logits = by_hand.read(token)
        torch.testing.assert_close(output.logits[-1][row].double(), logits, **CLOSE_LOGITS)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_generated_padding_token_finishes_a_row(two_blocks, rows):
    """Alone or in a batch: what is fed after it is neither learned nor counted."""
    prompt = random_ids(rows, 9)
    free = generate(two_blocks, prompt).sequences[:, 9:]
    padding = int(free[0, 5])
    output = generate(two_blocks, prompt, pad_token_id=padding)
    first = (output.sequences[0, 9:] == padding).nonzero()[0].item()
    assert output.cache.context.tokens[0] == 9 + first + 1
