"""A tokenizer as the metadata of a GGUF file: byte-level BPE, with the words cut as one of llama.cpp's names says.

The file cannot hold how a text is cut into words, only the name that llama.cpp has for it. A tokenizer is written if
its way is one of those that `labkit.models.gguf_tokenizer` knows, and if what that reads back gives the same tokens.

Agrees with: llama.cpp's `convert_hf_to_gguf.py`, `get_vocab_base`.
"""

import json

from labkit.models.gguf_metadata import Metadata
from labkit.models.gguf_tokenizer import CONTROL, CUTS, NAMED, USER_DEFINED, read_tokenizer

NORMAL = 1
GGUF = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
PROBE = (
    "It is a truth universally acknowledged, that 1813 men's fortunes don't add up to 42.\r\n\r\n  def f(x):\n\treturn "
    "x ** 2048  # Größe 42½ — naïve 日本 🙂; WE'VE 1234567 of   them!\n\n\n"
)


def vocabulary(tokenizer, rows: int, ends: list[int]) -> dict[str, object]:
    """The metadata of a tokenizer.

    Args:
        tokenizer: of transformers, a fast one.
        rows: of the model's embedding; there must be as many tokens.
        ends: ids at which the model's generation ends.

    Raises:
        ValueError: another number of tokens, or a tokenizer that GGUF or this writer cannot express.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise refusal(f"a {type(tokenizer).__name__} is not one of the tokenizers library")
    state = json.loads(backend.to_str())
    cut = name_of_cut(state)
    ids = backend.get_vocab(with_added_tokens=True)
    if sorted(ids.values()) != list(range(rows)):
        raise ValueError(
            f"the tokenizer has {len(ids):,} tokens and the model's embedding {rows:,} rows; a GGUF file needs one row "
            f"for each token. Call model.resize_token_embeddings({len(ids)}), or use the tokenizer that the model was "
            "trained with"
        )
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = [NORMAL] * rows
    for added in state["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    values: dict[str, object] = {
        f"{GGUF}model": "gpt2",
        f"{GGUF}pre": cut,
        f"{GGUF}tokens": tokens,
        f"{GGUF}token_type": kinds,
        f"{GGUF}merges": [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
    }
    for key, word in NAMED.items():
        number = getattr(tokenizer, f"{word}_id")
        if number is not None:
            values[f"{GGUF}{key}_token_id"] = number
    others = [i for i in ends if i != tokenizer.eos_token_id]
    for key, number in zip(("eot", "eom"), others):
        values[f"{GGUF}{key}_token_id"] = number
    begins, finishes = marks(backend, tokenizer)
    values |= {f"{GGUF}add_bos_token": begins, f"{GGUF}add_eos_token": finishes}
    if isinstance(tokenizer.chat_template, str):
        values[TEMPLATE] = tokenizer.chat_template
    check_same_tokens(backend, values)
    return values


def name_of_cut(state: dict) -> str:
    """llama.cpp's name for how a tokenizer cuts a text into words.

    Args:
        state: of the tokenizer, its `tokenizer.json`.

    Raises:
        ValueError: there is none that is known here, or it is no byte-level BPE.
    """
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("continuing_subword_prefix"):
        raise refusal(f"it is a {model['type']} that does not work on bytes")
    if state["normalizer"] is not None:
        raise refusal("it changes a text before it cuts it (a normalizer)")
    wanted = without_offsets(state["pre_tokenizer"])
    for name, cut in CUTS.items():
        steps = [json.loads(step.__getstate__()) for step in cut.steps]
        whole = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
        if without_offsets(whole) == wanted and cut.whole == model.get("ignore_merges", False):
            return name
    raise refusal(f"it cuts words in a way that has none of these names of llama.cpp: {', '.join(CUTS)}")


def without_offsets(step: object) -> object:
    """A pre-tokenizer without `trim_offsets`, which says where tokens stand in a text, not which they are."""
    if isinstance(step, dict):
        return {key: without_offsets(value) for key, value in step.items() if key != "trim_offsets"}
    return [without_offsets(one) for one in step] if isinstance(step, list) else step


def marks(backend, tokenizer) -> tuple[bool, bool]:
    """Does every text begin with the BOS token, and end with the EOS token?

    Raises:
        ValueError: other tokens are added.
    """
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    for begins in (False, True):
        for ends in (False, True):
            before = [tokenizer.bos_token_id] if begins else []
            if whole == before + plain + ([tokenizer.eos_token_id] if ends else []):
                return begins, ends
    raise refusal("it adds tokens to a text that are neither its BOS nor its EOS token")


def check_same_tokens(backend, values: dict[str, object]) -> None:
    """Raise a `ValueError` unless the tokenizer that is read from `values` gives the tokens of this one."""
    again = read_tokenizer(Metadata(dict(values), "the tokenizer"), 1).backend_tokenizer
    if again.encode(PROBE).ids != backend.encode(PROBE).ids:
        raise refusal("read back from the file, it would give other tokens")


def refusal(why: str) -> ValueError:
    return ValueError(
        f"this tokenizer cannot be written to a GGUF file: {why}. Save the model with labkit.formats.save_merged, and "
        "convert that folder with llama.cpp's convert_hf_to_gguf.py"
    )
