"""A model whose layers are cut among ranks computes what the whole one does, and its adapters cost no activations."""

import pytest
import torch

from labkit.scale import ranks, tensor_parallel, traffic
from labkit.training.loss import supervised_loss
from tests.scale import parts


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 4])
def test_both_layouts_equal_one_process_and_send_what_the_formula_says(bits):
    model, batch = parts.tiny_qlora(bits, blocksize=32), parts.batches()[0]
    loss = supervised_loss(model, batch) / batch.n_supervised
    loss.backward()
    results = ranks.start(parts.train_split, 2, bits, counted=True)
    for found in results:
        assert found["loss"] == pytest.approx(loss.item(), abs=1e-6)
        for name, grad in found["grads"].items():
            layer, side = name.rpartition(".")[::2]
            theirs = getattr(model.get_submodule(layer), side).grad
            if (layer in found["columns"]) == (side == "lora_B"):
                theirs = theirs.chunk(2, dim=0 if side == "lora_B" else 1)[found["place"][0]]
            torch.testing.assert_close(grad, theirs, rtol=1e-4, atol=1e-6)
    first, config = results[0], model.config
    expected = traffic.tensor_parallel_step(
        config.num_hidden_layers, first["tokens"], config.hidden_size, 4, first["whole"], 2
    )
    assert {kind: sum(found[kind] for found in results) for kind in expected} == expected


def test_what_cannot_be_cut_is_refused():
    weight = parts.tiny_qlora().model.layers[0].mlp.down_proj.base.weight  # 704 columns in blocks of 64
    with pytest.raises(ValueError, match="columns 0 to 352 of 704 cut through a block of 64 weights"):
        tensor_parallel.cut(weight, slice(None), slice(0, 352))
    left = tensor_parallel.cut(weight, slice(64, 128), slice(0, 128))
    assert torch.equal(left.dequantize(), weight.dequantize()[64:128, :128])
    layer = parts.tiny_qlora().model.layers[0].mlp.down_proj
    with pytest.raises(ValueError, match="256 outputs cannot be divided among 3 ranks"):
        tensor_parallel.check_divisible(layer, 3, outputs=True)
