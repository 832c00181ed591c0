"""Texts become the ids that the tokenizer file says, cleaned and padded as the text encoder expects them."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from leanwan.errors import InputError
from wan.modules.tokenizers import HuggingfaceTokenizer

PIECES = ["<pad>", "</s>", "<s>", "<unk>", "▁", "▁a", "▁red", "▁ball", ",", "A", "a", "b", "l", "_", "&", "é"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tokenizer whose unknown id and normalizer are not those that the library's T5 class would build."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = [(piece, 0.0 if piece.startswith("<") else -1.0) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=PIECES.index("<unk>")))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = special | {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def pieces(ids):
    return [PIECES[i] for i in ids[0].tolist()]


def test_pads_and_masks_to_the_length(directory):
    tokenizer = HuggingfaceTokenizer(directory, seq_len=6, clean="whitespace")
    ids, mask = tokenizer(["a red ball", "a"], return_mask=True, add_special_tokens=True)
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [[5, 6, 7, 1, 0, 0], [5, 1, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]


def test_truncates_and_keeps_the_end_token(directory):
    ids = HuggingfaceTokenizer(directory, seq_len=3, clean="whitespace")("a red ball a red ball")
    assert ids.tolist() == [[5, 6, 1]]


def test_without_a_length_and_with_overrides(directory):
    tokenizer = HuggingfaceTokenizer(directory)
    assert tokenizer("a red").tolist() == [[5, 6, 1]]
    assert tokenizer("a red", add_special_tokens=False).tolist() == [[5, 6]]
    assert tokenizer("a", padding="max_length", max_length=4).tolist() == [[5, 1, 0, 0]]
    assert tokenizer.vocab_size == len(PIECES)


def test_the_file_decides_normalizer_and_unknown_id(directory):
    """The library's T5 class reads this directory with an unknown id of 2 and without the normalizer."""
    ids = HuggingfaceTokenizer(directory)("ｒｅｄ，☃")
    assert pieces(ids) == ["▁red", ",", "<unk>", "</s>"]


@pytest.mark.parametrize(
    "clean, text, same_as",
    [
        ("whitespace", "  a \t red\n\u3000 ball ", "a red ball"),
        ("whitespace", "a &amp;amp; b", "a & b"),
        ("whitespace", "Ã©", "é"),
        ("whitespace", "A_b", "A_b"),
        ("lower", " A   B", "a b"),
        ("canonicalize", "A_b,  &lt;B&gt;!", "a b b"),
        (None, "a &amp; b", "a &amp; b"),
    ],
)
def test_cleaning(directory, clean, text, same_as):
    cleaned = HuggingfaceTokenizer(directory, clean=clean)(text)
    assert pieces(cleaned) == pieces(HuggingfaceTokenizer(directory)(same_as))


def test_unclean_text_differs(directory):
    """What the cleaning tests compare is told apart by this tokenizer."""
    tokenizer = HuggingfaceTokenizer(directory)
    for dirty, clean in [("a &amp; b", "a & b"), ("A_b", "a b"), ("a  b", "a b"), ("Ã©", "é")]:
        assert pieces(tokenizer(dirty)) != pieces(tokenizer(clean))


def test_bad_directories(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such tokenizer directory"):
        HuggingfaceTokenizer(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no such tokenizer directory"):
        HuggingfaceTokenizer("google/umt5-xxl")  # a name on the hub is not looked up
    with pytest.raises(InputError, match="holds no tokenizer.json"):
        HuggingfaceTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": \n {')
    with pytest.raises(InputError, match="cannot be read as a tokenizer") as error:
        HuggingfaceTokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_unknown_cleaning(directory):
    with pytest.raises(ValueError, match="'upper'.*'canonicalize'"):
        HuggingfaceTokenizer(directory, clean="upper")
