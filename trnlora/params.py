"""params.yaml as one validated model: an unknown key, a wrong type or an impossible combination is one clear line.

The comments in params.yaml say what each key means; types, bounds and rules between keys are here.
"""

import ipaddress
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    model_validator,
)

from trnlora import paths
from trnlora.errors import UserError
from trnlora.readers import StrictModel, checked, read_yaml

InstanceName = Literal[
    "trn1.2xlarge", "trn1.32xlarge", "trn2.3xlarge", "trn2.48xlarge", "trn3-gen1-server", "trn3-gen2-server"
]
# Of neuron.instance: null. The largest of each convert.hw_backend; only these have EFA and train together with others.
LARGEST: dict[str, InstanceName] = {"trn1": "trn1.32xlarge", "trn2": "trn2.48xlarge"}
# Ranks that AWS supports on an instance; the last is all logical cores. trn2's are those of joined cores
# (logical_core_size 2). Source: aws-neuron-sdk, archive/nxd-training/mlp.rst, "Currently we only support". It does not
# name trn2.3xlarge, whose one chip holds the first two of trn2.48xlarge's. It says nothing about trn3.
SUPPORTED_RANKS: dict[InstanceName, tuple[int, ...]] = {
    "trn1.2xlarge": (1, 2),
    "trn1.32xlarge": (1, 2, 8, 32),
    "trn2.3xlarge": (1, 4),
    "trn2.48xlarge": (1, 4, 16, 64),
}

# Bounds against slips of the keyboard: beyond them no machine, or a library that counts in 32 bits, could follow.
PositiveInt = Annotated[int, Field(ge=1, le=10**9)]
Tokens = Annotated[int, Field(ge=1, le=2**24)]  # of one sequence
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # torch multiplies it by 100,003 in 64 bits (training/batches.py)
Fraction = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("it holds a line break or another character that cannot be printed")
    if len(text.encode()) > PATH_MAX:
        raise ValueError(f"it is longer than {PATH_MAX} bytes, which no path may be")
    return text


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _host(text: str) -> str:
    is_name = len(text) <= 253 and re.fullmatch(r"(\w([\w-]{0,61}\w)?\.)*\w([\w-]{0,61}\w)?", text)
    if not is_name:
        try:
            ipaddress.ip_address(text)
        except ValueError:
            raise ValueError("it must be a host name or an address, without http://, brackets and port") from None
    return text


PATH_MAX = 4095  # of Linux
PrintableLine = Annotated[str, AfterValidator(_one_line)]  # ends up in a path, in a command or in one line of a log
FilePath = Annotated[PrintableLine, AfterValidator(_not_blank)]
Host = Annotated[PrintableLine, AfterValidator(_host)]


class Section(StrictModel):
    """A mistyped key is an error and not a silent default; true is not 1."""


class Model(Section):
    source: Annotated[PrintableLine, StringConstraints(pattern=r"^(hf|pypi|path)://.+")]
    sha256: Sha256 | None
    dtype: Literal["float32", "bfloat16", "float16"]


