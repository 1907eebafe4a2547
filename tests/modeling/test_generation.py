"""Generation: every way of decoding gives what the model itself gives when it reads the whole sequence anew."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    DynamicCache,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    set_seed,
)

from ttt_e2e import TTTE2ECache

from .by_hand import ReadingByHand
from .helpers import BATCH, VOCAB, WINDOW, random_ids, small_model
from .tiny_tokenizer import byte_level_tokenizer

CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # float64 under other orders of summation, amplified by a few inner steps
CLOSE_LOGITS = {"rtol": 1e-6, "atol": 1e-6}  # generate() returns float32
NEW = 2 * BATCH + 3
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.5},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam-sample": {"do_sample": True, "num_beams": 3},
    "several-samples": {"do_sample": True, "num_return_sequences": 2},
    "several-beams": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
}


@pytest.fixture(scope="module", params=[2, 3], ids=lambda blocks: f"{blocks}-suffix-blocks")
def model(request):
    return endless(request.param)


@pytest.fixture(scope="module")
def two_blocks():
    return endless(2)


def endless(blocks=2, **others):
    """A model that ends no sequence by itself; a head of its own and large weights make it write many different ids."""
    changes = {"eos_token_id": None, "tie_word_embeddings": False, "initializer_range": 0.3}
    return small_model(torch.float64, num_suffix_layers=blocks, **changes | others)


def generate(model, ids=None, **arguments):
    """Ids and everything else of a seeded generation."""
    set_seed(0)
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    # The padding id is never written, or a row would end there.
    return model.generate(ids, suppress_tokens=[0], **(settings | arguments))


def left_padded(lengths=(5, 2 * BATCH, 3 * BATCH - 2)):
    """Ids, their mask, and the rows without padding."""
    rows = [random_ids(1, length, seed=length) for length in lengths]
    ids, mask = torch.zeros(len(rows), max(lengths), dtype=torch.long), torch.zeros(len(rows), max(lengths)).long()
    for index, row in enumerate(rows):
        ids[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row, 1
    return ids, mask, rows


def assert_contexts_equal(cache, other):
    """Same counters and same fast weights, row by row."""
    assert cache.context.tokens == other.context.tokens
    assert cache.context.pending_counts == other.context.pending_counts
    left, right = cache.context.fast.own_copies().tensors, other.context.fast.own_copies().tensors
    torch.testing.assert_close(left, right, **CLOSE)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_cache_equals_no_cache(model, way):
    """Also beams: reordering rows moves what they learned. Left-padded rows reach their borders at different steps."""
    ids, mask, _ = left_padded()
    with_cache, without = (generate(model, ids, attention_mask=mask, use_cache=use, **way) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), **CLOSE_LOGITS)
    assert with_cache.past_key_values.has_learned and without.past_key_values is None


def test_greedy_equals_reading_by_hand(model):
    prompt = random_ids(1, 2 * BATCH - 1)
    output = generate(model, prompt)
    by_hand = ReadingByHand(model)
    written = by_hand.write(prompt[0].tolist(), NEW)
    assert output.sequences[0, prompt.shape[1] :].tolist() == written
    assert by_hand.steps == (prompt.shape[1] + NEW - 1) // BATCH
    assert len(set(written)) >= 5  # a text that only repeats itself would show little


@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["beams"]], ids=["greedy", "beams"])
@pytest.mark.parametrize("pass_mask", [True, False], ids=["mask", "padding-id"])
def test_left_padded_rows_equal_the_prompts_alone(model, way, pass_mask):
    ids, mask, rows = left_padded()
    output = generate(model, ids, attention_mask=mask if pass_mask else None, **way)
    for index, row in enumerate(rows):
        alone = generate(model, row, **way)
        assert torch.equal(output.sequences[index, -NEW:], alone.sequences[0, -NEW:])


@pytest.mark.parametrize("padding", [1, WINDOW, 5 * WINDOW])
def test_more_padding_changes_nothing(two_blocks, padding):
    prompt = random_ids(1, 13)
    ids = torch.cat([torch.zeros(1, padding, dtype=torch.long), prompt], dim=1)
    output, plain = generate(two_blocks, ids, attention_mask=(ids > 0).long()), generate(two_blocks, prompt)
    assert torch.equal(output.sequences[:, padding:], plain.sequences)
    assert output.past_key_values.context.tokens == plain.past_key_values.context.tokens


@pytest.mark.parametrize("chunk", [1, 3, BATCH, BATCH + 1, 100])
def test_prefill_in_chunks_equals_one_prefill(model, chunk):
    """Also chunks in which a left-padded row has no token yet."""
    ids, mask, _ = left_padded()
    one, chunked = (generate(model, ids, attention_mask=mask, prefill_chunk_size=size) for size in (None, chunk))
    assert torch.equal(one.sequences, chunked.sequences)
    assert_contexts_equal(one.past_key_values, chunked.past_key_values)


def test_prefill_in_chunks_of_nothing_but_padding(two_blocks):
    ids = torch.cat([torch.zeros(2, 10, dtype=torch.long), random_ids(2, 9)], dim=1)
    one, chunked = (generate(two_blocks, ids, attention_mask=(ids > 0).long(), prefill_chunk_size=n) for n in (None, 4))
    assert torch.equal(one.sequences, chunked.sequences)


@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["sampling"]], ids=["greedy", "sampling"])
@pytest.mark.parametrize("new_only", [False, True], ids=["whole-sequence", "new-ids"])
@pytest.mark.parametrize("first", [1, BATCH, BATCH + 4])
def test_continuing_from_a_returned_cache_equals_one_shot(model, way, new_only, first):
    """Whole sequences, or only what is new with a mask over all columns."""
    ids, mask, _ = left_padded()
    whole = generate(model, ids, attention_mask=mask, **way)
    cache = generate(model, ids, attention_mask=mask, max_new_tokens=first, **way).past_key_values
    given = whole.sequences[:, : ids.shape[1] + first]
    mask = torch.cat([mask, torch.ones(len(ids), first, dtype=torch.long)], dim=1)
    rest = generate(
        model,
        given[:, cache.get_seq_length() :] if new_only else given,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=NEW - first,
    )
    if way["do_sample"]:
        # Later random numbers differ; the scores of the first new token do not depend on them.
        torch.testing.assert_close(rest.logits[0], whole.logits[first], **CLOSE_LOGITS)
        return
    assert torch.equal(rest.sequences[:, -(NEW - first) :], whole.sequences[:, -(NEW - first) :])
    assert_contexts_equal(rest.past_key_values, whole.past_key_values)
    assert rest.past_key_values is cache


def test_continuing_with_more_text_equals_reading_it_all(model):
    """A second question to the same context, unpadded and without any mask."""
    prompt, question = random_ids(2, 11), random_ids(2, 9, seed=1)
    first = generate(model, prompt)
    conversation = torch.cat([first.sequences, question], dim=1)
    expected = generate(model, conversation)
    assert torch.equal(
        generate(model, conversation, past_key_values=first.past_key_values).sequences, expected.sequences
    )


@pytest.mark.parametrize("chunk", [None, 5])
def test_answers_from_one_context_are_independent(two_blocks, chunk):
    """Read once, answer many: forks of a context, and rows of it for several samples."""
    text = random_ids(1, 3 * BATCH + 2)
    with torch.no_grad():
        context = two_blocks(text, use_cache=True).past_key_values
    for seed in (1, 2):
        whole = torch.cat([text, random_ids(1, 6, seed=seed)], dim=1)
        output = generate(two_blocks, whole, past_key_values=context.fork(), prefill_chunk_size=chunk)
        assert torch.equal(output.sequences, generate(two_blocks, whole).sequences)
    rows = context.fork()
    rows.batch_repeat_interleave(3)
    beams = {"num_beams": 3}
    assert torch.equal(
        generate(two_blocks, whole, past_key_values=rows, **beams).sequences,
        generate(two_blocks, whole, **beams).sequences,
    )
    assert context.columns == text.shape[1]


def test_all_outputs_have_their_shapes(two_blocks):
    """Hidden states and attentions are those of each step's own tokens."""
    ids, mask, _ = left_padded()
    asked = {"output_scores": True, "output_hidden_states": True, "output_attentions": True, "max_new_tokens": BATCH}
    output = generate(two_blocks, ids, attention_mask=mask, **asked)
    assert len(output.scores) == len(output.logits) == len(output.hidden_states) == len(output.attentions) == BATCH
    assert {scores.shape for scores in output.scores} == {(3, VOCAB)}
    columns = [ids.shape[1]] + [1] * (BATCH - 1)
    for states, attentions, length in zip(output.hidden_states, output.attentions, columns, strict=True):
        assert [tuple(state.shape) for state in states] == [(3, length, 32)] * 5
        assert [tuple(weights.shape[:3]) for weights in attentions] == [(3, 4, length)] * 4
        for weights in attentions:
            sums = weights.sum(-1)[:, :, -1]
            torch.testing.assert_close(sums, torch.ones_like(sums))
    assert isinstance(output.past_key_values, TTTE2ECache)
    with torch.no_grad():
        whole = two_blocks(
            output.sequences[:, :-1],
            attention_mask=torch.cat([mask, torch.ones(3, BATCH - 1, dtype=torch.long)], dim=1),
            output_hidden_states=True,
        )
    for layer in range(5):
        states = torch.cat([step[layer] for step in output.hidden_states], dim=1)
        real = torch.cat([mask, torch.ones(3, BATCH - 1, dtype=torch.long)], dim=1).bool()
        torch.testing.assert_close(states[real], whole.hidden_states[layer][real], **CLOSE)


