"""Hostile and damaged adapter folders: each is refused with a reason, and the model is bit for bit as it was."""

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import nn

from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers
from labkit.alternatives.prefixes import PrefixConfig, add_prefix
from labkit.alternatives.prompts import PromptConfig, add_prompt
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.alternatives import load_alternative, save_alternative
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import AdapterMismatch
from labkit.lora.inject import add_lora
from labkit.lora.qlora import add_qlora
from tests.campaign.harness import FULL, rounds
from tests.campaign.hostile import DAMAGES, cases
from tests.lora.cases import make_model, randomize

SECONDS, MEGABYTES = 5, 500  # of one refusal
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
REASONS = (ValueError, AdapterMismatch, FileNotFoundError)


class Hung(BaseException):
    """A load did not come back."""


@contextmanager
def watchdog(seconds: int) -> Iterator[None]:
    """Raise `Hung` in the block after so many seconds."""

    def bark(*_):
        raise Hung(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make(seed: int = 0) -> nn.Module:
    return make_model(seed=seed, **SMALL)


def save_lora(folder: Path, seed: int = 1, **config) -> None:
    save_adapter(randomize(add_lora(make(), LoRAConfig(**{"r": 4, "alpha": 8} | config)), seed), folder)


def good_folders(place: Path) -> dict[str, Path]:
    """A good folder of every kind, and what loads it."""
    save_lora(place / "lora" / "good", targets=["q_proj", "v_proj"])
    save_lora(place / "lora" / "other", 2, targets=["q_proj", "v_proj"], alpha=16)
    save_lora(place / "full" / "good", variant="dora", modules_to_save=["lm_head"])
    theirs = get_peft_model(
        make(), PeftConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    theirs.save_pretrained(place / "peft" / "good")
    changed = add_qlora(make(), LoRAConfig(r=4, init="loftq_iter_1", targets=["q_proj"]), codebook="nf4")
    save_adapter(randomize(changed), place / "loftq" / "good", plain=False)
    for name, scale, outputs in (("good", 1.5, ["k_proj", "v_proj"]), ("other", 2.0, ["q_proj"])):
        model = add_ia3(make(), IA3Config(outputs=outputs, inputs=["down_proj"]))
        for layer in ia3_layers(model).values():
            nn.init.constant_(layer.vector, scale)
        save_alternative(model, place / "ia3" / name)
    save_alternative(add_prompt(make(), PromptConfig(4)), place / "prompt" / "good")
    save_alternative(add_prefix(make(), PrefixConfig(4)), place / "prefix" / "good")
    return {kind: place / kind / "good" for kind in DAMAGES}


def load(kind: str, model: nn.Module, folder: Path) -> nn.Module:
    return (load_alternative if kind in ("ia3", "prompt", "prefix") else load_adapter)(model, folder)


def everything(model: nn.Module) -> list:
    """All that a load could change in a model: classes, names, hooks, flags, and the bytes of every tensor."""
    found: list = []
    for name, module in model.named_modules():
        hooks = [
            sorted(map(id, value.values())) for key, value in vars(module).items() if key.endswith("_hooks")
        ]
        found.append((name, type(module), id(module), module.training, sorted(vars(module)), hooks))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        value = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        found.append((name, id(tensor), tensor.dtype, tensor.requires_grad, value))
    return found


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return good_folders(tmp_path_factory.mktemp("folders"))


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_folder_is_good_before_it_is_damaged(good: dict[str, Path], kind: str):
    load(kind, make(), good[kind])


def test_every_damaged_folder_is_refused_with_a_reason_and_changes_nothing(
    good: dict[str, Path], tmp_path: Path
):
    failures, slowest, peak = [], 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = make()
    before = everything(model)
    for number, (kind, damage, seed) in enumerate(cases(rounds(60, 200), seed=20)):
        folder = tmp_path / str(number) / "good"
        shutil.copytree(good[kind].parent, folder.parent)
        damage(folder, random.Random(seed))
        label, begin = f"{number}: {damage.__name__} of {kind}, seed {seed}", time.process_time()
        try:
            with watchdog(60):
                load(kind, model, folder)
            failures.append(f"{label}: loaded")
        except REASONS as error:
            if type(error) not in REASONS or len(str(error)) < 20:
                failures.append(f"{label}: no reason, {error!r}")
        except BaseException as error:  # what this test is there to find
            failures.append(f"{label}: {type(error).__name__} {error}")
        if everything(model) != before:
            failures.append(f"{label}: the model was changed")
            model = make()
            before = everything(model)
        if (folder / "ran").exists():
            failures.append(f"{label}: code from the folder ran")
        slowest = max(slowest, time.process_time() - begin)
        shutil.rmtree(folder.parent)
    assert not failures, "\n".join(failures)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024
    if FULL:
        print(f"{number + 1} folders; the slowest took {slowest:.2f} s; {grown:.0f} MB more at the peak")
        assert slowest <= SECONDS and grown <= MEGABYTES


def test_a_base_other_than_the_adapters_is_refused_for_every_kind_of_folder(good: dict[str, Path]):
    for kind in set(DAMAGES) - {"peft"}:  # whose folders do not say which base they are for
        for other in (make(seed=5), make_model(seed=0, **SMALL | {"intermediate_size": 96})):
            before = everything(other)
            with pytest.raises(AdapterMismatch):
                load(kind, other, good[kind])
            assert everything(other) == before, kind


def test_a_folder_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    (tmp_path / "round").symlink_to("round")
    names = ("file", "pipe", "empty", "round", "missing", "missing/deeper", "file/inside", "a" * 300, "\0")
    model = make()
    before = everything(model)
    for name in names:
        for loader in (load_adapter, load_alternative):
            with watchdog(60), pytest.raises(REASONS):
                loader(model, tmp_path / name)
    assert everything(model) == before
