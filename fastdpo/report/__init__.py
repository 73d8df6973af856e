"""The report of a run: from the files that the stages wrote, a table, a plot and one HTML page.

Reads files only, and nothing of the stages' code. Begin with `summary.py` (what is called), then
`page.py` (what the page shows), `runfiles.py` (what the files say), `templates/` (how it looks).
"""
