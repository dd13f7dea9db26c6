"""Small tokenizers of every family, made by `tokenizers` itself, and the chat templates of well-known models."""

import json
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from labkit.paths import data_folder

TEXTS = [
    "Answer: yes",
    "Answer: no",
    "name FROM users",
    "The number of rows is 12.",
    "playing in the play, she said: a b c\n",
    "SELECT a FROM b WHERE c = 1;\n\n",
    "user assistant question",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def around(single: str, *names: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[(n, SPECIAL.index(n)) for n in names])


def llama2(after: str = "") -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before every text, a byte for what has no token; a text is not cut into words."""
    made = Tokenizer(kinds.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    words = " ".join(TEXTS).split(" ")  # else there would be tokens of several words, and Llama 2 has none
    made.train_from_iterator(
        words, trainers.BpeTrainer(special_tokens=SPECIAL, vocab_size=120, show_progress=False)
    )
    state = json.loads(made.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    state["model"]["byte_fallback"] = True
    made = Tokenizer.from_str(json.dumps(state))
    made.post_processor = around(f"<s> $A {after}".strip(), "<s>", "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def llama2_with_end() -> PreTrainedTokenizerFast:
    """The same with `add_eos_token`: an end after every text, also after a prompt."""
    return llama2("</s>")


def llama2_without_bytes() -> PreTrainedTokenizerFast:
    """The same, of 40 tokens: what has none becomes <unk>."""
    made = Tokenizer(kinds.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.train_from_iterator(
        TEXTS[:3], trainers.BpeTrainer(special_tokens=SPECIAL, vocab_size=40, show_progress=False)
    )
    made.post_processor = around("<s> $A", "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def byte_level(add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's."""
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            special_tokens=["<|endoftext|>"], vocab_size=400, initial_alphabet=alphabet, show_progress=False
        ),
    )
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end)


def byte_level_with_space() -> PreTrainedTokenizerFast:
    """As RoBERTa's in Fairseq's setting: a space before every text."""
    return byte_level(add_prefix_space=True)


LETTERS = sorted({letter for text in TEXTS for letter in text if letter != " "})


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, `##` before what continues a word, tokens of its own around every text.

    The vocabulary is written out, because training one ends differently every time.
    """
    special = ["[UNK]", "[CLS]", "[SEP]"]
    letters = sorted({letter.lower() for letter in LETTERS if letter != "\n"})
    words = [
        "answer",
        "yes",
        "no",
        "name",
        "users",
        "the",
        "play",
        "##ing",
        "##er",
        "number",
        "rows",
        "select",
        "from",
    ]
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    made = Tokenizer(kinds.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's and Gemma's: the likeliest cut into pieces, which may change far to the left of what is added.

    The pieces are written out, because training them ends differently every time.
    """
    words = [
        "Answer:",
        "yes",
        "no",
        "name",
        "users",
        "the",
        "play",
        "number",
        "rows",
        "is",
        "SELECT",
        "FROM",
        "a",
        "ab",
    ]
    pieces = (
        [f"▁{word}" for word in words]
        + ["▁", "ing", "es", "er", "ers", "ow", "um", "bc", "ay", "ser"]
        + LETTERS
    )
    scores = [0.0] * len(SPECIAL) + [-2.0 - 0.05 * i for i in range(len(pieces))]
    made = Tokenizer(kinds.Unigram(list(zip([*SPECIAL, *pieces], scores)), unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_llama(*special: str, **names: str) -> PreTrainedTokenizerFast:
    """tiny-llama's, with further special tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(data_folder() / "tiny-llama")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)} | names)
    return tokenizer


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    make.__name__: make
    for make in (
        llama2,
        llama2_with_end,
        byte_level,
        byte_level_with_space,
        word_piece,
        unigram,
        tiny_llama,
    )
}


class Slow:
    """A tokenizer without offsets, in plain Python, with the attributes that labkit may use and no others."""

    def __init__(self, fast: PreTrainedTokenizerFast):
        self.fast = fast
        for name in (
            "unk_token",
            "unk_token_id",
            "eos_token",
            "eos_token_id",
            "pad_token_id",
            "chat_template",
        ):
            setattr(self, name, getattr(fast, name))
        self.all_special_ids = fast.all_special_ids

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.fast(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def decode(self, ids: list[int], **options) -> str:
        return self.fast.decode(ids, **options)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
R1_DISTILL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
TAGS = (  # marks of several ordinary tokens
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</' + m.role + '>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
UNMARKED = (  # nothing says where an answer ends
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def chatting(template: str, *special: str, **names: str) -> PreTrainedTokenizerFast:
    """tiny-llama's tokenizer with a chat template and the special tokens that it writes."""
    tokenizer = tiny_llama(*special, **names)
    tokenizer.chat_template = template
    return tokenizer


CHATS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "chatml": lambda: chatting(CHATML, "<|im_start|>", "<|im_end|>"),
    "llama3": lambda: chatting(
        LLAMA3, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", bos_token="<|begin_of_text|>"
    ),
    "gemma": lambda: chatting(
        GEMMA, "<start_of_turn>", "<end_of_turn>", bos_token="<bos>", eos_token="<eos>"
    ),
    "mistral": lambda: chatting(MISTRAL, "[INST]", "[/INST]", bos_token="<s>", eos_token="</s>"),
    "r1_distill": lambda: chatting(
        R1_DISTILL,
        "<｜User｜>",
        "<｜Assistant｜>",
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
    ),
    "tags": lambda: chatting(TAGS),
    "unmarked": lambda: chatting(UNMARKED),
}


def chat(*contents: str) -> dict:
    """A chat record of these messages, of user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}
