"""Learned contexts on disk: what is loaded is what was kept, and anything else is a clear error."""

import json
from pathlib import Path

import pytest
import torch

from ttt_e2e import TTTE2ECache, TTTE2EForCausalLM

from .helpers import BATCH, random_ids, small_model

FILES = ("context.safetensors", "context.json")


def read(model, ids, cache=None, **arguments):
    """A cache that has read `ids`."""
    with torch.no_grad():
        return model(ids, cache=cache, use_cache=True, **arguments).cache


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def cache(model):
    return read(model, random_ids(2, 2 * BATCH + 3))


@pytest.fixture
def folder(cache, tmp_path):
    cache.save_pretrained(tmp_path / "context")
    return tmp_path / "context"


def ragged(model):
    mask = torch.ones(3, 21, dtype=torch.long)
    mask[0, :16], mask[1, :4] = 0, 0
    return read(model, random_ids(3, 21), attention_mask=mask)


def beams(model):
    cache = read(model, random_ids(2, 21))
    cache.batch_repeat_interleave(3)
    cache.reorder_cache(torch.tensor([0, 0, 2, 4, 3, 3]))
    return cache


def finished(model):
    """Row 0 ends early; the padding behind its end must not be read when the text goes on."""
    prompt = random_ids(2, 5)
    end = model.generate(prompt[:1], max_new_tokens=3, do_sample=False)[0, -1].item()
    arguments = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": end, "return_dict_in_generate": True}
    cache = model.generate(prompt, **arguments).cache
    assert cache.finished is not None
    return cache


