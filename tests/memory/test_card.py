"""A measured step on a card: what its allocator says is taken apart. Most of it needs a card, some a stand-in."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim import AdamW

from labkit.memory import card
from labkit.memory.allocator import replay
from labkit.memory.formulas import plan
from labkit.memory.measurement import TrainingStep, measure, storages
from labkit.memory.random_weights import random_model
from labkit.memory.setup import Setup, setup_of
from labkit.memory.simulation import record_step
from labkit.memory.subjects import make_batch
from labkit.models.shapes import config_of
from labkit.quant.scratch import use_scratch
from labkit.training.recompute import checkpoint_blocks
from tests.memory.conftest import SMALL, close

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")


def test_blocks_are_found_by_their_addresses_also_where_a_snapshot_gives_only_sizes(monkeypatch):
    one, other, elsewhere = (torch.zeros(10) for _ in range(3))
    at = one.untyped_storage().data_ptr()
    segments = [
        {"address": at, "blocks": [{"size": 512}, {"size": 1024}]},
        {"address": other.untyped_storage().data_ptr() - 2048, "blocks": [{"size": 2048}, {"size": 4096}]},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert card.bytes_of_blocks([one, one[2:], other, elsewhere], CPU) == 512 + 4096
    assert card.bytes_of_blocks([one], torch.device("cuda", 0)) == 0, "of this card only"


class StandIn:
    """A card with 10,000 bytes of others and 3,000 of workspaces, of which each phase takes more or less."""

    def __init__(self, blocks: int):
        self.blocks, self.workspaces, self.peaks = blocks, 3000, iter([700, 900, 200])

    def free_workspaces(self, device):
        freed, self.workspaces = self.workspaces, 0
        return freed

    def bytes_of_blocks(self, tensors, device):
        return self.blocks

    def usage(self, device, peak=False):
        more = next(self.peaks) if peak else 0
        return SimpleNamespace(allocated=10_000 + self.blocks + self.workspaces + more)


def test_the_peak_of_a_card_is_that_of_the_worst_phase_without_what_others_have(monkeypatch):
    model = random_model(SMALL, Setup(method="lora", dtype="fp32", r=4))
    batch = make_batch(512, 1, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, fused=True)
    step = TrainingStep(model, batch, optimizer, trained, False, "supervised", 1.0)
    step()
    static = [*model.parameters(), *model.buffers(), batch.ids, batch.targets]
    static += [v for state in optimizer.state.values() for v in state.values()]
    own = sum(storages(static))
    stand_in = StandIn(own + 77)
    for name in ("free_workspaces", "bytes_of_blocks", "usage"):
        monkeypatch.setattr(card, name, getattr(stand_in, name))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    with use_scratch():  # other tests may have filled the usual one
        timeline, peak, phase = step.by_cuda()
    assert (peak, phase) == (own + 77 + 900, "backward")
    assert timeline.total == [own + 77, own + 77 + 700, own + 77 + 900, own + 77 + 200]
    assert [name for name, _ in timeline.phases] == ["forward", "backward", "optimizer"]
    assert step.overhead == {"workspaces of cuBLAS": 3000, "static blocks": 77}


# --- on a card

DEVICE = torch.device("cuda", 0)


def small_part_of(name: str):
    config = config_of(name)
    config.num_hidden_layers = 2
    return config


def plain_peak(config, setup: Setup) -> tuple[int, int, card.Usage]:
    """Two steps as anybody takes them: (allocated at the peak, bytes of no tensor, all peaks)."""
    card.free_workspaces(DEVICE)
    card.restart(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    model = random_model(config, setup, DEVICE)
    if setup.checkpointing:
        checkpoint_blocks(model)
    batch = make_batch(config.vocab_size, setup.batch_size, setup.max_length).to(DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(trained, lr=1e-5, fused=True)
    step = TrainingStep(model, batch, optimizer, trained, setup.checkpointing, setup.logits, 1.0)
    card.restart(DEVICE)
    step()
    step()
    peak = torch.cuda.max_memory_allocated(DEVICE) - before
    return peak, card.free_workspaces(DEVICE), card.usage(DEVICE, peak=True)


def setup_here(method: str, **settings) -> Setup:
    dtype = "bf16" if torch.cuda.get_device_capability(DEVICE) >= (8, 0) else "fp16"
    return setup_of(method, dict(dtype=dtype, max_length=512) | settings)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("method", "checkpointing"), [("qlora", True), ("qlora", False), ("lora", True), ("full", False)]
)
def test_on_a_card_a_plain_step_is_measured_and_planned(method, checkpointing):
    config, setup = small_part_of("llama-2-7b"), setup_here(method, checkpointing=checkpointing)
    peak, workspaces, peaks = plain_peak(config, setup)
    settings = setup.as_dict()
    # of two layers only, beside which what a kernel takes for itself weighs more than in a whole model
    assert close(plan(config, settings.pop("method"), **settings).peak, peak - workspaces, 0.03)
    played = replay(record_step(config, setup))
    assert close(played.peak_allocated, peak - workspaces, 0.03)
    assert close(played.peak_reserved, peaks.reserved - workspaces, 0.25)
    model = random_model(config, setup, DEVICE)
    ledger = measure(model, make_batch(config.vocab_size, 1, 512).to(DEVICE), checkpointing=checkpointing)
    assert close(ledger.peak, peak, 0.01)
    assert close(ledger["overhead/workspaces of cuBLAS"], workspaces, 0.5)
    record = record_step(config, setup).largest()
    tracked = {row.kind: row.bytes for row in ledger.select("activations")}
    for kind in ("residual", "norms", "mlp"):
        assert tracked.get(kind, 0) == record.get(f"activations/{kind}", 0), kind


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_with_a_pytorch_for_cuda_the_simulated_step_keeps_the_same_tensors(method):
    config, setup = config_of(SMALL), setup_here(method, max_length=64, r=8)
    as_on_a_cpu, as_on_a_card = (record_step(config, setup, on).peak()[0] for on in ("cpu", "cuda"))
    assert as_on_a_card == pytest.approx(as_on_a_cpu, rel=0.02)
