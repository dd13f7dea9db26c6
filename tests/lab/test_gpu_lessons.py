"""The cells of lessons that read what a GPU has shown: with records, and without."""

import functools
import json
from types import SimpleNamespace

import pytest

from labkit import lab
from labkit.lab import claims, gpu
from labkit.memory.formulas import plan
from labkit.memory.setup import METHODS
from labkit.paths import CHECKOUT
from tests.lab.gpu_records import write


def cells_of(number: str) -> dict[str, str]:
    """The code cells of a lesson, by their ids."""
    (path,) = CHECKOUT.glob(f"notebooks/{number}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


planned = functools.cache(plan)  # the lessons of this page ask the same of it


def run(number: str, capsys, monkeypatch, **given):
    """Run the cells of a lesson that read records; what they print, and their claims: (verdict, evidence) by number."""
    shown = []
    monkeypatch.setattr(claims, "display", lambda data, raw: shown.append(data[claims.MIME]))
    namespace = {"gpu": gpu, "lab": lab, "plan": planned, "METHODS": METHODS} | given
    for source in cells_of(number).values():
        if "gpu.recorded" in source or "on_gpu" in source or "gpu.settle" in source:
            exec(source, namespace)
    return " ".join(capsys.readouterr().out.split()), {
        data["claim"]: (data["verdict"], data["evidence"]) for data in shown
    }


@pytest.fixture
def records(tmp_path, monkeypatch):
    """The folder of records of a copy of the data that holds none."""
    for part in (CHECKOUT / "data").iterdir():
        if part.name != "results":
            (tmp_path / part.name).symlink_to(part)
    monkeypatch.setenv("LABKIT_DATA", str(tmp_path))
    return tmp_path / "results" / "gpu"


def step_on_gpu(factor=1.01, r=16, ck=True, length=512, model="llama-2-7b", method="qlora", gb=None):
    """(key, row) of the ledger: allocated is `factor` times what is planned, or `gb`."""
    settings = {"method": method, "r": r, "checkpointing": ck, "max_length": length, "batch_size": 1}
    allocated = round(factor * planned(model, **settings).peak if gb is None else gb * 1e9)
    row = {"model": model, **settings, "settings": settings, "simulated_bytes": allocated}
    row |= {"allocated_bytes": allocated, "reserved_bytes": round(1.1 * allocated)}
    return f"{method} {model} 1×{length}, r={r}, {ck}", row


NONE_YET = "no record of this on a GPU yet"


def test_lesson_01_shows_its_bill_beside_what_was_allocated(records, capsys, monkeypatch):
    assert run("01", capsys, monkeypatch)[0] == f"ledger: {gpu.NO_RECORD}"
    key, row = step_on_gpu()
    write(records, "ledger", {key: row})
    out, _ = run("01", capsys, monkeypatch)
    allocated = row["allocated_bytes"] / 1e9
    bill = allocated / 1.01
    assert f"{bill:.2f} GB {allocated:.2f} GB -1.0%" in out and "NVIDIA Imaginary 1" in out


def test_lesson_07_shows_the_kernel_beside_a_copy(records, capsys, monkeypatch):
    assert NONE_YET in run("07", capsys, monkeypatch)[0]
    row = dict(equal_bits=True, gb_per_s=3200.0, share_of_copy=0.8, peer_gb_per_s=None, over_peer=None)
    write(records, "kernels", {"device copy": {"gb_per_s": 4000.0}, "dequantize": row})
    out, _ = run("07", capsys, monkeypatch)
    assert "dequantize 4,000 GB/s 3,200 GB/s +25.0% 0.8 yes –" in out
    assert "no formula" not in out, "that the copy has no copy beside it is no problem"


STEP = {"model": "llama-2-7b", "tokens": 1024, "qlora_s": 0.3, "peer_s": None, "dequantize_share": 0.2}
STEP |= {"lora_operations": 67, "full_operations": 100}


def lesson_08(capsys, monkeypatch, model="smollm2-135m"):
    batch = SimpleNamespace(ids=SimpleNamespace(numel=lambda: 178))
    given = {"score": SimpleNamespace(exact_match=0.81), "profile": SimpleNamespace(model=model)}
    on_cpu = {
        "ratios": {"fp32 products": [1.4, 1.1]},
        "tokens_per_step": [32, 512],
        "step_times": {"rows": [{"seconds": [1.0]}]},
    }
    return run("08", capsys, monkeypatch, batches=[batch], **given, **on_cpu)


def test_lesson_08_shows_steps_and_the_fine_tune_beside_its_own(records, capsys, monkeypatch):
    out, found = lesson_08(capsys, monkeypatch)
    assert out.count(NONE_YET) == 2
    assert found["C61"][0] == "depends" and found["C61"][1].endswith("Not measured on a GPU yet.")
    tuned = {"exact_match": 0.9, "minutes": 1.5, "tokens_per_second": 9000.0, "peak_bytes": 10**9}
    rows = {
        "smollm2-135m, tickets": {"model": "smollm2-135m", **tuned},
        "tiny, tickets": {"model": "tiny", **tuned},
    }
    write(records, "finetune", rows)
    write(records, "steps", {"a": STEP | {"qlora_over_lora": 1.15}})
    out, found = lesson_08(capsys, monkeypatch)
    assert "1.25× 1.15× +8.7%" in out and "81% 90% -10.0%" in out
    assert (
        found["C61"][0] == "confirmed"
        and "a: QLoRA / LoRA 1.15× (1 / (1 − d) 1.25×, +8.7%)" in found["C61"][1]
    )
    write(
        records,
        "steps",
        {"a": STEP | {"qlora_over_lora": 1.5}, "b": STEP | {"qlora_over_lora": 1.02, "tokens": 9}},
    )
    assert lesson_08(capsys, monkeypatch)[1]["C61"][0] == "refuted"


def lesson_09(capsys, monkeypatch):
    medians = {None: (1.0, 0.1), 0.25: (1.3, 0.4)}
    ledger = {
        r: {"state": 1e8, "pageable": pageable, "weights, 4.127 bits": 3e9}
        for r, pageable in ((8, 0), (16, 1))
    }
    valve = {"died": 128, "valve_died": None, "valve_losses": [1.0], "with_room": [1.0]}
    return run("09", capsys, monkeypatch, medians=medians, ledger=ledger, state_bytes=10**7, **valve)


def test_lesson_09_shows_what_paging_costs_and_whether_the_valve_opened(records, capsys, monkeypatch):
    out, found = lesson_09(capsys, monkeypatch)
    assert NONE_YET in out and found["C10"][0] == "depends"
    assert found["C10"][1].endswith("The valve has not been opened on a GPU yet.")
    budget = {"bytes_moved": 10**10, "plain_s": 0.5, "copy_gb_per_s": 50.0, "ratio": 1.2, "bits_equal": True}
    valve = {"plain_died_at_length": 2048, "paged_reached_length": 8192, "losses_equal": True, "cap": "real"}
    peer = {"plain_died_at_length": 512, "paged_reached_length": 8192, "ratio": 1.1}
    for equal, verdict in ((True, "depends"), (False, "refuted")):
        write(
            records,
            "paging",
            {"budget 25 %": budget, "the valve": valve | {"losses_equal": equal}, "peer": peer},
        )
        out, found = lesson_09(capsys, monkeypatch)
        assert (
            "1.40× 1.20× +16.7%" in out
            and "the valve: paged 8,192 tokens (the plain run died at 2,048" in out
        )
        assert "peer" not in out + found["C10"][1], "the cap does not count what bitsandbytes pages"
        assert found["C10"][0] == verdict and "budget 25 %: measured 1.20×" in found["C10"][1]


def lesson_10(capsys, monkeypatch):
    given = {
        "relative": {"lora": 0.73},
        "big": {"lora": 67, "full": 100},
        "clock": {"lora": 0.81, "qlora": 0.93},
    }
    return run("10", capsys, monkeypatch, **given)


def test_lesson_10_says_that_nothing_was_measured_and_its_claims_rest_on_the_plan(
    records, capsys, monkeypatch
):
    out, found = lesson_10(capsys, monkeypatch)
    assert out.count(NONE_YET) == 2
    verdicts = {number: verdict for number, (verdict, _) in found.items()}
    assert verdicts == dict.fromkeys(("C16", "C38", "C39", "C63"), "depends") | {"C66": "refuted"}
    assert all(
        "Planned, not measured on a GPU yet." in found[number][1] for number in ("C16", "C38", "C39", "C63")
    )
    assert "Not measured on a GPU yet." in found["C66"][1]


def test_lesson_10_takes_a_record_as_evidence(records, capsys, monkeypatch):
    steps = [step_on_gpu(method=method) for method in METHODS]
    steps += [
        step_on_gpu(model="llama-3-8b", method="lora", r=32),
        step_on_gpu(model="llama-3-70b", factor=1.02),
    ]
    write(records, "ledger", dict(steps))
    write(records, "steps", {"a": STEP | {"lora_over_full": 0.7, "qlora_over_lora": 1.2}})
    out, found = lesson_10(capsys, monkeypatch)
    assert out.count("-1.0%") >= 4 and NONE_YET not in out
    assert found["C16"][0] == "depends" and "3.0 times less than LoRA" in found["C16"][1]
    for number in ("C16", "C38", "C39", "C63", "C66"):
        assert "Measured on a GPU, NVIDIA Imaginary 1 (2027-01-02, make gpu)" in found[number][1], number
    assert found["C66"][0] == "refuted" and "a: time 0.70× (operations 0.67×, -4.3%)" in found["C66"][1]
    assert "(planned" in found["C63"][1] and found["C63"][0] == "depends"


def test_the_verdicts_of_lesson_10_turn_if_a_gpu_shows_something_else(records, capsys, monkeypatch):
    steps = ((512, True), (512, False), (2048, False))
    for factor, verdict in ((1, "confirmed"), (2, "refuted")):
        said = {("llama-3-8b", m): gb for m, gb in zip(METHODS, (128, 22, 6.5))}
        said |= {("llama-3-70b", m): gb for m, gb in zip(METHODS, (1120, 185, 53))}
        rows = [
            step_on_gpu(model=model, method=method, length=length, ck=ck, r=32, gb=factor * gb)
            for (model, method), gb in said.items()
            for length, ck in steps
        ]
        rows += [
            step_on_gpu(method=m, gb=gb)
            for m, gb in (("qlora", 5), ("lora", 20 * factor), ("full", 90 * factor))
        ]
        rows += [step_on_gpu(model="llama-3-70b", length=512, ck=ck, gb=44 * factor) for ck in (True, False)]
        write(records, "ledger", dict(rows))
        slow = 1.2 if factor == 2 else 0.9
        write(records, "steps", {"a": STEP | {"lora_over_full": slow, "qlora_over_lora": 1.2}})
        found = {number: given[0] for number, given in lesson_10(capsys, monkeypatch)[1].items()}
        assert (found["C38"], found["C39"], found["C63"]) == (verdict,) * 3
        assert found["C16"] == "refuted", (
            "18 times less than full fine-tuning in mixed precision, 4 than LoRA"
        )
        assert found["C66"] == ("depends" if slow > 1 else "refuted")
