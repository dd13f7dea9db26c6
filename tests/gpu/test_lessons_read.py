"""What the sections measure has the names that the lessons read: a rehearsal, turned into a record of a GPU that is made up."""

import importlib
import json

import pytest
import torch
from gpu.record import publishable

from tests.gpu.test_schema import errors_of
from tests.lab.gpu_records import write
from tests.lab.test_gpu_lessons import lesson_08, lesson_09, lesson_10, records, run  # noqa: F401

TAKEN = {  # one row, or two, of each section
    "kernels": ("device copy", "dequantize 64×64"),
    "ledger": ("QLoRA small 1×64, checkpointing",),
    "steps": ("stand-in, 32 tokens",),
    "paging": ("the valve", "budget 50 %"),
    "finetune": ("tiny-llama, tickets",),
}


@pytest.mark.slow
def test_lessons_read_what_the_sections_measure(stage, records, capsys, monkeypatch):  # noqa: F811
    for name, keys in TAKEN.items():
        rows = {}
        for measurement in importlib.import_module(f"gpu.{name}").SECTION.measurements(stage):
            if measurement.key.startswith(keys):
                torch.manual_seed(stage.seed)
                rows[measurement.key] = publishable(measurement.run(stage))
        assert len(rows) == len(keys), name
        for row in rows.values():  # a model that `plan` knows, and a cap that is one
            row.update({"model": "tiny-llama"} if row.get("model") in ("small", "stand-in") else {})
            row.update({"cap": "real"} if "cap" in row else {})
        record = json.loads(write(records, name, rows).read_text())
        assert errors_of(record) == [], name
    capsys.readouterr()
    bill, _ = run("01", capsys, monkeypatch)
    kernels, _ = run("07", capsys, monkeypatch)
    steps, in_08 = lesson_08(capsys, monkeypatch, model="tiny-llama")
    paging, in_09 = lesson_09(capsys, monkeypatch)
    memory, in_10 = lesson_10(capsys, monkeypatch)
    for out, key in (
        (bill, TAKEN["ledger"][0]),
        (kernels, TAKEN["kernels"][1]),
        (steps, TAKEN["steps"][0]),
        (steps, TAKEN["finetune"][0]),
        (paging, TAKEN["paging"][1]),
        (paging, "the valve: paged"),
        (memory, TAKEN["ledger"][0]),
        (memory, TAKEN["steps"][0]),
    ):
        assert key in out and "no formula" not in out and "recorded on a GPU" in out
    for number, found in (("C61", in_08), ("C10", in_09), ("C66", in_10)):
        assert "Measured on a GPU, NVIDIA Imaginary 1" in found[number][1]
