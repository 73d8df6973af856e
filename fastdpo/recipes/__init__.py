"""Short ways to score and select that are no stage of their own, each with its source.

`follow_up`, `relevance`, `unlikeliness` and `best_of_majority` hold plain functions; `nectar` makes
the prompts of `storm-7b.yaml`, a configuration for `fastdpo iterate`.
"""
