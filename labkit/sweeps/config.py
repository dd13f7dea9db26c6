"""Everything that decides the numbers of a run, in one flat config: a row of a table, a line of results."""

from dataclasses import dataclass, fields

from labkit.alternatives.sized import SIZED_METHODS
from labkit.checks import check_choice, check_whole, nearest, use_python_numbers
from labkit.lora.config import LoRAConfig
from labkit.training.config import TrainConfig

# what `labkit.sweeps.tasks` has; named here, because a task is measured by runs
TASK_NAMES = (
    "austen",
    "spectra",
    "sql",
    "sql_more",
    "tickets",
    "tickets_loss",
    "tickets_varied",
    "facts",
    "docstrings",
)
DTYPES = ("float32", "bfloat16")
METHODS = ("full", "lora", "qlora", "subspace", "ia3", *SIZED_METHODS, "none")
MAX_LENGTH = 192  # tokens of an example; longer ones are left out


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the result of a run; a row of a table.

    Args:
        task: a name in `TASK_NAMES`.
        model: a name or folder for `labkit.models.load`.
        method: "full" (every parameter trains), "lora", "qlora" (LoRA over NF4 with double quantization),
            "subspace" (`d` random directions, see `labkit.analysis.subspace`), "prompt", "prefix",
            "bottleneck" or "ia3" (see `labkit.alternatives`), or "none" (the base model, only measured).
        r, alpha, targets, variant, init, dropout: see `labkit.LoRAConfig`.
        embeddings: train the embedding matrix, which these models share with the output layer; by default
            only with "full".
        products: dtype of the products with 4-bit weights, "float32" or "bfloat16"; by default what the processor
            is best at (`labkit.hardware.product_dtype`). Only with "qlora".
        adapter_dtype: of A and B, "float32" or "bfloat16"; the optimizer's state has the same.
        d: dimension of the random subspace.
        size: tokens of a soft prompt or prefix, width of bottleneck adapters.
        examples: train on the first so many records; by default on all.
        lr, steps, batch_size, batching, schedule, warmup, clip, lora_plus: see `labkit.TrainConfig`; in a subspace `lr`
            is the step of a weight, and z gets `labkit.analysis.subspace.matching_lr`.
        seed: of the start of the adapter, the order of the data, the random subspace, and `facts`.

    Raises:
        ValueError: a name is unknown or a number out of range.
    """

    task: str = "austen"
    model: str = "tiny-llama"
    method: str = "lora"
    r: int = 8
    alpha: float = 16
    targets: str = "all-linear"
    variant: str = "lora"
    init: str = "default"
    dropout: float = 0.0
    embeddings: bool | None = None
    d: int | None = None
    examples: int | None = None
    lr: float = 1e-3
    steps: int = 100
    batch_size: int = 8
    schedule: str = "linear"
    warmup: float = 0.05
    clip: float | None = 1.0
    seed: int = 0
    lora_plus: float = 1.0
    size: int | None = None
    products: str | None = None
    adapter_dtype: str = "float32"
    batching: str = "similar"

    def __post_init__(self):
        use_python_numbers(self)
        check_choice("task", self.task, TASK_NAMES)
        check_choice("method", self.method, METHODS)
        if not isinstance(self.model, str) or not self.model:
            raise ValueError(f"model={self.model!r} must be a name, or a folder, for labkit.models.load")
        if self.embeddings is not None:
            check_choice("embeddings", self.embeddings, (True, False))
        for name in ("examples", "d", "size"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        if (self.method == "subspace") != (self.d is not None):
            raise ValueError(
                f"method={self.method!r} with d={self.d}: d goes with method='subspace', and only with it"
            )
        if (self.method in SIZED_METHODS) != (self.size is not None):
            raise ValueError(
                f"method={self.method!r} with size={self.size}: "
                f"size goes with {', '.join(SIZED_METHODS)}, and only with them"
            )
        check_choice("adapter_dtype", self.adapter_dtype, DTYPES)
        if self.products is not None:
            check_choice("products", self.products, DTYPES)
            if self.method != "qlora":
                raise ValueError(
                    f"products={self.products!r} is the dtype of a 4-bit layer's products; method={self.method!r} "
                    "has no such layer"
                )
        if self.adapter_dtype != "float32" and self.method not in ("lora", "qlora"):
            raise ValueError(
                f"adapter_dtype={self.adapter_dtype!r} is for A and B; method={self.method!r} has none"
            )
        if self.task == "facts" and self.examples is None:
            raise ValueError("task='facts' draws as many facts as you ask for: give examples, such as 256")
        if not isinstance(self.targets, str):
            raise ValueError(
                f"targets={self.targets!r} must be a text here: a preset, a layer name, or a regular expression"
            )
        if self.lora_plus != 1 and self.method not in ("lora", "qlora"):
            raise ValueError(
                f"lora_plus={self.lora_plus!r} is a rate for LoRA's B; method={self.method!r} has none"
            )
        if self.lora_config().is_loftq and self.method != "qlora":
            raise ValueError(
                f"init={self.init!r} fits the adapter to a 4-bit base; it goes with method='qlora'"
            )
        self.train_config()  # its own checks

    @classmethod
    def from_dict(cls, values: dict) -> "RunConfig":
        """A config from a table of a TOML file or a line of results.

        Raises:
            ValueError: a key that no run has.
        """
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            near = nearest(unknown[0], known)
            raise ValueError(
                f"{', '.join(unknown)}: no such setting of a run; it has {', '.join(known)}{near}"
            )
        return cls(**values)

    def lora_config(self) -> LoRAConfig:
        """The adapter of "lora" and "qlora"."""
        return LoRAConfig(self.r, self.alpha, self.dropout, self.targets, self.variant, self.init)

    def train_config(self) -> TrainConfig:
        """How the run trains."""
        same = ("lr", "steps", "batch_size", "schedule", "warmup", "clip", "seed", "lora_plus", "batching")
        settings = {name: getattr(self, name) for name in same}
        return TrainConfig(**settings, max_length=MAX_LENGTH, progress=False)

    def __str__(self) -> str:
        changed = [f"{f.name}={v}" for f in fields(self) if (v := getattr(self, f.name)) != f.default]
        return ", ".join(changed) or "defaults"