def _not_s3(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("s3://"):
        name = value.rpartition("/")[2] or "NAME"
        raise ValueError(
            f"import it with `dvc import-url {value} data/{name}`, which keeps its version, and write path://data/{name}"
        )
    return value


DataUri = Annotated[PrintableLine, BeforeValidator(_not_s3), StringConstraints(pattern=r"^(hf|path)://.+")]
AdapterUri = Annotated[PrintableLine, StringConstraints(pattern=r"^(hf|path)://.+")]
FormatName = Literal["instruction", "prompt_completion", "messages", "sharegpt"]


class DataSource(Section):
    """One of several sources of rows. Keys that it leaves out are those of `data`."""

    source: DataUri
    sha256: Sha256 | None = None
    format: Literal["auto"] | FormatName | None = None
    columns: dict[str, str] | None = None
    config: str | None = None  # of a hub data set
    split: str | None = None  # of a hub data set
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0  # how often each training row is used; a fraction draws rows
    rows: PositiveInt | None = None  # at most so many training rows


# One URI or a list of sources. The tags choose which of the two an error is about, and are not shown: see `_explain`.
DataSources = Annotated[
    Annotated[DataUri, Tag("")] | Annotated[list[DataSource], Field(min_length=1), Tag(" ")],
    Discriminator(lambda value: " " if isinstance(value, list) else ""),
]


# What the renderer gives to a chat template, and what has a meaning in Jinja.
RESERVED_VARIABLES = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token",
    "unk_token", "pad_token", "raise_exception", "strftime_now", "loop", "self", "super", "caller", "varargs", "kwargs",
    "range", "dict", "namespace", "cycler", "joiner", "lipsum", "true", "false", "none", "True", "False", "None", "and",
    "or", "not", "in", "is", "if", "else", "elif", "for", "recursive", "set", "import", "from", "include",
}  # fmt: skip


class Data(Section):
    source: DataSources
    sha256: Sha256 | None
    format: Literal["auto"] | FormatName
    columns: dict[str, str]
    categories: list[str] | None
    prompt_template: Annotated[PrintableLine, StringConstraints(pattern=r"^(alpaca|dolly|chat|path://.+)$")]
    template_kwargs: dict[str, str | int | float | bool | None]
    mask_history: bool
    deduplicate: bool
    special_tokens: Literal["refuse", "as_text", "keep"]
    seq_len: Annotated[Tokens, Field(ge=8)]
    overlong: Literal["drop", "truncate"]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    packing: bool
    seed: Seed

    @model_validator(mode="after")
    def leaves_rows_to_train_on(self) -> "Data":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1, or no row is left to train on")
        return self

    @model_validator(mode="after")
    def variables_have_names_of_their_own(self) -> "Data":
        for name in self.template_kwargs:
            if not (name.isascii() and name.isidentifier()) or name in RESERVED_VARIABLES:
                raise ValueError(
                    f"template_kwargs: {json.dumps(name)[:60]} cannot be the name of a template's variable"
                )
        return self

    @model_validator(mode="after")
    def checksums_are_of_sources(self) -> "Data":
        if self.sha256 is not None and not isinstance(self.source, str):
            raise ValueError("sha256 is that of a single data.source: with a list, each source has its own sha256")
        return self


class Convert(Section):
    hw_backend: Literal["trn1", "trn2"]
    tp_size: Annotated[int, Field(ge=1, le=1024)]
    kv_size_multiplier: PositiveInt
    max_logits_diff: Annotated[float, Field(gt=0)]
    buffer_mib: Annotated[int, Field(ge=1, le=2**16)]

    @model_validator(mode="after")
    def multiplier_divides_tp(self) -> "Convert":
        if self.tp_size % self.kv_size_multiplier:
            raise ValueError(
                f"tp_size {self.tp_size} must be a multiple of kv_size_multiplier {self.kv_size_multiplier}"
            )
        return self


# PEFT's names of a decoder's linear layers, and NxD's for the first three together.
TargetModule = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"]


