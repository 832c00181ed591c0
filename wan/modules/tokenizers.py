"""Text to token ids, the way that Wan2.1's text encoder was trained to read it."""

import html
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from transformers import PreTrainedTokenizerFast

from leanwan.errors import InputError

__all__ = ["HuggingfaceTokenizer"]


def _repair(text: str) -> str:
    """Mends broken encodings, then resolves HTML entities, doubly escaped ones included."""
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _collapse(text: str) -> str:
    """Every run of white space becomes one space; none is left at the ends."""
    return " ".join(text.split())


def _whitespace(text: str) -> str:
    return _collapse(_repair(text))


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    """Lower case without punctuation; an underscore separates words."""
    text = _repair(text).replace("_", " ")
    return _collapse(text.translate(str.maketrans("", "", string.punctuation)).lower())


CLEANERS: dict[str | None, Callable[[str], str]] = {
    None: str,
    "whitespace": _whitespace,
    "lower": _lower,
    "canonicalize": _canonicalize,
}


class HuggingfaceTokenizer:
    """A tokenizer directory in the Hugging Face layout, read as its `tokenizer.json` says and never from a network.

    The file is taken at its word: the library's own T5 class would put its normalizer, word splitting and
    unknown-token id in place of those in the file.

    Args:
        name: directory with `tokenizer.json` and `tokenizer_config.json`.
        seq_len: pad and truncate every text to this many tokens; None leaves lengths alone.
        clean: None, "whitespace", "lower" or "canonicalize".
        kwargs: for `PreTrainedTokenizerFast.from_pretrained`.

    Raises:
        InputError: the directory or its `tokenizer.json` is missing or unreadable.
        ValueError: unknown `clean`.
    """

    def __init__(self, name: str | Path, seq_len: int | None = None, clean: str | None = None, **kwargs: Any):
        if clean not in CLEANERS:
            raise ValueError(f"clean={clean!r}: choose from {', '.join(map(repr, CLEANERS))}")
        if not Path(name).is_dir():
            raise InputError(f"{name}: no such tokenizer directory, see --ckpt_dir")
        if not (Path(name) / "tokenizer.json").is_file():
            raise InputError(f"{name}: holds no tokenizer.json, download the tokenizer again")
        self.name = name
        self.seq_len = seq_len
        self.clean = clean
        try:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True, **kwargs)
        except Exception as error:  # the tokenizers library raises bare Exception for a bad file
            reason = " ".join(str(error).split())[:160]
            raise InputError(
                f"{name}: cannot be read as a tokenizer, download it again ({reason})"
            ) from error
        self.vocab_size = self.tokenizer.vocab_size

    def __call__(
        self, sequence: str | Sequence[str], **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Token ids of one text or a list of texts.

        Args:
            sequence: str or list of str.
            return_mask: also return the mask of real tokens.
            kwargs: for the tokenizer; they take precedence over padding and truncation to `seq_len`.

        Returns:
            ids [B, L] int64, with `return_mask=True` (ids, mask), where mask [B, L] int64 is 1 at real tokens.
        """
        return_mask = kwargs.pop("return_mask", False)
        options: dict[str, Any] = {"return_tensors": "pt"}
        if self.seq_len is not None:
            options |= {"padding": "max_length", "truncation": True, "max_length": self.seq_len}
        texts = [sequence] if isinstance(sequence, str) else sequence
        tokens = self.tokenizer([CLEANERS[self.clean](text) for text in texts], **options | kwargs)
        return (tokens.input_ids, tokens.attention_mask) if return_mask else tokens.input_ids
