"""Files come in, tensors of micro-batches go out. Open `rows.py` first.

`rows.py`: a file or dataset -> checked rows. `tokenize.py`: rows -> `TokenizedPair`, through
`rendering.py`, which finds what a chat template loses. `budget.py`: pairs that fit a number of
tokens. `batch.py`: pairs -> packed tensors, and which pairs go into which batch. `records.py` has
the rows that go from stage to stage, `clock.py` the time that templates see.
"""

from fastdpo.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "TokenizedPair": "batch",
        "pack_pairs": "batch",
        "preference_rows": "rows",
        "read_rows": "rows",
        "tokenize_dataset": "tokenize",
    },
)
