"""Tiny random models with a real tokenizer."""

import json
from pathlib import Path
from typing import Any

from support import ROOT
from trnlora.files import write_sums

# As in SmolLM2's ChatML: <|im_start|> opens a turn, <|im_end|> closes it and is EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# In generation_config.json, as many models have it: neither evaluation nor server may sample like this.
SAMPLING = {
    "do_sample": True, "temperature": 1.9, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.8, "max_new_tokens": 3
}  # fmt: skip


# What each family adds, on the sizes of `write_model`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"head_dim": 64, "sliding_window": 256, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "granite": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 5.0
    },
}  # fmt: skip


def write_llama(folder: Path, **config: Any) -> Path:
    """`write_model` with a Llama."""
    return write_model(folder, "llama", **config)


def randomize_vectors(model: Any) -> None:
    """Give biases and norms random values: HF's zeros and ones would hide a wrong one."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter) + (1 if "norm" in name else 0))


def write_model(folder: Path, model_type: str, **config: Any) -> Path:
    """Write a random model of a family and its tokenizer to `folder`; `config` overrides the default sizes.

    The default fits tp 1 and 3 (multiplier 1), and 2 and 6 (multiplier 2): 6 heads, 3 KV heads, vocabulary 1536.
    """
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    rows = [json.loads(line) for line in (ROOT / "data" / "tasks.jsonl").read_text("utf-8").splitlines()]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [row[key] for row in rows for key in ("instruction", "context", "response")],
        vocab_size=1536,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    assert bpe.get_vocab_size() == 1536
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
    sizes: dict[str, Any] = {
        "vocab_size": 1536,
        "hidden_size": 192,  # head size 32: the smallest that vLLM's CPU attention supports
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        # Ten times the usual value: with 0.02, a tiny model's attention is so flat that swapped heads change little.
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(17)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **config}))
        if model_type != "llama":
            randomize_vectors(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ids | SAMPLING), "utf-8")
    write_sums(folder)  # as fetch_model does, for tests that start with a later stage
    return folder
