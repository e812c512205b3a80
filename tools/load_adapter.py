"""Add PEFT adapters to the running server by name, where serve.runtime_adapters allowed it when the server started.

    python tools/load_adapter.py [--params FILE] [--host HOST] [--port PORT] NAME=FOLDER …     (make load ADAPTERS=)

Each is checked as `make serve` checks those it starts with. The server has room for adapters on q, k and v, of rank up
to lora.r, and for serve.max_loras of them. A server with an API key wants VLLM_API_KEY here too.
"""

import argparse
from pathlib import Path

from trnlora import paths
from trnlora.errors import UserError, run
from trnlora.params import load_params
from trnlora.serving import vllm_args as serving
from trnlora.serving.adapters import check_adapter, parse_adapters
from trnlora.serving.client import request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=paths.PARAMS, help="params file (default: %(default)s)")
    parser.add_argument("--host", help="address of the server (default: serve.host)")
    parser.add_argument("--port", type=int, help="port of the server (default: serve.port)")
    parser.add_argument("adapters", nargs="+", metavar="NAME=FOLDER")
    args = parser.parse_args()

    params = load_params(args.params)
    if not params.serve.runtime_adapters:
        raise UserError(
            "serve.runtime_adapters is false: write true and start the server anew, or serve with ADAPTERS="
        )
    url = serving.base_url(args.host or params.serve.host, args.port or params.serve.port)
    room = serving.engine_args(params)
    for name, folder in parse_adapters(args.adapters).items():
        adapter = check_adapter(folder, paths.MODEL, name)
        if unserved := sorted(adapter.modules - {"q_proj", "k_proj", "v_proj"}):
            raise UserError(f"{folder} changes {', '.join(unserved)}, which the running server leaves as they are: "
                            "start it anew with ADAPTERS=")  # fmt: skip
        if adapter.r > room["max_lora_rank"]:
            raise UserError(f"{folder} has rank {adapter.r}, the running server has room for {room['max_lora_rank']}: "
                            "start it anew with ADAPTERS=")  # fmt: skip
        served = [model["id"] for model in request(url, "/v1/models")["data"] if model["id"] != serving.BASE]
        if name in served:
            raise UserError(f"the server has an adapter {name!r} already: give this one another name")
        # More than that many would take vLLM's last slot, which answers for the base: see serving.engine_args.
        if len(served) >= params.serve.max_loras:
            raise UserError(f"the server has {len(served)} adapters and serve.max_loras is {params.serve.max_loras}: "
                            "raise it and start the server anew")  # fmt: skip
        request(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        print(f"{name} is served from {folder}")


if __name__ == "__main__":
    run(main)
