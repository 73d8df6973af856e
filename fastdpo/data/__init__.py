"""Files come in, tensors of micro-batches go out. Open `rows.py` first.

`rows.py`: a file or dataset -> checked rows. `tokenize.py`: rows -> examples (`examples.py`: pairs,
lists, single responses), through `rendering.py` and `lost.py`, which finds what a chat template
loses. `budget.py`: examples that fit a number of tokens. `batch.py`: examples -> packed tensors,
and which go into which batch. `records.py` has the rows that go from stage to stage, `clock.py` the
time that templates see.
"""

from fastdpo.lazy import lazy

__getattr__ = lazy(
    __name__,
    {
        "TokenizedList": "examples",
        "TokenizedPair": "examples",
        "TokenizedSingle": "examples",
        "example_rows": "rows",
        "pack_pairs": "batch",
        "preference_rows": "rows",
        "read_rows": "rows",
        "tokenize_dataset": "tokenize",
    },
)
