"""A doctor for fine-tuned models: numeric probes, each with a threshold and its reason.

findings         what a probe says
case, rows       what is known of a model, measured once
origins          the base and the folder
inputs           labels and templates
wiring           gradients
rounding         precision and merges
sizes            learning rate and size of the update
sameness         KV cache and reference
answers          what the model says
probes           what a probe is, and all of them, in order
examine          `doctor`, which asks them
report           `Report`: text, HTML, JSON
specimens, zoo   sick fine-tunes to try it on
command          python -m labkit.doctor
"""

from labkit.doctor.examine import doctor
from labkit.doctor.findings import HEALTHY, SICK, UNKNOWN, Finding
from labkit.doctor.probes import PROBES, Probe
from labkit.doctor.report import Report

__all__ = ["HEALTHY", "PROBES", "SICK", "UNKNOWN", "Finding", "Probe", "Report", "doctor"]
