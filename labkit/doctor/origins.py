"""Is this the adapter that was saved, on the base that it was trained on?"""

import statistics

from labkit.doctor.case import Case
from labkit.doctor.findings import Finding, Missing, healthy, sick
from labkit.formats.peft_config import from_peft
from labkit.formats.peft_folder import read_folder
from labkit.formats.peft_tensors import adapter_tensors, check_adapter, same_values
from labkit.formats.provenance import check_base, check_saved, read_provenance
from labkit.lora.config import LoRAConfig
from labkit.lora.fingerprint import differences, fingerprint
from labkit.lora.mounting import mounted_adapter

SAME = 0.01  # of a scaling, relative: another rule for it differs by sqrt(r), at least 1.4


def look_at_origin(case: Case) -> Finding:
    """Counts what differs between the folder and the model: parts of the base, tensors, and the scaling."""
    if case.folder is None:
        raise Missing("no adapter folder was given, so nothing says what was trained, and on which base")
    raw, tensors = read_folder(case.folder)
    try:
        provenance = read_provenance(case.folder)
        if mounted_adapter(case.model) is None:
            return fits_or_not(case, raw, tensors, provenance)
        check_saved(raw, tensors, case.folder, provenance)
    except ValueError as error:
        return sick(str(error), 1, "take the folder as it was saved, and load it onto the base that it names")
    mine = (
        {}
        if provenance and "start" in provenance
        else adapter_tensors(mounted_adapter(case.model), plain=True)
    )
    lost = [name for name, tensor in tensors.items() if mine and not is_in(name, tensor, mine)]
    if lost:
        return sick(
            f"{len(lost)} of the {len(tensors)} tensors in the folder are not in the model, such as {lost[0]}",
            len(lost),
            "load the folder again with labkit.load_adapter, which refuses to load a part of it",
        )
    if provenance is None:
        raise Missing(
            "the folder has no labkit.json, which names the base; its tensors are those of the model"
        )
    parts = differences(provenance["base"], fingerprint(case.model, provenance.get("replaces", ())))
    if parts:
        return sick(
            f"the base is not the one that the adapter was trained on: {', '.join(parts)} have other fingerprints",
            len(parts),
            "load the base that it was trained on, or train again on this one",
        )
    ratio = scaling_ratio(case, provenance["config"])
    if ratio is not None and abs(ratio - 1) > SAME:
        return sick(
            f"the correction counts {ratio:.3g} times what it did in training: the scaling differs",
            1,
            "export it again: rsLoRA's scaling is alpha / sqrt(r), and a format without it needs alpha times sqrt(r)",
            scaling_ratio=ratio,
        )
    return healthy("base, tensors and scaling are those of the folder", 0)


def is_in(name: str, tensor, mine: dict) -> bool:
    """Is a tensor of the folder in the model, but for its dtype?"""
    return name in mine and mine[name].shape == tensor.shape and same_values(mine[name], tensor)


def fits_or_not(case: Case, raw: dict, tensors: dict, provenance: dict | None) -> Finding:
    """The answer where the adapter is not in the model: would it fit?"""
    check_base(case.model, case.folder, provenance)
    config, names = from_peft(case.model, raw, tensors, case.folder)
    check_adapter(case.model, config, names, tensors, case.folder)
    raise Missing("the folder fits the model, and is not loaded: labkit.load_adapter(model, folder)")


def scaling_ratio(case: Case, recorded: dict) -> float | None:
    """The scaling of the layers beside that of the recorded config; None if a layer's rank is not the recorded one.

    PiSSA is saved with twice its rank, and then says nothing here.
    """
    config = LoRAConfig(**recorded)
    pairs = [(layer, config.for_layer(name)) for name, layer in case.layers.items()]
    if not pairs or any(layer.r != one.r for layer, one in pairs):
        return None
    return statistics.median(layer.scaling / one.scaling for layer, one in pairs)
