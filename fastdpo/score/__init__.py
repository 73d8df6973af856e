"""Candidates in, a score for each out.

`stage.score` does it; `load.load_scorer` makes scorers of their names, `config.ScoreConfig` has the
options, and each source of scores has its file. Read `stage.py` first.
"""
