"""The architectures that finespun is tested with, two layers of each."""

from __future__ import annotations

from transformers import (
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)


def architectures(vocab_size: int, positions: int) -> dict[str, PreTrainedConfig]:
    """Configs by name; sliding windows are of five tokens."""
    small = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
    }
    return {
        "llama": LlamaConfig(**small, intermediate_size=48, num_key_value_heads=2),
        "qwen2": Qwen2Config(**small, intermediate_size=48, num_key_value_heads=2),
        "qwen3": Qwen3Config(**small, intermediate_size=48, num_key_value_heads=2, head_dim=8),
        "mistral": MistralConfig(**small, intermediate_size=48, num_key_value_heads=2, sliding_window=5),
        "gpt_neox": GPTNeoXConfig(**small, intermediate_size=48),
        "gpt2": GPT2Config(vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=positions),
        "opt": OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32),
        "gemma2": Gemma2Config(
            **small, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=8
        ),
        "gemma3": Gemma3TextConfig(
            **small,
            intermediate_size=48,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "phi": PhiConfig(**small, intermediate_size=48),
        "phi3": Phi3Config(**small, intermediate_size=48, num_key_value_heads=2, pad_token_id=0),
        "cohere": CohereConfig(**small, intermediate_size=48, num_key_value_heads=2, logit_scale=0.25, pad_token_id=0),
        "granite": GraniteConfig(**small, intermediate_size=48, num_key_value_heads=2, logits_scaling=4.0),
        "bloom": BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=2, n_head=4),
    }
