"""The export audit: each variant of an adapter by each way out, measured against the adapted model in memory.

An export breaks without an error when the other program reads less than what was written: a scale that it does not
know, a base that was changed, rows in another order. So each cell loads what was written as the other program does, and
gives the largest difference of a logit. vLLM and llama.cpp's converter of adapters are not run: their cells compute
what their rules make of a PEFT folder (`labkit.formats.audit_rules`). llama.cpp itself is run where xllamacpp is
installed; elsewhere its files are read back here, and the cell says so.
"""

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labkit.checks import check_choice, needed
from labkit.formats import llama_cpp
from labkit.formats.adapters import save_adapter
from labkit.formats.audit_rules import (
    alpha_by_rank,
    check_convertible,
    corrected,
    folder_corrections,
    gguf_corrections,
    one_scale,
)
from labkit.formats.audit_variants import VARIANTS, ExportVariant, base_of, put_on
from labkit.formats.fitness import check_for_vllm
from labkit.formats.gguf_adapter import save_gguf_adapter
from labkit.formats.gguf_model import save_gguf
from labkit.formats.merged import save_merged
from labkit.formats.vllm_rules import REFUSED
from labkit.models.gguf import read_gguf
from labkit.models.loading import load

TEXT = "Mr. Darcy looked at Elizabeth, and she said"
TOLERANCE = 1e-3  # of a logit, both sides in fp32: rounding stays below it, and a lost scale is far above
SAME, OTHER, NOT_WRITTEN = "same", "other", "refused"
READ_BACK = "not run by llama.cpp (xllamacpp is not installed): read back from the file"


@dataclass(frozen=True)
class ExportCell:
    """What becomes of one variant by one way out.

    Attributes:
        variant: one of `VARIANTS`.
        target: one of `TARGETS`.
        outcome: "same", the adapted model; "other", another model without an error; or "refused".
        difference: the largest of a logit against the adapted model in memory; of llama.cpp, which gives nothing else,
            of a log-probability. None if refused.
        how: it was read; or the refusal's sentence.
    """

    variant: str
    target: str
    outcome: str
    difference: float | None
    how: str

    def __str__(self) -> str:
        if self.difference is None:
            return self.outcome
        return f"{self.difference:.0e}" if self.outcome == SAME else f"{self.difference:.2g}: other"


@dataclass(frozen=True)
class Sample:
    """An adapted model to export.

    Attributes:
        variant: of its adapter.
        model: with the adapter on it.
        base: the same without it; not to be changed.
        tokenizer: of both.
        ids: (1, length) a text to compare on.
        folder: to write into.
    """

    variant: ExportVariant
    model: nn.Module
    base: nn.Module
    tokenizer: Any
    ids: Tensor
    folder: Path

    def compare(self, logits: Tensor) -> float:
        """The largest difference between `logits`, (1, length, vocabulary), and the adapted model's."""
        return (logits - logits_of(self.model, self.ids)).abs().max().item()

    def compare_llama_cpp(self, file: Path, adapter: Path | None = None) -> float:
        """The same for what llama.cpp computes of the next token's log-probabilities."""
        expected = logits_of(self.model, self.ids)[0, -1].log_softmax(-1)
        server = llama_cpp.engine(file, adapter)
        said = llama_cpp.answer(server, self.ids[0].tolist(), tokens=1, top=len(expected)).top[0]
        return max(abs(expected[token].item() - value) for token, value in said.items())


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits.float()


def audit_exports(
    source: str | Path = "tiny-llama",
    variants: Iterable[str] | None = None,
    targets: Iterable[str] | None = None,
    ratio: float = 0.1,
    seed: int = 0,
) -> tuple[ExportCell, ...]:
    """Export an adapter of each variant by each way out, load it there, and compare. Files are temporary.

    Args:
        source: the base, a Llama, by a name that `labkit.models.load` knows.
        variants: some of `VARIANTS`; default: all.
        targets: some of `TARGETS`; default: all.
        ratio: the size of the corrections: their rms by that of the weights.
        seed: of the adapters' random numbers.

    Returns:
        a cell for each, variant by variant.

    Raises:
        ValueError: a variant or target is not known.
        ModuleNotFoundError: peft or gguf is not there.
    """
    chosen = {name: VARIANTS[name] for name in checked("variants", variants, VARIANTS)}
    ways = {name: TARGETS[name] for name in checked("targets", targets, TARGETS)}
    fresh, tokenizer = load(source, dtype=torch.float32)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    cells: list[ExportCell] = []
    for name, variant in chosen.items():
        base = base_of(copy.deepcopy(fresh), variant)
        try:
            model = put_on(copy.deepcopy(base), variant, ratio, seed)
        except ValueError as error:
            cells += [ExportCell(name, target, NOT_WRITTEN, None, str(error)) for target in ways]
            continue
        for target, measure in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                sample = Sample(variant, model, base, tokenizer, ids, Path(folder))
                cells.append(cell_of(name, target, measure, sample))
    return tuple(cells)


