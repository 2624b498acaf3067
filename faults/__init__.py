"""Trainings that are broken on purpose, as processes, seeded; `python -m faults`, docs/faults.md.

`table.py` has a row for every fault: what is done, what has to happen, and either a function of
this package that does it or the tests that do. `bench.py` starts trainings and compares losses,
`results.py` keeps what was seen, `page.py` writes it down. The other modules are the faults.
"""
