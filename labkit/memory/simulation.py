"""This course's own training step, run without numbers: the peak comes from the code, even for a 70B model.

A *fake* tensor has a shape, a dtype and a device, and no memory; operations on it work out what would come
out. So the model is built of fake weights (4-bit ones too), `supervised_loss`, `backward` and the optimizer
run as they are, and `labkit.memory.tracker` notes what each tensor would have taken. A 70B model needs a
minute and a few hundred MB.

Three questions need numbers, and are answered otherwise:

- `hidden[mask]`: the setup says how many positions the mask selects;
- whether the logits are the output layer's output: the config says so;
- whether transformers sees several sequences packed into one: it never does.

It runs as on a CPU, whose attention keeps the same tensors as CUDA's three fused kernels (flash, cuDNN's, the
memory-efficient one) but for some 50 bytes. Agrees with `labkit.memory.measurement` on real steps: `tests/memory`.
"""

import math
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, AdamW

from labkit.data.batches import IGNORE, Batch
from labkit.lora.config import LoRAConfig
from labkit.lora.inject import add_lora, lora_layers
from labkit.lora.targets import matching_layers
from labkit.memory.counting import state_tensors, tensors_of
from labkit.memory.ledger import Ledger, LedgerRow
from labkit.memory.setup import DTYPES, Setup, dtype_name, setup_of
from labkit.memory.tracker import TensorRecord, Tracker
from labkit.models.shapes import changes_logits, config_of, meta_model
from labkit.models.surgery import replace_module
from labkit.quant.blockwise import NESTED_BLOCKSIZE
from labkit.quant.config import QuantConfig
from labkit.quant.linear import QuantLinear
from labkit.quant.scratch import SCRATCH_BYTES, Scratch, current_scratch, use_scratch
from labkit.quant.state import tensors_by_name
from labkit.quant.tensor import NestedScales, QuantizedTensor
from labkit.training.chunked_loss import assume_unchanged
from labkit.training.loss import supervised_loss
from labkit.training.recompute import checkpoint_blocks


def simulate(model, method: str = "qlora", **settings) -> Ledger:
    """Run this course's own training step without numbers, and record every tensor.

    Arguments as for `labkit.memory.plan`; `dtype` and `adapter_dtype` too.
    """
    return simulate_step(config_of(model), setup_of(method, settings))


def simulate_step(config, setup: Setup) -> Ledger:
    """Run a step of `setup` on fake tensors; see `labkit.memory.simulate`."""
    tensors = tensors_of(config, setup)
    return ledger_of(
        record_step(config, setup),
        title=f"{tensors.name}: {setup.describe()} (simulated)",
        settings=setup.as_dict() | {"model": tensors.name},
        counts=tensors.counts(setup),
        source="labkit.memory.simulation",
    )


def record_step(config, setup: Setup, on: str = "cpu") -> TensorRecord:
    """Every tensor of a step of `setup`, run on fake tensors.

    Args:
        config: of a transformers model.
        setup: the step.
        on: the device that the fake tensors claim to be on, whose operations decide what autograd keeps. "cuda"
            needs a GPU, though nothing is computed there, and differs by a few bytes for each attention.

    Raises:
        ValueError: the setup is not one of this course's own step.
    """
    of_this_course = {"master": False, "state_dtype": None, "gradient_dtype": None, "recompute_act": True}
    for name, value in of_this_course.items():
        if getattr(setup, name) != value:
            given = f"{name}={getattr(setup, name)!r}"
            raise ValueError(f"{given} is not part of this course's step, which simulate runs; use plan")
    model = shaped_model(config, setup)
    with FakeTensorMode(allow_non_fake_inputs=True), scratch_as_on(setup.device, model):
        model.to_empty(device=on)
        model.tie_weights()  # to_empty has made two tensors of a tied one
        model.train()
        if setup.checkpointing:
            checkpoint_blocks(model)
        batch = fake_batch(setup).to(on)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer, state = optimizer_of(parameters, setup)
        static = static_tensors(model, state, batch)
        tracker = _Simulation(model, static, setup.n_supervised, setup.device == "cpu")
        with tracker.watch(), known_answers(model, config):
            tracker.start("forward")
            value = supervised_loss(model, batch, setup.logits) / setup.n_supervised
            tracker.start("backward")
            value.backward()
            tracker.start("optimizer")
            nn.utils.clip_grad_norm_(parameters, 1.0)
            if optimizer is not None:
                optimizer.step()
        return tracker.finish()


class _Simulation(Tracker):
    """A tracker that also says how many positions a mask selects."""

    def __init__(self, model, static, n_selected: int, count_generator: bool):
        super().__init__(model, static, count_generator)
        self.n_selected = n_selected

    def run(self, func, args, kwargs):
        if func is torch.ops.aten.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            values, mask = args[0], args[1][0]
            return values.new_empty((self.n_selected, *values.shape[mask.dim() :]))
        return func(*args, **kwargs)


def shaped_model(config, setup: Setup) -> nn.Module:
    """The model of a setup on the meta device: quantized, adapted, with `requires_grad` as in training."""
    model = meta_model(config, setup.attention, DTYPES[setup.dtype])
    if setup.method == "full":
        return model
    if setup.method == "qlora":
        quantization = setup.quantization
        for name in matching_layers(model, setup.quantize):
            linear = model.get_submodule(name)
            weight = shaped_weight(linear.weight, quantization)
            replace_module(model, name, QuantLinear(weight, linear.bias, quantization.compute_dtype))
    add_lora(model, LoRAConfig(r=setup.r, targets=setup.targets))
    for layer in lora_layers(model).values():
        for side in (layer.lora_A, layer.lora_B):
            side.data = side.data.to(DTYPES[setup.adapter_dtype])
    if setup.train_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.requires_grad_(True)
    return model


