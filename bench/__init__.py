"""The benchmarks, of a checkout only: what is measured, and the tables that are made of it.

Rows go to files of JSON lines (`bench/results`), which `bench.report` turns into RESULTS.md. Begin
with `__main__.py` (the loss alone), `step.py` (whole optimizer steps) and `report.py`. How anything
is measured is in `turns.py`, what all rows say and their files in `rows.py`, what all tables share
in `tables.py`.
"""