CONTEXTS = {
    "batch": lambda model: read(model, random_ids(2, 2 * BATCH + 3)),
    "at-a-border": lambda model: read(model, random_ids(2, 2 * BATCH)),
    "nothing-learned": lambda model: read(model, random_ids(2, 3)),
    "plain": lambda model: read(model, random_ids(2, 21), test_time_training=False),
    "ragged": ragged,
    "beams": beams,
    "finished": finished,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", CONTEXTS.values(), ids=CONTEXTS)
def test_loaded_equals_kept(make, dtype, tmp_path):
    """Bit-identical tensors, counters, logits and generated text."""
    model = small_model(dtype)
    cache = make(model)
    cache.save_pretrained(tmp_path / "context")
    loaded = TTTE2ECache.from_pretrained(tmp_path / "context", model=model)
    assert_identical(loaded, cache)
    new = random_ids(cache.batch_size, 5, seed=1)
    mask = torch.ones(cache.batch_size, cache.get_seq_length() + 5, dtype=torch.long)
    arguments = {"attention_mask": mask, "max_new_tokens": 2 * BATCH, "return_dict_in_generate": True}
    kept, again = (
        model.generate(new, cache=own, output_logits=True, do_sample=False, **arguments) for own in (cache, loaded)
    )
    assert torch.equal(kept.sequences, again.sequences)
    assert torch.equal(torch.stack(kept.logits), torch.stack(again.logits))
    assert_identical(again.cache, kept.cache)


def assert_identical(cache, other):
    for name in ("columns", "finished", "padding_id", "nbytes"):
        assert getattr(cache, name) == getattr(other, name), name
    left, right = cache.context, other.context
    assert (left.tokens, left.next_positions, left.pending_counts) == (
        right.tokens,
        right.next_positions,
        right.pending_counts,
    )
    assert (left.fast is None) == (right.fast is None)
    if left.fast is not None:
        assert left.fast.rows == right.fast.rows
        assert all(map(torch.equal, left.fast.tensors, right.fast.tensors))
        assert {t.dtype for t in left.fast.tensors} == {torch.float32}
    for own, others in zip(left.past_key_values, right.past_key_values, strict=True):
        assert all(map(torch.equal, own.joined(), others.joined()))
    assert (left.pending is None) == (right.pending is None)
    if left.pending is not None:
        for name in ("inputs", "ids", "positions"):
            assert torch.equal(getattr(left.pending, name), getattr(right.pending, name))


def test_a_fork_can_be_saved_before_it_reads_on(model, cache, tmp_path):
    cache.fork().save_pretrained(tmp_path / "fork")
    ids = random_ids(2, 5, seed=1)
    loaded = TTTE2ECache.from_pretrained(tmp_path / "fork", model=model)
    with torch.no_grad():
        logits = model(ids, cache=loaded).logits
        torch.testing.assert_close(logits, model(ids, cache=cache).logits)


def test_another_copy_of_the_model_answers_the_same(model, cache, folder, tmp_path):
    """Read on one machine, answer on another: the model comes from its own saved folder."""
    model.save_pretrained(tmp_path / "model")
    other = TTTE2EForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = TTTE2ECache.from_pretrained(folder, model=other)
    new = random_ids(2, 9, seed=1)
    with torch.no_grad():
        expected = model(new, cache=cache).logits
        assert torch.equal(other(new, cache=loaded).logits, expected)


def test_a_loaded_context_can_be_saved_again(model, folder, tmp_path):
    loaded = TTTE2ECache.from_pretrained(str(folder), model=model)
    loaded.save_pretrained(str(tmp_path / "deep" / "er"))
    assert_identical(TTTE2ECache.from_pretrained(tmp_path / "deep" / "er", model=model), loaded)


def test_saving_again_replaces_the_older_context(model, cache, folder):
    read(model, random_ids(2, 30, seed=5), cache)
    cache.save_pretrained(folder)
    assert_identical(TTTE2ECache.from_pretrained(folder, model=model), cache)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_weights_are_refused(folder):
    with pytest.raises(ValueError, match="other weights"):
        TTTE2ECache.from_pretrained(folder, model=small_model(seed=1))


@pytest.mark.parametrize(
    "change", [{"inner_learning_rate": 0.5}, {"mini_batch_size": 4}, {"rms_norm_eps": 1e-5}], ids=str
)
def test_another_configuration_is_refused(folder, change):
    with pytest.raises(ValueError, match="another configuration"):
        TTTE2ECache.from_pretrained(folder, model=small_model(**change))


@pytest.mark.parametrize("change", [{"use_cache": False}, {"meta_gradient": "first_order"}], ids=str)
def test_settings_that_leave_the_context_alone_may_differ(folder, change):
    assert TTTE2ECache.from_pretrained(folder, model=small_model(**change)).columns == 2 * BATCH + 3


def test_a_model_of_another_kind_is_refused(folder):
    with pytest.raises(ValueError, match=r"`model` is a Linear"):
        TTTE2ECache.from_pretrained(folder, model=torch.nn.Linear(2, 2))


def test_an_empty_cache_cannot_be_saved(model, tmp_path):
    with pytest.raises(ValueError, match="empty"):
        TTTE2ECache(model.config).save_pretrained(tmp_path / "context")
    assert list(tmp_path.iterdir()) == []


def in_place(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)


def replaced(model):
    model.model.norm.weight = torch.nn.Parameter(torch.ones_like(model.model.norm.weight))


def trained(model):
    model.train()(random_ids(1, 20), labels=random_ids(1, 20)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def through_data(model):
    model.model.embed_tokens.weight.data.add_(1)


def converted(model):
    model.double()


@pytest.mark.parametrize("change", [in_place, replaced, trained, through_data, converted])
def test_weights_that_changed_since_reading_are_refused(change, tmp_path):
    model = small_model()
    cache = read(model, random_ids(1, 20))
    change(model)
    with pytest.raises(ValueError, match="weights changed"):
        cache.save_pretrained(tmp_path / "context")
    assert list(tmp_path.iterdir()) == []


def test_the_model_must_still_be_there_to_save(tmp_path):
    cache = read(small_model(), random_ids(1, 20))
    with pytest.raises(ValueError, match="gone"):
        cache.save_pretrained(tmp_path / "context")
    assert list(tmp_path.iterdir()) == []


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def lengthened(path):
    path.write_bytes(path.read_bytes() + b"more")


def one_bit_flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def replaced_by_a_list(path):
    path.write_text("[1, 2]")


def not_text(path):
    path.write_bytes(b"\xff\xfe\x00\x01" * 20)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [truncated, emptied, lengthened, one_bit_flipped, replaced_by_a_list, not_text], ids=lambda f: f.__name__
)
def test_a_damaged_file_is_a_clear_error(model, folder, name, damage):
    damage(folder / name)
    with pytest.raises(ValueError, match=r"damaged.*read the text again"):
        TTTE2ECache.from_pretrained(folder, model=model)


def test_every_flipped_byte_of_the_description_is_noticed(model, folder):
    """No value of the json can change unseen: every byte that matters is covered by a checksum."""
    path = folder / "context.json"
    whole = path.read_bytes()
    counters = json.loads(whole)
    for place in range(0, len(whole), 7):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(bytes(data))
        try:
            same = json.loads(data) == counters
        except ValueError:
            same = False
        if not same:
            with pytest.raises(ValueError, match="context in"):
                TTTE2ECache.from_pretrained(folder, model=model)


@pytest.mark.parametrize(
    "key", ["format", "fingerprint", "checksum", "tokens", "next_positions", "pending_counts", "columns"]
)
@pytest.mark.parametrize("value", [None, "x", [], -1], ids=str)
def test_a_wrong_value_in_the_description_is_a_clear_error(model, folder, key, value):
    path = folder / "context.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match="context in"):
        TTTE2ECache.from_pretrained(folder, model=model)


@pytest.mark.parametrize(
    "key", ["format", "fingerprint", "checksum", "tokens", "pending_counts", "columns", "finished"]
)
def test_a_missing_value_in_the_description_is_a_clear_error(model, folder, key):
    path = folder / "context.json"
    description = json.loads(path.read_text())
    del description[key]
    path.write_text(json.dumps(description))
    with pytest.raises(ValueError, match="damaged"):
        TTTE2ECache.from_pretrained(folder, model=model)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(model, folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        TTTE2ECache.from_pretrained(folder, model=model)


def test_a_missing_folder_is_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TTTE2ECache.from_pretrained(tmp_path / "nowhere", model=model)


def test_tensors_of_another_context_are_refused(model, folder, tmp_path):
    """Two valid files that do not belong together."""
    read(model, random_ids(2, 30, seed=3)).save_pretrained(tmp_path / "other")
    (folder / FILES[0]).write_bytes((tmp_path / "other" / FILES[0]).read_bytes())
    with pytest.raises(ValueError, match="damaged"):
        TTTE2ECache.from_pretrained(folder, model=model)


def test_a_folder_with_other_files_is_left_alone(cache, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`folder`.*other files"):
        cache.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_file_in_place_of_the_folder_is_left_alone(cache, tmp_path):
    (tmp_path / "context").write_text("mine")
    with pytest.raises(ValueError, match="`folder`"):
        cache.save_pretrained(tmp_path / "context")
    assert (tmp_path / "context").read_text() == "mine"


@pytest.mark.parametrize("failing", ["write_bytes", "write_text"])
def test_a_failure_while_saving_leaves_the_older_context(model, cache, folder, monkeypatch, failing):
    older = TTTE2ECache.from_pretrained(folder, model=model)
    read(model, random_ids(2, 30, seed=5), cache)

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, failing, fail)
    with pytest.raises(OSError, match="no space"):
        cache.save_pretrained(folder)
    monkeypatch.undo()
    assert_identical(TTTE2ECache.from_pretrained(folder, model=model), older)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("moves_before", [0, 1])
def test_a_failure_while_replacing_leaves_the_older_context(model, cache, folder, monkeypatch, moves_before):
    """Either move of the exchange may fail."""
    from ttt_e2e import cache_files

    older = TTTE2ECache.from_pretrained(folder, model=model)
    read(model, random_ids(2, 30, seed=5), cache)
    moves, replace = [], cache_files.os.replace

    def fail(source, target):
        moves.append(target)
        if len(moves) == moves_before + 1:
            raise OSError("interrupted")
        replace(source, target)

    monkeypatch.setattr(cache_files.os, "replace", fail)
    with pytest.raises(OSError, match="interrupted"):
        cache.save_pretrained(folder)
    monkeypatch.undo()
    assert_identical(TTTE2ECache.from_pretrained(folder, model=model), older)
