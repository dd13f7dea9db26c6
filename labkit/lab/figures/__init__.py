"""Pictures of a lesson's subject: a notebook draws them, and an explorer puts controls on them."""

from labkit.lab.figures.alternatives import block_picture
from labkit.lab.figures.bill import bill_bars
from labkit.lab.figures.breakdown import peak_areas, peak_bar
from labkit.lab.figures.failures import beside_healthy, curve_wall, matrix_figure
from labkit.lab.figures.forgetting import plane
from labkit.lab.figures.merging import crossings
from labkit.lab.figures.multitask import multitask_figure
from labkit.lab.figures.own_data import result_rows, written_answer
from labkit.lab.figures.paging import residency_map
from labkit.lab.figures.prices import load_prices, price_all, price_figure, price_table
from labkit.lab.figures.scaling import gap_bars, rank_bars, rank_curves, wire_bars, worker_spans
from labkit.lab.figures.serving import Span, batch_picture, cost_curves, evidence_picture, schedule_picture
from labkit.lab.figures.training import run_figure

__all__ = [
    "Span",
    "batch_picture",
    "beside_healthy",
    "bill_bars",
    "block_picture",
    "cost_curves",
    "crossings",
    "curve_wall",
    "evidence_picture",
    "gap_bars",
    "load_prices",
    "matrix_figure",
    "multitask_figure",
    "peak_areas",
    "peak_bar",
    "plane",
    "price_all",
    "price_figure",
    "price_table",
    "rank_bars",
    "rank_curves",
    "residency_map",
    "result_rows",
    "run_figure",
    "schedule_picture",
    "wire_bars",
    "worker_spans",
    "written_answer",
]
