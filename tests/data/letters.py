"""A tokenizer and documents small enough to work out every row by hand."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ttt_e2e.data import tokenize_documents

SEPARATOR = 0


def letters_tokenizer(bos_token="<s>", eos_token=None) -> PreTrainedTokenizerFast:
    """Each letter is a token: `a` is 1, `b` is 2, and so on; the separator is 0."""
    vocabulary = {"<s>": SEPARATOR} | {chr(ord("a") + n): n + 1 for n in range(26)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos_token, eos_token=eos_token)


def documents_of(*texts: str) -> Dataset:
    return Dataset.from_dict({"path": [f"{n}.txt" for n in range(len(texts))], "text": list(texts)})


def store_of(folder, *texts: str):
    return tokenize_documents(documents_of(*texts), letters_tokenizer(), folder)
