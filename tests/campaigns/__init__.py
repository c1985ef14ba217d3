"""Trials in large numbers, that anyone can repeat: `python -m campaigns` lists them."""
