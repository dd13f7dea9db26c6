"""The command that serves versions of a registry with vLLM, once vLLM is known to take each as it is meant.

vllm serve BASE --enable-lora --max-loras 2 --max-lora-rank 16 --lora-modules support=/…/adapters/support/v2

--max-loras is one more than there are adapters. On a CPU, vLLM 0.32 computes a request to the base with the adapter in
the last of its slots, if the batch has a request to an adapter, too; an empty slot makes that the base. (It marks "no
adapter" by the index -1, and looks that up: vllm/lora/ops/torch_ops/lora_ops.py.)
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.formats.fitness import Fitness, check_for_vllm
from labkit.formats.peft_config import place_of_base
from labkit.serving.registry import Registry
from labkit.serving.versions import Version


@dataclass(frozen=True)
class VllmLine:
    """What vLLM makes of some versions.

    Attributes:
        served: by the name under which vLLM is to serve each: the version, and how it fits.
        arguments: of the command; None if one does not fit.
    """

    served: dict[str, tuple[Version, Fitness]]
    arguments: list[str] | None

    def __str__(self) -> str:
        """The command, quoted for a shell."""
        return "" if self.arguments is None else shlex.join(self.arguments)


def vllm_line(registry: Registry, references: Sequence[str] = (), base: str | None = None) -> VllmLine:
    """The command that serves versions with vLLM.

    Args:
        registry: that has them.
        references: which, each served under the name it is given by: "support", "support@v2"; default: every
            adapter whose alias production points somewhere, under its own name.
        base: the folder or hub id of the base model; default: where the base of the registry is on this machine.

    Raises:
        labkit.serving.naming.UnknownAdapter: one of them is not there.
        ValueError: there is nothing to serve, or a version is damaged.
    """
    chosen = list(dict.fromkeys(references))
    if not chosen:
        chosen = [alias.partition("@")[0] for alias in registry.aliases() if alias.endswith("@production")]
    if not chosen:
        raise ValueError(
            f"nothing to serve: no alias production points anywhere in {registry.root}; name versions"
        )
    served = {}
    for reference in chosen:
        version = registry.resolve(reference)
        served[reference] = (version, check_for_vllm(folder_of(version)))
    fits = [fitness for _, fitness in served.values()]
    if not all(fitness.fits for fitness in fits):
        return VllmLine(served, None)
    rank = max(fitness.max_lora_rank for fitness in fits)
    modules = [f"{name}={folder_of(version)}" for name, (version, _) in served.items()]
    limits = ["--max-loras", str(len(modules) + 1), "--max-lora-rank", str(rank)]
    command = ["vllm", "serve", base or place_of_base(registry.base.name), "--enable-lora", *limits]
    return VllmLine(served, [*command, "--lora-modules", *modules])


def folder_of(version: Version) -> Path:
    """The folder of a version, under the name that people know it by if it is there."""
    return version.place if version.place.exists() else version.path
