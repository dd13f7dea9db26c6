"""A day with a GPU: every row is kept, whatever happens to a measurement, to its process, or to the disk."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from gpu import day, machine, running
from gpu.measurement import Measurement, Section, Skipped, Stage, laps, spread
from gpu.record import Record
from gpu.tables import in_words

from tests.gpu.conftest import SCRIPTS

SCRIPT = SCRIPTS / "gpu_day.py"
LATER = 10**12  # there is time enough


def section_of(*measurements, conclude=lambda rows: [f"{len(rows)} rows"]) -> Section:
    return Section("kernels", "A section", lambda stage: list(measurements), {"n": "n"}, conclude)


def take(section, stage, folder, until=LATER, **options):
    """Run a section, and read its record."""
    record = Record(section, stage, folder)
    running.run(section, stage, record, until, **options)
    return json.loads((folder / f"{section.name}.json").read_text())


def outcomes(record) -> dict[str, str]:
    return {row["key"]: row["outcome"] for row in record["rows"]}


def run_out_of_memory(stage):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore text")


def fail(stage):
    raise ValueError("a shape is wrong")


def skip(stage):
    raise Skipped("it does not apply here")


def test_whatever_happens_to_a_measurement_the_next_is_taken(stage, tmp_path, capfd):
    section = section_of(
        Measurement("a", run_out_of_memory),
        Measurement("b", fail),
        Measurement("c", skip),
        Measurement("d", lambda stage: {"n": 1}),
    )
    record = take(section, stage, tmp_path)
    expected = {"a": "out of memory", "b": "failed", "c": "skipped", "d": "measured"}
    assert outcomes(record) == expected
    reasons = [row.get("reason", "") for row in record["rows"]]
    assert reasons[0] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert reasons[1:3] == ["ValueError: a shape is wrong", "it does not apply here"]
    assert record["rows"][3]["numbers"] == {"n": 1} and record["conclusions"] == ["1 rows"]
    assert not record["complete"], "a measurement that failed is left to do"
    assert "a shape is wrong" in capfd.readouterr().err, "with the place where it failed"


def test_a_real_lack_of_memory_is_recorded_as_one(stage, tmp_path):
    def too_large(stage):
        return {"n": torch.empty(2**62, dtype=torch.uint8).numel()}

    assert outcomes(take(section_of(Measurement("a", too_large)), stage, tmp_path)) == {"a": "out of memory"}


def test_a_further_run_takes_only_what_is_not_measured(stage, tmp_path):
    taken = []

    def note(name, result):
        def run(stage):
            taken.append(name)
            return result(stage)

        return Measurement(name, run)

    def number(stage):
        return {"n": 1}

    section = section_of(note("a", number), note("b", run_out_of_memory), note("c", fail), note("d", skip))
    take(section, stage, tmp_path)
    record = take(section, stage, tmp_path)
    assert taken == ["a", "b", "c", "d", "c", "d"]
    assert outcomes(record) == {"a": "measured", "b": "out of memory", "c": "failed", "d": "skipped"}


def test_what_another_machine_or_version_measured_is_not_taken_over(stage, tmp_path, monkeypatch):
    section = section_of(Measurement("a", lambda stage: {"n": 1}))
    take(section, stage, tmp_path)
    assert Record(section, stage, tmp_path).is_done("a")
    for name, other in (
        ("hardware", {"device": "another"}),
        ("versions", {"torch": "9.9"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"gpu.record.{name}", lambda *_, other=other: other)
            assert not Record(section, stage, tmp_path).is_done("a")
    for damaged in ("", "[]", '{"rows": 1', "null"):
        (tmp_path / "kernels.json").write_text(damaged)
        assert not Record(section, stage, tmp_path).is_done("a")


def test_when_the_time_is_up_nothing_more_is_begun_and_the_next_run_goes_on(tmp_path):
    on_a_card = Stage(torch.device("cpu"), torch.float32, False, tmp_path)
    short = Measurement("short", lambda stage: {"n": 1}, seconds=1)
    long = Measurement("long", lambda stage: {"n": 2}, seconds=1000)
    record = take(section_of(long, short), on_a_card, tmp_path, until=time.time() + 100)
    assert outcomes(record) == {"long": "not reached", "short": "measured"} and not record["complete"]
    record = take(section_of(long, short), on_a_card, tmp_path)
    assert outcomes(record) == {"short": "measured", "long": "measured"} and record["complete"]


def test_a_device_that_is_too_small_skips_with_the_figure_that_it_would_need(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "free_bytes", lambda device: 15_000_000_000)
    section = section_of(Measurement("a", lambda stage: {}, needs_bytes=40_000_000_000))
    (row,) = take(section, stage, tmp_path)["rows"]
    assert row["outcome"] == "skipped"
    assert row["reason"] == "it needs 40.8 GB of the device's memory, of which 15.0 GB are free"


def test_without_a_package_a_measurement_is_skipped_and_names_it(stage, tmp_path):
    needs = Measurement("a", lambda stage: {}, packages=("json", "no_such_package", "nor_this"))
    (row,) = take(section_of(needs), stage, tmp_path)["rows"]
    assert (row["outcome"], row["reason"]) == ("skipped", "no_such_package and nor_this are not installed")


def test_an_interrupt_is_passed_on_and_the_rows_before_it_are_kept(stage, tmp_path):
    def stop(stage):
        raise KeyboardInterrupt

    section = section_of(
        Measurement("a", lambda stage: {"n": 1}), Measurement("b", stop), Measurement("c", fail)
    )
    with pytest.raises(KeyboardInterrupt):
        take(section, stage, tmp_path)
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert outcomes(record) == {"a": "measured", "b": "not reached"}


def test_infinite_numbers_become_null_and_a_conclusion_that_fails_costs_no_row(stage, tmp_path):
    odd = Measurement("a", lambda stage: {"n": float("nan"), "more": [float("inf"), {"x": 1}]})
    record = take(section_of(odd, conclude=lambda rows: [rows["b"]]), stage, tmp_path)
    assert record["rows"][0]["numbers"] == {"n": None, "more": [None, {"x": 1}]}
    assert record["conclusions"] == ["no conclusion: KeyError: 'b'"]


DYING = """
import json, os, sys
sys.path[:0] = [{scripts!r}, {root!r}]
from pathlib import Path
import torch
from gpu import running
from gpu.measurement import Measurement, Section, Stage
from gpu.record import Record

