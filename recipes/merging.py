"""Make data/results/merging: what is lost, in loss, between training an adapter and serving it.

    python -m recipes.merging

    served.jsonl        LoRA and QLoRA, each served in all the ways of `serve`, after 2, 10 and 40 steps
    served_qat.jsonl    the same for an adapter trained in `labkit.lora.quantization_aware`
    extracted.jsonl     a full fine-tune of the linear layers, as an adapter of rank 1 to 128, by SVD
    combined.jsonl      two adapters, for prose (Austen) and definitions (Bierce), combined in every way

One line per run, as `labkit.sweeps` writes it: `labkit.sweeps.load_recorded("merging/served")` reads it. A run that
is recorded is not repeated; a killed recipe goes on where it was. All losses are nats per token of held-out text, on
the same passages in every row of a file. About ten minutes on one core.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from labkit import models
from labkit.data.passages import load_austen, load_held_out
from labkit.files.writing import only_one
from labkit.lora.adapters import add_adapter, remove_adapter, use_adapter
from labkit.lora.combining import COMBINATIONS, combine
from labkit.lora.extraction import extract_adapter
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.merging import merge, unload
from labkit.lora.qat import quantization_aware
from labkit.lora.survival import merged_survival
from labkit.paths import data_folder
from labkit.quant.model import quantize_model
from labkit.sweeps.config import RunConfig
from labkit.sweeps.fitting import fit, prepare
from labkit.sweeps.processes import line_of
from labkit.sweeps.records import Results, append, load, mend_last_line
from labkit.training.control import TrainControl
from labkit.training.evaluate import text_loss
from labkit.training.history import History
from labkit.training.loop import train

SEEDS = (0, 1, 2)
SNAPSHOTS = (2, 10, 40)  # steps: the update grows with them, and with it the share that a 4-bit merge keeps
RANKS = (1, 2, 4, 8, 16, 32, 128)
PASSAGES = 20  # held out, where many models are measured on them
EXAMPLES = 100  # of each of two domains
DENSITY = 0.5  # the share that pruning keeps

Factors = dict[str, tuple[Tensor, Tensor]]

# rates: the best at 100 steps of `experiments/rank.toml` and `four_bit.toml`, and of `full.toml`, whose highest it is;
# for QAT half and twice the rate are tried too, at the first seed
LORA = RunConfig(lr=1.2e-2, steps=SNAPSHOTS[-1], batch_size=4)
QLORA = replace(LORA, method="qlora", products="float32")
FULL = RunConfig(method="full", embeddings=False, lr=2e-3, steps=100, batch_size=4)
PAIR = replace(LORA, steps=20, examples=EXAMPLES)


@cache
def bases() -> tuple[nn.Module, nn.Module, object]:
    """tiny-llama in fp32 and in NF4, and its tokenizer; to be copied, not changed."""
    base, tokenizer = models.load("tiny-llama", torch.float32, torch.device("cpu"))
    quantized = copy.deepcopy(base)
    quantize_model(quantized, progress=False)
    return base, quantized, tokenizer


def loss(model: nn.Module, records: list[dict]) -> float:
    return text_loss(model, bases()[2], records, 32)[0]


def prose() -> list[dict]:
    return load_austen("validation")[:PASSAGES]


def adapted(base: nn.Module, factors: Factors, config: RunConfig) -> nn.Module:
    """A copy of `base` with these A and B."""
    model = add_lora(copy.deepcopy(base), config.lora_config())
    for name, layer in lora_layers(model).items():
        layer.lora_A.data, layer.lora_B.data = (factor.clone() for factor in factors[name])
    return model


def serve(factors: Factors, config: RunConfig) -> dict[str, float]:
    """The losses of one adapter served in five ways, the size of its update, and the share that two merges keep.

    fp32             on the base in full precision, merged or not
    nf4              on the base in NF4, unmerged
    rule             merged into the dequantized NF4 base, in bf16: QLoRA's rule
    naive            merged into the NF4 base and quantized again
    from_original    merged into the base in full precision, and quantized
    """
    base, quantized, _ = bases()
    held_out, found = prose(), {}
    full, four_bit = adapted(base, factors, config), adapted(quantized, factors, config)
    found["fp32"], found["nf4"] = loss(full, held_out), loss(four_bit, held_out)
    merge(four_bit, requantize=True, originals=base)
    found["share_from_original"] = merged_survival(four_bit)[""].share
    found["from_original"] = loss(four_bit, held_out)
    four_bit = adapted(quantized, factors, config)
    merge(four_bit, requantize=True)
    whole = merged_survival(four_bit)[""]
    found |= {"rho": whole.rho, "share_naive": whole.share, "naive": loss(four_bit, held_out)}
    rule = unload(adapted(quantized, factors, config), dequantize=True, dtype=torch.bfloat16)
    return found | {"rule": loss(rule.float(), held_out)}


def served(config: RunConfig, aware: bool = False) -> dict[str, float]:
    """Train, and serve what there is after each of `SNAPSHOTS`: {"rho_2": …, "naive_2": …, …}."""
    model, tokenizer = prepare(config)
    kept: dict[int, Factors] = {}

    def keep(history: History) -> None:
        step = len(history.steps)
        if step in SNAPSHOTS:
            kept[step] = {
                name: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
                for name, layer in lora_layers(model).items()
            }

    with quantization_aware(model) if aware else nullcontext():
        train(model, tokenizer, load_austen("train"), config.train_config(), control=TrainControl(keep))
    base, quantized, _ = bases()
    metrics = {"base_fp32": loss(base, prose()), "base_nf4": loss(quantized, prose())}
    for step, factors in kept.items():
        metrics |= {f"{name}_{step}": value for name, value in serve(factors, config).items()}
    return metrics


def served_qat(config: RunConfig) -> dict[str, float]:
    return served(config, aware=True)


def extracted(config: RunConfig) -> dict[str, float]:
    """Fine-tune in full; the loss of that, and of an adapter of each rank that does the same to the linear layers.

    Measured as the runs of `experiments/rank.toml` are, on all of the validation novel.
    """
    tuned, _, _ = fit(config, load_austen("train"))
    metrics = {"full": loss(tuned, load_austen("validation"))}
    for r in RANKS:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "[0-9]+ weights changed too")  # the norms, in no adapter
            model = extract_adapter(copy.deepcopy(bases()[0]), tuned, r)
        metrics[f"r_{r}"] = loss(model, load_austen("validation"))
    return metrics


def combined(config: RunConfig) -> dict[str, float]:
    """Adapters for two domains, alone, combined, and trained on both: the loss on each domain.

    The one for both gets as many steps as the two together.
    """
    definitions = load_held_out("devil")
    training = {"austen": load_austen("train")[:EXAMPLES], "devil": definitions[:EXAMPLES]}
    held_out = {"austen": prose(), "devil": definitions[EXAMPLES:][:PASSAGES]}
    both = [record for pair in zip(*training.values()) for record in pair]
    runs = {name: (config, records) for name, records in training.items()}
    runs["mixed"] = (replace(config, steps=2 * config.steps, examples=2 * EXAMPLES), both)
    model = copy.deepcopy(bases()[0])
    metrics = {}

    def measure(name: str) -> None:
        for domain, records in held_out.items():
            metrics[f"{name}_on_{domain}"] = loss(model, records)

    measure("base")
    for name, (settings, records) in runs.items():
        trained, _, _ = fit(settings, records)
        if lora_layers(model):
            add_adapter(model, name, config.lora_config())
        else:
            add_lora(model, config.lora_config(), name)
        layers = lora_layers(trained)
        for path, layer in lora_layers(model).items():
            layer.lora_A.data, layer.lora_B.data = layers[path].lora_A.data, layers[path].lora_B.data
        measure(name)
    for how in COMBINATIONS:
        prunes = how not in ("cat", "linear", "svd")
        for weight in (1.0,) if prunes else (0.5, 1.0):
            weights = dict.fromkeys(training, weight)
            combine(model, weights, "combined", how, density=DENSITY if prunes else None, seed=config.seed)
            measure(f"{how}_{weight:g}")
            use_adapter(model, "austen")
            remove_adapter(model, "combined")
    return metrics


def plan() -> list[tuple[str, Callable[[RunConfig], dict[str, float]], RunConfig]]:
    """All runs: the file, what is measured, and the config; one seed after the other."""
    runs: list[tuple[str, Callable[[RunConfig], dict[str, float]], RunConfig]] = []
    for seed in SEEDS:
        rates = (LORA.lr, LORA.lr / 2, LORA.lr * 2) if seed == 0 else (LORA.lr,)
        runs += [("served", served, replace(one, seed=seed)) for one in (LORA, QLORA)]
        runs += [("served_qat", served_qat, replace(LORA, lr=lr, seed=seed)) for lr in rates]
        runs += [("combined", combined, replace(PAIR, seed=seed))]
        runs += [("extracted", extracted, replace(FULL, seed=seed))]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=data_folder() / "results" / "merging")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with only_one(out / ".lock", f"this recipe is running already, and writes to {out}"):
        for name, measure, config in plan():
            path = out / f"{name}.jsonl"
            mend_last_line(path)
            if config in (load(path) if path.exists() else Results()).by_config():
                continue
            started = time.perf_counter()
            metrics = measure(config)
            outcome: dict[str, object] = {"status": "done", "metrics": metrics}
            append(path, line_of(config, outcome, time.perf_counter() - started))
            print(f"{name}: {config}", flush=True)


if __name__ == "__main__":
    main()
