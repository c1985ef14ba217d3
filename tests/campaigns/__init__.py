"""Trials in large numbers, that anyone can repeat: `python -m campaigns` lists them.

`campaign` is the framework. A module with a `CAMPAIGN` is one campaign. The others are parts:

- `cancellations`: `hosts` what is called, `strikes` how it is cancelled
- `cancellations`, `kills`, `signals`: `published` knows what each row may hold
- `fuzz`: `targets`
- `io_errors`: `failing_io` (Python and C) fails calls, `io_kinds` which ones, `disks`
- `mishaps`: `bridges` runs many in a process, `trouble` what is done to them
- `model`: `rules` is the model
- `snapshots`: `contract` is the judge
- `soak`: `measured` memory, `oracle` the judge, `writer` the busy neighbour
"""
