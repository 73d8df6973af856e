"""Programs to start from, each whole and under a hundred lines.

    python -m fastdpo.examples.bare_loop --model MODEL --dataset pairs.jsonl

`bare_loop` is the loss in a loop of your own, `hf_trainer` in `transformers.Trainer`, `trl_trainer`
in TRL.  `long_context` trains pairs of tens of thousands of tokens on one GPU, the whole loop is in
`reward_model_rounds`, and `reward_server` serves scores to it from another machine.
"""
