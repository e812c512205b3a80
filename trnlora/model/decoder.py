"""The decoder, written against a backend's parallel layers. Parameter names are NxD's, not HF's.

Shapes: B batch, T tokens, H hidden, D head size, I MLP size, V vocabulary, N labelled tokens, r LoRA rank. q and k
count this rank's query and KV heads.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trnlora.errors import UserError
from trnlora.model.config import KEPT_TOKENS, ModelConfig
from trnlora.model.needed_tokens import needed_tokens
from trnlora.model.parallel import Backend
from trnlora.model.recompute import not_kept
from trnlora.model.tensors import EMBEDDINGS, LM_HEAD

IGNORED = -100  # the label of a position that is not trained on, as in HF


class RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float, backend: Backend):
        super().__init__()
        self.backend = backend
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.backend.ops.rms_norm(x, self.weight, self.eps)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of channels (D/2,), with HF's "llama3" long-context scaling where set.

    Source: transformers, modeling_rope_utils.py, `_compute_llama3_parameters`.
    """
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    if config.rope_scaling is None:
        return frequency
    factor = config.rope_scaling["factor"]
    low, high = config.rope_scaling["low_freq_factor"], config.rope_scaling["high_freq_factor"]
    turns = config.rope_scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow channels, stretched; 1: fast channels, unchanged
    return (1 - smooth) * frequency / factor + smooth * frequency


def rotary_tables(frequencies: Tensor, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, T, D/2) of position_ids (B, T); the 1 stands for the heads."""
    angles = position_ids[:, None, :, None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def next_tokens(labels: Tensor) -> Tensor:
    """What each position predicts (B, T): the next position's label. The last one predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, backend: Backend, kv_size_multiplier: int):
        super().__init__()
        self.backend = backend
        self.head_dim = config.head_dim
        self.scale = config.attention_multiplier
        self.qkv_proj = backend.gqa_qkv_linear(
            config.hidden_size, (config.q_size, config.kv_size), kv_size_multiplier, bias=config.family.qkv_bias
        )
        norm = RMSNorm if config.family.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(config.head_dim, config.rms_norm_eps, backend) for _ in "qk")
        self.o_proj = backend.row_parallel_linear(config.q_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_plan: Any, keep: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.qkv_proj(x))  # (B, T, this rank's heads, D)
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        q, k = (self.backend.ops.rotary(y, cos, sin) for y in (q, k))
        y = self.backend.attention(q, k, v, attention_plan, self.scale)
        y = y.transpose(1, 2).flatten(2)
        return self.o_proj(y if keep is None else y[keep])


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, backend: Backend):
        super().__init__()
        self.backend = backend
        self.gate_up_proj = backend.column_parallel_linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = backend.row_parallel_linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        gate_up = self.gate_up_proj(x)  # each rank holds [gate_r, up_r]
        y = self.backend.ops.swiglu(gate_up)
        with not_kept(y, self.backend.ops.swiglu, gate_up, when=recompute):
            return self.down_proj(y)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, backend: Backend, kv_size_multiplier: int):
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.self_attn = Attention(config, backend, kv_size_multiplier)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.mlp = MLP(config, backend)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention_plan: Any,
        keep: Tensor | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """keep: as in `DecoderLM.forward`. recompute: norms and SwiGLU in the backward pass, to keep less for it."""
        normed = self.input_layernorm(x)
        with not_kept(normed, self.input_layernorm, x, when=recompute):
            attended = self.self_attn(normed, cos, sin, attention_plan, keep)
        x = self._add(x if keep is None else x[keep], attended)
        normed = self.post_attention_layernorm(x)
        with not_kept(normed, self.post_attention_layernorm, x, when=recompute):
            return self._add(x, self.mlp(normed, recompute))

    def _add(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + x if self.residual_multiplier == 1 else residual + x * self.residual_multiplier


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, backend: Backend, kv_size_multiplier: int):
        super().__init__()
        self.embed_tokens = backend.parallel_embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, backend, kv_size_multiplier) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)


