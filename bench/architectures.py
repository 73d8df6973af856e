"""Tiny models of every causal language model that transformers has, with random weights.

A default configuration is shrunk by the names of its fields.  Windows, chunks and the lengths at
which rotary frequencies change become shorter than `bench.sweep`'s pairs; of per-layer lists one
layer of each kind stays.  What does not fit this way is spelled out a family in `_OWN`.
"""

import inspect
from typing import Any

import torch

from fastdpo.model.attention import keep_softcap

VOCAB = 320  # of tests/tiny.py's tokenizer
WINDOW = 24
ORIGINAL = 60  # the length that a rotary embedding was trained for, where it has one

_SIZES: dict[int | float, str] = {
    VOCAB: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    64: """hidden_size d_model n_embd embedding_size embedding_dim emb_dim dim
        input_embedding_size output_embedding_size hidden_size_global attention_hidden_size
        word_embed_proj_dim lru_width feed_forward_size embed_dim""",
    96: """intermediate_size ffn_dim ffn_hidden_size d_ff dff dim_ff d_inner decoder_ffn_dim
        encoder_ffn_dim n_inner intermediate_size_mlp dense_intermediate_size mlp_dim
        shared_intermediate_size""",
    32: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        kv_lora_rank q_lora_rank moe_shared_expert_intermediate_size
        shared_experts_intermediate_size o_lora_rank mamba_d_ssm""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads swa_num_attention_heads linear_num_value_heads mamba_num_heads
        mamba_n_heads linear_num_heads num_encoder_attention_heads num_decoder_attention_heads
        index_topk_blocks""",
    2: """num_key_value_heads num_kv_heads kv_n_heads n_head_kv swa_num_key_value_heads
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k
        num_query_groups num_encoder_layers num_decoder_layers num_local_layers""",
    16: """index_n_heads head_dim v_head_dim qk_rope_head_dim qk_nope_head_dim swa_head_dim
        linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim mamba_d_head
        kv_channels attention_head_dim attention_head_size d_head index_head_dim chunk_size
        mamba_chunk_size ssm_state_size state_size mamba_d_state d_state query_pre_attn_scalar
        global_head_dim hidden_size_per_layer_input head_dim_global dim_head laurel_rank d_kv
        rotary_dim""",
    8: """num_experts n_routed_experts num_local_experts moe_num_experts num_experts_total
        index_block_size mamba_headdim time_step_rank mamba_dt_rank""",
    512: """max_position_embeddings n_positions n_ctx max_seq_len context_length
        model_max_length max_target_positions n_positions""",
    WINDOW: """sliding_window sliding_window_size attention_window_size window_size
        local_attention attention_chunk_size keep_window_size index_topk""",
    ORIGINAL: "original_max_position_embeddings",
    1: """n_group num_expert_group n_groups topk_group first_k_dense_replace
        num_nextn_predict_layers n_shared_experts num_shared_experts mamba_n_groups
        max_window_layers type_vocab_size num_kv_shared_layers""",
}
_SIZE = {name: size for size, names in _SIZES.items() for name in names.split()}
# Whole configurations of other modalities, and what has nothing to do with sizes.
_SKIP = {"transformers_version", "architectures", "id2label", "label2id", "model_type", "dtype"}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

_MAMBA_2 = {"mamba_n_heads": 8}  # heads times their size are twice the hidden size
_GEMMA_4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
}
_ASSISTANT = {
    **_GEMMA_4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
    "num_hidden_layers": 2, "num_kv_shared_layers": 2,
}  # fmt: skip
_HYBRID = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]
_DOTS_3 = {
    "kv_lora_rank": 32, "num_hidden_layers": 2, "n_routed_experts": 8,
    "layer_types": ["indexed_attention", "sliding_attention"],
    "mlp_layer_types": ["dense", "sparse"],
    "per_layer_config": {
        1: {
            "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32,
            "kv_lora_rank": 32, "head_dim": 32, "qk_nope_head_dim": 16, "v_head_dim": 16,
            "qk_rope_head_dim": 16,
        }
    },
}  # fmt: skip
_QWEN_4 = {
    "layer_types": ["linear_attention", "full_attention"], "indexer_n_heads": 2,
    "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4, "ngram_vocab_size_base": 64, "split_ngram_parts": 2,
    "hc_lowrank": 8,
}  # fmt: skip
_DECODER = {"is_decoder": True}  # what is an encoder otherwise
# Fields that the sizes above do not fit; "default NAME" is set before the shrinking.
_OWN: dict[str, dict[str, Any]] = {
    **{
        name: _DECODER
        for name in (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra",
            "ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert",
            "roformer", "xlm-roberta", "xlm-roberta-xl",
        )
    },
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "reformer": {
        **_DECODER, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32],
        "attention_head_size": 16,
    },
    "bamba": _MAMBA_2,
    "granitemoehybrid": _MAMBA_2,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zamba": {
        "layers_block_type": _HYBRID, "num_hidden_layers": 5, "num_key_value_heads": 4,
        "attention_head_dim": 32, "attention_hidden_size": 128,
    },
    "zamba2": {
        "layers_block_type": _HYBRID, "num_hidden_layers": 5, "num_key_value_heads": 4,
        "attention_head_dim": 32, "attention_hidden_size": 128, "n_mamba_heads": 8,
        "mamba_headdim": 16,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"],
    },
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3,
        "num_dense_layers": 1,
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {
            "hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2,
        },
    },
    "gemma4_text": _GEMMA_4,
    "gemma4_unified_text": _GEMMA_4,
    "gemma4": {"text_config": _GEMMA_4},
    "gemma4_unified": {"text_config": _GEMMA_4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": _ASSISTANT, "default text_config": _ASSISTANT},
    "gemma4_unified_assistant": {"text_config": _ASSISTANT, "default text_config": _ASSISTANT},
    "dots3_note_text": _DOTS_3,
    "dots3_note": {
        "text_config": _DOTS_3,
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "qwen4_exp_text": _QWEN_4,
    "qwen4_exp": {"text_config": _QWEN_4},
}  # fmt: skip


def model_types() -> list[str]:
    """All that AutoModelForCausalLM knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config(model_type: str, **changes: Any) -> Any:
    """A tiny configuration; `changes` go over what is chosen here, dictionaries are merged."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    own = _OWN.get(model_type, {})
    base = {k: v for k, v in own.items() if k.startswith("default ")}
    default = config_class(**{k.removeprefix("default "): v for k, v in base.items()})
    return config_class(**_merged(_shrunk(default), {**own, **changes}))


def _merged(fields: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    fields = dict(fields)
    for name, value in own.items():
        if name.startswith("default "):
            continue
        if value is ...:  # left to the class
            fields.pop(name, None)
        elif isinstance(value, dict) and isinstance(fields.get(name), dict):
            fields[name] = _merged(fields[name], value)
        else:
            fields[name] = value
    return fields


def _shrunk(config: Any) -> dict[str, Any]:
    """Fields of a smaller configuration of the class."""
    names = set(inspect.signature(type(config)).parameters) | set(vars(config))
    fields: dict[str, Any] = {}
    for name in sorted(names - _SKIP):
        value = vars(config).get(name)
        if name.startswith("_") or value is None:
            continue
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            fields[name] = {**_shrunk(value), "model_type": value.model_type}
        elif name in _TOKENS:
            fields[name] = _TOKENS[name]
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int) and name in _SIZE:
            fields[name] = min(_SIZE[name], value) if value > 0 else value
        elif isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            fields[name] = 0.0
        elif name == "rope_parameters" and isinstance(value, dict):
            fields[name] = _rope(value)
        elif name.endswith("token_id") or name.endswith("token_index"):
            fields[name] = VOCAB - 1
    if "kv_lora_rank" in fields:  # latent attention has no groups
        fields["num_key_value_heads"] = _SIZE["num_attention_heads"]
    return {**fields, **_layers(config)}


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    rope = {k: _rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = ORIGINAL
    if "mrope_section" in rope:
        rope["mrope_section"] = [2, 3, 3]
    return rope


def _layers(config: Any) -> dict[str, Any]:
    """Per-layer lists with one layer of each kind, at least two."""
    known = inspect.signature(type(config)).parameters
    total = getattr(config, "num_hidden_layers", None)
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == total and name in known
    }
    if not lists or total is None:
        return {}
    seen: dict[tuple[str, ...], int] = {}
    for i in range(total):
        seen.setdefault(tuple(str(value[i]) for value in lists.values()), i)
    kept = sorted(seen.values()) if len(seen) > 1 else [0, 1]
    kept = [i for i in kept if i < total]
    fields: dict[str, Any] = {}
    for name, value in lists.items():
        fields[name] = [value[i] for i in kept]
        if name in _SIZE:
            fields[name] = [_SIZE[name]] * len(kept)
    return {**fields, "num_hidden_layers": len(kept)}


def build(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """A model with weights so large that attention and routing are far from uniform, in fp64."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = config(model_type, **changes)
    # Grouped products of experts have no fp64.
    model = AutoModelForCausalLM.from_config(settings, experts_implementation="eager").double()
    keep_softcap(model)  # as models are loaded
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model
