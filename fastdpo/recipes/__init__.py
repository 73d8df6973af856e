"""Short ways to score and select that are no stage of their own, each with its source; and files.

`relevance` holds a scorer; `nectar` makes the prompts of `storm-7b.yaml`, a configuration for
`fastdpo iterate`; `files` copies that one, and those in `launch` that start runs on several GPUs.
"""
