"""Sampling: prompts and a policy come in, candidates go out, in parts on disk.

Open `stage.py` first: ``open_sampler`` loads or reaches a policy, ``sample`` draws from it. The
ways to draw are `generate.py`, `continuous.py` (transformers), `vllm.py` and `server.py` (vLLM);
`sampler.py` is what they share, `config.py` has the options.
"""
