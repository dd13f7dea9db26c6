"""Section kernels: what a row holds, which bits it compares, the tests in a child process, and what follows from the rows."""

import json
import subprocess
from importlib.util import find_spec

import pytest
import torch
from gpu import kernel_rates, kernel_rows, kernel_tests, kernels
from gpu.kernel_rates import ends, number_of, reference_of, same
from gpu.kernels import SECTION, SHAPES, conclude, measurements
from gpu.measurement import Skipped, Stage

from labkit.quant.kernels import operations
from labkit.quant.tensor import quantize

FIELDS = {"equal_bits", "gb_per_s", "share_of_copy", "peer_gb_per_s", "over_peer", "median_s"}
ALIKE = ("dequantize", "quantize", "multiply")


def rows_of(stage, keys):
    return {m.key: m.run(stage) for m in measurements(stage) if m.key.startswith(keys)}


def test_every_kernel_has_a_row_with_what_lessons_read_and_the_reference_s_bits(stage):
    rows = rows_of(stage, ALIKE)
    kinds = {"dequantize", "quantize", "quantize scales of", "multiply, 1 row,", "multiply, 8 rows,"}
    assert all(any(key.startswith(kind) for key in rows) for kind in kinds)
    for key, row in rows.items():
        assert row.keys() >= FIELDS, key
        assert row["equal_bits"] is True and row["gb_per_s"] > 0 and row["peer_gb_per_s"] is None, key
    json.dumps(rows, allow_nan=False)


def test_one_wrong_bit_anywhere_in_what_is_compared_is_seen(stage, monkeypatch):
    right = operations.dequantize_4bit

    def wrong(weight, n, dtype, out):
        values = right(weight, n, dtype, out)
        values.view(-1).view(torch.int32)[-1] ^= 1
        return values

    monkeypatch.setattr(operations, "dequantize_4bit", wrong)
    row = kernel_rows.dequantize_row(stage, (64, 64), torch.float32, nested=True)
    assert row["equal_bits"] is False


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_reference_of_a_part_is_that_part_of_the_dequantized_weight(double_quant, monkeypatch):
    monkeypatch.setattr(kernel_rates, "CHECKED", 1 << 15)
    q = quantize(torch.randn(301, 257), double_quant=double_quant)
    parts = ends(301 * 257)
    assert parts == [slice(0, 32768), slice(65536, 77357)] and ends(99) == [slice(0, 99)]
    for part in parts:
        assert same(reference_of(q, part), q.dequantize().view(-1)[part])


def test_calls_take_turns_on_more_bytes_than_the_cache_holds(tmp_path):
    card = Stage(torch.device("cuda"), torch.bfloat16, False, tmp_path)
    for moved in (1 << 20, 8 << 20, 147 << 20, 1 << 30):
        assert number_of(card, moved) * moved > 120 << 20
    assert number_of(card, 1 << 30) == 1


def test_on_a_card_published_shapes_come_in_the_order_of_what_they_decide(tmp_path):
    card = Stage(torch.device("cuda"), torch.bfloat16, False, tmp_path)
    found = measurements(card)
    keys = [m.key for m in found]
    assert len(set(keys)) == len(keys)
    assert keys[:2] == ["tests marked gpu", "device copy"]
    assert all(any(f"{a}×{b}" in key for key in keys) for a, b in SHAPES)
    assert keys[7].startswith("rows up to which nothing is dequantized")
    assert keys[8].startswith("size of a program that dequantizes")
    assert not any("interpreter" in key for key in keys)
    assert sum(m.seconds for m in found) < 110
    assert all(m.needs_bytes > 0 for m in found if m.key.startswith(ALIKE))
    old = measurements(Stage(torch.device("cuda"), torch.float16, False, tmp_path))
    assert "dequantize 4096×14336, float16, double quantization" in [m.key for m in old]


def test_rows_are_left_out_with_the_reason_where_there_are_no_kernels(stage, monkeypatch):
    monkeypatch.setattr(kernels, "has_kernels", lambda tensor: False)
    for measurement in measurements(stage):
        if measurement.key.startswith(ALIKE):
            with pytest.raises(Skipped, match="there are no kernels for this device"):
                measurement.run(stage)


def test_only_files_with_the_marker_are_given_to_pytest():
    files = kernel_tests.gpu_test_files()
    assert "tests/quant/kernels/test_triton_on_gpu.py" in files
    assert "tests/quant/kernels/test_cpu.py" not in files


