"""vLLM's rules for adapters of Llama-like models, each with its place in vLLM's source (read in 2026).

kind, rank             vllm/config/lora.py (MaxLoRARanks), vllm/lora/peft_helper.py (validate_legal)
dora, saved, bias      vllm/lora/peft_helper.py (_validate_features, validate_legal)
scaling                vllm/lora/peft_helper.py (__post_init__): one factor, alpha / r or alpha / sqrt(r)
start                  not a field of PEFTHelper, so passed over
tensor, module         vllm/lora/lora_model.py (check_unexpected_modules), vllm/lora/utils.py
                       (parse_fine_tuned_lora_name, is_base_embedding_weights),
                       vllm/model_executor/models/llama.py (packed_modules_mapping, embedding_modules)
vocabulary             vllm/lora/lora_model.py, vllm/lora/layers/logits_processor.py
dtype, values          vllm/config/lora.py (LoRADType); it looks at no values
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from labkit.data.own.findings import counted
from labkit.formats.peft_config import FOLLOWS, STARTS
from labkit.formats.peft_folder import PREFIX
from labkit.formats.peft_settings import ALLOWED, shown
from labkit.formats.peft_tensors import STORED
from labkit.lora.config import pattern_matches

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
USUAL_RANK = 16  # of --max-lora-rank, unless it is given
MAX_VOCABULARY = 258_048  # with adapters at all; 257,024 in earlier versions
REQUIRED = ("r", "lora_alpha", "target_modules")
CHANGES_BASE = tuple(start for start in STARTS if start in ("pissa", "olora"))
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EMBEDDINGS = ("embed_tokens", "lm_head")
LLAMA = re.compile(
    r"model\.layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)|model\.embed_tokens|lm_head"
)
LETTER = re.compile(r"(\.lora_(?:embedding_)?)([AB])$")  # which factor a tensor is
FACTOR = re.compile(r"\.lora_(?:[AB]\.weight|embedding_[AB])$")
DTYPES = ("float16", "bfloat16")
REFUSED, WRONG, NOTED = "refused", "wrong", "noted"
MERGED = "write the merged model with labkit.formats.save_merged(model, tokenizer, folder), and serve that"


class Objection(NamedTuple):
    """One thing about a folder that vLLM does not take as it is meant.

    Attributes:
        rule: its name in the table of this module.
        outcome: "refused" with an error; "wrong", served without an error and computed otherwise; or "noted", served
            as it is meant if the advice is followed.
        found: what is in the folder.
        allowed: what vLLM takes.
        advice: what to do.
    """

    rule: str
    outcome: str
    found: str
    allowed: str
    advice: str

    def __str__(self) -> str:
        return f"{self.outcome} ({self.rule}): {self.found}; allowed: {self.allowed}; to do: {self.advice}"


def of_config(raw: Mapping) -> Iterator[Objection]:
    """What keeps vLLM from reading the configuration at all."""
    again = "save the adapter again, with labkit.save_adapter or PEFT's save_pretrained"
    if raw["peft_type"] != "LORA":
        yield Objection(
            "kind", REFUSED, f"peft_type={shown(raw['peft_type'])}", "'LORA'", "train a LoRA adapter"
        )
        return
    missing = [key for key in REQUIRED if key not in raw]
    if missing:
        yield Objection("kind", REFUSED, f"no {', '.join(missing)}", f"all of {REQUIRED}", again)
    for key, check in FOLLOWS.items():
        if key in raw and not check(raw[key]):
            allowed = ALLOWED.get(check, "such a value as for all layers, for each of some patterns")
            yield Objection("kind", REFUSED, f"{key}={shown(raw[key])}", allowed, again)


def ranks_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of each adapted module, by its name in the model."""
    return {
        key.removeprefix(PREFIX).rpartition(".lora_")[0]: tensor.shape[0]
        for key, tensor in tensors.items()
        if key.endswith((".lora_A.weight", ".lora_embedding_A")) and tensor.dim() == 2
    }


