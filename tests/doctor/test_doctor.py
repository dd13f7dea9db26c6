"""The doctor takes what there is, says what it could not probe, and changes nothing."""

import copy
import json

import pytest
import torch

from labkit.doctor import HEALTHY, PROBES, SICK, UNKNOWN, doctor
from labkit.doctor.specimens import adapted, held_records, train_records
from labkit.formats.adapters import save_adapter
from labkit.lora.adapters import use_adapter
from labkit.lora.fingerprint import fingerprint
from labkit.lora.inject import lora_layers
from labkit.lora.merging import merge, unload
from labkit.training.history import History

FEW = train_records()[:3]


def test_the_model_leaves_as_it_came(moved):
    model, tokenizer = moved
    model.train()
    model.model.layers[0].eval()
    some = next(p for p in model.parameters() if p.requires_grad)
    some.grad = torch.ones_like(some)
    names = ("training", "requires_grad", "grad", "random", "adapter")

    def state():
        return dict(
            zip(
                names,
                (
                    {name: module.training for name, module in model.named_modules()},
                    {name: p.requires_grad for name, p in model.named_parameters()},
                    {name: id(p.grad) for name, p in model.named_parameters() if p.grad is not None},
                    torch.random.get_rng_state().tolist(),
                    {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
                ),
            )
        )

    before, base = state(), fingerprint(model)
    report = doctor(model, tokenizer, FEW, held_out=held_records()[:2], reference=copy.deepcopy(model))
    after = state()
    assert report["training"].outcome == report["reference"].outcome == HEALTHY
    weights = before.pop("adapter"), after.pop("adapter")
    assert before == after
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert some.grad.eq(1).all()
    assert fingerprint(model) == base


def test_without_data_it_says_what_is_missing(moved):
    report = doctor(*moved)
    assert report.of(SICK) == []
    assert report["size"].outcome == report["precision"].outcome == HEALTHY
    assert set(report.of(UNKNOWN)) >= {"labels", "training", "cache", "effect", "stopping"}
    assert report["labels"].says == "no data was given"
    assert "that could be made" in report.verdict


def test_one_record_is_enough_for_what_the_model_says(moved):
    report = doctor(*moved, FEW[:1])
    assert report["cache"].outcome == HEALTHY
    assert report["training"].outcome == HEALTHY
    assert report["effect"].outcome == SICK  # noise in B is no learning


def test_data_in_another_format_is_named(moved):
    report = doctor(*moved, [{"question": "Where?", "answer": "Here"}])
    assert "'prompt'" in report["labels"].says and report["labels"].outcome == UNKNOWN


def test_records_that_cannot_be_trained_on_are_sick(moved):
    report = doctor(*moved, [*FEW, {"prompt": "", "completion": ""}])
    assert report.first == "labels" and report["labels"].number == 0.25


def test_a_merged_model_is_judged_by_what_it_says(moved):
    model, tokenizer = moved
    merge(model)
    report = doctor(model, tokenizer, FEW)
    assert "merged" in report["training"].says and report["training"].outcome == UNKNOWN
    assert report["precision"].outcome == HEALTHY and report["precision"].numbers["share"] > 0.99
    assert all(layer.is_merged for layer in lora_layers(model).values())


def test_of_a_model_without_an_adapter_it_probes_what_there_is(moved):
    model, tokenizer = moved
    report = doctor(unload(model), tokenizer, FEW)
    assert report["cache"].outcome == HEALTHY
    assert "no adapter" in report["effect"].says or "untrained" in report["effect"].says
    assert report["size"].outcome == UNKNOWN


def test_an_adapter_that_is_switched_off_is_the_first_finding(moved):
    model, tokenizer = moved
    use_adapter(model, None)
    report = doctor(model, tokenizer, FEW)
    assert report.first == "training" and "switched off" in report["training"].says


def test_a_fresh_adapter_is_not_sick_of_being_untrained(tiny):
    report = doctor(adapted(0, r=2), tiny[1], FEW)
    assert report.of(SICK) == []
    assert report["effect"].outcome == report["stopping"].outcome == UNKNOWN


def test_the_folder_of_the_model_is_recognized(moved, tmp_path):
    model, tokenizer = moved
    save_adapter(model, tmp_path / "adapter")
    assert doctor(model, tokenizer, adapter=tmp_path / "adapter")["origin"].outcome == HEALTHY


def test_an_unfinished_folder_is_an_error(moved, tmp_path):
    model, tokenizer = moved
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        doctor(model, tokenizer, adapter=tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "IA3"])
def test_a_folder_of_another_method_is_an_error(moved, tmp_path, kind):
    model, tokenizer = moved
    save_adapter(model, tmp_path / "adapter")
    place = tmp_path / "adapter" / "adapter_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"peft_type": kind}))
    with pytest.raises(ValueError, match=f"{kind}.*LoRA"):
        doctor(model, tokenizer, adapter=tmp_path / "adapter")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"history": [1.0]}, "labkit.train returned"),
        ({"valley": (1e-2, 1e-3)}, "lower learning rate first"),
        ({"valley": 1e-3}, "two learning rates"),
        ({"reference": "other"}, "a model, 'base'"),
        ({"data": "train.jsonl"}, "list of records"),
        ({"data": FEW, "fed": "batch"}, "batch of the trainer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_of_the_wrong_kind_are_errors(moved, wrong, says):
    with pytest.raises(ValueError, match=says):
        doctor(*moved, **wrong)


def test_nan_in_a_weight_is_what_is_found_first(moved):
    model, tokenizer = moved
    with torch.no_grad():
        next(iter(lora_layers(model).values())).lora_B[0, 0] = float("nan")
    report = doctor(model, tokenizer, FEW, held_out=held_records()[:8])
    assert report.first == "precision"
    assert report["effect"].outcome == report["cache"].outcome == SICK
    assert report["size"].outcome == report["generalization"].outcome == UNKNOWN


def test_losses_over_a_few_tokens_are_not_compared(moved):
    report = doctor(*moved, FEW, held_out=held_records()[:1])
    assert "too few to compare" in report["generalization"].says


def test_a_flat_loss_is_no_fall():
    """Noise around a constant has no significant fall; a loss that does fall has."""
    from labkit.doctor.case import Case
    from labkit.doctor.sizes import look_at_rate

    noise = torch.randn(30, generator=torch.Generator().manual_seed(0)).tolist()

    def look(losses):
        steps = [{"step": i, "loss": loss, "lr": 1e-3, "grad_norm": 1.0} for i, loss in enumerate(losses)]
        return look_at_rate(Case(torch.nn.Linear(1, 1), None, history=History(steps=steps)))

    assert look([2 + 0.1 * n for n in noise]).outcome == SICK
    assert look([2 - 0.05 * i + 0.1 * n for i, n in enumerate(noise)]).outcome == HEALTHY
    steep = [7.0, 1.6, 1.5, 1.3, 1.1, 1.0, 0.95, 0.9, 0.9, 0.8, 0.85, 0.8, 0.75, 0.7, 0.7]
    assert look(steep).outcome == HEALTHY  # its first third falls so far that thirds alone are not sure
    assert look([2.0, float("nan")]).outcome == SICK
    with pytest.raises(Exception, match="too few"):
        look([2.0, 1.0])


def test_how_sure_a_fall_is_agrees_with_kendalls_test():
    stats = pytest.importorskip("scipy.stats")
    from labkit.doctor.sizes import kendall

    for seed in range(5):
        losses = (
            torch.randn(24, generator=torch.Generator().manual_seed(seed)) - torch.arange(24) / 9
        ).tolist()
        result = stats.kendalltau(range(24), losses, method="asymptotic")
        assert kendall(losses) == pytest.approx(stats.norm.isf(result.pvalue / 2), rel=1e-6)


def test_each_probe_gives_its_threshold_a_reason_in_every_form(moved):
    report = doctor(*moved, [{"prompt": "<b>", "completion": " <i>"}])
    table = report._repr_html_()
    assert len(PROBES) == len(report.findings) == 12
    for probe in PROBES:
        assert probe.name in str(report) and probe.name in table and probe.why
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["first"] == report.first == "effect"
    assert "<i>To do:</i>" in table and table.count("<tr>") == 13
    with pytest.raises(KeyError, match="there are: origin"):
        report["pulse"]