class DecoderLM(nn.Module):
    """A dense decoder for training and scoring: no KV cache, every token at once."""

    def __init__(self, config: ModelConfig, backend: Backend, kv_size_multiplier: int):
        super().__init__()
        self.config = config
        self.backend = backend
        self.kv_size_multiplier = kv_size_multiplier
        # Recompute each layer in the backward pass and keep only its inputs: less memory, more time.
        self.recompute_layers = False
        # Compute only `needed_tokens` in `loss`. Not with dropout, whose masks differ for tokens that would be equal.
        self.only_needed_tokens = False
        # Their number, and that of the labelled ones, is made a multiple of this: by padding, and by unlabelled ones.
        self.row_multiple = 1
        self.model = Decoder(config, backend, kv_size_multiplier)
        self.lm_head = backend.column_parallel_linear(config.hidden_size, config.vocab_size)
        self._frequencies: Tensor | None = None

    @classmethod
    def empty(cls, config: ModelConfig, backend: Backend, kv_size_multiplier: int) -> "DecoderLM":
        """The model of one rank, frozen, on torch's meta device: its weights take no memory."""
        with torch.device("meta"):
            return cls(config, backend, kv_size_multiplier).requires_grad_(False)

    def check_shard(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError when a shard's keys or shapes are not exactly the model's."""
        expected = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
        if wrong:
            name = wrong[0]
            raise UserError(
                f"the shard of rank {self.backend.tp_rank} does not fit the model: {name} has shape "
                f"{shapes.get(name, 'none')}, expected {expected.get(name, 'none')} ({len(wrong)} such tensors): "
                "run `dvc repro -f convert_nxd`"
            )

    @classmethod
    def from_shard(
        cls, config: ModelConfig, backend: Backend, kv_size_multiplier: int, shard: Mapping[str, Tensor]
    ) -> "DecoderLM":
        """The model of one rank, frozen, using the shard's own tensors (nothing is copied).

        Raises UserError when the shard's keys or shapes are not exactly the model's.
        """
        model = cls.empty(config, backend, kv_size_multiplier)
        model.check_shard({name: tuple(tensor.shape) for name, tensor in shard.items()})
        tensors = dict(shard)
        if config.tie_word_embeddings:  # the file holds the same rows twice: one copy is never read
            tensors[LM_HEAD] = tensors[EMBEDDINGS]
        model.load_state_dict(tensors, strict=True, assign=True)
        return model.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor,
        keep: Tensor | None = None,
        documents: list[list[int]] | None = None,
    ) -> Tensor:
        """What the LM head takes, (B, T, H), from three (B, T) tensors: the hidden states after the final norm.

        They are divided by logits_scaling here, so that nothing has to divide the logits.

        keep (B, T), bool: the positions that are wanted. The last layer then computes only these, and (N, H) is
        returned. documents: of `NeededTokens`, if the others are (1, K) tensors of these tokens.
        """
        x = self.model.embed_tokens(input_ids)
        if self.config.embedding_multiplier != 1:
            x = x * self.config.embedding_multiplier
        cos, sin = rotary_tables(self._rotary_frequencies(x.device), position_ids, x.dtype)
        attention_plan = self.backend.prepare_attention(document_ids, documents)
        last = self.model.layers[-1]
        recompute = self.backend.recomputes and input_ids.numel() > KEPT_TOKENS
        for layer in self.model.layers:
            inputs = (x, cos, sin, attention_plan, keep if layer is last else None)
            if self.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)  # see `draw_dropout`
            else:
                x = layer(*inputs, recompute=recompute)
        x = self.model.norm(x)
        return x if self.config.logits_scaling == 1 else x / self.config.logits_scaling

    def layers_of_labelled_tokens(self) -> Iterator[nn.Module]:
        """The linear layers that compute only the labelled tokens, unless the backend has static shapes."""
        last = self.model.layers[-1]
        assert isinstance(last, DecoderLayer)
        yield from (last.self_attn.o_proj, last.mlp.gate_up_proj, last.mlp.down_proj)

    def _rotary_frequencies(self, device: torch.device) -> Tensor:
        """They stay on the device: on torch_xla, computing them again would copy them from the host each time."""
        if self._frequencies is None or self._frequencies.device != device:
            self._frequencies = rotary_frequencies(self.config).to(device)
        return self._frequencies

    def logits(self, hidden: Tensor) -> Tensor:
        """This rank's part (…, V/tp) of the logits of hidden states (…, H)."""
        return self.lm_head(hidden)

    def loss(
        self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sum of the next-token cross-entropy in nats over labelled tokens, and their number, from (B, T) tensors.

        Labels are aligned as in HF: position t predicts labels[t + 1], and −100 marks ignored positions.
        """
        targets = next_tokens(labels)
        labelled = targets != IGNORED
        if self.backend.static_shapes:
            hidden = self(input_ids, position_ids, document_ids)
        elif self.only_needed_tokens and (
            needed := needed_tokens(input_ids, position_ids, document_ids, labelled, self.row_multiple)
        ):
            columns = (input_ids, position_ids, document_ids, targets)
            *rows, targets = (column.flatten()[needed.places][None] for column in columns)
            targets[:, targets.shape[1] - needed.padding :] = IGNORED
            keep = targets != IGNORED
            unlabelled = (~keep).nonzero(as_tuple=True)[1]
            keep[:, unlabelled[: -int(keep.sum()) % self.row_multiple]] = True
            hidden, targets = self(*rows, keep, needed.documents), targets[keep]
        else:
            hidden, targets = self(input_ids, position_ids, document_ids, labelled), targets[labelled]
        return self.backend.cross_entropy(hidden, self.lm_head, targets), labelled.sum()