LEARN = {"context": (True, True), "prompt": (True, False), "none": (False, False)}


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
        assert output.past_key_values.has_learned == (by_hand.steps > 0)
        if by_hand.steps and learn_from == "prompt":
            fast = [tensor[0] for tensor in output.past_key_values.context.fast.own_copies().tensors]
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
        cache = two_blocks(text, use_cache=True).past_key_values
    whole = torch.cat([text, question], dim=1)
    given = question if new_only else whole
    mask = torch.ones_like(whole)
    output = generate(two_blocks, given, attention_mask=mask, past_key_values=cache, learn_from=learn_from)
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
        cache = two_blocks(text, use_cache=True).past_key_values
    before = [tensor.clone() for tensor in cache.context.fast.tensors]
    output = generate(two_blocks, torch.cat([text, question], 1), past_key_values=cache, learn_from="none")
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
    assert not output.past_key_values.has_learned
    assert not torch.equal(learned.sequences, expected.sequences)


# ---- finished rows ----


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
        assert output.past_key_values.context.tokens == (rows[0].shape[1] + place + 1, rows[1].shape[1] + NEW - 1)
    conversation = torch.cat([output.sequences, question], dim=1)
    full_mask = torch.cat([mask, torch.ones(2, NEW + 10, dtype=torch.long)], dim=1)
    if not use_cache:
        # Without a context nobody remembers where the rows ended; the mask has to say it.
        full_mask[0, mask.shape[1] + place + 1 : mask.shape[1] + NEW] = 0
    rest = generate(
        two_blocks,
        conversation,
        attention_mask=full_mask if pass_mask else None,
        past_key_values=output.past_key_values,
        **special | {"eos_token_id": None},
    )
    for row, length in enumerate((place + 1, NEW)):
        alone = generate(two_blocks, rows[row], **special)
        text = alone.sequences[:, : rows[row].shape[1] + length]
        both = torch.cat([text, question[row : row + 1]], dim=1)
        cache = alone.past_key_values if use_cache else None
        arguments = special | {"eos_token_id": None, "attention_mask": torch.ones_like(both)}
        expected = generate(two_blocks, both, past_key_values=cache, **arguments)
        assert torch.equal(rest.sequences[row, -NEW:], expected.sequences[0, -NEW:])
        if use_cache:
            own = rest.past_key_values.fork()
            own.batch_select_indices(torch.tensor([row]))
            assert_contexts_equal(own, expected.past_key_values)


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
    cache = output.past_key_values
    new = torch.cat([output.sequences, question], dim=1)[:, cache.get_seq_length() :]
    full_mask = torch.cat([mask, torch.ones(2, NEW + 10, dtype=torch.long)], dim=1)
    arguments = {"attention_mask": full_mask, "past_key_values": cache, "prefill_chunk_size": 3}
    rest = generate(two_blocks, new, **arguments, **special | {"eos_token_id": None})
    text = torch.cat([rows[0], output.sequences[:1, mask.shape[1] :][:, : place + 1], question[:1]], dim=1)
    expected = generate(two_blocks, text, **special | {"eos_token_id": None})
    assert torch.equal(rest.sequences[0, -NEW:], expected.sequences[0, -NEW:])


