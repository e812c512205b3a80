"""Where the stages read and write, relative to the project's root. dvc.yaml names the same paths."""

from pathlib import Path

PARAMS = Path("params.yaml")
PARAMS_CHECKED = Path("artifacts/params_checked")  # check_params: always the same bytes

MODEL = Path("artifacts/model")  # fetch_model: the HF folder
MODEL_CONFIG = MODEL / "config.json"
PREPARED = Path("artifacts/prepared")  # prepare_data: packed rows (parquet) and examples (jsonl)
SHARDS = Path("artifacts/shards")  # convert_nxd: pretrained_weight/model/dp_rank_00_tp_rank_RR_pp_rank_00.pt
LORA_SHARDS = Path("artifacts/lora_adapter")  # finetune_lora: lora/model/…pt and adapter_config.json, as NxD has them
ADAPTER = Path("artifacts/adapter")  # flatten_adapter: the PEFT folder
ADAPTER_SUMS = Path("artifacts/adapter.SHA256SUMS")
MERGED = Path("artifacts/merged")  # flatten_adapter: base + adapter as an HF folder; empty without flatten.merged_model
ANSWERS = Path("artifacts/answers.jsonl")  # eval_vllm: prompt, reference, base and tuned answers
OUTPUTS = (MODEL, PREPARED, SHARDS, LORA_SHARDS, ADAPTER, ANSWERS)  # one of each stage

METRICS = Path("metrics")  # <stage>.json, tracked by git so that `dvc metrics diff` needs no remote
PLOTS = Path("plots")
CURVES = PLOTS / "training"  # finetune_lora: DVCLive's curves
CATEGORY_PLOT = PLOTS / "exact_match_by_category.json"  # eval_vllm

# What finetune_lora reads, and writes beside its metrics. The launcher looks at their locks before the first rank does.
TRAINING_INPUTS = (MODEL, PREPARED, SHARDS)
TRAINING_OUTPUTS = (LORA_SHARDS, CURVES)
