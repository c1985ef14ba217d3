"""Trials in large numbers, that anyone can repeat: `python -m campaigns` lists them.

`campaign` is the framework. A module with a `CAMPAIGN` is one campaign. The others are parts:

- `cancellations`: `hosts` what is called, `strikes` how it is cancelled
- `cancellations`, `kills`, `signals`: `published` judges the rows
- `fuzz`: `targets`
- `io_errors`: `failing_io` (Python and C) fails calls, `io_kinds` which ones, `disks`
- `mishaps`: `bridges` runs many in a process, `trouble` what is done to them
- `model`: `rules` is the model, and the judge
- `snapshots`: `contract` is the judge
- `soak`: `measured` judges memory, `oracle` the rows; `writer` is the busy neighbour
"""
