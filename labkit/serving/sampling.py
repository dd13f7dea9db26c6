"""The next token of a row: the most likely one, or one drawn, the same in any company.

A request has a seed and a generator of its own. For each token one number g is drawn for every entry of the vocabulary,
from Gumbel's distribution, and the token is the one with the largest log p / T + g: a draw from the softmax. In other
company the logits differ in their last bits. That changes a draw only where two candidates are as close as that; sums
of probabilities, sorted, change with every two tokens in the tail that change places.

Source: Maddison, Tarlow and Minka (2014), "A* Sampling", section 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.checks import check_number, check_whole


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: of the softmax; 0 takes the most likely token.
        top_p: draw among the most likely tokens that together have this probability.
        top_k: draw among this many of the most likely tokens; 0 for all.
        seed: of the draws.

    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self):
        check_number(
            "temperature",
            self.temperature,
            at_least=0,
            usual="0 for the most likely token, 1 for the model's own",
        )
        check_number("top_p", self.top_p, at_least=0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must be above 0 and at most 1")
        check_whole("top_k", self.top_k, at_least=0, usual="0 for all tokens")
        check_whole("seed", self.seed, at_least=0)
        if self.seed >= 2**63:
            raise ValueError(f"seed={self.seed} must be below 2**63")

    def generator(self) -> torch.Generator:
        """A generator for the draws of one request."""
        return torch.Generator().manual_seed(self.seed)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, float]:
    """The next token, and its log-probability in the model (at temperature 1, among all tokens).

    Args:
        logits: (vocabulary,), finite.
        sampling: how.
        generator: of the request, on the CPU.
    """
    log_probs = logits.float().log_softmax(-1)
    if sampling.temperature == 0:
        token = int(log_probs.argmax())
        return token, float(log_probs[token])
    scaled = log_probs.double().cpu() / max(sampling.temperature, 1e-6)
    if sampling.top_k and sampling.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        probabilities, order = scaled.softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        scaled = scaled.index_fill(0, order[before >= sampling.top_p], -torch.inf)
    gumbel = -torch.empty_like(scaled).exponential_(generator=generator).log()
    token = int((scaled + gumbel).argmax())
    return token, float(log_probs[token])
