"""Random sequences of calls on tiny models of every family, against an oracle that does not know labkit.

After each call the logits must be the oracle's, or the call must have raised an error of labkit's own with a reason
and left everything as it was, bit for bit. A silent difference is a failure.
"""

import copy
import inspect
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from peft import PeftModel
from torch import nn

import labkit
from labkit import LoRAConfig, TrainConfig, models
from labkit.lora.inject import lora_layers
from labkit.models.walk import own_name, unwrap
from labkit.training.run import TrainingRun
from tests.campaign.harness import rounds
from tests.campaign.oracle import ARCHITECTURES, IDS, Correction, Oracle, make_base, principal, scaling_of

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.bfloat16: 0.1}  # of the largest logit
RECORDS = [{"prompt": "one two", "completion": " three"}, {"prompt": "a", "completion": " b c"}]
COUNTS: Counter[str] = Counter()


def snapshot(model: nn.Module) -> dict:
    """Everything that a call which refuses must leave as it was."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    trains = [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    return {"state": state, "modules": modules, "trains": trains, "active": labkit.active_adapter(model)}


def same(one: dict, other: dict) -> bool:
    return all(one[key] == other[key] for key in ("modules", "trains", "active")) and (
        one["state"].keys() == other["state"].keys()
        and all(torch.equal(value, other["state"][name]) for name, value in one["state"].items())
    )


MISUSES = [
    labkit.merge,
    labkit.unmerge,
    labkit.unload,
    labkit.dequantize_model,
    lambda model: labkit.add_lora(model, LoRAConfig(targets=["no_such_layer"])),
    lambda model: labkit.use_adapter(model, "none"),
    lambda model: labkit.remove_adapter(model, "second "),
    lambda model: labkit.save_adapter(model, "/proc/none"),
    lambda model: labkit.load_adapter(model, "/proc/none"),
]
NAMES = ("default", "second", "third")
CONFIGS = st.builds(
    lambda r, alpha, kind, targets: LoRAConfig(
        r=r, alpha=alpha, variant=kind[0], init=kind[1], targets=targets
    ),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 4, 16]),
    st.sampled_from(
        [
            ("lora", "default"),
            ("lora", "b_random"),
            ("rslora", "gaussian"),
            ("dora", "default"),
            ("lora", "pissa"),
        ]
    ),
    st.sampled_from(["all-linear", ("first two",)]),
)


class Calls(RuleBasedStateMachine):
    """One model, its oracle, and the calls that may come in any order."""

    architecture = "llama"

    @initialize()
    def begin(self):
        self.model, self.oracle = make_base(self.architecture), Oracle(self.architecture)
        self.tokenizer = TOKENIZER
        self.dtype, self.floor = torch.float32, torch.float32  # of the weights; the coarsest they ever had
        self.history: list[Callable[[nn.Module], object]] = []  # what made this base from a fresh one
        self.merged, self.quantized, self.changed_base, self.seed = False, False, False, 0
        COUNTS["sequences"] += 1

    def attempt(self, call: Callable[[], object]) -> bool:
        """Make a call; False if it was refused, with a reason of labkit's own, and changed nothing."""
        name = inspect.currentframe().f_back.f_code.co_name
        before = snapshot(self.model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call()
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            where = traceback.extract_tb(error.__traceback__)[-1].filename
            assert "/labkit/" in where, f"an error from below: {error!r}"
            assert len(str(error).split()) > 5, f"no reason: {error!r}"
            assert same(before, snapshot(self.model)), f"refused, and changed something: {error}"
            COUNTS[f"{name}, refused"] += 1
            return False
        COUNTS[name] += 1
        return True

    @property
    def adapted(self) -> bool:
        return bool(self.oracle.corrections)

    def layers(self) -> dict[str, nn.Module]:
        return {own_name(self.model, n): layer for n, layer in lora_layers(self.model).items()}

    def put_factors(self, name: str, config: LoRAConfig) -> None:
        """Give the adapter that has just been added factors of this test's own making, and tell the oracle."""
        self.seed += 1
        chance = torch.Generator().manual_seed(self.seed)
        scaling = scaling_of(config.r, config.alpha, config.variant)
        A, B, magnitude = {}, {}, {}
        taken = {}
        for path, layer in self.layers().items():
            weight = self.oracle.weights[path]
            r, (out, width) = config.r, weight.shape
            A[path] = torch.randn(r, width, generator=chance, dtype=torch.float64) / width**0.5
            B[path] = torch.randn(out, r, generator=chance, dtype=torch.float64)
            B[path] *= weight.std() * (width / r) ** 0.5 / scaling  # the correction is as large as the weight
            if config.is_dora:
                magnitude[path] = weight.norm(dim=1)
                assert torch.allclose(
                    layer.lora_magnitude.double(), magnitude[path], rtol=TOLERANCE[self.floor]
                )
            if config.is_pissa:
                taken[path] = principal(weight, r)
            with torch.no_grad():
                layer.lora_A.copy_(A[path])
                layer.lora_B.copy_(B[path])
        assert A, "no layer was adapted"
        made = Correction(A, B, scaling, magnitude if config.is_dora else None, taken)
        dtype = layer.lora_A.dtype
        self.oracle.corrections[name] = made.cast(dtype).cast(torch.float64)
        self.oracle.active = name

    # the calls

    @rule(name=st.sampled_from(NAMES), config=CONFIGS)
    def add(self, name, config):
        if isinstance(config.targets, tuple):  # the first two kinds of layers that this architecture has
            names = sorted(self.oracle.weights)
            config = replace(config, targets=tuple(dict.fromkeys(n.rpartition(".")[2] for n in names[:2])))

        def call():
            if self.adapted:
                labkit.add_adapter(self.model, name, config)
            else:
                labkit.add_lora(self.model, config, name)

        if self.attempt(call):
            assert not self.merged and name not in self.oracle.corrections
            self.put_factors(name, config)

    @precondition(lambda self: len(self.oracle.corrections) < 2)
    @rule(name=st.sampled_from(NAMES), config=CONFIGS)
    def add_more(self, name, config):
        self.add(name, config)

    @rule()
    def quantize(self):
        if self.attempt(lambda: labkit.quantize_model(self.model, progress=False)):
            assert not self.quantized and not self.merged
            self.oracle.quantize()
            self.quantized = True
            self.history.append(lambda m: labkit.quantize_model(m, progress=False))

    @rule()
    def dequantize(self):
        if self.attempt(lambda: labkit.dequantize_model(self.model)) and self.quantized and not self.merged:
            self.quantized = False
            self.history.append(labkit.dequantize_model)

    @precondition(lambda self: bool(self.oracle.active))
    @rule()
    def merge(self):
        if self.attempt(lambda: labkit.merge(self.model)):
            assert self.oracle.active and not self.merged and not self.quantized
            self.merged = True

    @precondition(lambda self: bool(self.merged))
    @rule()
    def unmerge(self):
        if self.attempt(lambda: labkit.unmerge(self.model)):
            self.merged = False

    @rule(call=st.sampled_from(MISUSES))
    @precondition(lambda self: not self.adapted and not self.quantized)
    def misuse(self, call):
        """What has no meaning now, or no such name: refused, and nothing changed."""
        done = self.attempt(lambda: call(self.model))
        assert not done or call is labkit.dequantize_model, call

    @precondition(lambda self: bool(self.adapted))
    @rule(name=st.sampled_from([*NAMES, None]))
    def use(self, name):
        if self.attempt(lambda: labkit.use_adapter(self.model, name)):
            assert name is None or name in self.oracle.corrections
            self.oracle.active = name

    @precondition(lambda self: bool(self.adapted))
    @rule(name=st.sampled_from(NAMES))
    def remove(self, name):
        if self.attempt(lambda: labkit.remove_adapter(self.model, name)):
            del self.oracle.corrections[name]
            self.oracle.active = None if self.oracle.active == name else self.oracle.active

    @precondition(lambda self: bool(self.adapted))
    @rule(keep=st.booleans(), dequantize=st.booleans())
    def unload(self, keep, dequantize):
        if self.attempt(lambda: labkit.unload(self.model, merged=keep, dequantize=dequantize)):
            assert not lora_layers(self.model)
            if keep:
                self.oracle.fix(self.oracle.effective())
                self.changed_base = True
            self.quantized = self.quantized and not dequantize
            if dequantize:
                self.history.append(labkit.dequantize_model)
            self.merged, self.oracle.corrections, self.oracle.active = False, {}, None

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype):
        if self.attempt(lambda: self.model.to(dtype)):
            self.dtype = dtype
            self.floor = dtype if TOLERANCE[dtype] > TOLERANCE[self.floor] else self.floor
            self.oracle.cast(dtype)
            self.history.append(lambda m: m.to(dtype))

    @rule(way=st.sampled_from(["compile", "data parallel", "off"]))
    def wrap(self, way):
        inner = unwrap(self.model)
        if way == "compile":
            self.model = torch.compile(inner, backend="eager")
        else:
            self.model = nn.DataParallel(inner) if way == "data parallel" else inner

    @rule()
    def copy(self):
        self.model = copy.deepcopy(unwrap(self.model))

    @precondition(lambda self: self.adapted and not self.changed_base)
    @rule(through_peft=st.booleans(), plain=st.booleans())
    def save_and_load(self, through_peft, plain):
        """Another model of the same base loads the adapter, here or in PEFT, and computes the same."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            if not self.attempt(lambda: labkit.save_adapter(self.model, path, plain=plain)):
                return
            other = make_base(self.architecture)
            for step in self.history:
                step(other)
            if through_peft and not self.quantized:
                other = PeftModel.from_pretrained(other, str(path)).eval()
            else:
                labkit.load_adapter(other, path)
            self.compare(other, "the adapter, loaded again")

    @precondition(lambda self: bool(self.adapted))
    @rule()
    def block(self):
        """Within `disabled` the model is its base alone."""
        active = self.oracle.active

        def look():
            with labkit.disabled(self.model):
                self.oracle.active = None
                self.compare(self.model, "disabled")

        try:
            self.attempt(look)
        finally:
            self.oracle.active = active

    @precondition(lambda self: self.dtype == torch.float32)
    @rule(steps=st.sampled_from([1, 2]), interrupted=st.booleans())
    def train(self, steps, interrupted):
        """A step moves the mounted adapter and nothing else; a run that was interrupted goes on as if it had not been."""
        if not self.adapted and not self.quantized:
            return  # full fine-tuning changes the base, about which this oracle knows nothing
        self.model = unwrap(self.model)
        twin = copy.deepcopy(self.model) if interrupted else None
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(lr=1e-2, steps=steps, batch_size=1, progress=False, warmup=0, seed=3)
            kept = TrainConfig(**vars(config) | {"checkpoint_folder": folder})
            if not self.attempt(lambda: self.run(twin or self.model, config)):
                return
            if twin is not None:
                with stopping_at(steps - 1):
                    self.run(self.model, kept)
                self.run(self.model, kept)
                for (name, p), q in zip(self.model.named_parameters(), twin.parameters()):
                    assert torch.equal(p, q), f"{name} differs after an interrupt"
        correction = self.oracle.corrections[self.oracle.active]
        moved = False
        for path, layer in self.layers().items():
            moved |= not torch.allclose(layer.lora_B.double(), correction.B[path], atol=1e-6)
            correction.A[path] = layer.lora_A.detach().double().clone()
            correction.B[path] = layer.lora_B.detach().double().clone()
            if correction.magnitude is not None:
                correction.magnitude[path] = layer.lora_magnitude.detach().double().clone()
        assert moved, "a training step moved nothing"

    def run(self, model: nn.Module, config: TrainConfig) -> None:
        labkit.train(model, self.tokenizer, RECORDS, config)
        model.eval()

    # what must hold after each

    def compare(self, model: nn.Module, what: str) -> None:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = unwrap(model)(IDS).logits if not isinstance(model, PeftModel) else model(IDS).logits
        want = self.oracle.logits(self.dtype)
        error = (got.double() - want.double()).abs().max() / want.double().abs().max()
        limit = max(TOLERANCE[self.floor], TOLERANCE[torch.float32] if self.quantized else 0)
        assert error < limit, f"{what}: {error:.2e} off"

    @invariant()
    def computes_what_the_equations_say(self):
        if hasattr(self, "oracle"):
            self.compare(self.model, "after this sequence")


@contextmanager
def stopping_at(number: int) -> Iterator[None]:
    """Within the block, a training run is interrupted (Ctrl-C) in this step."""
    step = TrainingRun.step

    def stop(run, at, *rest):
        if at == number:
            raise KeyboardInterrupt
        return step(run, at, *rest)

    TrainingRun.step = stop
    try:
        yield
    finally:
        TrainingRun.step = step


TOKENIZER = models.load("tiny-llama")[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_sequence_of_calls_computes_what_the_equations_say_or_is_refused(architecture: str):
    machine = type("Calls", (Calls,), {"architecture": architecture})
    plan = settings(
        max_examples=rounds(2, 150),
        stateful_step_count=12,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        database=None,
        phases=(hypothesis.Phase.generate,),  # a failure prints its sequence; making it shorter takes minutes
    )
    COUNTS.clear()
    run_state_machine_as_test(
        hypothesis.seed(list(ARCHITECTURES).index(architecture))(machine), settings=plan
    )
    print(dict(COUNTS))
