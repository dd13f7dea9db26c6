"""Which token comes next: the most likely, or one drawn as often as the model says."""

from collections import Counter

import pytest
import torch

from labkit.serving.sampling import Sampling, choose

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])


def draws(sampling, count=4000):
    generator = sampling.generator()
    return Counter(choose(LOGITS, sampling, generator)[0] for _ in range(count))


def test_temperature_zero_takes_the_most_likely_token_with_its_log_probability():
    token, log_prob = choose(LOGITS, Sampling(), Sampling().generator())
    assert token == 1 and log_prob == pytest.approx(LOGITS.log_softmax(-1)[1].item())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    found, wanted = draws(Sampling(temperature, seed=3)), (LOGITS / temperature).softmax(-1)
    for token in range(5):
        error = 4 * (wanted[token] * (1 - wanted[token]) / 4000) ** 0.5
        assert abs(found[token] / 4000 - wanted[token]) < error


def test_top_k_and_top_p_leave_only_the_most_likely():
    assert set(draws(Sampling(1.0, top_k=2), 300)) == {1, 3}
    # 0.56, 0.21, 0.13, …: the first two have 0.77
    assert set(draws(Sampling(1.0, top_p=0.7), 300)) == {1, 3}
    assert set(draws(Sampling(1.0, top_p=0.8), 300)) == {1, 3, 0}
    assert set(draws(Sampling(1.0, top_p=1e-9), 300)) == {1}


def test_the_same_seed_draws_the_same_and_another_seed_others():
    def tokens(seed):
        sampling = Sampling(1.0, seed=seed)
        generator = sampling.generator()
        return [choose(LOGITS, sampling, generator)[0] for _ in range(50)]

    assert tokens(1) == tokens(1) != tokens(2)


def test_tokens_that_are_ruled_out_are_never_drawn():
    logits = LOGITS.clone()
    logits[1] = -torch.inf
    sampling = Sampling(1.0)
    generator = sampling.generator()
    assert all(choose(logits, sampling, generator)[0] != 1 for _ in range(500))


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_p=0), dict(top_p=1.5), dict(top_k=-1),
     dict(seed=-1), dict(seed=2**63), dict(temperature=True)],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)
