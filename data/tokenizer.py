"""Tokenizers: one that is there, or byte-level BPE trained on the documents at hand."""

import hashlib
import json
import tempfile
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from datasets import Dataset
from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging

from ..storage.cached_folder import cached_folder
from ..storage.digests import digest
from .sources import path_or_id
from .texts import text_batches, text_totals

logger = logging.get_logger(__name__)

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|padding|>"
# Turns of a model that was never taught any, as a text; an answer ends with its paragraph.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].capitalize() }}: {{ message['content'] }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_END = "\n\n"
FORMAT, MANIFEST = 1, "manifest.json"
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(source: str | Path, vocabulary_size: int | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, or from the Hub by its id.

    Args:
        vocabulary_size: of the model that it is for, if there is one.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no file of a tokenizer.
        ValueError: the tokenizer cannot be loaded, or has ids that the model does not know.
    """
    folder = path_or_id(source, "source")
    if folder is not None and not any((folder / name).is_file() for name in FILES):
        raise FileNotFoundError(
            f"source={source}: no tokenizer in it (none of {', '.join(FILES)}); name a folder that "
            "`tokenizer.save_pretrained` has written"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder or source)
    except Exception as error:
        raise ValueError(
            f"source={source}: the tokenizer cannot be loaded ({error}); name a folder that "
            "`tokenizer.save_pretrained` has written, or an id of the Hub"
        ) from error
    if vocabulary_size is not None:
        check_vocabulary(tokenizer, vocabulary_size)
    return tokenizer


def find_tokenizer(*sources: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the first source that has one; None where there is none.

    Raises:
        ValueError: the one in a folder cannot be loaded. (What the Hub has beside a model may be of any kind: only a
            warning says so.)
    """
    for source in sources:
        try:
            return load_tokenizer(source)
        except FileNotFoundError:
            continue
        except ValueError as error:
            if Path(source).is_dir():
                raise
            logger.warning(f"{source}: no tokenizer is taken from it ({error})")
    return None


def trained_tokenizer(documents: Dataset, vocabulary_size: int, cache_folder: Path) -> PreTrainedTokenizerBase:
    """`train_tokenizer` on the texts of the documents, or what it returned for the same texts before.

    Args:
        documents: column `text`.
        vocabulary_size: entries in all.
        cache_folder: where the tokenizer is kept.
    """
    settings = {"format": FORMAT, "vocabulary_size": vocabulary_size, "texts": text_totals(documents).digest}
    folder = Path(cache_folder) / "tokenizers" / digest(settings)

    def build(part: Path) -> dict:
        train_tokenizer(chain.from_iterable(text_batches(documents)), vocabulary_size).save_pretrained(part)
        return settings

    cached_folder(folder, MANIFEST, build)
    return AutoTokenizer.from_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE and wrap it for transformers.

    Every text is encoded with the begin token first, as the model saw it in training. Any text can be encoded and
    decoded back: bytes that were never merged are tokens of their own. Padding is on the left, as generation needs it.

    Args:
        texts: what to learn the merges from.
        vocabulary_size: entries in all, among them 256 bytes and 3 special tokens.

    Raises:
        ValueError: the vocabulary has no room for the bytes and the special tokens.
    """
    alphabet, special_tokens = pre_tokenizers.ByteLevel.alphabet(), [BEGIN, END, PADDING]
    if vocabulary_size < len(alphabet) + len(special_tokens):
        raise ValueError(
            f"vocabulary_size={vocabulary_size}: must be at least {len(alphabet) + len(special_tokens)}, "
            "for all bytes and the special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=True
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before every document: the begin token, or the end token where there is none.

    Raises:
        ValueError: the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise ValueError(
        "tokenizer: it has neither a bos_token nor an eos_token to stand between documents; "
        'add one: tokenizer.add_special_tokens({"bos_token": ...})'
    )


def speaks_plainly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a conversation is a plain text to it, because it has no chat template or the plain one."""
    return tokenizer.chat_template in (None, PLAIN_TEMPLATE)


def encode_documents(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, split_special_tokens: bool = True
) -> list[list[int]]:
    """The token ids of every document: the separator, then its text as of `encode_texts`, and nothing at its end."""
    separator = separator_id(tokenizer)
    return [[separator, *ids] for ids in encode_texts(texts, tokenizer, split_special_tokens)]


def encode_texts(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    split_special_tokens: bool = True,
    add_special_tokens: bool = False,
) -> list[list[int]]:
    """The token ids of texts.

    Args:
        split_special_tokens: a text that spells out a special token, such as `<|end|>`, means these letters; False
            encodes them as that token.
        add_special_tokens: with what the tokenizer puts around a text.

    Raises:
        ValueError: they are to be split, and the tokenizer, which is not a fast one, cannot do that.
    """
    if tokenizer.is_fast:
        return [found.ids for found in encode_with_offsets(texts, tokenizer, split_special_tokens, add_special_tokens)]
    how = {"split_special_tokens": split_special_tokens, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(texts, add_special_tokens=False, **how)["input_ids"]
    if split_special_tokens and not special_ids(tokenizer).isdisjoint(chain.from_iterable(encoded)):
        raise ValueError(
            "split_special_tokens=True: this tokenizer finds special tokens in plain text, and only of a fast one "
            "(with a tokenizer.json) can they be taken away; set it to False, or use a fast tokenizer"
        )
    return tokenizer(texts, **how)["input_ids"] if add_special_tokens else encoded


def encode_with_offsets(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    split_special_tokens: bool = True,
    add_special_tokens: bool = False,
) -> list[Encoding]:
    """As `encode_texts`, of a fast tokenizer: ids, and the characters that each stands for."""
    arguments = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    encoded = tokenizer(texts, split_special_tokens=split_special_tokens, **arguments).encodings
    special = special_ids(tokenizer) if split_special_tokens else set()
    # A tokenizer whose vocabulary of words or pieces has the special tokens among the others finds them there as well.
    if not special.isdisjoint(chain.from_iterable(found.ids for found in encoded)):
        return _without_special_tokens(tokenizer).encode_batch(texts, add_special_tokens=add_special_tokens)
    if add_special_tokens:
        arguments["add_special_tokens"] = True
        return tokenizer(texts, split_special_tokens=split_special_tokens, **arguments).encodings
    return encoded


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids of all special tokens but the one for what is unknown."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added - {tokenizer.unk_token_id}


def _without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """The same vocabulary under the same ids, in which no text is a special token."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {tokenizer.convert_ids_to_tokens(index) for index in special_ids(tokenizer)}
    special.discard(state["model"].get("unk_token"))

    def hidden(name: str) -> str:
        return f"\0{name}" if name in special else name

    words = state["model"]["vocab"]  # {word: id}, or of a unigram model [[piece, score]]
    if isinstance(words, dict):
        state["model"]["vocab"] = {hidden(word): index for word, index in words.items()}
    else:
        state["model"]["vocab"] = [[hidden(piece), score] for piece, score in words]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in special]
    state |= {"truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps(state))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides how a text is encoded, the separator included."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by the last call; every call sets them anew.
        state.pop("truncation"), state.pop("padding")
        data = json.dumps(state, sort_keys=True).encode()
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            data = b"".join(path.read_bytes() for path in sorted(Path(folder).iterdir()))
    return hashlib.sha256(f"{separator_id(tokenizer)} {tokenizer.split_special_tokens} ".encode() + data).hexdigest()


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> None:
    """Check that a model knows all ids of a tokenizer.

    Raises:
        ValueError: it does not.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocabulary_size:
        raise ValueError(
            f"tokenizer={tokenizer.name_or_path!r}: its ids go up to {largest}, but the model knows only "
            f"{vocabulary_size}, and so only 0 to {vocabulary_size - 1}; name, or save with the model, the tokenizer "
            "that it was trained with"
        )
