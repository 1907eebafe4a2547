"""Learned contexts of strangers: checksums and fingerprint are in order, and what they hold is refused all the same."""

import copy
import hashlib
import json
import math
import random

import pytest
import torch
from safetensors.torch import load, save

from ttt_e2e import TTTE2ECache
from ttt_e2e.cache_files import checksum

from .helpers import BATCH, VOCAB, WINDOW, random_ids, small_model

LENGTH = 2 * BATCH + 3
FAST, IDS = "fast.0", "pending.ids"


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def honest(model, tmp_path_factory):
    """Description and tensors of a context of two rows, one of them shorter."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :BATCH] = 0
    with torch.no_grad():
        cache = model(random_ids(2, LENGTH), attention_mask=mask, use_cache=True).cache
    folder = tmp_path_factory.mktemp("honest")
    cache.save_pretrained(folder)
    return json.loads((folder / "context.json").read_text()), load((folder / "context.safetensors").read_bytes())


def forge(folder, description: dict, data: bytes | dict):
    """Write a context as somebody does who knows the format."""
    folder.mkdir(exist_ok=True)
    data = data if isinstance(data, bytes) else save(data)
    description = description | {"tensors": hashlib.sha256(data).hexdigest()}
    (folder / "context.json").write_text(json.dumps(description | {"checksum": checksum(description)}))
    (folder / "context.safetensors").write_bytes(data)
    return folder


def entry(index: int, value: float):
    """Set one number of a tensor."""

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[index] = value
        return tensor

    return change


def test_a_forgery_of_nothing_is_accepted(model, honest, tmp_path):
    description, tensors = honest
    assert TTTE2ECache.from_pretrained(forge(tmp_path / "c", description, tensors), model).columns == LENGTH


FIELDS = {
    "columns": [10**15, -1, 0, 1.0, True, "19", None, [19], 10**400],
    "tokens": [
        [],
        [LENGTH, -1],
        [LENGTH + 1, 11],
        [1e30, 11],
        [19.0, 11],
        ["19", 11],
        [True, 11],
        None,
        "no",
    ],
    "next_positions": [[LENGTH - 1, 11], [2**63, 11], [LENGTH], [LENGTH, float("nan")], [None, 11], {}, 5],
    "fast_rows": [[0, 2], [1, 1], [0], [-1, 0], [0, "1"], [0.0, 1], 7, "01", [True, False]],
    "pending_counts": [[BATCH + 1, 3], [-1, 3], [3], [0, 0], [3.0, 3], ["3", 3], 10**15, [3, 12]],
    "finished": [[True], [1, 0], True, "yes", [None, True], [True, False, True]],
    "padding_id": [-1, VOCAB, 1.5, True, "0", [0]],
    "fingerprint": [{}, None, "sha", {"weights": 1, "config": 2, "adapters": 3, "adapted_layers": 4}],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_that_no_reading_leaves_is_named(model, honest, tmp_path, name):
    description, tensors = honest
    for value in FIELDS[name]:
        folder = forge(tmp_path / "c", description | {name: value}, tensors)
        with pytest.raises(ValueError, match=rf"context in {folder} is damaged \(`{name}.*: read the text again"):
            TTTE2ECache.from_pretrained(folder, model)


def test_missing_and_unknown_fields_are_named(model, honest, tmp_path):
    description, tensors = honest
    for name in sorted(description.keys() - {"tensors", "checksum"}):
        less = {key: value for key, value in description.items() if key != name}
        with pytest.raises(ValueError, match=rf"context in .*{name}"):
            TTTE2ECache.from_pretrained(forge(tmp_path / "c", less, tensors), model)
    with pytest.raises(ValueError, match=r"fields \['surprise'\] are unknown"):
        TTTE2ECache.from_pretrained(forge(tmp_path / "c", description | {"surprise": 1}, tensors), model)


TENSORS = {
    "nan": (FAST, entry(5, math.nan), r"`fast\.0` holds nan"),
    "inf": (FAST, entry(5, math.inf), r"`fast\.0` holds inf"),
    "1e30": (FAST, entry(5, -1e30), r"`fast\.0` holds -1e\+30|`fast\.0` holds -1\.0000"),
    "further than all steps": (FAST, entry(5, 9.0), r"fast weights of row 0 have a joint norm of 9.*2 inner steps"),
    "nan in keys": ("keys.2", entry(0, math.nan), r"`keys\.2` holds nan"),
    "inf in values": ("values.0", entry(0, -math.inf), r"`values\.0` holds -inf"),
    "nan in pending inputs": ("pending.inputs", entry(0, math.nan), r"`pending\.inputs` holds nan"),
    "id outside": (IDS, entry(0, VOCAB), rf"`pending\.ids` holds {VOCAB}"),
    "negative id": (IDS, entry(0, -100), r"`pending\.ids` holds -100"),
    "negative position": ("pending.positions", entry(0, -1), r"`pending\.positions` holds -1"),
    "huge position": ("pending.positions", entry(2, 2**60), r"`pending\.positions` holds"),
    "position after the next one": ("pending.positions", entry(2, 25), r"`pending\.positions` of row 0 must grow"),
    "ids as floats": (IDS, lambda t: t.float(), r"`pending\.ids` is F32.*I32 or I64"),
    "fast weights as float16": (FAST, lambda t: t.half(), r"`fast\.0` is F16"),
    "keys as integers": ("keys.0", lambda t: t.long(), r"`keys\.0` is I64"),
    "transposed": (FAST, lambda t: t.mT.contiguous(), r"`fast\.0` is F32 \[2, 32, 48\].*\[2, 48, 32\]"),
    "another copy": (FAST, lambda t: torch.cat([t, t]), r"`fast\.0` is F32 \[4"),
    "one row": ("keys.1", lambda t: t[:1].contiguous(), r"`keys\.1` is F32 \[1"),
    "too many columns": ("keys.0", lambda t: torch.cat([t, t], dim=2), rf"`keys\.0` is F32.*{WINDOW - 1}, 8\]"),
    "fewer columns than tokens": ("keys.0", lambda t: t[:, :, :2].contiguous(), r"`keys\.0` is F32 \[2, 4, 2, 8\]"),
    "no dimension": ("keys.0", lambda t: t.sum(), r"`keys\.0` is F32 \[\]"),
    "empty": ("values.3", lambda t: t[:, :0].contiguous(), r"`values\.3` is F32 \[2, 0"),
    "missing": ("values.3", lambda t: None, r"tensors \['values\.3'\] are missing"),
    "missing fast weights": ("fast.4", lambda t: None, r"tensors \['fast\.4'\] are missing"),
}


@pytest.mark.parametrize(("name", "change", "message"), TENSORS.values(), ids=TENSORS)
def test_a_tensor_that_no_reading_leaves_is_named(model, honest, tmp_path, name, change, message):
    description, tensors = honest
    new = change(tensors[name])
    tensors = {key: value for key, value in tensors.items() if key != name} | ({} if new is None else {name: new})
    folder = forge(tmp_path / "c", description, tensors)
    with pytest.raises(ValueError, match=rf"context in {folder} is damaged \(.*({message}).*read the text again"):
        TTTE2ECache.from_pretrained(folder, model)


def test_an_unknown_tensor_is_named(model, honest, tmp_path):
    description, tensors = honest
    folder = forge(tmp_path / "c", description, tensors | {"fast.6": tensors[FAST].clone()})
    with pytest.raises(ValueError, match=r"tensors \['fast\.6'\] are unknown"):
        TTTE2ECache.from_pretrained(folder, model)


FILES = {
    "deep json": (b'{"format":' + b"[" * 10**5, None, "recursion"),
    "deep json that is whole": (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", None, "lacks"),
    "huge json": (b" " * (5 * 2**20), None, "longer than"),
    "huge number": (b'{"format": ' + b"9" * 5000 + b"}", None, "digits"),
    "huge header": (None, (10**15).to_bytes(8, "little") + b"{}", "header of .* claims 1000000000000000 bytes"),
    "long header": (None, (2**20).to_bytes(8, "little") + b" " * 2**20, "header of .* claims 1048576 bytes"),
    "header of nothing": (None, b"", "header"),
    "huge shape": (
        None,
        (lambda text: len(text).to_bytes(8, "little") + text)(
            b'{"keys.0":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4000000000000000000]}}'
        ),
        "header|Invalid|overflow|offset|incomplete",
    ),
}


@pytest.mark.parametrize(("text", "data", "message"), FILES.values(), ids=FILES)
def test_files_are_refused_before_anything_is_made_of_them(model, honest, tmp_path, monkeypatch, text, data, message):
    from ttt_e2e import cache_files

    description, tensors = honest
    folder = forge(tmp_path / "c", description, tensors if data is None else data)
    if text is not None:
        (folder / "context.json").write_bytes(text)
    monkeypatch.setattr(cache_files, "load", lambda data: pytest.fail("tensors were loaded"))
    with pytest.raises(ValueError, match=rf"(?s)context in {folder} is damaged .*({message}).*read the text again"):
        TTTE2ECache.from_pretrained(folder, model)


def test_a_context_from_before_adapters_were_noted_is_named(model, honest, tmp_path):
    description, tensors = honest
    with pytest.raises(ValueError, match=r"format 1, which does not say which adapters.*read the text again"):
        TTTE2ECache.from_pretrained(forge(tmp_path / "c", description | {"format": 1}, tensors), model)


SLIDING, FULL = "sliding_attention", "full_attention"
MODES = [
    {},
    {"use_attention": False},
    {"use_prime_mlp": False, "num_suffix_layers": 3},
    {"layer_types": [SLIDING, FULL, SLIDING, SLIDING]},
    {"test_time_training": False, "layer_types": [FULL] * 4},
    {"inner_max_grad_norm": None, "inner_learning_rate": 0.01, "num_key_value_heads": 2},
    {"inner_max_grad_norm": 0.1, "inner_learning_rate": 1e-4, "initializer_range": 1.0},
    {"mini_batch_size": 1, "sliding_window": 1},
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_context_that_reading_leaves_is_accepted(mode, tmp_path):
    """Ragged batches, read in pieces, with rows repeated and left out in between."""
    generator, model = random.Random(0), small_model(**mode)
    for _ in range(4):
        rows, cache = generator.randint(1, 3), TTTE2ECache(model.config)
        for _ in range(3):
            length = generator.choice([1, 2, 5, BATCH + 1, 40])
            mask = torch.ones(rows, length, dtype=torch.long)
            for row in range(rows):
                mask[row, generator.sample(range(length), generator.randint(0, length))] = 0
            ids = random_ids(rows, length, seed=generator.randint(0, 99))
            with torch.no_grad():
                model(ids, cache=cache, attention_mask=mask)
            kept = [generator.randrange(rows) for _ in range(generator.randint(1, 3))]
            cache.batch_select_indices(torch.tensor(kept))
            rows = len(kept)
            cache.save_pretrained(tmp_path / "c")
            loaded = TTTE2ECache.from_pretrained(tmp_path / "c", model)
            assert (loaded.context.tokens, loaded.columns) == (cache.context.tokens, cache.columns)


JUNK = [None, True, -1, 0, 3, 10**15, 2**63, 1.5, math.nan, "", "x", [], [[]], {}, [1], [None, None], {"a": 1}]


def test_random_forgeries_are_refused_or_read_on(model, honest, tmp_path):
    """Whatever is accepted is finite and can be read on from; whatever is refused is a ValueError."""
    generator, seeds = random.Random(0), torch.Generator().manual_seed(0)
    accepted = 0
    for _ in range(150):
        description, tensors = copy.deepcopy(honest[0]), dict(honest[1])
        for _ in range(generator.choice([1, 1, 2])):
            if generator.random() < 0.5:
                name = generator.choice(sorted(description))
                value = description[name]
                if isinstance(value, list) and value and generator.random() < 0.6:
                    value[generator.randrange(len(value))] = generator.choice([*JUNK, 1, 2, 5, 8, 19])
                else:
                    description[name] = generator.choice(JUNK)
            else:
                name = generator.choice(sorted(tensors))
                tensor = tensors[name].clone()
                number = generator.choice([math.nan, math.inf, 1e30, 0.0, 1.0, -1.0, 50.0, 1e9])
                whole = not tensor.is_floating_point()
                tensor.view(-1)[generator.randrange(tensor.numel())] = (
                    int(min(number, 1e9) if number == number else -1) if whole else number
                )
                tensors[name] = tensor
        folder = forge(tmp_path / "c", description, tensors)
        try:
            cache = TTTE2ECache.from_pretrained(folder, model)
        except ValueError as error:
            assert str(folder) in str(error)
            continue
        accepted += 1
        new = torch.randint(3, VOCAB, (2, BATCH), generator=seeds)
        with torch.no_grad():
            assert model(new, cache=cache).logits.isfinite().all()
    assert 10 < accepted < 100
