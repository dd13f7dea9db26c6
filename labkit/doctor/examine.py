"""A fine-tuned model, examined: a dozen numbers, each with a threshold that has a reason.

    report = doctor(model, tokenizer, train_records, history, adapter="runs/support", held_out=test_records)
    report.first        the first cause: "labels", "rate", …; None if nothing was found
    print(report)

A loss curve falls in most failures too. So the doctor looks at what decides: which tokens are learned, which tensors
get a gradient, how large the update is, what the model says at the end of an answer. It takes what there is (a model
alone, a merged one, one record) and says what it could not probe, and what is missing for it. It changes nothing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.checks import check_positive, is_number
from labkit.data.records import records_of
from labkit.doctor.case import Case
from labkit.doctor.findings import Finding, Missing, unknown
from labkit.doctor.probes import PROBES, Probe
from labkit.doctor.report import Report
from labkit.doctor.untouched import untouched
from labkit.formats.peft_folder import read_folder
from labkit.lora.mounting import mounted_adapter
from labkit.models.walk import adapters_in, unwrap
from labkit.sweeps.valleys import Valley
from labkit.training.history import History


def doctor(
    model: nn.Module,
    tokenizer: Any,
    data: Any = None,
    history: History | None = None,
    adapter: str | Path | None = None,
    held_out: Any = None,
    *,
    fed: Any = None,
    served: Sequence[Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    reference: nn.Module | str | None = None,
    valley: tuple[float, float] | Valley | None = None,
) -> Report:
    """Probe a fine-tuned model for what usually goes wrong. Nothing about it is changed.

    Args:
        model: with an adapter, merged, or a base; on whatever device it is.
        tokenizer: its tokenizer.
        data: training records; at most 100 are looked at (2000 for copies among the held-out ones).
        history: of the run, as `labkit.train` returns it.
        adapter: the PEFT folder that the model's adapter was saved in, or came from.
        held_out: records that were not trained on.
        fed: batches as the trainer feeds them, with `input_ids` and `labels`, made of `data` in any order.
        served: the prompts of `data`, in its order, as the server makes them: texts (tokenized as servers do, with
            special tokens), chats, or token ids.
        optimizer: of the run.
        reference: of preference training: a model, or "base" for the model with its adapter switched off.
        valley: the learning rates that are good, at alpha = 2 r: a recorded one, of
            `labkit.sweeps.valleys.recorded_valley`, or the lowest and the highest.

    Returns:
        A `Report`.

    Raises:
        ValueError: an argument of the wrong kind; a folder that is damaged, or of another method than LoRA.
        FileNotFoundError: no adapter in the folder, or one that was not finished.
    """
    check_patient(model, tokenizer, history, reference, valley)
    folder = None if adapter is None else check_folder(adapter)
    for name, records in (("data", data), ("held_out", held_out)):
        if records is not None:
            records_of(records, name)
    case = Case(model, tokenizer, data, history, folder, held_out, fed, served, optimizer, reference, valley)
    with untouched(model):
        findings = tuple((probe, answer(probe, case)) for probe in PROBES)
    return Report(subject_of(case), findings)


def answer(probe: Probe, case: Case) -> Finding:
    """What a probe says; what it lacks is its answer too."""
    try:
        return probe.look(case)
    except Missing as missing:
        return unknown(str(missing))
    except RuntimeError as error:  # out of memory, or an operation that the device or dtype does not have
        return unknown(f"it could not be measured: {error}")


def check_patient(
    model: object, tokenizer: object, history: object, reference: object, valley: object
) -> None:
    """Raise a `ValueError` unless these are what `doctor` takes."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}, and must be a model; load one with model, tokenizer = models.load(…)"
        )
    if not callable(tokenizer):
        raise ValueError(f"tokenizer={tokenizer!r} must be the model's tokenizer, as models.load returns it")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device: it has shapes, and no values to look at")
    if history is not None and not isinstance(history, History):
        raise ValueError(
            f"history is a {type(history).__name__}, and must be what labkit.train returned, or None"
        )
    if not (reference is None or reference == "base" or isinstance(reference, nn.Module)):
        raise ValueError(f"reference={reference!r} must be a model, 'base', or None")
    if valley is not None and not isinstance(valley, Valley):
        if not isinstance(valley, (tuple, list)) or len(valley) != 2 or not all(map(is_number, valley)):
            raise ValueError(f"valley={valley!r} must be two learning rates, such as (1e-3, 1e-2)")
        for rate in valley:
            check_positive("valley", rate)
        if valley[0] > valley[1]:
            raise ValueError(f"valley={valley!r} must name the lower learning rate first")


def check_folder(path: str | Path) -> Path:
    """The path of a folder with a LoRA adapter.

    Raises:
        FileNotFoundError: there is none, or it was not finished.
        ValueError: it is damaged, or of another method.
    """
    path = Path(path)
    raw, _ = read_folder(path)
    if raw["peft_type"] != "LORA":
        raise ValueError(
            f"the adapter in {path} is of the kind {raw['peft_type']!r}; the doctor knows LoRA and its variants. Load it "
            "with labkit.alternatives, and give the model alone"
        )
    return path


def subject_of(case: Case) -> str:
    """What is examined, in words."""
    inner, adapter = unwrap(case.model), mounted_adapter(case.model)
    if adapter is not None:
        config = adapter.config
        what = f"with {config.variant}, r={config.r}, alpha={config.alpha:g}, in {len(adapter.layers)} layers"
        what += ", merged" if adapter.is_merged else ""
    else:
        others = adapters_in(case.model)
        what = f"with {' and '.join(others)}" if others else "without an adapter"
    n = f"{case.n_records} records" if case.data is not None else "no data"
    return f"{type(inner).__name__} {what}, on {case.device}; {n}"
