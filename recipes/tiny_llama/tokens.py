"""The tokenizer of tiny-llama and the token stream that it is trained on.

Byte-level BPE: text is cut into words, words into bytes, and the most frequent neighbours are merged until
there are 4,096 entries (Sennrich et al. 2016, arXiv:1508.07909, over bytes as in GPT-2). Every byte is in the
vocabulary, so no text is out of vocabulary and bits per byte are defined for all of it. Digits stay single
tokens.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from labkit.files.writing import new_file, new_folder
from recipes.tiny_llama.corpus import DOMAINS
from recipes.tiny_llama.sources import Document

VOCAB = 4096
EOS, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: list[str], vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab` entries, with `EOS` as id 0 and `PAD` as id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_tokenizer(work: Path, documents: list[Document]) -> PreTrainedTokenizerFast:
    """The tokenizer in `work`/tokenizer, trained on the training documents if it is not there yet."""
    folder = work / "tokenizer"
    if not folder.exists():
        with new_folder(folder) as made:
            train_tokenizer([d.text for d in documents if not d.held_out]).save_pretrained(made)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def ids_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The token ids of each text, without special tokens."""
    return [
        encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    ]


def make_stream(work: Path, documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """All training documents as one array of uint16, by domain, with `EOS` before each document."""
    path = work / "train.npy"
    if not path.exists():
        texts = [d.text for domain in DOMAINS for d in documents if d.domain == domain and not d.held_out]
        stream = np.concatenate(
            [np.array([tokenizer.eos_token_id, *ids], np.uint16) for ids in ids_of(texts, tokenizer)]
        )
        with new_file(path) as part:
            np.save(part, stream)
    return np.load(path)
