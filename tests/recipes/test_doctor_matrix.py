"""The doctor's matrix: what it plans, and that a line says what the doctor says."""

from labkit.doctor.zoo import SICK
from labkit.sweeps.records import append
from recipes import doctor_matrix


def test_every_specimen_and_three_dozen_healthy_runs_are_planned_once_on_fresh_seeds():
    plan = doctor_matrix.plan()
    sound = [name for name, _ in plan if name not in SICK]
    assert len(set(plan)) == len(plan) and {name for name, _ in plan} >= set(SICK)
    assert len(sound) == 36 and not {seed for _, seed in plan} & {0, 1, 10, 11, 12}


def test_a_line_has_the_diagnosis_and_is_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_matrix, "STEPS", 2)
    line = doctor_matrix.measure("adapter frozen", 10)
    assert line["expected"] == line["first"] == "training"
    assert len(line["losses"]) == 2 and line["asked"] == 10 >= line["right"] and len(line["answers"]) == 3
    append(tmp_path / "lines.jsonl", line)
    assert doctor_matrix.recorded(tmp_path / "lines.jsonl") == {("adapter frozen", 10): line}
