"""Conversations of several turns through the real stages: what is trained on, scored and answered is the same."""

import json
from pathlib import Path

import pytest
import torch
from support.records import write_fetched
from support.stages import metrics, run_stage, set_params

from trnlora.data.examples import read_examples, reference

pytestmark = pytest.mark.slow

TOPICS = ("lamp", "chair", "table", "clock", "plate", "spoon", "towel", "bottle", "candle", "basket")


def conversation(number: int) -> list[dict[str, str]]:
    """A row of two or three questions. A later answer depends on what was said before."""
    name, price = f"{TOPICS[number % 10]} {number}", 3 + number % 7
    turns = [
        ("system", "Answer as the shop's till."),
        ("user", f"One {name} costs {price}. What is it?"),
        ("assistant", f"A {name}."),
        ("user", "And two of them?"),
        ("assistant", f"They cost {2 * price}."),
        ("user", "Thank you!"),
        ("assistant", "Goodbye."),
    ][number % 2 : 5 + number % 3 // 2 * 2]
    return [{"role": role, "content": content} for role, content in turns]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A folder with an adapter trained on conversations, and the answers of it."""
    folder = tmp_path_factory.mktemp("conversations")
    (folder / "artifacts").mkdir()
    (folder / "artifacts" / "model").symlink_to(tiny_llama)
    rows = (json.dumps({"messages": conversation(number)}) + "\n" for number in range(100))
    (folder / "rows.jsonl").write_text("".join(rows), "utf-8")
    set_params(
        folder,
        data={"source": "path://rows.jsonl", "sha256": None, "seq_len": 256, "prompt_template": "chat"},
        lora={"lora_dropout": 0.05},
        train={"max_steps": 8, "lr": 1.0e-2},
        eval={"max_tokens": 8, "max_prompts": 8, "min_changed_fraction": 0.0, "max_loss_gap": 1.0e-4},
    )
    write_fetched(folder)
    for name in ("prepare_data", "convert_nxd", "finetune_lora", "flatten_adapter", "eval_vllm"):
        run_stage(name, folder)
    return folder


def test_trainer_peft_and_vllm_measure_the_same_loss(folder: Path) -> None:
    trained, flat, served = (metrics(folder, name) for name in ("finetune_lora", "flatten_adapter", "eval_vllm"))
    assert trained["validation_loss"] < trained["base_validation_loss"] - 0.1
    assert flat["trainer_peft_loss_gap"] < 1e-5
    assert served["loss_gap_trainer"] < 1e-5


def test_every_answer_is_labelled_and_the_loss_is_that_of_hf_with_its_own_mask(folder: Path, tiny_llama: Path) -> None:
    """The base model's loss on the labels of HF's assistant mask, from its chat template with `generation` marks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
        "{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    nats, labelled = 0.0, 0
    examples = read_examples(folder / "artifacts/prepared/validation.jsonl")
    for example in examples:
        encoded = tokenizer.apply_chat_template(
            example["messages"], chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]  # type: ignore[call-overload, index]
        length = len(example["token_ids"])
        assert ids[:length] == example["token_ids"]  # HF's has the line break behind the last <|im_end|> too
        spans = [position for start, end in example["labelled"] for position in range(start, end)]
        assert spans == [position for position, is_answer in enumerate(mask) if is_answer]
        assert len(example["labelled"]) == sum(message["role"] == "assistant" for message in example["messages"])
        with torch.no_grad():
            logits = model(torch.tensor([example["token_ids"]])).logits[0].log_softmax(-1)
        nats -= sum(logits[position - 1, example["token_ids"][position]].item() for position in spans)
        labelled += len(spans)
    assert len({len(example["labelled"]) for example in examples}) > 1
    base = metrics(folder, "finetune_lora")["base_validation_loss"]
    assert nats / labelled == pytest.approx(base, abs=1e-5)
    assert metrics(folder, "prepare_data")["validation"]["labelled_tokens"] == labelled


def test_the_models_are_asked_for_the_last_answer(folder: Path) -> None:
    examples = read_examples(folder / "artifacts/prepared/test.jsonl")
    answers = [json.loads(line) for line in (folder / "artifacts/answers.jsonl").read_text("utf-8").splitlines()]
    by_id = {example["id"]: example for example in examples}
    assert answers
    for answer in answers:
        example = by_id[answer["id"]]
        assert answer["reference"] == reference(example) == example["messages"][-1]["content"]
        assert answer["prompt"].endswith("<|im_start|>assistant\n")
        assert example["messages"][-2]["content"] in answer["prompt"]
