"""Tiny real models and a tokenizer, built without a hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    initializer_range=0.2,
)  # fmt: skip


class Family(NamedTuple):
    """A model family; ``build`` takes the vocabulary size."""

    name: str
    build: Callable[[int], Any]


def _family(name: str, config: str, **extra: Any) -> Family:
    def build(vocab_size: int) -> Any:
        import transformers

        config_class = getattr(transformers, config)
        settings = config_class(vocab_size=vocab_size, **{**_SIZES, **extra})
        return transformers.AutoModelForCausalLM.from_config(settings)

    return Family(name, build)


LLAMA = _family("llama", "LlamaConfig")
QWEN = _family("qwen3", "Qwen3Config", tie_word_embeddings=True)
GEMMA = _family(  # eager, because transformers before 5.22 gives it SDPA, which drops its soft cap
    "gemma2", "Gemma2Config", sliding_window=8, query_pre_attn_scalar=8, attn_implementation="eager"
)
GEMMA3 = _family(
    "gemma3", "Gemma3TextConfig", sliding_window=8, query_pre_attn_scalar=8,
    layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
OLMO = _family("olmo", "OlmoConfig")
OLMO2 = _family("olmo2", "Olmo2Config")
MIXTRAL = _family("mixtral", "MixtralConfig", num_local_experts=4)
QWEN2_MOE = _family(
    "qwen2_moe", "Qwen2MoeConfig", num_experts=4, sliding_window=30, use_sliding_window=True,
    max_window_layers=0, moe_intermediate_size=16, shared_expert_intermediate_size=16,
)  # fmt: skip
LLAMA4 = _family("llama4", "Llama4TextConfig", intermediate_size_mlp=48, num_local_experts=2)
MISTRAL = _family("mistral", "MistralConfig", sliding_window=8)
COHERE = _family("cohere", "CohereConfig")
GRANITE = _family("granite", "GraniteConfig", logits_scaling=4.0)
PHI = _family("phi", "PhiConfig")
OPT = _family(
    "opt", "OPTConfig", ffn_dim=48, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.2,
    layerdrop=0.3, activation_function="gelu",
)  # fmt: skip
BLOOM = _family("bloom", "BloomConfig", n_layer=2, n_head=4)
MAMBA = _family("mamba", "MambaConfig")


def build_tokenizer() -> Any:
    """Byte-level BPE with ChatML tokens, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = ["tell me about the weather and long walks on the beach", "no idea at all", "be nice"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(family: Family, path: Path, seed: int = 0) -> Path:
    """Save a random model of the family and its tokenizer in Hugging Face format."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    family.build(len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
