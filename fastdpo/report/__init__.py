"""The report of a run: from the files of the stages, a page, a table, a plot and model cards.

Reads files only, and nothing of the stages' code. Begin with `summary.py` (what is called), then
`page.py` and `card.py` (what a page shows and a card says), `runfiles.py` (what the files say),
`templates/` (how it looks).
"""