@pytest.mark.parametrize(
    "last, passed, failed, skipped",
    [
        ("19 skipped, 3 deselected in 2.31s", 0, 0, 19),
        ("1 failed, 40 passed, 2 skipped in 30.10s", 40, 1, 2),
        ("2 failed, 5 passed, 1 skipped, 7 deselected, 1 error in 3.00s", 5, 3, 1),
    ],
)
def test_what_pytest_counts_is_read_from_its_last_line(last, passed, failed, skipped):
    numbers = kernel_tests.counts(f"FAILED tests/quant/test_a.py::test_b[x] - assert 1 == 2\n{last}\n")
    assert (numbers["passed"], numbers["failed"], numbers["skipped"]) == (passed, failed, skipped)
    assert numbers["failures"] == ["test_a.py::test_b[x]"]


def test_gpu_tests_run_in_a_process_of_their_own_and_count_what_they_do(stage, monkeypatch):
    monkeypatch.setattr(kernel_tests, "gpu_test_files", lambda: ["tests/quant/kernels/test_triton_on_gpu.py"])
    numbers = kernel_tests.run_gpu_tests(stage)
    assert numbers["failed"] == 0 and numbers["passed"] + numbers["skipped"] > 10
    if not torch.cuda.is_available():
        assert numbers["passed"] == 0


def test_a_pytest_that_runs_nothing_is_a_failure(stage, monkeypatch):
    done = subprocess.CompletedProcess([], 4, "no tests ran in 0.01s\n", "ERROR: file not found")
    monkeypatch.setattr(kernel_tests.subprocess, "run", lambda *arguments, **rest: done)
    with pytest.raises(RuntimeError, match="(?s)pytest ended with 4: .*file not found"):
        kernel_tests.run_gpu_tests(stage)


def test_a_rehearsal_runs_the_gpu_s_kernels_in_the_interpreter(stage, monkeypatch):
    def run(command, env, **rest):
        assert env["TRITON_INTERPRET"] == "1" and find_spec(command[2]) is not None
        return subprocess.CompletedProcess(command, len(said) > 1, said[0], "\n".join(said[1:]))

    said = ["equal bits\n"]
    monkeypatch.setattr(kernel_tests.subprocess, "run", run)
    assert kernel_tests.interpret(stage) == {"equal_bits": True}
    said = ["", "Traceback", "AssertionError: a bit"]
    with pytest.raises(RuntimeError, match="AssertionError: a bit"):
        kernel_tests.interpret(stage)


def test_conclusions_say_in_numbers_which_goals_are_met():
    row = {"equal_bits": True, "share_of_copy": 0.85, "over_peer": None}
    rows = {
        "tests marked gpu": {"passed": 40, "failed": 1, "skipped": 2},
        "dequantize 4096×4096, bfloat16": row | {"over_peer": 1.2},
        "dequantize 64×64, bfloat16": row | {"share_of_copy": 0.7},
        "quantize 64×64, bfloat16": row | {"equal_bits": False, "over_peer": 0.9},
        "quantize scales of 64×64": row | {"share_of_copy": 0.1},
        "rows up to which nothing is dequantized": {"limit": 6, "limit_now": 4},
        "size of a program that dequantizes": {
            "best": "512 words, 4 warps",
            "now": "1024 words, 8 warps",
        },
    }
    assert conclude(rows) == [
        "Of the tests marked gpu, 40 passed, 1 failed and 2 were skipped.",
        "Bits equal to the reference's, in 4 measurements: not in quantize 64×64, bfloat16.",
        "dequantize: 0.70 to 0.85 of the bytes per second of a copy; goal 0.8, not met.",
        "dequantize: 1.20 to 1.20 times bitsandbytes; goal 1, met.",
        "quantize: 0.85 to 0.85 of the bytes per second of a copy; goal 0.8, met.",
        "quantize: 0.90 to 0.90 times bitsandbytes; goal 1, not met.",
        "Up to 6 rows it is no slower to multiply without a dequantized weight; FEW_ROWS_ON_GPU is 4.",
        "Programs of 512 words, 4 warps dequantize fastest; 1024 words, 8 warps are used.",
    ]
    assert conclude({"device copy": {"gb_per_s": 4000.0}}) == []


def test_the_table_shows_what_rows_have(stage):
    assert SECTION.name == "kernels" and FIELDS - {"peer_gb_per_s"} <= SECTION.columns.keys()
    assert kernels.device_copy(stage)["gb_per_s"] > 0