def die(stage):
    os.abort()

section = Section("kernels", "A section", lambda stage: [
    Measurement("a", lambda stage: {{"n": 1}}), Measurement("b", die), Measurement("c", lambda stage: {{"n": 3}}),
], {{"n": "n"}})
folder = Path(sys.argv[sys.argv.index("--results") + 1])
stage = Stage(torch.device("cpu"), torch.float32, True, folder)
running.run(section, stage, Record(section, stage, folder), 10**12, "--after-death" in sys.argv)
"""


def test_a_process_that_dies_costs_the_measurement_that_killed_it_and_nothing_else(tmp_path, capfd):
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(scripts=str(SCRIPTS), root=str(SCRIPTS.parent)))
    arguments = day_arguments("--results", str(tmp_path))
    assert day.run_apart(arguments, str(script), "kernels", time.time() + 300) == 0
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert outcomes(record) == {"a": "measured", "b": "failed", "c": "measured"}
    assert record["rows"][1]["reason"] == "the process ended without a word" and not record["complete"]
    assert "goes on with the next measurement" in capfd.readouterr().out


def test_a_section_that_does_not_end_is_stopped(capfd):
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    assert day.wait_for(process, time.time()) == 1 and process.poll() == -signal.SIGKILL
    assert "does not end" in capfd.readouterr().out


def day_arguments(*given: str):
    import gpu_day

    return gpu_day.parse(["--cpu", *given])


def run_script(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--only", "kernel"), "invalid choice: 'kernel'"),
        (("--minutes", "0"), "0 is not a number of minutes above 0"),
        (("--minutes", "nan"), "nan is not a number of minutes above 0"),
    ],
)
def test_what_the_command_line_does_not_know_is_said(given, says):
    result = run_script(*given)
    assert result.returncode == 2 and says in result.stderr


def test_without_a_card_it_says_so_and_a_rehearsal_leaves_the_records_of_cards_alone(tmp_path):
    result = run_script("--only", "serving", "--results", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "No GPU is used: a rehearsal in small shapes on the CPU" in result.stdout
    record = json.loads((tmp_path / "cpu" / "serving.json").read_text())
    assert record["rehearsal"] and record["hardware"]["device"] == "CPU"
    assert os.uname().nodename not in json.dumps(record)


def test_a_folder_that_cannot_be_written_is_one_sentence_and_not_a_traceback(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = run_script("--only", "serving", "--results", str(tmp_path / "file"))
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and str(tmp_path / "file") in line


def test_a_stop_from_outside_ends_the_section_too_and_says_how_to_go_on(tmp_path):
    command = [sys.executable, str(SCRIPT), "--cpu", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("== "):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on with what is left" in errors
    assert "Traceback" not in errors


@pytest.fixture
def cards(monkeypatch):
    """Makes PyTorch report GPUs that are not there."""

    class Card:
        name, total_memory, multi_processor_count = "NVIDIA T4", 15 * 2**30, 40

    def report(capability: tuple[int, int], count: int = 1):
        Card.major, Card.minor = capability
        for name, value in (
            ("is_available", lambda: True),
            ("set_device", lambda device: None),
            ("get_device_capability", lambda *_: capability),
            ("get_device_properties", lambda *_: Card),
            ("device_count", lambda: count),
        ):
            monkeypatch.setattr(torch.cuda, name, value)

    return report


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_dtype_follows_the_card(capability, dtype, cards, tmp_path):
    cards(capability)
    options = day_arguments()
    options.cpu = False
    stage = day.stage_of(options, tmp_path)
    assert stage.dtype == dtype and stage.cuda and not stage.rehearsal
    assert any("no bf16" in line for line in day.describe(stage)) == (dtype == torch.float16)


def test_of_two_cards_it_takes_the_first_and_says_so(cards, tmp_path):
    cards((9, 0), count=2)
    options = day_arguments()
    options.cpu = False
    lines = day.describe(day.stage_of(options, tmp_path))
    assert "2 GPUs: the first is used; CUDA_VISIBLE_DEVICES=1 chooses another" in lines


def test_a_card_whose_driver_nobody_can_tell_is_described_all_the_same(cards, tmp_path, monkeypatch):
    cards((9, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.hardware(torch.device("cuda", 0))
    assert found["driver"] is None and found["device"] == "NVIDIA T4"
    assert "NVIDIA T4, 15 GiB" in day.describe(
        Stage(torch.device("cuda", 0), torch.bfloat16, False, tmp_path)
    )


def test_ways_take_turns_in_an_order_that_changes(stage):
    order = []
    seconds = laps({name: lambda name=name: order.append(name) for name in "abc"}, stage, rounds=20)
    rounds = ["".join(order[i : i + 3]) for i in range(3, 63, 3)]
    assert order[:3] == list("abc") and len(set(rounds)) > 3
    assert all(sorted(lap) == list("abc") for lap in rounds)
    assert spread(seconds["a"])["laps"] == 20 and spread([3.0, 1.0, 2.0])["median_s"] == 2.0


@pytest.mark.parametrize(
    ("value", "words"), [(None, "–"), (True, "yes"), (12345, "12,345"), (0.123456, "0.1235"), ("a", "a")]
)
def test_a_number_is_shown_with_as_many_digits_as_it_has(value, words):
    assert in_words(value) == words
