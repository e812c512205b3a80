"""Add PEFT adapters to the running server by name, if it was started with serve.runtime_adapters: true.

    python tools/load_adapter.py [--params FILE] [--host HOST] [--port PORT] NAME=FOLDER …     (make load ADAPTERS=)

Each adapter is checked in the same way as those that `make serve` starts with, and must have been trained with the
prompt template that the server has. The server has room for serve.max_loras adapters on the layers of
lora.target_modules, of rank up to lora.r. If the server has an API key, set VLLM_API_KEY here too.
"""

from trnlora import paths
from trnlora.cli import add_params, add_server, script_parser, server_address
from trnlora.errors import UserError, run
from trnlora.model.targets import peft_modules
from trnlora.params import Params, load_params
from trnlora.serving import client
from trnlora.serving.adapters import BASE, Adapter, check_adapter, parse_adapters
from trnlora.serving.prompts import check_template_of_server
from trnlora.serving.vllm_args import max_lora_rank
from trnlora.weights.adapter_source import adapter_folder


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    add_server(parser)
    parser.add_argument("adapters", nargs="+", metavar="NAME=FOLDER", help="PEFT folders, or bundles")
    args = parser.parse_args()

    params = load_params(args.params)
    if not params.serve.runtime_adapters:
        raise UserError("serve.runtime_adapters is false: set it to true and restart the server, or use ADAPTERS=")
    url = client.base_url(*server_address(args, params))
    for name, path in parse_adapters(args.adapters).items():
        folder = adapter_folder(path)
        adapter = check_adapter(folder, paths.MODEL, name)
        check_room(adapter, [model for model in client.served_models(url) if model != BASE], params)
        check_template_of_server(adapter, url, params)
        client.request(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        print(f"{name} is served from {path}")


def check_room(adapter: Adapter, served: list[str], params: Params) -> None:
    """Raise UserError if the running server, which has the adapters `served`, has no room for this one."""
    restart = "restart it with ADAPTERS="
    if others := sorted(adapter.modules - set(peft_modules(params.lora.target_modules))):
        raise UserError(
            f"{adapter.folder} changes {', '.join(others)}, to which the running server applies no adapter: {restart}"
        )
    if adapter.r > max_lora_rank(params.lora.r):
        raise UserError(
            f"{adapter.folder} has rank {adapter.r}, the running server has room for rank "
            f"{max_lora_rank(params.lora.r)}: {restart}"
        )
    if adapter.name in served:
        raise UserError(f"the server already has an adapter {adapter.name!r}: choose another name")
    # One more would take vLLM's last slot, which must stay empty: see vllm_args.engine_args.
    if len(served) >= params.serve.max_loras:
        raise UserError(
            f"the server has {len(served)} adapters and serve.max_loras is {params.serve.max_loras}: "
            "raise it and restart the server"
        )


if __name__ == "__main__":
    run(main)