def test_a_finished_row_stays_finished_through_selection_and_files(two_blocks, tmp_path):
    output, *_ = ending_batch(two_blocks, 0)
    cache = output.past_key_values
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
    assert output.past_key_values.context.tokens == (20 + NEW - 1,) * 2
    assert output.past_key_values.finished is None
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
    assert output.past_key_values.context.tokens[0] == 9 + first + 1


# ---- more ways in ----


@pytest.mark.parametrize("way", [WAYS["greedy"], WAYS["beams"]], ids=["greedy", "beams"])
@pytest.mark.parametrize("learn_from", LEARN)
def test_embeddings_with_ids_equal_ids(two_blocks, learn_from, way):
    ids, mask, _ = left_padded()
    embeds = two_blocks.get_input_embeddings()(ids).detach()
    expected = generate(two_blocks, ids, attention_mask=mask, learn_from=learn_from, **way)
    output = generate(
        two_blocks, input_ids=ids, inputs_embeds=embeds, attention_mask=mask, learn_from=learn_from, **way
    )
    assert torch.equal(output.sequences, expected.sequences)
    assert_same_learning(output.past_key_values, expected.past_key_values)


def assert_same_learning(cache, other):
    assert cache.has_learned == other.has_learned
    if cache.has_learned:
        assert_contexts_equal(cache, other)


