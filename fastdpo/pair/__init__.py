"""Scored candidates in, preference pairs out.

`stage.pair` does it as `config.PairConfig` says: `transforms` make one score of several, `rules`
choose pairs, `votes` and `filters` turn, soften, drop and weigh them, `offline` adds others. Read
`stage.py` first.
"""
