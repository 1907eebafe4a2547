"""The tokenizer encodes every text, puts its begin token first, and survives saving."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ttt_e2e.data import load_tokenizer, tokenizer, train_tokenizer, trained_tokenizer

TEXTS = ["def f(x):\n    return x + 1\n", "import os\nimport sys\n"] * 10
DOCUMENTS = Dataset.from_dict({"text": TEXTS})


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(TEXTS, vocabulary_size=280)


@pytest.fixture
def trainings(monkeypatch):
    """The vocabulary size of each training."""
    sizes = []

    def counting(texts, vocabulary_size):
        sizes.append(vocabulary_size)
        return train_tokenizer(texts, vocabulary_size)

    monkeypatch.setattr(tokenizer, "train_tokenizer", counting)
    return sizes


@pytest.mark.parametrize("text", ["def f(x):\n    return x\n", "grüße \U0001f600 \x00\t\r\n", " leading", ""])
def test_any_text_comes_back(trained, text):
    ids = trained(text)["input_ids"]
    assert ids[0] == trained.bos_token_id
    assert trained.decode(ids, skip_special_tokens=True) == text


def test_merges_were_learned(trained):
    assert len(trained) == 280
    assert len(trained("import os")["input_ids"]) < 1 + len("import os")


def test_special_tokens_are_the_first_ids(trained):
    assert (trained.bos_token_id, trained.eos_token_id, trained.pad_token_id) == (0, 1, 2)


def test_saved_tokenizer_is_the_same(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    batch = ["import os", "def f(x):"]
    assert loaded(batch, padding=True)["input_ids"] == trained(batch, padding=True)["input_ids"]
    assert loaded(batch, padding=True)["attention_mask"][0][0] == 0, "padding must be on the left"


def test_vocabulary_without_room_for_the_bytes_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="vocabulary_size=258: must be at least 259"):
        train_tokenizer(TEXTS, vocabulary_size=258)
    with pytest.raises(ValueError, match="vocabulary_size=258: must be at least 259"):
        trained_tokenizer(DOCUMENTS, 258, tmp_path)


def test_tokenizer_is_trained_once_for_the_same_texts(trained, tmp_path, trainings):
    first, second = (trained_tokenizer(DOCUMENTS, 280, tmp_path) for _ in range(2))
    assert trainings == [280]
    assert first.get_vocab() == second.get_vocab() == trained.get_vocab(), "training is deterministic"
    assert first("import os")["input_ids"] == trained("import os")["input_ids"]
    trained_tokenizer(DOCUMENTS, 270, tmp_path)
    trained_tokenizer(DOCUMENTS.select(range(19)), 280, tmp_path)
    assert trainings == [280, 270, 280]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "changed"])
def test_damaged_tokenizer_is_trained_anew(trained, tmp_path, trainings, monkeypatch, name, damage):
    warnings = []
    monkeypatch.setattr("ttt_e2e.storage.cached_folder.logger", SimpleNamespace(warning=warnings.append))
    trained_tokenizer(DOCUMENTS, 280, tmp_path)
    [path] = (tmp_path / "tokenizers").rglob(name)
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[: len(data) // 2] if damage == "cut off" else data.replace(b"2", b"3"))
    assert trained_tokenizer(DOCUMENTS, 280, tmp_path).get_vocab() == trained.get_vocab()
    assert trainings == [280, 280] and len(warnings) == 1 and name in warnings[0]


def test_id_of_the_hub_goes_to_the_auto_class(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda source: f"loaded {source}")
    assert load_tokenizer("someone/model") == "loaded someone/model"


def test_tokenizer_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    def unreachable(source):
        raise OSError("no network")

    with pytest.raises(FileNotFoundError, match="missing: there is no such folder"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"source=\./missing: there is no such folder"):
        load_tokenizer("./missing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in it \(none of tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"source=someone/model: .*no network"):
        load_tokenizer("someone/model")


KINDS = {
    "bytes": (models.BPE, {}, pre_tokenizers.ByteLevel(add_prefix_space=False), trainers.BpeTrainer),
    "merges": (models.BPE, {"unk_token": "<unk>"}, pre_tokenizers.Metaspace(), trainers.BpeTrainer),
    "unigram": (models.Unigram, {}, pre_tokenizers.Metaspace(), trainers.UnigramTrainer),
    "word pieces": (models.WordPiece, {"unk_token": "<unk>"}, pre_tokenizers.Whitespace(), trainers.WordPieceTrainer),
    "words": (models.WordLevel, {"unk_token": "<unk>"}, pre_tokenizers.WhitespaceSplit(), trainers.WordLevelTrainer),
}


@pytest.fixture(scope="module", params=KINDS)
def fast(request):
    """A tokenizer of one kind that puts tokens around a text."""
    model, arguments, pre_tokenizer, trainer = KINDS[request.param]
    backend = Tokenizer(model(**arguments))
    backend.pre_tokenizer = pre_tokenizer
    special = ["<s>", "</s>", "<unk>"]
    more = {"unk_token": "<unk>"} if request.param == "unigram" else {}
    texts = ["the cat sat on the mat </s> <s>", "t h e c a s o n m < / >"] * 9
    backend.train_from_iterator(texts, trainer(vocab_size=300, special_tokens=special, show_progress=False, **more))
    around = [(token, backend.token_to_id(token)) for token in special[:2]]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_special_tokens_that_a_text_spells_out_are_letters(fast):
    text, begin, end = "the cat </s> sat <s>", fast.bos_token_id, fast.eos_token_id
    [split] = tokenizer.encode_texts([text], fast)
    assert split and not {begin, end} & set(split)
    [encoded] = tokenizer.encode_with_offsets([text], fast, add_special_tokens=True)
    assert encoded.ids == [begin, *split, end] and encoded.offsets[-2][1] == len(text)
    [whole] = tokenizer.encode_texts([text], fast, split_special_tokens=False)
    assert whole == fast(text, add_special_tokens=False).input_ids and {begin, end} <= set(whole)


def test_a_text_without_special_tokens_is_encoded_as_ever(fast):
    text = "the cat sat"
    expected = fast(text, add_special_tokens=False).input_ids
    assert tokenizer.encode_texts([text, "", text], fast) == [expected, [], expected]
    around = [[fast.bos_token_id, *expected, fast.eos_token_id]]
    assert [fast(text).input_ids] == tokenizer.encode_texts([text], fast, add_special_tokens=True) == around


def test_the_tokenizer_itself_stays_as_it_is(fast):
    before, digest = fast("the </s> mat").input_ids, tokenizer.tokenizer_digest(fast)
    tokenizer.encode_texts(["the </s> mat"], fast)
    assert fast("the </s> mat").input_ids == before and tokenizer.tokenizer_digest(fast) == digest


def test_letters_come_back(trained):
    text = "x<|end|><|begin|>\n<|padding|>"
    [ids] = tokenizer.encode_texts([text], trained)
    assert trained.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.encode_documents([text], trained) == [[trained.bos_token_id, *ids]]


def test_a_slow_tokenizer_that_cannot_split_is_refused(fast):
    class Slow:
        is_fast, unk_token_id, added_tokens_decoder = False, None, fast.added_tokens_decoder

        def __call__(self, texts, **arguments):
            return {"input_ids": [[fast.eos_token_id] for _ in texts]}

    with pytest.raises(ValueError, match=r"split_special_tokens=True.*set it to False"):
        tokenizer.encode_texts(["</s>"], Slow())
    assert tokenizer.encode_texts(["</s>"], Slow(), False, add_special_tokens=True) == [[fast.eos_token_id]]
