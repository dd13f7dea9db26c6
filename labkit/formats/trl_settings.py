"""Our settings in the words of TRL, PEFT and bitsandbytes: with these, their run takes the steps of ours.

    TrainConfig   ->  SFTConfig(**sft_settings(config))
    LoRAConfig    ->  LoraConfig(**peft_settings(config))
    QuantConfig   ->  BitsAndBytesConfig(**bitsandbytes_settings(config))

`OPTIONS` is the same as a table: each pair of names, and where the two mean different things. Most of a migration is
not the names: a default that nobody typed decides as much as a setting that somebody did. So everything is written
out, also where it is their default today.

None of the three libraries is imported here. Not translated is what they cannot be told: their warm-up begins at a
rate of zero and ours one step later, a record that is too long is cut by them and left out by us, and the order of
the records is another random one.

Agrees with: TRL `trainer/sft_config.py`, transformers `training_args.py`, PEFT `tuners/lora/config.py`.
"""

from typing import Any, NamedTuple

from labkit.checks import check_choice
from labkit.lora.config import LoRAConfig
from labkit.quant.config import QuantConfig
from labkit.training.config import TrainConfig


class Option(NamedTuple):
    """A pair of settings: `Class.field` here and there, and where they differ ("" for nowhere)."""

    ours: str
    theirs: str
    differs: str = ""


OPTIONS = (
    Option("TrainConfig.lr", "SFTConfig.learning_rate", "their default is one for full fine-tuning"),
    Option("TrainConfig.steps", "SFTConfig.max_steps", "theirs: -1 is for as many as the epochs take"),
    Option("TrainConfig.epochs", "SFTConfig.num_train_epochs"),
    Option("TrainConfig.batch_size", "SFTConfig.per_device_train_batch_size", "theirs is per GPU"),
    Option("TrainConfig.accumulation", "SFTConfig.gradient_accumulation_steps"),
    Option("TrainConfig.schedule", "SFTConfig.lr_scheduler_type"),
    Option("TrainConfig.warmup", "SFTConfig.warmup_steps", "below 1 a share; their first step is at rate 0"),
    Option("TrainConfig.clip", "SFTConfig.max_grad_norm", "no clipping: ours None, theirs 0"),
    Option("TrainConfig.weight_decay", "SFTConfig.weight_decay"),
    Option("TrainConfig.betas", "SFTConfig.adam_beta2", "and adam_beta1"),
    Option("TrainConfig.eps", "SFTConfig.adam_epsilon"),
    Option("TrainConfig.optimizer", "SFTConfig.optim", "theirs keeps its state in the adapter's dtype"),
    Option("TrainConfig.max_length", "SFTConfig.max_length", "a longer record: theirs cuts it, ours leaves it out"),
    Option("TrainConfig.batching", "SFTConfig.packing", "and train_sampling_strategy"),
    Option("TrainConfig.checkpointing", "SFTConfig.activation_checkpointing", "TRL turns it on"),
    Option("TrainConfig.eval_every", "SFTConfig.eval_steps", "their loss is a mean over batches, ours over tokens"),
    Option("TrainConfig.checkpoint_every", "SFTConfig.save_steps"),
    Option("TrainConfig.seed", "SFTConfig.seed", "the same number is another order"),
    Option("LoRAConfig.r", "LoraConfig.r"),
    Option("LoRAConfig.alpha", "LoraConfig.lora_alpha", "alpha / r is 1 by PEFT's default"),
    Option("LoRAConfig.dropout", "LoraConfig.lora_dropout"),
    Option("LoRAConfig.targets", "LoraConfig.target_modules", "theirs: a list by architecture, for Llama q and v"),
    Option("LoRAConfig.variant", "LoraConfig.use_rslora", "and use_dora"),
    Option("LoRAConfig.init", "LoraConfig.init_lora_weights"),
    Option("QuantConfig.codebook", "BitsAndBytesConfig.bnb_4bit_quant_type", "theirs is FP4 unless told"),
    Option("QuantConfig.double_quant", "BitsAndBytesConfig.bnb_4bit_use_double_quant"),
    Option("QuantConfig.compute_dtype", "BitsAndBytesConfig.bnb_4bit_compute_dtype"),
)  # fmt: skip
OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw8bit": "adamw_8bit"}
STRATEGIES = {"similar": "group_by_length", "shuffled": "random", "packed": "random"}


