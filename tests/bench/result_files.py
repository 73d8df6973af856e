"""Files of rows, and the document that is made of them."""

import json

from bench import report


def write_rows(path, rows):
    """A JSON line each; the path, as the command line takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def document_of(results, out, option="--out"):
    """The text that the report makes of files of rows, in place of another one."""
    command = [*map(str, results), option, str(out)]
    if not out.exists():
        out.write_text("old")
    before = out.read_text()
    assert report.main([*command, "--check"]) == 1 and out.read_text() == before
    assert report.main(command) == 0 and report.main([*command, "--check"]) == 0
    return out.read_text()
