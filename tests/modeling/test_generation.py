"""Generation: every way of decoding gives what the model itself gives when it reads the whole sequence anew."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    set_seed,
)

from ttt_e2e import TTTE2ECache

from .by_hand import ReadingByHand
from .generating import CLOSE, CLOSE_LOGITS, LEARN, NEW, WAYS, assert_contexts_equal, endless, generate, left_padded
from .helpers import BATCH, VOCAB, WINDOW, random_ids
from .tiny_tokenizer import byte_level_tokenizer


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=lambda blocks: f"{blocks}-suffix-blocks"
)
def model(request):
    return endless(request.param)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_cache_equals_no_cache(model, way):
    """Also beams: reordering rows moves what they learned. Left-padded rows reach their borders at different steps."""
    ids, mask, _ = left_padded()
    with_cache, without = (generate(model, ids, attention_mask=mask, use_cache=use, **way) for use in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), **CLOSE_LOGITS)
    assert with_cache.cache.has_learned and without.cache is None


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
    assert output.cache.context.tokens == plain.cache.context.tokens


@pytest.mark.parametrize("chunk", [1, 3, BATCH, BATCH + 1, 100])
def test_prefill_in_chunks_equals_one_prefill(model, chunk):
    """Also chunks in which a left-padded row has no token yet."""
    ids, mask, _ = left_padded()
    one, chunked = (generate(model, ids, attention_mask=mask, prefill_chunk_size=size) for size in (None, chunk))
    assert torch.equal(one.sequences, chunked.sequences)
    assert_contexts_equal(one.cache, chunked.cache)


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
    cache = generate(model, ids, attention_mask=mask, max_new_tokens=first, **way).cache
    given = whole.sequences[:, : ids.shape[1] + first]
    mask = torch.cat([mask, torch.ones(len(ids), first, dtype=torch.long)], dim=1)
    rest = generate(
        model,
        given[:, cache.get_seq_length() :] if new_only else given,
        attention_mask=mask,
        cache=cache,
        max_new_tokens=NEW - first,
    )
    if way["do_sample"]:
        # Later random numbers differ; the scores of the first new token do not depend on them.
        torch.testing.assert_close(rest.logits[0], whole.logits[first], **CLOSE_LOGITS)
        return
    assert torch.equal(rest.sequences[:, -(NEW - first) :], whole.sequences[:, -(NEW - first) :])
    assert_contexts_equal(rest.cache, whole.cache)
    assert rest.cache is cache


def test_continuing_with_more_text_equals_reading_it_all(model):
    """A second question to the same context, unpadded and without any mask."""
    prompt, question = random_ids(2, 11), random_ids(2, 9, seed=1)
    first = generate(model, prompt)
    conversation = torch.cat([first.sequences, question], dim=1)
    expected = generate(model, conversation)
    assert torch.equal(generate(model, conversation, cache=first.cache).sequences, expected.sequences)


@pytest.mark.parametrize("chunk", [None, 5])
def test_answers_from_one_context_are_independent(two_blocks, chunk):
    """Read once, answer many: forks of a context, and rows of it for several samples."""
    text = random_ids(1, 3 * BATCH + 2)
    with torch.no_grad():
        context = two_blocks(text, use_cache=True).cache
    for seed in (1, 2):
        whole = torch.cat([text, random_ids(1, 6, seed=seed)], dim=1)
        output = generate(two_blocks, whole, cache=context.fork(), prefill_chunk_size=chunk)
        assert torch.equal(output.sequences, generate(two_blocks, whole).sequences)
    rows = context.fork()
    rows.batch_repeat_interleave(3)
    beams = {"num_beams": 3}
    assert torch.equal(
        generate(two_blocks, whole, cache=rows, **beams).sequences,
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
    assert isinstance(output.cache, TTTE2ECache)
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
    assert_same_learning(output.cache, expected.cache)


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
        cache = two_blocks(ids[:, :11], use_cache=True, learning_span=None if with_ids else (0, 0)).cache
    embeds = two_blocks.get_input_embeddings()(ids).detach()
    given = {"input_ids": ids} if with_ids else {}
    output = generate(two_blocks, inputs_embeds=embeds, cache=cache, learn_from=learn_from, **given)
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
    output = generate(two_blocks, ids, attention_mask=mask, cache=cache)
    assert torch.equal(output.sequences, generate(two_blocks, ids, attention_mask=mask).sequences)
    assert output.cache is cache


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
        labels = two_blocks(more, cache=output.cache, labels=more)
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
    cache = outputs[0].cache
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