# The values of vLLM's --max-lora-rank (vllm/config/lora.py, MaxLoRARanks). An adapter may have any rank up to one.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Lora(Section):
    r: Annotated[int, Field(ge=1, le=MAX_LORA_RANKS[-1])]
    lora_alpha: PositiveInt
    use_rslora: bool
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | Annotated[list[TargetModule], Field(min_length=1)]
    share_a: bool
    init_adapter: AdapterUri | None

    @model_validator(mode="before")
    @classmethod
    def no_dora(cls, values: Any) -> Any:
        if isinstance(values, dict) and "use_dora" in values:
            raise ValueError(
                "use_dora is not supported: DoRA needs the norms of whole columns of weight + update at every step, "
                "which NxD's LoRA does not compute and vLLM does not serve"
            )
        return values

    @property
    def scaling(self) -> float:
        """The factor on B(A(x)), as in PEFT."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Neuron(Section):
    instance: InstanceName | None
    python: FilePath | None
    vllm_python: FilePath | None
    logical_core_size: Literal[1, 2]
    sequence_parallel: bool
    selective_checkpointing: bool
    cc_flags: PrintableLine
    compile_cache: FilePath


class Flatten(Section):
    merged_model: bool


class Train(Section):
    epochs: Annotated[int, Field(ge=1, le=10**6)]
    max_steps: PositiveInt | None
    lr: Annotated[float, Field(gt=0)]
    schedule: Literal["linear", "cosine", "constant", "wsd"]
    warmup_ratio: Fraction
    decay_ratio: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    dp_size: Annotated[int, Field(ge=1, le=2**16)]
    micro_batch_size: Annotated[int, Field(ge=1, le=2**16)]
    global_batch_size: PositiveInt
    activation_checkpointing: bool
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    matmul_precision: Literal["highest", "bf16"]
    validate_every_steps: PositiveInt | None
    keep: Literal["last", "best"]
    early_stopping_patience: PositiveInt | None
    checkpoint_every_steps: PositiveInt
    checkpoints_kept: PositiveInt
    loggers: list[Literal["tensorboard", "mlflow", "wandb"]]
    seed: Seed

    @model_validator(mode="before")
    @classmethod
    def max_steps_is_not_minus_one(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("max_steps") == -1:
            raise ValueError(
                "max_steps: -1 is refused, since a schedule over -1 steps has a learning rate of 0 after warm-up; "
                "write null for the steps that epochs and data give"
            )
        return values

    @model_validator(mode="after")
    def global_batch_is_whole(self) -> "Train":
        if self.global_batch_size % (self.micro_batch_size * self.dp_size):
            raise ValueError(
                f"global_batch_size {self.global_batch_size} must be a multiple of "
                f"micro_batch_size × dp_size = {self.micro_batch_size * self.dp_size}"
            )
        return self

    @model_validator(mode="after")
    def warmup_ends_before_decay(self) -> "Train":
        if self.schedule == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise ValueError(
                f"schedule wsd: warmup_ratio {self.warmup_ratio} + decay_ratio {self.decay_ratio} must be at most 1"
            )
        return self


class Eval(Section):
    adapter: AdapterUri | None
    engine: Literal["host", "device"]
    max_tokens: Tokens
    max_prompts: PositiveInt | None
    min_changed_fraction: Fraction
    max_loss_gap: Annotated[float, Field(gt=0)]


class Serve(Section):
    host: Host
    port: Annotated[int, Field(ge=1, le=65535)]
    max_model_len: Tokens
    max_num_seqs: Annotated[int, Field(ge=1, le=2**16)]
    max_loras: Annotated[int, Field(ge=1, le=1000)]
    runtime_adapters: bool
    kv_cache_gib: Annotated[int, Field(ge=1, le=2**16)]


class Params(Section):
    backend: Literal["cpu", "cuda", "neuron", "nxd"]
    model: Model
    data: Data
    convert: Convert
    lora: Lora
    train: Train
    flatten: Flatten
    eval: Eval
    serve: Serve
    neuron: Neuron

    @property
    def on_trainium(self) -> bool:
        return self.backend in ("neuron", "nxd")

    @model_validator(mode="after")
    def combinations_that_run(self) -> "Params":
        if self.eval.max_tokens >= self.serve.max_model_len:
            raise ValueError(
                f"eval.max_tokens {self.eval.max_tokens} leaves no room for a prompt in "
                f"serve.max_model_len {self.serve.max_model_len}"
            )
        if self.data.seq_len >= self.serve.max_model_len:
            # prompt_logprobs of a row of seq_len tokens asks vLLM for one more.
            raise ValueError(
                f"serve.max_model_len {self.serve.max_model_len} must be above data.seq_len {self.data.seq_len}, "
                "or eval_vllm cannot score the longest validation row"
            )
        if self.eval.engine == "device" and self.backend != "nxd":
            raise ValueError(f"eval.engine: device is for backend nxd; with backend {self.backend}, write host")
        if self.train.matmul_precision == "bf16" and (self.backend, self.model.dtype) != ("cpu", "float32"):
            raise ValueError("train.matmul_precision: bf16 is for backend cpu with model.dtype float32; write highest")
        if self.backend == "nxd":
            self._check_nxd()
        if self.backend == "neuron" and self.convert.hw_backend == "trn1":
            raise ValueError("backend: neuron (native PyTorch) needs convert.hw_backend trn2; trn1 has nxd only")
        if self.on_trainium:
            self._check_trainium()
        return self

    def _check_nxd(self) -> None:
        if self.train.activation_checkpointing:
            raise ValueError("train.activation_checkpointing: on nxd it is neuron.selective_checkpointing instead")
        if self.neuron.sequence_parallel and self.data.seq_len % self.convert.tp_size:
            raise ValueError(
                f"neuron.sequence_parallel cuts data.seq_len {self.data.seq_len}, which must be a multiple of "
                f"convert.tp_size {self.convert.tp_size}"
            )
        if not self.lora.share_a:
            raise ValueError("lora.share_a: false is not supported on nxd: NxD's layers of q, k and v have one input")

    def _check_trainium(self) -> None:
        if self.model.dtype == "float16":
            raise ValueError("model.dtype: float16 is not supported on Trainium; write bfloat16 or float32")
        if self.convert.hw_backend == "trn1" and self.neuron.logical_core_size != 1:
            raise ValueError("neuron.logical_core_size must be 1 on trn1, whose cores cannot be joined")
        self._check_instance()
        ranks, supported = self.train.dp_size * self.convert.tp_size, supported_ranks(self)
        if supported is None or ranks in supported:
            return
        name = instance_name(self)
        several = name in LARGEST.values()
        if not several or ranks % supported[-1] or self.convert.tp_size > supported[-1]:
            raise ValueError(
                f"train.dp_size {self.train.dp_size} × convert.tp_size {self.convert.tp_size} is {ranks} ranks, which "
                f"AWS does not support on {name}: choose them for {', '.join(map(str, supported))}"
                + (f", or for several full instances with {supported[-1]} each" if several else "")
            )

    def _check_instance(self) -> None:
        name = instance_name(self)
        generation = name[: len("trn1")]
        if generation == "trn3" and self.backend == "nxd":
            raise ValueError(f"neuron.instance {name} needs backend: neuron; nxd has trn1 and trn2 only")
        if ("trn1" if generation == "trn1" else "trn2") != self.convert.hw_backend:
            raise ValueError(f"neuron.instance {name} does not fit convert.hw_backend {self.convert.hw_backend}")


def instance_name(params: Params) -> InstanceName:
    """The machine that the params are for."""
    return params.neuron.instance or LARGEST[params.convert.hw_backend]


def supported_ranks(params: Params) -> tuple[int, ...] | None:
    """The numbers of ranks that AWS supports on one instance; None where it says nothing (trn3, cores not joined)."""
    name = instance_name(params)
    if name.startswith("trn2") and params.neuron.logical_core_size != 2:
        return None
    return SUPPORTED_RANKS.get(name)


def load_params(path: Path = paths.PARAMS) -> Params:
    """Read and check a params file.

    Raises UserError with one line that names the file, the key and what is wrong with it.
    """
    return check_params(read_mapping(path), path)


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys of a YAML file. Raises UserError where it is missing, is not valid YAML or holds no keys."""
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys: `make profile NAME=smollm2-135m-cpu` writes params.yaml")
    return values


def check_params(values: dict[str, Any], path: Path) -> Params:
    """`values` of the file `path` as Params. Raises UserError with one line that names `path` and what is wrong."""
    return checked(values, Params, str(path))
