"""The ring's collectives against gloo's, its counts against closed forms, and gloo's sockets against both."""

import pytest
import torch

from labkit.scale import ranks, sockets, traffic
from tests.scale import parts


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3])
def test_the_rings_collectives_give_what_gloos_do(number):
    for found in ranks.start(parts.ring_and_gloo, number, 7, counted=True):
        for op, (mine, theirs) in ((k, v) for k, v in found.items() if not k.startswith("objects")):
            torch.testing.assert_close(
                mine, theirs, msg=op, rtol=1e-6 if number > 2 else 0, atol=1e-6 if number > 2 else 0
            )
        assert found["objects mine"] == found["objects theirs"] == [{"rank": i} for i in range(number)]


@pytest.mark.skipif(not sockets.is_readable(), reason="the system does not say what its sockets send")
@pytest.mark.parametrize("number", [2, 3])
def test_gloos_own_sockets_carry_what_the_formula_says(number):
    n = 300_000
    found = ranks.start(parts.socket_bytes, number, n)
    assert len({one["first"] for one in found}) == 1
    rounds = zip(*(one["sent"] for one in found))
    wrapped = min(map(sum, rounds)) - traffic.all_reduce(4 * n, number)  # what is sent again counts again
    assert 0 <= wrapped < 100 * sockets.HEADER * number  # headers; a tenth of a per cent


def test_formulas_of_a_step():
    """Of Patarasuk & Yuan 2009, section 3, and of ZeRO, section 7: a ring moves 2 (N - 1) / N of the tensor per rank."""
    adapters = [torch.empty(1_221_120, dtype=torch.float32, device="meta")] * 4  # SmolLM2-135M at rank 16
    assert traffic.ddp_step(adapters, 2) / 2 == 4 * 4 * 1_221_120
    assert traffic.padded((5, 3), 4, 2) == 72
    group = traffic.Group("block", (((4, 4), 1, False), ((2, 2), 4, True)))
    assert traffic.fsdp_step([group], 2) == {"all_gather": 2 * (16 + 16), "reduce_scatter": 16}
    sixteen, four = (traffic.tokens_to_hide_gathering(bits, 2, "pcie 4.0 x16", 1e14) for bits in (16, 4.127))
    assert sixteen / four == pytest.approx(3.88, abs=0.01)  # QLoRA, section 3: 4.127 bits per weight
    host = traffic.tokens_to_hide_offload(4.127, 2, "pcie 4.0 x16", 1e14)
    assert host == pytest.approx(
        four
    )  # two ranks: half a model from the host twice, or from the neighbour twice
    assert traffic.tokens_to_hide_offload(4.127, 8, "pcie 4.0 x16", 1e14) == pytest.approx(host / 4)
    with pytest.raises(ValueError, match="choose one of"):
        traffic.seconds(1, "pigeon")
