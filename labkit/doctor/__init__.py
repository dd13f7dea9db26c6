"""A doctor for fine-tuned models: numeric probes, each with a threshold and its reason.

findings         what a probe is, and what it says
case, rows       what is known of a model, measured once
origins          the base and the folder
inputs           labels and templates
wiring           gradients
rounding         precision and merges
sizes            learning rate and size of the update
sameness         KV cache and reference
answers          what the model says
probes           all of them, in order
examine          `doctor`, which asks them
report           `Report`: text, HTML, JSON
command          python -m labkit.doctor
"""

from labkit.doctor.examine import doctor
from labkit.doctor.findings import HEALTHY, SICK, UNKNOWN, Finding, Probe
from labkit.doctor.probes import PROBES
from labkit.doctor.report import Report

__all__ = ["HEALTHY", "PROBES", "SICK", "UNKNOWN", "Finding", "Probe", "Report", "doctor"]
