"""What a GPU must show, section by section: see `scripts/gpu_day.py`."""
