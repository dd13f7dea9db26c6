"""Kills and a full disk while adapters are saved over old ones."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from labkit.alternatives.ia3 import IA3Config, add_ia3, ia3_layers
from labkit.files import writing
from labkit.formats.adapters import load_adapter, save_adapter
from labkit.formats.alternatives import load_alternative, save_alternative
from labkit.formats.peft_folder import OURS
from labkit.formats.provenance import PROVENANCE
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from tests.campaign.harness import moments, rounds, small_disk, start

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FOREIGN = {"notes.txt", "logs"}  # what lies in the folder beside the adapter


def make() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **SIZES)).eval()


def write(model: nn.Module, n: int, path: Path) -> None:
    """Save an adapter all of whose numbers are `n`."""
    layers = lora_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_A.fill_(n)
            layer.lora_B.fill_(n)
    save_adapter(model, path, data=n)


def rewrite(path: Path, first: int) -> None:
    """Save over an old adapter again and again: `first`, `first` + 1, …; the file `begun` says that it began."""
    torch.set_num_threads(1)
    model = add_lora(make(), LoRAConfig(r=4))
    (path.parent / "begun").write_text("")
    n = first
    while True:
        write(model, n, path)
        n += 1


def kill_once_begun(moment: float, path: Path, first: int) -> None:
    """SIGKILL to `rewrite`, `moment` seconds after its first save began."""
    process = start(rewrite, path, first)
    begun = path.parent / "begun"
    while not begun.exists():
        assert process.is_alive(), "the process failed by itself"
        time.sleep(0.002)
    process.join(moment)
    assert process.is_alive(), "the process failed by itself"
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    begun.unlink()


def number_in(path: Path) -> int:
    """Which adapter is in the folder; a mixture of two is none."""
    numbers = {p.item() for layer in lora_layers(load_adapter(make(), path)).values() for p in
               (layer.lora_A.detach().unique(), layer.lora_B.detach().unique())}  # fmt: skip
    recorded = json.loads((path / PROVENANCE).read_text())["data"]
    assert numbers == {recorded}
    return recorded


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".part")]


def test_a_kill_leaves_an_adapter_whole_and_the_next_save_clears_the_rest(tmp_path: Path):
    path = tmp_path / "a"
    model = add_lora(make(), LoRAConfig(r=4))
    write(model, 0, path)
    (path / "notes.txt").write_text("a week of work")
    (path / "logs").mkdir()
    (path / "logs" / "1.txt").write_text("loss 2.1")
    left, before = 0, 0
    for round_, moment in enumerate(moments(100, 0.08, seed=1)):
        if round_ >= rounds(10, 100) and left > 0:
            break  # a slice goes on until a kill has fallen into a save
        kill_once_begun(moment, path, first=1000 * (round_ + 1))
        number = number_in(path)
        assert number == before or 1000 * (round_ + 1) <= number, "an adapter of some time ago"
        assert set(os.listdir(path)) == FOREIGN | set(OURS)
        assert (path / "notes.txt").read_text() == "a week of work"
        assert (path / "logs" / "1.txt").read_text() == "loss 2.1"
        left, before = left + len(leftovers(tmp_path)), number
    assert left > 0, "no kill fell into a save"
    write(model, 7, path)
    assert number_in(path) == 7 and os.listdir(tmp_path) == ["a"]


def methods():
    """What is saved: how it is made, saved, loaded, and how its numbers are changed."""

    def lora(n: int) -> nn.Module:
        model = add_lora(make(), LoRAConfig(r=4))
        for layer in lora_layers(model).values():
            nn.init.constant_(layer.lora_B, n)
        return model

    def ia3(n: int) -> nn.Module:
        model = add_ia3(make(), IA3Config(outputs=["k_proj", "v_proj"], inputs=["down_proj"]))
        for layer in ia3_layers(model).values():
            nn.init.constant_(layer.vector, n)
        return model

    return {
        "adapter": (lora, save_adapter, load_adapter),
        "alternative": (ia3, save_alternative, load_alternative),
    }


@pytest.mark.parametrize("kind", methods())
def test_a_full_disk_leaves_the_old_adapter_and_gives_one_sentence(tmp_path: Path, kind: str):
    made, save, load = methods()[kind]
    ids = torch.arange(12).view(1, 12)
    with small_disk(tmp_path / "disk", kilobytes=200) as disk, torch.no_grad():
        if disk is None:
            pytest.skip("no permission to mount a small disk")
        folder = save(made(1), disk / "a", data="old")
        (folder / "notes.txt").write_text("mine")
        expected = made(1)(ids).logits
        with (
            (disk / "filler").open("wb", buffering=0) as filler,
            pytest.raises(OSError, match="No space left"),
        ):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(
            writing.CannotWrite, match=r"^cannot write .*/a: the disk is full; what was .* is intact$"
        ):
            save(made(2), folder, data="new")
        assert torch.equal(load(make(), folder)(ids).logits, expected)
        assert (
            set(os.listdir(folder)) == {*OURS, "notes.txt"} and (folder / "notes.txt").read_text() == "mine"
        )
        with pytest.raises(writing.CannotWrite, match="the disk is full"):
            save(made(2), disk / "b")
        assert sorted(os.listdir(disk)) == ["a", "filler"]
        (disk / "filler").unlink()
        save(made(2), folder, data="new")
        assert torch.equal(load(make(), folder)(ids).logits, made(2)(ids).logits)
