"""Tiny models of the families that people bring, with random weights and the embedded model's tokenizer."""

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers as hf

from common.models import embedded

VOCABULARY = 2048
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 16}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# The keys that a family calls otherwise.
OPT = {"ffn_dim": 128, "word_embed_proj_dim": 64}
DISTIL = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 256}
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}

# By family: the class that the checkpoint is saved as, its config, and what differs from SIZES or GROUPED.
DECODERS: Mapping[str, tuple[type, type, Mapping[str, object]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, GROUPED),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, GROUPED),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, GROUPED),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, GROUPED | {"head_dim": 16}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, GROUPED | {"head_dim": 16}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, GROUPED | {"head_dim": 16}),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, GROUPED),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, SIZES | OPT),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config,
        TOKENS | {"vocab_size": VOCABULARY, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4},
    ),
    "neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, SIZES),
    "falcon": (hf.FalconForCausalLM, hf.FalconConfig, SIZES),
    "bloom": (
        hf.BloomForCausalLM,
        hf.BloomConfig,
        TOKENS | {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, GROUPED | EXPERTS | {"num_local_experts": 4}),
    "qwen3-moe": (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 64},
    ),
    "gpt-oss": (
        hf.GptOssForCausalLM,
        hf.GptOssConfig,
        GROUPED | EXPERTS | {"num_local_experts": 4, "intermediate_size": 64},
    ),
    "deepseek": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, SIZES | DEEPSEEK),
}
ENCODERS: Mapping[str, tuple[type, type, Mapping[str, object]]] = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig, SIZES),
    "deberta": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config, SIZES),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, SIZES | {"pad_token_id": 1}),
    "distilbert": (hf.DistilBertForMaskedLM, hf.DistilBertConfig, {"vocab_size": VOCABULARY, **DISTIL}),
    "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig, SIZES | {"cls_token_id": 1, "sep_token_id": 2}),
    "xlm-roberta": (hf.XLMRobertaForMaskedLM, hf.XLMRobertaConfig, SIZES | {"pad_token_id": 1}),
    "electra": (hf.ElectraForPreTraining, hf.ElectraConfig, SIZES | {"embedding_size": 64}),
}
OTHERS: Mapping[str, tuple[type, type, Mapping[str, object]]] = {
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, {"vocab_size": VOCABULARY, **T5}),
    "mamba": (
        hf.MambaForCausalLM,
        hf.MambaConfig,
        {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    ),
}
FAMILIES = {**DECODERS, **ENCODERS, **OTHERS}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save(family: str, folder: Path, **changes: object) -> Path:
    """A checkpoint of the family with random weights, as its makers would save it; ``changes`` to its config."""
    kind, config, settings = FAMILIES[family]
    torch.manual_seed(0)
    kind(config(**settings | changes)).save_pretrained(folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(embedded.unpack())
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def tiny_bert(folder: Path) -> str:
    """A random encoder with the embedded tokenizer, saved as a user's local model would be."""
    config = hf.BertConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    # What a test trains, and what follows in it, must not depend on the tests before it.
    torch.manual_seed(0)
    network = hf.BertModel(config)
    network.save_pretrained(folder / "bert")
    hf.AutoTokenizer.from_pretrained(embedded.unpack()).save_pretrained(folder / "bert")
    return str(folder / "bert")
