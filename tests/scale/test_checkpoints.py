"""A checkpoint of two ranks is read by one, and by three, with the same bits; a rank that dies leaves the old one."""

import json

import pytest
import torch

from labkit.scale import checkpoints, ranks
from tests.scale import parts


@pytest.mark.slow
def test_two_ranks_to_one_to_three_with_the_same_bits_and_nothing_half_written(tmp_path):
    two, one, three = (tmp_path / name for name in ("two", "one", "three"))
    written = ranks.start(parts.go_on, 2, None, two, 2)[0]["written"]
    assert any(name.endswith("exp_avg_sq") and t.abs().sum() > 0 for name, t in written.items())
    by_one = ranks.start(parts.go_on, 1, two, one, 0)[0]
    by_three = ranks.start(parts.go_on, 3, one, three, 0)
    for found in (by_one, *by_three):
        assert found["step"] == 2 and found["counts"] == {2.0}
        for held in (found["loaded"], found["written"]):
            assert held.keys() == written.keys()
            assert all(torch.equal(held[name], tensor) for name, tensor in written.items())
    assert len(list(three.glob("*.safetensors"))) == 3 and not list(tmp_path.rglob("*.distcp"))

    before = {file.name: file.read_bytes() for file in three.iterdir()}
    with pytest.raises(ranks.RankFailed, match="^rank 1 of 2 was killed by SIGKILL"):
        ranks.start(parts.die_while_saving, 2, three, patience=20)
    assert {file.name: file.read_bytes() for file in three.iterdir()} == before
    checkpoints.read_run(three)


def test_a_checkpoint_that_lacks_a_ranks_file_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    run = {"step": 2, "ranks": 2, "files": {"a.safetensors": 4, "b.safetensors": 4}, "tensors": {}}
    with pytest.raises(checkpoints.DamagedCheckpoint, match=r"has no run.json: it is no checkpoint"):
        checkpoints.read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(checkpoints.DamagedCheckpoint, match=r"b.safetensors is missing; copy"):
        checkpoints.read_run(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"12")
    with pytest.raises(checkpoints.DamagedCheckpoint, match=r"is 2 bytes long instead of 4"):
        checkpoints.read_run(tmp_path)
    (tmp_path / "run.json").write_text('{"step": 2')
    with pytest.raises(checkpoints.DamagedCheckpoint, match="run.json is damaged"):
        checkpoints.read_run(tmp_path)
