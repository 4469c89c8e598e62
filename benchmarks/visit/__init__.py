"""The stages of a visit to a machine with a GPU; `benchmarks/gpu_visit.py` runs one of them in one command."""