def of_rank(rank: int, needed: int | None, given: int | None) -> Iterator[Objection]:
    """Is the rank one that the server has room for?"""
    smaller = "labkit.lora.compress_adapter(model, name, into, r=…) makes one of lower rank"
    if needed is None:
        yield Objection("rank", REFUSED, f"rank {rank}", f"at most {RANKS[-1]}", smaller)
    elif given is not None and rank > given:
        start = f"start the server with --max-lora-rank {needed}; or {smaller}"
        yield Objection("rank", REFUSED, f"rank {rank}", f"at most --max-lora-rank, which is {given}", start)
    elif given is None and needed > USUAL_RANK:
        start = f"start the server with --max-lora-rank {needed}"
        yield Objection(
            "rank", NOTED, f"rank {rank}", f"at most --max-lora-rank, which is {USUAL_RANK} by default", start
        )


def of_features(raw: Mapping) -> Iterator[Objection]:
    """What the adapter is besides a correction s B A of the weights of its base."""
    if raw.get("use_dora"):
        advice = f"{MERGED}; or make a LoRA adapter that comes near, with labkit.lora.compress_adapter"
        yield Objection("dora", REFUSED, "use_dora=true", "plain LoRA or rsLoRA", advice)
    if raw.get("modules_to_save"):
        found = f"modules_to_save={shown(raw['modules_to_save'])}"
        yield Objection("saved", REFUSED, found, "none: only corrections of low rank", MERGED)
    if raw.get("bias", "none") != "none" or raw.get("lora_bias"):
        found = f"bias={shown(raw.get('bias', 'none'))}, lora_bias={shown(bool(raw.get('lora_bias')))}"
        advice = (
            "train without; or merge it with PEFT's merge_and_unload, if the layers have biases of their own"
        )
        yield Objection("bias", REFUSED, found, "bias='none', lora_bias=false", advice)
    start = raw.get("init_lora_weights")
    if start not in STARTS or start in CHANGES_BASE:
        found = f"init_lora_weights={shown(start)}, a difference to a base that was changed with it"
        advice = (
            "load it with labkit.load_adapter and save it with plain=True; with PEFT, save it with "
            "path_initial_model_for_weight_conversion"
            if start in CHANGES_BASE
            else "save it with PEFT's path_initial_model_for_weight_conversion; of LoftQ, serve the merged model"
        )
        yield Objection("start", WRONG, found, "a difference to the original base", advice)


def of_scaling(raw: Mapping, ranks: Mapping[str, int]) -> Iterator[Objection]:
    """Is the scale of each module that which vLLM computes for all from r and lora_alpha?"""
    divide = math.sqrt if raw.get("use_rslora") else float
    one = raw["lora_alpha"] / divide(raw["r"])
    alphas = raw.get("alpha_pattern") or {}
    differ = {}
    for module, rank in ranks.items():
        alpha = next((a for key, a in alphas.items() if pattern_matches(key, module)), raw["lora_alpha"])
        if not math.isclose(alpha / divide(rank), one, rel_tol=1e-6):
            differ[module] = alpha / divide(rank)
    if differ:
        module, scale = next(iter(differ.items()))
        more = f" and {counted(len(differ) - 1, 'module')} more" if len(differ) > 1 else ""
        found = f"{module} is scaled by {scale:.4g}{more} by rank_pattern or alpha_pattern"
        allowed = f"the one scale {one:.4g} of r={raw['r']} and lora_alpha={raw['lora_alpha']}"
        advice = "labkit.lora.combine(model, {name: 1.0}, 'even') puts the scales into B, exactly; save that"
        yield Objection("scaling", WRONG, found, allowed, advice)


