"""Answer the test rows with the base model and with the adapter in one vLLM engine, score both, and apply the gates.

    python stages/eval_vllm.py [--params FILE]

Decoding is greedy, up to eval.max_tokens or the end-of-sequence token. Prompts are the token ids that prepare_data
wrote, so nothing is tokenized a second time. The loss on the validation rows is teacher-forced through vLLM's
prompt_logprobs and compared with the losses that the trainer and PEFT measured on the same rows.

The stage fails, with the numbers in one line, if the adapter changes too few answers or does not change the loss (vLLM
silently serves the base model when an adapter does not fit), and if the three losses differ. The answers of a failed
run are then in artifacts/answers.rejected.jsonl, and none of the files below is written.

With eval.engine: device (backend nxd), vLLM runs on Trainium with the Python of neuron.vllm_python. It gives no
prompt_logprobs there, so vLLM's losses are left out and the trainer's loss is compared with PEFT's.

With eval.adapter, a PEFT adapter from elsewhere is scored in the same way instead of the trained one. Its loss is then
only compared with the base model's.

Reads   artifacts/model, artifacts/adapter (and its SHA256SUMS), artifacts/prepared/{validation,test}.jsonl,
        metrics/finetune_lora.json (validation_loss), metrics/flatten_adapter.json (peft_validation_loss);
        artifacts/merged, for a vllm-neuron that loads no adapters
Writes  artifacts/answers.jsonl, metrics/eval_vllm.json, metrics/timing/eval_vllm.json,
        plots/exact_match_by_category.json
"""

from trnlora.cli import add_params, script_parser
from trnlora.errors import run
from trnlora.evaluation.run import evaluate
from trnlora.params import load_params


def main() -> None:
    parser = script_parser(__doc__)
    add_params(parser)
    args = parser.parse_args()
    evaluate(load_params(args.params))


if __name__ == "__main__":
    run(main)