def test_embeddings_alone_can_be_read_but_not_learned(two_blocks):
    ids = random_ids(2, 20)
    embeds = two_blocks.get_input_embeddings()(ids).detach()
    expected = generate(two_blocks, ids, learn_from="none")
    output = generate(two_blocks, inputs_embeds=embeds, learn_from="none")
    assert torch.equal(output.sequences, expected.sequences[:, 20:])
    for learn_from in ("context", "prompt"):
        with pytest.raises(ValueError, match=r"`inputs_embeds`.*`input_ids`"):
            generate(two_blocks, inputs_embeds=embeds, learn_from=learn_from)


@pytest.mark.parametrize("with_ids", [True, False], ids=["ids", "alone"])
def test_embeddings_go_on_from_a_cache(two_blocks, with_ids):
    ids = random_ids(1, 20)
    learn_from = "context" if with_ids else "none"
    expected = generate(two_blocks, ids, learn_from=learn_from)
    with torch.no_grad():
        cache = two_blocks(ids[:, :11], use_cache=True, learning_span=None if with_ids else (0, 0)).past_key_values
    embeds = two_blocks.get_input_embeddings()(ids).detach()
    given = {"input_ids": ids} if with_ids else {}
    output = generate(two_blocks, inputs_embeds=embeds, past_key_values=cache, learn_from=learn_from, **given)
    assert torch.equal(output.sequences[:, -NEW:], expected.sequences[:, -NEW:])


def test_embeddings_that_cannot_be_read_are_refused(two_blocks):
    ids = random_ids(1, 20)
    embeds = two_blocks.get_input_embeddings()(ids).detach()
    with pytest.raises(ValueError, match=r"`inputs_embeds` \(1, 20, 32\) and `input_ids` \(1, 19\)"):
        generate(two_blocks, input_ids=ids[:, 1:], inputs_embeds=embeds)
    with pytest.raises(ValueError, match=r"`prefill_chunk_size=4`.*`inputs_embeds`"):
        generate(two_blocks, input_ids=ids, inputs_embeds=embeds, prefill_chunk_size=4)


def test_an_empty_cache_may_be_passed(two_blocks):
    ids, mask, _ = left_padded()
    cache = TTTE2ECache(two_blocks.config)
    output = generate(two_blocks, ids, attention_mask=mask, past_key_values=cache)
    assert torch.equal(output.sequences, generate(two_blocks, ids, attention_mask=mask).sequences)
    assert output.past_key_values is cache