def of_names(raw: Mapping, tensors: Mapping[str, Tensor]) -> Iterator[Objection]:
    """Does vLLM read each tensor, and find the module that it is for?"""
    by_kind: dict[str, list[str]] = {}
    for key in sorted(tensors):
        by_kind.setdefault(kind_of(key, raw), []).append(key)
    parts = {key.removesuffix(".weight") for key in tensors}
    alone = [
        key for key in sorted(parts) if LETTER.search(key) and LETTER.sub(other_factor, key) not in parts
    ]
    flat = [key for key in sorted(tensors) if FACTOR.search(key) and tensors[key].dim() != 2]
    if flat:
        found = f"{named(flat)} is no matrix"
        advice = "save the adapter again, with the weights gathered from all devices"
        yield Objection("tensor", REFUSED, found, "matrices", advice)
    if unread := by_kind.get("unread"):
        yield Objection(
            "tensor", REFUSED, named(unread), "lora_A and lora_B, and those of embeddings", MERGED
        )
    if alone:
        found = f"{named(alone)} without the other factor"
        yield Objection("tensor", REFUSED, found, "both factors of each module", "save the adapter again")
    if new := by_kind.get("embeddings"):
        found = f"{named(new)}, the embeddings of a base that was given new tokens, which are passed over"
        yield Objection("tensor", WRONG, found, "the vocabulary of the base", MERGED)
    if unknown := by_kind.get("unknown"):
        allowed = f"of a Llama-like model {', '.join((*LINEAR, *EMBEDDINGS))}"
        advice = f"train with targets among them; or {MERGED}"
        yield Objection("module", REFUSED, named(unknown), allowed, advice)
    if elsewhere := by_kind.get("elsewhere"):
        advice = (
            "train and save the adapter on the model with its head (…ForCausalLM), whose names vLLM goes by"
        )
        yield Objection(
            "module", WRONG, named(elsewhere), f"{PREFIX}model.layers.0.self_attn.q_proj…", advice
        )


def kind_of(key: str, raw: Mapping) -> str:
    """What vLLM makes of a tensor, by its name; "" if it reads it, or if `of_features` names it already."""
    match = STORED.fullmatch(key)
    if match is None or key.endswith("lora_magnitude_vector"):
        if key.endswith(tuple(f".{name}.base_layer.weight" for name in EMBEDDINGS)):
            return "embeddings"
        known = list(raw.get("modules_to_save") or ())
        known += ["lora_magnitude_vector"] * bool(raw.get("use_dora"))
        known += ["bias"] * (bool(raw.get("lora_bias")) or raw.get("bias", "none") != "none")
        return "" if any(str(part) in key for part in known) else "unread"
    module = match.group(1).removeprefix(PREFIX)
    if module.rpartition(".")[2] not in (*LINEAR, *EMBEDDINGS):
        return "unknown"
    return "" if LLAMA.fullmatch(module) else "elsewhere"


def other_factor(match: re.Match) -> str:
    """The end of the name of B for that of A, and the other way round."""
    return match.group(1) + ("B" if match.group(2) == "A" else "A")


def named(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def of_vocabulary(tensors: Mapping[str, Tensor], vocabulary: int | None) -> Iterator[Objection]:
    """Are the adapted embeddings those of the base, and is its vocabulary one that vLLM takes adapters for?"""
    if vocabulary is None:
        return
    if vocabulary > MAX_VOCABULARY:
        found = f"a base of {vocabulary:,} tokens"
        yield Objection("vocabulary", REFUSED, found, f"at most {MAX_VOCABULARY:,} with adapters", MERGED)
    for key, tensor in tensors.items():
        side = {".lora_embedding_A": -1, ".lm_head.lora_B.weight": 0}
        at = next((place for end, place in side.items() if key.endswith(end) and tensor.dim() == 2), None)
        if at is not None and tensor.shape[at] != vocabulary:
            found = f"{key} for {tensor.shape[at]:,} tokens"
            yield Objection("vocabulary", REFUSED, found, f"the {vocabulary:,} tokens of the base", MERGED)


def of_values(tensors: Mapping[str, Tensor]) -> Iterator[Objection]:
    """Are the numbers finite, and what becomes of their dtype?"""
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        advice = "train again from a checkpoint before the numbers grew without limit"
        yield Objection("values", WRONG, f"{named(broken)} with NaN or infinity", "finite numbers", advice)
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - set(DTYPES))
    if kinds:
        found = f"weights in {', '.join(kinds)}, which the server rounds to the dtype of its model"
        advice = "compare the answers with those of labkit; where the difference counts, serve with --dtype float32"
        yield Objection("dtype", NOTED, found, f"--lora-dtype {', '.join(DTYPES)} or auto", advice)