def checked(what: str, names: Iterable[str] | None, known: Mapping[str, object]) -> list[str]:
    """The names, or all that are known."""
    wanted = list(known if names is None else [names] if isinstance(names, str) else names)
    for name in wanted:
        check_choice(what, name, tuple(known))
    return wanted


def cell_of(name: str, target: str, measure: Callable, sample: Sample) -> ExportCell:
    try:
        difference, how = measure(sample)
    except ValueError as error:
        return ExportCell(name, target, NOT_WRITTEN, None, str(error))
    return ExportCell(name, target, SAME if difference < TOLERANCE else OTHER, difference, how)


def audit_table(cells: Iterable[ExportCell]):
    """The cells as a table to show: a row for each variant, a column for each target (a pandas DataFrame)."""
    pandas = needed("pandas", "a table of the audit")
    rows: dict[str, dict[str, str]] = {}
    for cell in cells:
        rows.setdefault(cell.variant, {})[cell.target] = str(cell)
    return pandas.DataFrame.from_dict(rows, orient="index")


def by_nothing(sample: Sample) -> tuple[float, str]:
    """The base without the adapter: what an adapter that is lost comes to."""
    return sample.compare(logits_of(sample.base, sample.ids)), "the base, without any adapter"


def by_peft(sample: Sample) -> tuple[float, str]:
    peft = needed("peft", "the audit of exports")
    folder = save_adapter(sample.model, sample.folder / "adapter", plain=sample.variant.plain)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(sample.base), folder)
    return sample.compare(logits_of(loaded, sample.ids)), "PEFT, on the base in memory"


def by_merged(sample: Sample) -> tuple[float, str]:
    from transformers import AutoModelForCausalLM

    folder = save_merged(sample.model, sample.tokenizer, sample.folder / "merged", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return sample.compare(logits_of(loaded, sample.ids)), "plain transformers"


def by_gguf(sample: Sample) -> tuple[float, str]:
    file = save_gguf(sample.model, sample.tokenizer, sample.folder / "merged.gguf", "F32")
    if llama_cpp.is_installed():
        return sample.compare_llama_cpp(file), "llama.cpp, log-probabilities"
    checkpoint = read_gguf(file)
    loaded = type(sample.base)(checkpoint.config)
    loaded.load_state_dict(checkpoint.tensors, strict=False)  # a tied output layer is no tensor of its own
    return sample.compare(logits_of(loaded, sample.ids)), READ_BACK


def by_gguf_adapter(sample: Sample) -> tuple[float, str]:
    file = save_gguf_adapter(sample.model, sample.folder / "adapter.gguf")
    if llama_cpp.is_installed():
        base = save_gguf(sample.base, sample.tokenizer, sample.folder / "base.gguf", "F32")
        return sample.compare_llama_cpp(base, file), "llama.cpp, log-probabilities"
    loaded = corrected(sample.base, gguf_corrections(file, sample.base.config))
    return sample.compare(logits_of(loaded, sample.ids)), READ_BACK


def by_vllm(sample: Sample) -> tuple[float, str]:
    folder = save_adapter(sample.model, sample.folder / "adapter", plain=sample.variant.plain)
    fitness = check_for_vllm(folder, vocabulary=sample.base.config.vocab_size)
    refused = [objection for objection in fitness.objections if objection.outcome == REFUSED]
    if refused:
        raise ValueError(str(refused[0]))
    loaded = corrected(sample.base, folder_corrections(folder, one_scale))
    how = "; ".join(["by vLLM's rules, not by vLLM", *map(str, fitness.objections)])
    return sample.compare(logits_of(loaded, sample.ids)), how


def by_converter(sample: Sample) -> tuple[float, str]:
    folder = save_adapter(sample.model, sample.folder / "adapter", plain=sample.variant.plain)
    check_convertible(folder)
    loaded = corrected(sample.base, folder_corrections(folder, alpha_by_rank))
    how = "by the rules of convert_lora_to_gguf.py, not by it: lora_alpha / r of each layer, and nothing else"
    return sample.compare(logits_of(loaded, sample.ids)), how


TARGETS: dict[str, Callable[[Sample], tuple[float, str]]] = {
    "base alone": by_nothing,
    "PEFT": by_peft,
    "merged": by_merged,
    "GGUF merged": by_gguf,
    "GGUF adapter": by_gguf_adapter,
    "llama.cpp's converter": by_converter,
    "vLLM": by_vllm,
}
