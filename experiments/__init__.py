"""Long runs whose results are recorded under `data/results/` and shown in the notebooks, with the commands that make them."""
