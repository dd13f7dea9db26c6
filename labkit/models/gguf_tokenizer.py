"""The tokenizer in the metadata of a GGUF file: byte-level BPE, cut into words as the file names it.

The file lists tokens and merges, but not the regular expression that cuts a text into words before them: of that
it gives llama.cpp's *name*. Under another expression the merges still run and give other tokens, so a name that
is not known here is refused.

Agrees with: transformers' `integrations/gguf/gguf_tokenizer_mapping.py`; llama.cpp's `llama-vocab.cpp`.
"""

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from labkit.models.gguf_metadata import Metadata

CONTROL, USER_DEFINED = 3, 4  # gguf's TokenType: tokens that text never spells; tokens that are never cut
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message
NO_PART = (  # in turning a text into tokens with byte-level BPE
    "scores", "seperator_token_id", "cls_token_id", "mask_token_id", "prefix_token_id", "suffix_token_id",
    "middle_token_id", *(f"fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
)  # fmt: skip
LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Cut:
    """How a text is cut into words.

    Attributes:
        steps: pre-tokenizers, one after the other.
        whole: a word that is a token is taken as it is, even if no merges lead to it.
        begins: texts begin with the BOS token, unless the file says otherwise.
    """

    steps: tuple
    whole: bool = False
    begins: bool = False


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's expression
LLAMA_3 = Cut(
    (
        pre_tokenizers.Split(Regex(LLAMA_3_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
    whole=True,
    begins=True,
)
CUTS = {
    "gpt-2": Cut((WORDS,)),
    "smollm": Cut((pre_tokenizers.Digits(individual_digits=True), WORDS)),  # every digit a token of its own
    "llama-bpe": LLAMA_3,
    "llama3": LLAMA_3,
    "llama-v3": LLAMA_3,
}


def end_ids(meta: Metadata) -> int | list[int] | None:
    """The ids at which generation ends: one, several, or None if the file names none."""
    ids = [meta.look(f"tokenizer.ggml.{end}_token_id", None) for end in ENDS]
    known = list(dict.fromkeys(i for i in ids if i is not None))
    return known if len(known) > 1 else next(iter(known), None)


def read_tokenizer(meta: Metadata, context: int):
    """The tokenizer of the file, with its chat template.

    Args:
        meta: of the file; all that concerns the tokenizer is crossed off.
        context: tokens of the longest text.

    Raises:
        ValueError: another kind of tokenizer, another name for the words, or damage.
    """
    from transformers import PreTrainedTokenizerFast

    def take(key: str, *default: object):
        return meta.take(f"tokenizer.ggml.{key}", *default)

    if (kind := take("model")) != "gpt2":
        raise meta.refusal(f"its tokenizer is of the kind {kind!r}; only 'gpt2' (byte-level BPE) can be read")
    if (name := take("pre", None)) not in CUTS:
        raise meta.refusal(
            f"its tokenizer cuts words as tokenizer.ggml.pre={name!r} says; known are {', '.join(CUTS)}"
        )
    meta.expect("tokenizer.ggml.add_space_prefix", False, "a space before every text cannot be read")
    meta.cross_off(f"tokenizer.ggml.{key}" for key in (*NO_PART, "eot_token_id", "eom_token_id"))
    cut, tokens = CUTS[name], take("tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        raise meta.refusal("its tokenizer has a token twice")
    merges = [tuple(merge.split(" ")) for merge in take("merges")]
    try:
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.whole))
    except Exception as error:  # tokenizers raises Exception itself, for a merge of what is no token
        raise meta.refusal(f"its merges do not fit its tokens ({error})") from None
    bpe.pre_tokenizer = cut.steps[0] if len(cut.steps) == 1 else pre_tokenizers.Sequence(list(cut.steps))
    bpe.decoder = decoders.ByteLevel()
    kinds = take("token_type", [])
    for number, add in ((CONTROL, bpe.add_special_tokens), (USER_DEFINED, bpe.add_tokens)):
        special = number == CONTROL
        add([AddedToken(t, normalized=False, special=special) for t, k in zip(tokens, kinds) if k == number])
    ids = {word: take(f"{key}_token_id", None) for key, word in NAMED.items()}
    if any(i is not None and not 0 <= i < len(tokens) for i in ids.values()):
        raise meta.refusal(f"of its special tokens {ids} not all are among its {len(tokens):,} tokens")
    named = {word: tokens[i] for word, i in ids.items() if i is not None}
    add_marks(bpe, take("add_bos_token", cut.begins), take("add_eos_token", False), named, vocab, meta)
    result = PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=context, clean_up_tokenization_spaces=False, **named
    )
    result.chat_template = meta.take("tokenizer.chat_template", None)
    return result


def add_marks(bpe: Tokenizer, begin: bool, end: bool, named: dict, vocab: dict, meta: Metadata) -> None:
    """Let every text begin with the BOS token, end with the EOS token, or both."""
    marks = [word for word, wanted in (("bos_token", begin), ("eos_token", end)) if wanted]
    if absent := [word for word in marks if word not in named]:
        raise meta.refusal(f"it adds a {absent[0]} to every text, and does not say which that is")
    if marks:
        before = [named["bos_token"]] if begin else []
        after = [named["eos_token"]] if end else []
        bpe.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(named[word], vocab[named[word]]) for word in marks],
        )
