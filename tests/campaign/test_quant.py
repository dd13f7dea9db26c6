"""4-bit weights under hostile fields, in any order of saving and loading, and kernels whose compiler is killed.

The memory of every tensor ends, or begins, at a page that may not be touched: a kernel that reads or writes one byte
beyond is killed by the system, and its process with it.
"""

import copy
import ctypes
import mmap
import os
import pickle
import random
import shutil
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from labkit.hardware import set_fast
from labkit.quant.codebooks import nf4
from labkit.quant.config import BLOCKSIZES
from labkit.quant.kernels import cpu
from labkit.quant.linear import QuantLinear
from labkit.quant.tensor import NestedScales, QuantizedTensor, quantize
from tests.campaign.harness import kill_after, moments, processes, rounds, start

PAGE = mmap.PAGESIZE
NAMES = ("nf4", "fp4", "fp4-e3m0", "int4", "optimal-64")
linux_only = pytest.mark.skipif(os.name != "posix", reason="protects pages of memory")


class Guarded:
    """Memory between two pages that may not be touched."""

    def __init__(self):
        self.maps: list[mmap.mmap] = []
        self.protect = ctypes.CDLL(None, use_errno=True).mprotect

    def tensor(self, source: torch.Tensor, at_the_end: bool) -> torch.Tensor:
        """A copy of `source`, a contiguous tensor, that touches the page after it, or the one before."""
        size = source.nbytes
        inner = max(1, -(-size // PAGE)) * PAGE
        memory = mmap.mmap(-1, inner + 2 * PAGE)
        self.maps.append(memory)
        view = np.frombuffer(memory, np.uint8)
        begin = view.ctypes.data
        for page in (begin, begin + PAGE + inner):
            assert self.protect(ctypes.c_void_p(page), PAGE, 0) == 0
        offset = PAGE + (inner - size if at_the_end else 0)
        made = torch.from_numpy(view[offset : offset + size]).view(source.dtype).view(source.shape)
        return made.copy_(source)


def spoiled(tensor: torch.Tensor, chance: random.Random) -> object:
    """Something that is not quite `tensor`."""
    flat = tensor.reshape(-1)
    return chance.choice(
        [
            lambda: flat[:-1],
            lambda: flat[: len(flat) // 2].clone(),
            lambda: tensor.reshape(-1, 1),
            lambda: tensor.to(
                chance.choice([torch.int8, torch.float16, torch.float64, torch.int64, torch.bool])
            ),
            lambda: torch.stack([flat, flat], 1)[:, 0],
            lambda: tensor.to("meta"),
            lambda: tensor.to_sparse(),
            lambda: flat.new_empty(0),
            lambda: None,
            lambda: flat.tolist(),
        ]
    )()


def hostile_fields(weight: QuantizedTensor, chance: random.Random) -> dict[str, object]:
    """Up to three fields that may not fit the others."""
    n = weight.shape.numel()
    scales = weight.scales
    choices = {
        "blocksize": lambda: chance.choice([*BLOCKSIZES, -64, 0, 1, 63, 64.0, "64", None, 2**62, True]),
        "shape": lambda: chance.choice(
            [
                (n,),
                (1, n),
                (n, 1),
                (n + 1,),
                (2 * n,),
                (n, n),
                (-n,),
                (-1, -n),
                (0, n),
                (2**40, 2**40),
                (n + 0.0,),
                n,
                (),
            ]
        ),
        "codebook": lambda: chance.choice([*NAMES, "dynamic8", "nf5", "", None, 4, "optimal-1"]),
        "dtype": lambda: chance.choice(
            [torch.float32, torch.bfloat16, torch.float16, torch.int8, "float32", None]
        ),
        "packed": lambda: spoiled(weight.packed, chance),
        "scales": lambda: (
            replace(
                scales,
                **{
                    (name := chance.choice(["codes", "absmax", "offset"])): spoiled(
                        getattr(scales, name), chance
                    )
                },
            )
            if isinstance(scales, NestedScales)
            else spoiled(scales, chance)
        ),
    }
    return {name: choices[name]() for name in chance.sample(sorted(choices), chance.randint(0, 3))}


def read_hostile_weights(answers: Connection, seeds: range) -> None:
    """Make weights of hostile fields in guarded memory, and read those that are allowed by both paths."""
    refused = read = 0
    torch.set_num_threads(1)
    for seed in seeds:
        chance, guarded = random.Random(seed), Guarded()
        torch.manual_seed(seed)
        shape = chance.choice(
            [(chance.randint(1, 200),), (chance.randint(1, 9), 32 * chance.randint(1, 9)), (3, 5, 7)]
        )
        values = guarded.tensor(torch.randn(shape), chance.random() < 0.5)
        settings = chance.choice(NAMES), chance.choice(BLOCKSIZES), chance.random() < 0.5
        weight = quantize(values, *settings)
        fields = {
            name: getattr(weight, name)
            for name in ("packed", "scales", "shape", "dtype", "codebook", "blocksize")
        }
        try:
            fields |= hostile_fields(weight, chance)
            end = chance.random() < 0.5
            place = lambda t: guarded.tensor(t, end) if plain(t) else t  # noqa: B023, E731
            nested = fields["scales"]
            if isinstance(nested, NestedScales):
                fields["scales"] = NestedScales(
                    place(nested.codes), place(nested.absmax), place(nested.offset)
                )
            else:
                fields["scales"] = place(nested)
            weight = QuantizedTensor(**fields | {"packed": place(fields["packed"])})
        except (ValueError, TypeError):
            refused += 1
            continue
        read += 1
        if weight.is_meta:
            continue
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            out = guarded.tensor(torch.empty(weight.shape, dtype=dtype), end)
            weight.dequantize(out=out)
            set_fast(False)
            expected = weight.dequantize(dtype)
            set_fast(True)
            same = out.view(torch.uint8).equal(expected.view(torch.uint8)) or expected.isnan().any()
            assert same, f"seed {seed}: {dtype}"
        if weight.dim() == 2 and cpu.multiplies(weight.shape[1]):
            x = guarded.tensor(torch.randn(3, weight.shape[1]), end)
            torch.testing.assert_close(
                weight.multiply(x), x @ weight.dequantize(torch.float32).T, rtol=1e-4, atol=1e-4
            )
    answers.send((refused, read))


def plain(tensor: object) -> bool:
    """Can it be copied to guarded memory as it is?"""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and tensor.numel() > 0
    )


@linux_only
def test_no_fields_make_a_kernel_leave_its_memory():
    here, there = processes.Pipe(duplex=False)
    number = rounds(150, 6000)
    process = start(read_hostile_weights, there, range(number))
    there.close()
    try:
        refused, read = here.recv()
    except EOFError:
        process.join()
        pytest.fail(f"the process ended with {process.exitcode} (-11: it left its memory)")
    process.join()
    assert refused + read == number and refused > number / 4 and read > number / 8


def touch_beyond(answers: Connection) -> None:
    """What the guard is for: a kernel that is told of one block more than there is."""
    guarded = Guarded()
    levels = guarded.tensor(nf4(), at_the_end=True)
    packed = guarded.tensor(torch.zeros(32, 1, dtype=torch.uint8), at_the_end=True)
    scales = guarded.tensor(torch.ones(1), at_the_end=True)
    out = torch.empty(128)
    addresses = packed.data_ptr(), scales.data_ptr(), 0, 0, 0, 0, levels.data_ptr(), out.data_ptr()
    cpu.threads.run(cpu.dequantize_task.address, 2, 128, 128, 2, 64, *addresses, 4, 0)
    answers.send("it went on")


@linux_only
def test_the_guard_notices_a_kernel_that_leaves_its_memory():
    here, there = processes.Pipe(duplex=False)
    process = start(touch_beyond, there)
    there.close()
    process.join()
    assert process.exitcode < 0
    with pytest.raises(EOFError):
        here.recv()


class Pair:
    """A 4-bit layer that lives through saving, loading, casting and copying, and the weight that it must have."""

    def __init__(self, chance: random.Random):
        self.chance = chance
        self.layer = self.other()
        self.expected = self.layer.weight.dequantize(torch.float32)

    def other(self) -> QuantLinear:
        """A new layer of any settings."""
        settings = self.chance.choice(NAMES), self.chance.choice(BLOCKSIZES), self.chance.random() < 0.5
        layer = QuantLinear(quantize(torch.randn(24, 96), *settings), torch.randn(24))
        return layer.bfloat16() if self.chance.random() < 0.3 else layer

    def take_over(self, assign: bool) -> None:
        """Load another layer's state."""
        source = self.other()
        state = load(save(source.state_dict())) if self.chance.random() < 0.5 else source.state_dict()
        self.layer.load_state_dict(copy.deepcopy(state), assign=assign)
        self.expected = source.weight.dequantize(torch.float32)

    def copy_in(self) -> None:
        self.take_over(assign=False)

    def assign(self) -> None:
        self.take_over(assign=True)

    def hand_over(self) -> None:
        """Another layer loads this one's state."""
        other = self.other()
        other.load_state_dict(copy.deepcopy(self.layer.state_dict()))
        self.layer = other

    def copied(self) -> None:
        self.layer = copy.deepcopy(self.layer)

    def pickled(self) -> None:
        self.layer = pickle.loads(pickle.dumps(self.layer))

    def cast(self) -> None:
        self.layer.to(self.chance.choice([torch.float32, torch.bfloat16, torch.float16]))

    def through_meta(self) -> None:
        state = copy.deepcopy(self.layer.state_dict())
        self.layer = self.layer.to("meta")
        self.layer.load_state_dict(state, assign=True)

    def refused(self) -> None:
        """A state that does not fit is refused, and the layer is as it was."""
        state = self.other().state_dict()
        name = self.chance.choice([key for key in state if key != "bias"])
        state[name] = self.chance.choice(
            [state[name].reshape(-1)[:-1], state[name].double(), torch.zeros(2, 3)]
        )
        with pytest.raises(RuntimeError, match="The layer is as it was"):
            self.layer.load_state_dict(
                state, assign=self.chance.random() < 0.5, strict=self.chance.random() < 0.5
            )

    def check(self) -> None:
        """Both paths compute with the weight that the layer must have."""
        weight = self.layer.weight.dequantize(torch.float32)
        assert torch.equal(weight, self.expected)
        dtype = self.layer.dtype
        x = torch.randn(self.chance.choice([1, 3, 20]), 96).to(dtype)
        bias = self.layer.bias.detach()
        with torch.no_grad():
            y = self.layer(x)
        torch.testing.assert_close(
            y, nn.functional.linear(x, weight.to(dtype), bias.to(dtype)), rtol=2e-2, atol=2e-2
        )


STEPS = ("copy_in", "assign", "hand_over", "copied", "pickled", "cast", "through_meta", "refused")


def test_a_layer_is_its_weight_after_any_sequence_of_saving_loading_casting_and_copying():
    for seed in range(rounds(40, 2000)):
        chance = random.Random(seed)
        torch.manual_seed(seed)
        pair, done = Pair(chance), []
        for _ in range(chance.randint(2, 10)):
            done.append(chance.choice(STEPS))
            try:
                getattr(pair, done[-1])()
                pair.check()
            except Exception as error:
                raise AssertionError(f"seed {seed}: {' > '.join(done)}") from error


def compile_again_and_again(folder: Path) -> None:
    """Compile small tasks that are kept in `folder`, each anew."""
    import numba

    from labkit.quant.kernels import kept, tasks

    numba.config.CACHE_DIR = str(folder)

    def task(arguments):
        numba.carray(arguments, 1)[0] = 7

    while True:
        kernel = kept.compiled(tasks.TASK)(task)
        memory = np.zeros(1, np.int64)
        kernel.ctypes(memory.ctypes.data_as(kernel.ctypes.argtypes[0]))
        assert memory[0] == 7
        if random.random() < 0.5:  # otherwise the next one loads it
            shutil.rmtree(folder, ignore_errors=True)


def test_a_compiler_that_is_killed_leaves_whole_kernels_or_none(tmp_path: Path):
    for moment in moments(rounds(1, 20), 4.0, seed=0):
        beside = start(compile_again_and_again, tmp_path / "kept")  # two at once
        assert kill_after(moment, compile_again_and_again, tmp_path / "kept")
        assert beside.is_alive(), f"the other one failed: {beside.exitcode}"
        beside.kill()
        beside.join()