def sft_settings(config: TrainConfig) -> dict[str, Any]:
    """The arguments of TRL's `SFTConfig` that mean what `config` does; add `output_dir`, and what only they have.

    Raises:
        ValueError: a setting that TRL has no word for: LoRA+, a state budget, packing without a mask.
    """
    if config.lora_plus != 1:
        raise ValueError(
            f"lora_plus={config.lora_plus!r} is no setting of SFTConfig; allowed: 1. To do: give the trainer an optimizer "
            "of peft.optimizers.create_loraplus_optimizer"
        )
    if config.state_budget_bytes is not None:
        raise ValueError(
            f"state_budget_bytes={config.state_budget_bytes!r}: bitsandbytes pages by its own rules, and on a CUDA device "
            "only; allowed: None. To do: optim='paged_adamw_8bit'"
        )
    check_choice("batching", config.batching, STRATEGIES)
    settings = {
        "learning_rate": config.lr,
        "max_steps": -1 if config.steps is None else config.steps,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "lr_scheduler_type": config.schedule
        if config.warmup == 0 or config.schedule != "constant"
        else "constant_with_warmup",
        "warmup_steps": config.warmup,
        "max_grad_norm": config.clip or 0.0,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "adam_epsilon": config.eps,
        "optim": OPTIMIZERS[config.optimizer],
        "seed": config.seed,
        "max_length": config.max_length,
        "packing": config.batching == "packed",
        "train_sampling_strategy": STRATEGIES[config.batching],
        "activation_checkpointing": config.checkpointing,
        "bf16": False,  # autocast; theirs is on unless told
        "logging_steps": 1,
        "disable_tqdm": not config.progress,
        "report_to": "none",
        "save_strategy": "no",
    }
    if config.checkpoint_folder is not None:
        settings |= {"save_strategy": "steps", "save_steps": config.checkpoint_every}
    if config.eval_every is not None:
        settings |= {"eval_strategy": "steps", "eval_steps": config.eval_every}
    if config.patience is not None:  # add EarlyStoppingCallback(config.patience) to the trainer
        settings |= {
            "load_best_model_at_end": True,
            "save_strategy": "steps",
            "save_steps": config.eval_every,
        }
    return settings


def peft_settings(config: LoRAConfig) -> dict[str, Any]:
    """The arguments of PEFT's `LoraConfig` that mean what `config` does, for a causal language model.

    Raises:
        ValueError: a start that PEFT has no word for, or a preset of targets that is ours alone.
    """
    if config.init not in ("default", "gaussian") and not config.starts_from_weight:
        raise ValueError(
            f"init={config.init!r} is ours alone; PEFT has 'default', 'gaussian' and those that start from the weight"
        )
    if config.targets in ("attention", "mlp"):
        raise ValueError(
            f"targets={config.targets!r} is ours alone; give the names of the layers, such as ['q_proj', 'v_proj']"
        )
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    return {
        "task_type": "CAUSAL_LM",
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "use_rslora": config.is_rslora,
        "use_dora": config.is_dora,
        "init_lora_weights": True if config.init == "default" else config.init,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "modules_to_save": list(config.modules_to_save) or None,
        "bias": "none",
    }


def bitsandbytes_settings(config: QuantConfig) -> dict[str, Any]:
    """The arguments of transformers' `BitsAndBytesConfig` that mean what `config` does.

    Raises:
        ValueError: a codebook or a block size that bitsandbytes cannot be told.
    """
    check_choice("codebook", config.codebook, ("nf4", "fp4"))
    check_choice("blocksize", config.blocksize, (64,))
    settings: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.codebook,
        "bnb_4bit_use_double_quant": config.double_quant,
    }
    if config.compute_dtype is not None:  # theirs is fp32 unless told
        settings["bnb_4bit_compute_dtype"] = config.compute_dtype
    return settings
