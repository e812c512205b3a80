"""What vLLM refuses of a model, known from its small files: so that nothing is trained that cannot be served."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from trnlora.errors import UserError
from trnlora.model.config import ModelConfig
from trnlora.model.hf_config import Section, TokenIds
from trnlora.params import Params
from trnlora.readers import read_json_as

# The head sizes that vLLM's CPU attention was compiled for, in every dtype (vLLM 0.32, csrc/cpu/cpu_attn.cpp;
# get_supported_head_sizes lacks 48).
CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def check_servable(config: ModelConfig, params: Params) -> None:
    """Raise UserError for a head size that vLLM's CPU attention has not got, or too few positions for params.serve.

    LoRA ranks are bounded in params.py. Sizes other than the head's can be any.
    """
    if params.serve.max_model_len > config.max_position_embeddings:
        raise UserError(
            f"serve.max_model_len {params.serve.max_model_len} is above the model's max_position_embeddings "
            f"{config.max_position_embeddings}, so vLLM would not start: set it to at most that, and data.seq_len below"
        )
    on_cpu = params.backend != "cuda" and params.eval.engine == "host"
    if on_cpu and config.head_dim not in CPU_HEAD_SIZES:
        raise UserError(
            f"the model's head size (head_dim) is {config.head_dim}; vLLM on a CPU serves "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}: choose another model.source"
        )


class GenerationConfig(Section):
    """The keys of generation_config.json that vLLM reads, in the bounds of its SamplingParams."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    eos_token_id: TokenIds | None = None


def check_generation_config(folder: Path, vocab_size: int, where: str, fix: str) -> None:
    """Check `folder`/generation_config.json, if there is one. where: what errors call the file.

    vLLM ignores one that is not JSON, and refuses every request if a value is out of its bounds. Raises UserError.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    config = read_json_as(file, GenerationConfig, fix, where)
    if beyond := [token for token in config.eos_token_id or () if token >= vocab_size]:
        raise UserError(f"{where} has eos_token_id {beyond[0]}, which is not below vocab_size {vocab_size}{fix}")
    from transformers import GenerationConfig as TransformersConfig  # seconds

    try:
        TransformersConfig.from_pretrained(folder)
    except Exception as error:  # its own checks, and whatever a value of another type leads to
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: transformers refuses it ({reason}){fix}") from None
