"""Is a PEFT folder fit for vLLM? Told by its files alone, with what to change where it is not.

What vLLM refuses is the lesser trouble. It passes over what it does not read: patterns of ranks and scales, the changed
base of PiSSA, tensors that none of its modules is named after. The server then answers, as another model.

`labkit.formats.vllm_rules` has the rules.
"""

from dataclasses import dataclass
from pathlib import Path

from labkit.checks import check_choice
from labkit.formats.new_weights import vocabulary_of
from labkit.formats.peft_folder import CONFIG, read_folder
from labkit.formats.peft_settings import check_expressions
from labkit.formats.vllm_rules import (
    NOTED,
    RANKS,
    Objection,
    of_config,
    of_features,
    of_names,
    of_rank,
    of_scaling,
    of_values,
    of_vocabulary,
    ranks_of,
)


@dataclass(frozen=True)
class Fitness:
    """What vLLM makes of a PEFT folder.

    Attributes:
        path: of the folder.
        rank: the largest in it; None if it has none.
        max_lora_rank: the smallest value of --max-lora-rank that does; None if none does.
        objections: all that was found.
    """

    path: Path
    rank: int | None
    max_lora_rank: int | None
    objections: tuple[Objection, ...]

    @property
    def fits(self) -> bool:
        """Does vLLM serve the adapter as it is meant?"""
        return all(objection.outcome == NOTED for objection in self.objections)

    def __str__(self) -> str:
        verdict = (
            f"fits vLLM with --enable-lora --max-lora-rank {self.max_lora_rank}"
            if self.fits
            else "does not fit vLLM"
        )
        return "\n".join([f"the adapter in {self.path} {verdict}", *(f"  {o}" for o in self.objections)])


def check_for_vllm(
    path: str | Path, max_lora_rank: int | None = None, vocabulary: int | None = None
) -> Fitness:
    """Check a PEFT folder, of labkit or PEFT, against vLLM's rules for adapters of Llama-like models.

    Args:
        path: of the folder.
        max_lora_rank: of the server, if that is given; default: what the adapter needs is said.
        vocabulary: of the base, in tokens; default: that of the base that the folder names, if it is on this machine.

    Returns:
        the objections, with what to do about each.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it is damaged or a pickle file, a pattern in it cannot be matched, or the server's rank is none that
            vLLM allows.
    """
    if max_lora_rank is not None:
        check_choice("max_lora_rank", max_lora_rank, RANKS)
    raw, tensors = read_folder(Path(path))
    objections = list(of_config(raw))
    if objections:
        return Fitness(Path(path), None, None, tuple(objections))
    check_expressions(Path(path) / CONFIG, raw.get("alpha_pattern") or ())
    ranks = ranks_of(tensors)
    rank = max([raw["r"], *ranks.values()])
    needed = next((allowed for allowed in RANKS if allowed >= rank), None)
    if vocabulary is None:
        vocabulary = vocabulary_of(str(raw.get("base_model_name_or_path") or ""))
    objections = [
        *of_rank(rank, needed, max_lora_rank),
        *of_features(raw),
        *of_scaling(raw, ranks),
        *of_names(raw, tensors),
        *of_vocabulary(tensors, vocabulary),
        *of_values(tensors),
    ]
    return Fitness(Path(path), rank, needed, tuple(objections))