def test_without_a_prompt_generation_begins_with_bos(two_blocks):
    output = generate(two_blocks)
    assert torch.equal(output.sequences, generate(two_blocks, torch.tensor([[1]])).sequences)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_inference_mode_equals_no_grad(two_blocks, way):
    """Masks and ids made in inference mode as well; what was learned there can be used outside."""
    expected = generate(two_blocks, left_padded()[0], attention_mask=left_padded()[1], **way)
    with torch.inference_mode():
        ids, mask, _ = left_padded()
        output = generate(two_blocks, ids, attention_mask=mask, **way)
    assert torch.equal(output.sequences, expected.sequences)
    if way == WAYS["greedy"]:
        more = random_ids(3, BATCH)
        labels = two_blocks(more, past_key_values=output.past_key_values, labels=more)
        labels.loss.backward()
        two_blocks.zero_grad()


def test_inference_mode_reads_labels_positions_and_embeddings(two_blocks):
    def call():
        ids, mask, _ = left_padded()
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        embeds = two_blocks.get_input_embeddings()(ids)
        return two_blocks(ids, mask, positions, inputs_embeds=embeds, labels=ids.masked_fill(mask == 0, -100))

    with torch.no_grad():
        expected = call()
    with torch.inference_mode():
        output = call()
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)


def test_a_model_with_adapters_generates_the_same_with_and_without_cache(tmp_path):
    """LoRA on attention and on prime MLPs, also in saved contexts."""
    base = endless()
    targets = ["q_proj", "prime_mlp.gate_proj", "prime_mlp.down_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    set_seed(1)
    plain = generate(base, left_padded()[0], attention_mask=left_padded()[1])
    model = get_peft_model(base, config).double().eval()
    ids, mask, _ = left_padded()
    outputs = []
    for use_cache in (True, False):
        set_seed(0)
        outputs.append(
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW,
                do_sample=False,
                suppress_tokens=[0],
                use_cache=use_cache,
                learn_from="context",
                return_dict_in_generate=True,
            )
        )
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert not torch.equal(outputs[0].sequences, plain.sequences)
    cache = outputs[0].past_key_values
    cache.save_pretrained(tmp_path / "context")
    assert TTTE2ECache.from_pretrained(tmp_path / "context", model=model).columns == cache.columns


# ---- streamers and stopping ----


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def writer(tokenizer):
    """A model of the tokenizer's ids."""
    return endless(vocab_size=len(tokenizer))


