"""Every cell of the export audit, run: what is the same model elsewhere, what is another, and what is refused."""

from functools import cache

import pytest

from labkit.formats import llama_cpp
from labkit.formats.audit import (
    NOT_WRITTEN,
    OTHER,
    READ_BACK,
    SAME,
    TARGETS,
    audit_exports,
    audit_table,
)
from labkit.formats.audit_variants import VARIANTS

WRITTEN = ("PEFT", "merged", "GGUF merged")
NO_FACTORS = {"DoRA": "no place for DoRA", "modules_to_save": "no place for lm_head"}
NOT_IN_A_FOLDER = {  # the scale of some layers is not that of the folder, or the base is not
    "llama.cpp's converter": {
        "rsLoRA",
        "PiSSA, as PEFT saves it",
        "rank and alpha patterns",
        "two ranks combined",
    },
    "vLLM": {"PiSSA, as PEFT saves it", "rank and alpha patterns"},
}
REACHABLE = [name for name in VARIANTS if name != "embeddings, head tied"]


@cache
def cells(variant):
    """The cells of a variant, by target."""
    return {cell.target: cell for cell in audit_exports(variants=[variant])}


@pytest.mark.parametrize("variant", REACHABLE)
def test_what_is_written_whole_is_the_same_model_elsewhere(variant):
    found = cells(variant)
    assert found["base alone"].difference > 0.5
    for target in WRITTEN:
        assert found[target].outcome == SAME and found[target].difference < 1e-4, found[target]


@pytest.mark.parametrize("variant", REACHABLE)
def test_a_gguf_adapter_is_the_same_model_or_is_refused_with_the_way_out(variant):
    cell = cells(variant)["GGUF adapter"]
    if variant in NO_FACTORS:
        assert cell.outcome == NOT_WRITTEN and NO_FACTORS[variant] in cell.how and "save_gguf(" in cell.how
    else:
        assert cell.outcome == SAME and cell.difference < 1e-4


@pytest.mark.parametrize("target", NOT_IN_A_FOLDER)
@pytest.mark.parametrize("variant", REACHABLE)
def test_a_program_that_reads_less_of_a_folder_is_another_model_without_an_error(variant, target):
    cell = cells(variant)[target]
    if variant in NO_FACTORS:
        assert cell.outcome == NOT_WRITTEN and "labkit.formats.save_" in cell.how
    elif variant in NOT_IN_A_FOLDER[target]:
        assert cell.outcome == OTHER and cell.difference > 0.1
    else:
        assert cell.outcome == SAME and cell.difference < 1e-4


def test_an_embedding_whose_head_is_tied_is_refused_before_anything_is_written():
    found = cells("embeddings, head tied")
    assert list(found) == list(TARGETS)
    assert {cell.outcome for cell in found.values()} == {NOT_WRITTEN}
    assert all("labkit.untie_embeddings" in cell.how for cell in found.values())


def test_without_llama_cpp_the_files_are_read_back_and_the_cells_say_so(monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    names = ["rsLoRA", "embeddings, head untied", "rank and alpha patterns"]
    found = audit_exports(variants=names, targets=["GGUF merged", "GGUF adapter"])
    assert [cell.how for cell in found] == [READ_BACK] * 6
    assert all(cell.outcome == SAME and cell.difference < 1e-4 for cell in found)


def test_the_table_has_a_row_for_each_variant_and_a_column_for_each_target():
    table = audit_table([*cells("LoRA").values(), *cells("DoRA").values()])
    assert list(table.index) == ["LoRA", "DoRA"] and list(table.columns) == list(TARGETS)
    assert table.loc["DoRA", "GGUF adapter"] == "refused" and table.loc["LoRA", "base alone"].endswith(
        ": other"
    )


def test_an_unknown_variant_or_target_is_named():
    with pytest.raises(ValueError, match="variants='LORA'"):
        audit_exports(variants="LORA")
    with pytest.raises(ValueError, match="targets='ONNX'"):
        audit_exports(targets=["ONNX"])
