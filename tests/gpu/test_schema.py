"""Records are as `data/results/gpu/schema.json` says, and name no machine, person or path."""

import copy
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import running
from gpu.measurement import Measurement, Section, Skipped, Stage
from gpu.record import Record, without_paths

from tests.gpu.conftest import SCRIPTS

jsonschema = pytest.importorskip("jsonschema")

FOLDER = SCRIPTS.parent / "data" / "results" / "gpu"
SCHEMA = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
COMMITTED = sorted(FOLDER.glob("*/*.json"))


def refuse(constant: str):
    raise ValueError(f"{constant} is not JSON")


def read(path: Path) -> dict:
    """A record, of which `NaN` and `Infinity` are no part."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def errors_of(record: dict) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in VALIDATOR.iter_errors(record)]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_committed_records_are_of_gpus_and_as_the_schema_says():
    others = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert others - {path.relative_to(FOLDER).as_posix() for path in COMMITTED} == {
        "README.md",
        "schema.json",
    }
    for path in COMMITTED:
        record = read(path)
        assert errors_of(record) == [], path
        assert not record["rehearsal"] and record["section"] == path.stem, path
        keys = [row["key"] for row in record["rows"]]
        assert len(set(keys)) == len(keys), f"{path}: a key stands for one measurement"


NUMBERS = {
    "kernels": {
        "tests marked gpu": dict(passed=40, failed=0, skipped=2),
        "device copy": dict(gb_per_s=4200.0),
        "dequantize 4096 × 4096, bf16": dict(
            equal_bits=True, gb_per_s=3900.0, share_of_copy=0.93, peer_gb_per_s=None, over_peer=None, median_s=1e-4
        ),
    },
    "ledger": {
        "QLoRA llama-2-7b 1×512, checkpointing": dict(
            model="llama-2-7b", method="qlora", batch_size=1, max_length=512, checkpointing=True, plan_bytes=100,
            simulated_bytes=101, allocated_bytes=102, reserved_bytes=120, plan_error=-0.02, simulation_error=-0.01,
            seconds_to_make=2.0,
        ),
    },
    "steps": {
        "llama-2-7b, 512 tokens": dict(
            model="llama-2-7b", tokens=512, full_s=None, lora_s=0.2, qlora_s=0.25, peer_s=None, lora_over_full=None,
            qlora_over_lora=1.25, dequantize_share=0.15,
        ),
    },
    "paging": {
        "budget 25 %": dict(budget_share=0.25, step_s=0.3, plain_s=0.2, ratio=1.5, bits_equal=True),
        "the valve": dict(
            cap_bytes=10**9, plain_died_at_length=1024, paged_reached_length=2048, losses_equal=True,
            budget_bytes=10**8, lengths=[512, 1024, 2048],
        ),
    },
    "finetune": {
        "tiny-llama, tickets": dict(
            model="tiny-llama", exact_match_before=0.0, exact_match=0.5, parse_rate=1.0, n_test=100, minutes=0.5,
            tokens_per_second=9000.0, dtype="bfloat16", peak_bytes=10**9,
        ),
    },
    "serving": {"cost curve": dict(adapters=16)},
}  # fmt: skip
OPTIONAL = {"parse_rate"}
CARD = {
    "device": "NVIDIA Imaginary 1",
    "memory_bytes": 150 * 10**9,
    "capability": "9.0",
    "multiprocessors": 132,
    "driver": "580.95.05",
    "processor": "Intel(R) Xeon(R) CPU @ 2.00GHz",
    "cpus": 16,
}


def skip(stage):
    raise Skipped("labkit does not serve adapters yet")


def fail(stage):
    raise FileNotFoundError(
        f"{Path.home() / 'models' / 'model.safetensors'} is not there, nor is {Path.home()}"
    )


def run_out_of_memory(stage):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1.2 GiB free.")


@pytest.fixture(scope="module", params=NUMBERS)
def written(request, tmp_path_factory):
    """A record of a section as the script writes it on a GPU that is made up, with every outcome."""
    name = request.param
    taken = [Measurement(key, lambda stage, row=row: row) for key, row in NUMBERS[name].items()]
    taken += [Measurement("a", skip), Measurement("b", fail), Measurement("c", run_out_of_memory)]
    taken += [Measurement("d", skip, seconds=1e13)]
    section = Section(name, "A section", lambda stage: taken, {}, lambda rows: [f"{len(rows)} rows"])
    folder = tmp_path_factory.mktemp("records")
    stage = Stage(torch.device("cpu"), torch.bfloat16, False, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpu.record.hardware", lambda device: CARD)
        running.run(section, stage, Record(section, stage, folder), 10**12)
    return read(folder / f"{name}.json")


@pytest.fixture
def record(written):
    return copy.deepcopy(written)


def test_what_the_script_writes_is_as_the_schema_says_with_every_outcome(record):
    assert errors_of(record) == []
    outcomes = {row["outcome"] for row in record["rows"]}
    assert outcomes == {"measured", "skipped", "failed", "out of memory", "not reached"}


def test_neither_the_machine_nor_a_person_nor_a_path_is_in_it(record):
    text = json.dumps(record, ensure_ascii=False)
    assert "model.safetensors is not there, nor is …" in text, "of a path the name of the file is left"
    assert str(Path.home()) not in text and f'"{socket.gethostname()}"' not in text


def broken(record):
    """(what is wrong, the record with it)."""

    def changed(change):
        other = copy.deepcopy(record)
        change(other)
        return other

    row = record["rows"][0]["numbers"]
    yield "no hardware", changed(lambda r: r.pop("hardware"))
    yield "hardware that is not named", changed(lambda r: r["hardware"].pop("device"))
    yield "a CPU, said to be measured on a GPU", changed(lambda r: r["hardware"].update(device="CPU"))
    yield "a GPU without its capability", changed(lambda r: r["hardware"].pop("capability"))
    yield "a name of the machine", changed(lambda r: r["hardware"].update(hostname="gpu-7"))
    yield "a name of the machine in a row", changed(lambda r: r["rows"][0]["numbers"].update(host="gpu-7"))
    yield "an address", changed(lambda r: r["hardware"].update(processor="10.0.12.7"))
    yield "a person", changed(lambda r: r["conclusions"].append("ask joe@gpu-7"))
    for path in (
        "/home/joe/labkit/x.py",
        "see /tmp for it",
        "C:\\Users\\joe",
        "'/srv/models/a'",
        "\\\\gpu-7\\share",
    ):
        yield path, changed(lambda r, path=path: r["rows"][0]["numbers"].update(model=path))
        yield path, changed(lambda r, path=path: r["rows"][-1].update(reason=path))
    yield "no version of torch", changed(lambda r: r["versions"].pop("torch"))
    yield "another schema", changed(lambda r: r.update(schema=2))
    yield "no such section", changed(lambda r: r.update(section="benchmarks"))
    yield "a date of its own kind", changed(lambda r: r.update(date="1/12/2026"))
    yield "more than the schema knows", changed(lambda r: r.update(note="hello"))
    yield "no such outcome", changed(lambda r: r["rows"][0].update(outcome="fine"))
    yield "measured, and nothing to show", changed(lambda r: r["rows"][0].update(numbers={}))
    yield "not measured, and no reason", changed(lambda r: r["rows"][-1].pop("reason"))
    yield "skipped, with numbers", changed(lambda r: r["rows"][-1].update(numbers=row))
    yield "seconds below zero", changed(lambda r: r["rows"][0].update(seconds=-1))
    yield "complete, or nearly", changed(lambda r: r.update(complete="nearly"))
    yield "rows by name", changed(lambda r: r.update(rows={"a": row}))
    if record["section"] != "serving":
        for name in row:
            if name not in OPTIONAL:
                yield f"no {name}", changed(lambda r, name=name: r["rows"][0]["numbers"].pop(name))
            for wrong in ([1], -1 if type(row[name]) in (int, float) and "error" not in name else {"a": 1}):
                yield (
                    f"{name} = {wrong}",
                    changed(lambda r, name=name, wrong=wrong: r["rows"][0]["numbers"].update({name: wrong})),
                )


def test_whatever_is_wrong_in_a_record_is_refused(record):
    accepted = [what for what, other in broken(record) if not errors_of(other)]
    assert accepted == [] and errors_of(record) == []


def test_a_record_with_a_number_that_json_does_not_have_is_refused(record, tmp_path):
    record["rows"][0]["numbers"]["share"] = math.nan
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="NaN is not JSON"):
        read(path)


def test_a_rehearsal_is_as_the_schema_says_and_is_none_of_a_gpu(tmp_path):
    command = [
        sys.executable,
        str(SCRIPTS / "gpu_day.py"),
        "--cpu",
        "--only",
        "serving",
        "--results",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (path,) = tmp_path.glob("*/serving.json")
    record = read(path)
    assert errors_of(record) == [] and record["rehearsal"]
    assert any("CPU" in error for error in errors_of(record | {"rehearsal": False}))


def test_of_a_path_the_name_of_the_file_is_left():
    for text, left in {
        "[Errno 2] No such file or directory: '/home/joe/models/a.gguf'": "[Errno 2] No such file or directory: 'a.gguf'",
        "cannot write /mnt/disk-1/joe": "cannot write …",
        "in /tmp, or /home/joe/": "in …, or …",
        "12 GB/s and/or ~/.cache, labkit/lab/gpu.py, 1/2": "12 GB/s and/or ~/.cache, labkit/lab/gpu.py, 1/2",
    }.items():
        assert without_paths(text) == left
