"""A byte-level BPE tokenizer trained on the documents at hand."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BEGIN, END, PADDING = "<|begin|>", "<|end|>", "<|padding|>"


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
