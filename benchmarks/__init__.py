"""Benchmarks: ours and a reference side by side, in one run, in turns (A B A B)."""
