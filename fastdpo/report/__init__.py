"""The report of a run: from the files that the stages wrote, a page, a table, a plot, model cards.

Reads files only, and nothing of the stages' code. Begin with `summary.py` (what is called), then
`page.py` (what the page shows) and `card.py` (what a model card says), `runfiles.py` (what the files
say), `templates/` (how it looks).
"""
