"""Pages: where the tensors of a state lie, and what never moves."""

import pytest
import torch

from labkit.optim.page import Page, Place, lay_out


def test_tensors_lie_one_after_the_other_from_multiples_of_64_bytes_on():
    state = {
        "step": torch.zeros(()),
        "a": torch.zeros(5, 3),
        "b": torch.zeros(100, dtype=torch.uint8),
        "lr": 0.1,
    }
    layout = lay_out(state, "w", "cpu", min_elements=0)
    places = {key: value.at for key, value in layout.entries.items() if isinstance(value, Place)}
    assert places == {"step": 0, "a": 64, "b": 128}
    assert layout.entries["lr"] == 0.1 and (layout.nbytes, layout.exempt) == (4096, 0)


def test_small_tensors_and_those_of_another_device_are_exempt():
    state = {"step": torch.zeros(()), "a": torch.zeros(100)}
    layout = lay_out(state, "w", "cpu", min_elements=10)
    assert layout.entries["step"] is state["step"] and isinstance(layout.entries["a"], Place)
    assert (layout.nbytes, layout.exempt) == (4096, 4)
    on_gpu = lay_out(state, "w", "cuda", min_elements=0)
    assert on_gpu.entries == state and (on_gpu.nbytes, on_gpu.exempt) == (0, 404)


def test_a_page_opens_as_views_of_its_frame_with_the_strides_that_it_had():
    state = {"a": torch.arange(12.0).view(3, 4).t(), "b": torch.ones(7, dtype=torch.bfloat16), "n": 3}
    page = Page("key", "w", state=dict(state))
    page.layout, page.nbytes, page.exempt = lay_out(page.state, "w", "cpu", min_elements=0)
    assert not page.is_framed(), "in memory of its own"
    page.open(torch.zeros(page.nbytes, dtype=torch.uint8))
    assert page.is_framed() and page.state["a"].stride() == (1, 4) and page.state["n"] == 3
    page.state["a"].copy_(state["a"])
    assert torch.equal(page.frame[:48].view(torch.float32), torch.arange(12.0))
    page.state["b"] = torch.ones(7, dtype=torch.bfloat16)
    assert not page.is_framed(), "replaced"


def test_a_tensor_with_gaps_is_made_contiguous():
    state = {"a": torch.zeros(4, 6)[:, ::2]}
    lay_out(state, "w", "cpu", min_elements=0)
    assert state["a"].is_contiguous() and state["a"].shape == (4, 3)


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, torch.zeros(3).to_sparse(), object()])
def test_what_cannot_be_paged_is_named(value):
    with pytest.raises(TypeError, match=r"state\['history'\] of parameter w is a .* can be paged"):
        lay_out({"history": value}, "w", "cpu", min_elements=0)