def test_streamers_give_the_text_as_it_is_written(writer, tokenizer, capsys):
    prompt = tokenizer("the old house", return_tensors="pt").input_ids
    written = generate(writer, prompt).sequences[:, prompt.shape[1] :]
    expected = tokenizer.decode(written[0])
    generate(writer, prompt, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == expected
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generate, args=(writer, prompt), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and len(pieces) > 1


class StopAfter(StoppingCriteria):
    """Every row ends after its own number of columns."""

    def __init__(self, columns):
        self.columns = torch.tensor(columns)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.columns


def test_stopping_criteria_end_the_text(two_blocks):
    ids, mask, _ = left_padded()
    columns = ids.shape[1]
    stop = StoppingCriteriaList([StopAfter([columns + 4, columns + 9, columns + 6]), MaxTimeCriteria(600.0)])
    output = generate(two_blocks, ids, attention_mask=mask, stopping_criteria=stop)
    expected = generate(two_blocks, ids, attention_mask=mask, max_new_tokens=9)
    assert torch.equal(output.sequences, expected.sequences)


def test_stop_strings_end_the_text(writer, tokenizer):
    prompt = tokenizer("the old house", return_tensors="pt").input_ids
    written = generate(writer, prompt).sequences[0, prompt.shape[1] :].tolist()
    places = [n for n in range(3, NEW - 2) if tokenizer.decode(written[n]).isascii() and written[n] not in written[:n]]
    arguments = {"stop_strings": [tokenizer.decode(written[places[0]])], "tokenizer": tokenizer}
    output = generate(writer, prompt, **arguments).sequences[0, prompt.shape[1] :].tolist()
    assert output == written[: len(output)] and 1 <= len(output) <= places[0] + 1


# ---- what cannot be ----


def assert_refused(model, cache, error, match, ids=None, **arguments):
    """The call raises, and the cache is as it was."""
    before = None if cache is None else (cache.context, cache.columns, cache.finished)
    if cache is not None:
        arguments["past_key_values"] = cache
    with pytest.raises(error, match=match):
        generate(model, random_ids(1, 20) if ids is None else ids, **arguments)
    if cache is not None:
        assert (cache.context, cache.columns, cache.finished) == before


@pytest.fixture
def cache(two_blocks):
    with torch.no_grad():
        return two_blocks(random_ids(1, 20)[:, :19], use_cache=True).past_key_values


REFUSED = {
    "unknown-learn-from": (ValueError, r"`learn_from`.*'answer'", {"learn_from": "answer"}),
    "assistant": (ValueError, "`assistant_model", {"assistant_model": "itself"}),
    "prompt-lookup": (ValueError, "`prompt_lookup_num_tokens=3`", {"prompt_lookup_num_tokens": 3}),
    "early-exit": (ValueError, "`assistant_early_exit=2`", {"assistant_early_exit": 2}),
    "static": (ValueError, "`cache_implementation='static'`", {"cache_implementation": "static"}),
    "quantised": (ValueError, "`cache_implementation='quantized'`", {"cache_implementation": "quantized"}),
    "offloaded": (ValueError, "`cache_implementation='offloaded'`", {"cache_implementation": "offloaded"}),
    "continuous-batching": (ValueError, "`cache_implementation='paged'`", {"cache_implementation": "paged"}),
    "unknown-argument": (ValueError, "learn_form", {"learn_form": "prompt"}),
    "id-outside": (
        ValueError,
        f"`input_ids` holds the id {VOCAB}",
        {"ids": torch.tensor([[*random_ids(1, 20)[0], VOCAB]])},
    ),
}


REFUSED_WITH_CACHE = {
    "cache-and-no-cache": (ValueError, "`use_cache=False`", {"use_cache": False}),
    "plain-model": (ValueError, "`test_time_training=False`", {"test_time_training": False}),
}
CASES = [pytest.param(case, False, id=name) for name, case in REFUSED.items()]
CASES += [pytest.param(case, True, id=f"{name}-cache") for name, case in (REFUSED | REFUSED_WITH_CACHE).items()]


@pytest.mark.parametrize("case, with_cache", CASES)
def test_what_is_impossible_is_refused_by_name(two_blocks, cache, case, with_cache):
    error, match, arguments = case
    arguments = {name: two_blocks if value == "itself" else value for name, value in arguments.items()}
    assert_refused(two_blocks, cache if with_cache else None, error, match, **arguments)


@pytest.mark.parametrize(
    "ids, mask",
    [
        (random_ids(1, 5, seed=1), None),
        (random_ids(1, 5, seed=1), torch.ones(1, 5)),
        (random_ids(1, 5, seed=1), torch.ones(1, 23)),
        (random_ids(1, 20)[:, :19], None),
        (random_ids(1, 25, seed=1), None),
    ],
    ids=["new-ids", "short-mask", "mask-of-another-length", "nothing-new", "another-text"],
)
def test_a_cache_needs_the_whole_sequence_or_a_full_mask(two_blocks, cache, ids, mask):
    match = r"`past_key_values` has read 19 columns.*`input_ids` \(\d+ columns.*`attention_mask`"
    assert_refused(two_blocks, cache, ValueError, match, ids=ids, attention_mask=mask)


def test_a_foreign_cache_is_refused(two_blocks):
    foreign = DynamicCache(config=two_blocks.config)
    with pytest.raises(TypeError, match=r"`past_key_values` is a DynamicCache.*TTTE2ECache"):
        generate(two_blocks, random_ids(1, 5), past_key_values=foreign)
    assert foreign.get_seq_length() == 0
    with pytest.raises(TypeError, match="`past_key_values` is a DynamicCache"):
        two_blocks(random_ids(1, 5), past_key_values=foreign)


def test_a_cache_of_too_few_rows_is_refused(two_blocks, cache):
    match = "`past_key_values` holds 1 rows but the inputs have 3.*batch_repeat_interleave"
    assert_refused(two_blocks, cache, ValueError, match, num_beams=3)


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "padding-id"])
def test_right_padding_is_refused(two_blocks, with_mask):
    ids = random_ids(2, 20)
    ids[0, 15:] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        generate(two_blocks, ids, attention_mask=(ids > 0).long() if with_mask else None)


def test_continuous_batching_is_refused(two_blocks):
    assert not hasattr(two_blocks, "init_continuous_batching")
    with pytest.raises(NotImplementedError, match="Continuous batching"):
        two_blocks.generate_batch([[3, 4, 5]])