def shaped_weight(weight: torch.Tensor, config: QuantConfig) -> QuantizedTensor:
    """A 4-bit weight of the shape of `weight`, on its device, without values."""
    n = weight.numel()
    blocks = math.ceil(n / config.blocksize)
    packed = weight.new_empty((math.ceil(n / 2), 1), dtype=torch.uint8)
    if config.double_quant:
        scales = NestedScales(
            weight.new_empty(blocks, dtype=torch.uint8),
            weight.new_empty(math.ceil(blocks / NESTED_BLOCKSIZE), dtype=torch.float32),
            weight.new_empty((), dtype=torch.float32),
        )
    else:
        scales = weight.new_empty(blocks, dtype=torch.float32)
    return QuantizedTensor(packed, scales, weight.shape, weight.dtype, config.codebook, config.blocksize)


def fake_batch(setup: Setup) -> Batch:
    """Ids and targets of the setup's shape."""
    ids = torch.zeros(setup.batch_size, setup.max_length, dtype=torch.int64)
    targets = torch.full((setup.batch_size, setup.max_length), IGNORE)
    return Batch(ids, targets)


def optimizer_of(parameters: list[nn.Parameter], setup: Setup):
    """The optimizer, and the tensors of its state after a first step.

    Of 8-bit AdamW there is the state only: its step takes no memory that counts.
    """
    if setup.optimizer == "adamw8bit":
        sizes = [n for p in parameters for n in state_tensors(p.numel(), dtype_name(p.dtype), setup)]
        return None, [torch.empty(n, dtype=torch.uint8, device=parameters[0].device) for n in sizes]
    kinds = {"adamw": (AdamW, {"fused": True}), "sgd": (SGD, {"fused": True})}
    kind, options = kinds[setup.optimizer]
    optimizer = kind(parameters, lr=1e-3, **options)
    for p in parameters:
        p.grad = torch.empty_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer, state_of(optimizer)


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of an optimizer's state."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]


def static_tensors(
    model: nn.Module, state: list[torch.Tensor], batch: Batch
) -> dict[str, list[torch.Tensor]]:
    """What is there before the step, by "component/kind" of a ledger."""
    found: dict[str, list[torch.Tensor]] = {"activations/inputs": [batch.ids, batch.targets]}
    buffer = current_scratch().memory
    if buffer.numel():
        found["temporary/buffer for a dequantized layer"] = [buffer]
    adapters = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    ends = {
        id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    }
    packed: set[int] = set()
    for module in model.modules():
        tensors = list(module.named_buffers(recurse=False))
        if isinstance(module, QuantLinear):  # which may hold its bytes as parameters
            tensors = list(tensors_by_name(module.weight).items())
            packed.update(id(tensor) for _, tensor in tensors)
        for name, buffer in tensors:
            kind = "weights/buffers"
            if isinstance(module, QuantLinear):
                kind = "weights/4 bits" if name == "packed" else "constants/scales"
            found.setdefault(kind, []).append(buffer)
    for p in model.parameters():
        if id(p) in packed:
            continue
        if id(p) in adapters:
            kind = f"lora/{dtype_name(p.dtype)}"
        else:
            kind = f"weights/{'embeddings' if id(p) in ends else 'others'}, {dtype_name(p.dtype)}"
        found.setdefault(kind, []).append(p)
    found["optimizer/state"] = state
    return found


@contextmanager
def known_answers(model: nn.Module, config):
    """Within the block, the questions that need numbers are answered; see the module docstring."""
    unchanged = assume_unchanged(model.get_output_embeddings(), not changes_logits(config))
    packed = mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)
    with unchanged, packed:
        yield


class FakeScratch(Scratch):
    """A buffer for dequantized weights that is used for fake tensors too."""

    def dequantize(self, weight, dtype):
        if weight.shape.numel() * dtype.itemsize > SCRATCH_BYTES:
            return weight.dequantize(dtype)
        view = self.views.get((weight.shape, dtype))
        return weight.dequantize(dtype, self.new_view(weight.shape, dtype) if view is None else view)


@contextmanager
def scratch_as_on(device: str, model: nn.Module):
    """Within the block, `QuantLinear` takes its memory for dequantized weights as it does on `device`.

    On a card that is with Triton's kernels, whether or not there are kernels for the CPU of this machine.
    """
    if device != "cpu":
        with use_scratch(), mock.patch("labkit.quant.kernels.dispatch.has_kernels", lambda tensor: True):
            yield
        return

    scratch = FakeScratch()
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    for layer in layers:
        dtype = layer.compute_dtype or layer.dtype
        if layer.weight.shape.numel() * dtype.itemsize <= SCRATCH_BYTES:
            scratch.new_view(layer.weight.shape, dtype)
    with use_scratch(scratch):
        yield


def ledger_of(record: TensorRecord, title: str, settings: dict, counts: dict, source: str) -> Ledger:
    """The rows of a record."""
    _, event = record.peak()
    at_peak, largest = record.at(event), record.largest()
    rows = []
    for label, n in largest.items():
        component, _, kind = label.partition("/")
        n = at_peak.get(label, 0) if component == "temporary" else n
        rows.append(LedgerRow(component, kind, n, at_peak.get(label, 0), "bytes of tensors", source))
    moment = record.phase_at(event)
    return Ledger(rows, title, moment, settings, counts, record.timeline())
