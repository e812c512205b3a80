"""trnlora.json: what an adapter was trained with is read from its folder, and what contradicts it is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.evaluation import EvalWorker
from support.records import OTHER_DIGEST, record, write_fetched, write_prepared_with, write_record, write_trained_with
from support.server import Server, assert_one_line, script
from support.stages import metrics, set_params

from trnlora.data.examples import prompt_token_ids, read_examples
from trnlora.data.templates import load_template
from trnlora.errors import UserError
from trnlora.evaluation.run import read_inputs
from trnlora.files import SUMS, sha256, write_json, write_sums
from trnlora.params import load_params
from trnlora.readers import read_json
from trnlora.serving.adapters import Adapter, check_adapter, common_generation
from trnlora.serving.prompts import template_to_serve
from trnlora.sources import without_machine_path
from trnlora.training.adapter_record import GREEDY, AdapterRecord, make_record, read_record
from trnlora.weights.peft_folder import RECORD


def edited(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of nested values with another one at `key`, such as base_model.source; None: without it."""
    copy: dict[str, Any] = json.loads(json.dumps(values))
    *outer, last = key.split(".")
    inner = copy
    for name in outer:
        inner = inner[name]
    inner[last] = value
    if value is None:
        del inner[last]
    return copy


# The file


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format: Input should be 1 (it is 2)"),
        ("format", None, "format is missing"),
        ("template.jinja", 7, "template.jinja: Input should be a valid string (it is 7)"),
        ("base_model.sha256", {}, "base_model.sha256: Dictionary should have at least 1 item"),
        ("base_model.sha256", {"model.safetensors": "abc"}, "base_model.sha256.model.safetensors: String should match"),
        ("data.files", [], "data.files: List should have at least 1 item"),
        ("params.data.prompt_template", "alpaca", "params_sha256 is not that of params: one of them was edited"),
        ("generation.temperature", "0", "generation.temperature: Input should be a valid number; write it unquoted"),
        ("generation.temperature", -1, "generation.temperature: Input should be greater than or equal to 0"),
        ("generation.max_new_tokens", 5, "generation.max_new_tokens is not a known key"),
        ("trained_at", "today", "trained_at is not a known key"),
    ],
)
def test_a_damaged_record_is_refused(tiny_llama: Path, tmp_path: Path, key: str, value: Any, message: str) -> None:
    write_json(tmp_path / RECORD, edited(record(tiny_llama), key, value))
    with pytest.raises(UserError) as caught:
        read_record(tmp_path)
    assert f"{tmp_path / RECORD}: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", '{"format": NaN}', "\xff", "[" * 100_000], ids=lambda text: repr(text[:9])
)
def test_what_is_not_a_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=RECORD) as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_link_to_a_record_that_is_gone_is_not_an_adapter_without_one(tmp_path: Path) -> None:
    (tmp_path / RECORD).symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"trnlora\.json is missing"):
        read_record(tmp_path)


def test_a_plain_peft_folder_has_no_record(others: list[Path], tiny_llama: Path) -> None:
    assert read_record(others[0]) is None
    assert check_adapter(others[0], tiny_llama, "first").record is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("path:///home/me/rows.jsonl", "path://…/rows.jsonl"),
        ("path://data/rows.jsonl", "path://data/rows.jsonl"),
        ("/home/me/rows.jsonl", "…/rows.jsonl"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("hf://org/name@abc", "hf://org/name@abc"),
        ("hf://org/name@abc/train.parquet", "hf://org/name@abc/train.parquet"),
    ],
)
def test_no_path_of_the_machine_is_shown(text: str, shown: str) -> None:
    assert without_machine_path(text) == shown


@pytest.fixture
def root(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: what the stages before flatten_adapter record. Rows were rendered with dolly."""
    set_params(tmp_path, data={"prompt_template": "dolly"})
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/model").symlink_to(tiny_llama)
    write_prepared_with(tmp_path / "artifacts/prepared")
    write_trained_with(tmp_path)
    write_fetched(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_record_has_what_was_used_and_not_what_params_say_now(root: Path) -> None:
    set_params(root, data={"prompt_template": "alpaca"}, train={"lr": 0.5}, model={"source": "path:///elsewhere"})
    made = make_record()
    assert made.template.model_dump() == load_template("dolly", {}, None).model_dump()
    assert made.params["train"]["lr"] == 0.001
    assert made.base_model.source == "path://…/tiny"
    assert made.base_model.sha256["model.safetensors"] == sha256(root / "artifacts/model/model.safetensors")
    assert made.data.prepared_sha256 == sha256(root / "artifacts/prepared" / SUMS)
    assert made.generation == GREEDY
    assert make_record() == made
    write_json(root / "adapter" / RECORD, made.model_dump())
    assert read_record(root / "adapter") == made


def rerender(root: Path) -> None:
    write_prepared_with(root / "artifacts/prepared", "alpaca")


def other_model(root: Path) -> None:
    fetched = read_json(root / "metrics/fetch_model.json")
    write_json(root / "metrics/fetch_model.json", fetched | {"sha256": {"model.safetensors": OTHER_DIGEST}})


def other_config(root: Path) -> None:
    source = (root / "artifacts/model").resolve()
    (root / "artifacts/model").unlink()
    shutil.copytree(source, root / "artifacts/model")
    (root / "artifacts/model/config.json").write_text("{}", "utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rerender, "artifacts/prepared/SHA256SUMS is not the one that artifacts/lora_adapter was trained with"),
        (other_config, "artifacts/model/config.json is not the one that artifacts/lora_adapter was trained with"),
        (other_model, "metrics/fetch_model.json is not of the weights in artifacts/model: run `dvc repro -f fetch_"),
        (lambda root: (root / "metrics/fetch_model.json").write_text("{}"), "fetch_model.json: source: Input should"),
        (lambda root: (root / "metrics/fetch_model.json").unlink(), "fetch_model.json is missing"),
        (lambda root: (root / "artifacts/lora_adapter/training.json").unlink(), "training.json is missing"),
        (lambda root: (root / "artifacts/prepared/prepared.json").write_text("{}"), "prepared.json is damaged"),
        (lambda root: (root / "artifacts/prepared/sources.json").write_text("{}"), "sources.json: Input should be a"),
    ],
)
def test_a_record_of_other_rows_or_another_model_is_not_written(
    root: Path, change: Callable[[Path], Any], message: str
) -> None:
    change(root)
    with pytest.raises(UserError) as caught:
        make_record()
    assert message in str(caught.value)


# What contradicts a record, before any engine starts


@pytest.mark.parametrize("files", [{"model.safetensors": OTHER_DIGEST}, {"model-00001-of-00001.safetensors": "1" * 64}])
def test_an_adapter_of_other_weights_is_refused(
    adapter: Path, tiny_llama: Path, tmp_path: Path, files: dict[str, str]
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    write_json(folder / RECORD, edited(record(tiny_llama), "base_model.sha256", files))
    message = r"adapter x: .*was trained on other weights than those of .*: on path://…/tiny, whose model\S* has sha256"
    with pytest.raises(UserError, match=message):
        check_adapter(folder, tiny_llama, "x")


def adapters(model: Path, *recorded: dict[str, Any] | None) -> list[Adapter]:
    """Adapters a, b, … with these changes to `record`; None: without a record."""
    return [
        Adapter(name, Path(name), 16, frozenset(), None if values is None else AdapterRecord(**record(model, **values)))
        for name, values in zip("abc", recorded, strict=False)
    ]


@pytest.mark.parametrize(
    ("recorded", "now", "served", "printed"),
    [
        ([{}], "dolly", "dolly", ""),
        ([{}, {}], "dolly", "dolly", ""),
        ([{}], "alpaca", "dolly", "params.yaml has the prompt template alpaca (sha256 "),
        ([{"template": "alpaca"}], "path://gone.jinja", "alpaca", "params.yaml's cannot be loaded"),
        ([{"template": "alpaca"}, None], "alpaca", "alpaca", "b: no trnlora.json says the prompt template"),
        ([None, None], "alpaca", "alpaca", "a, b: no trnlora.json says the prompt template of the training; alpaca"),
    ],
    ids=str,
)
def test_the_server_has_the_template_of_its_adapters(
    root: Path, recorded: list[Any], now: str, served: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(root, data={"prompt_template": now})
    found = template_to_serve(adapters(root / "artifacts/model", *recorded), load_params())
    assert found.jinja == load_template(served, {}, None).jinja
    out = capsys.readouterr().out
    assert printed in out
    assert bool(printed) == bool(out)


def test_the_variables_of_a_template_count(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    set_params(root, data={"template_kwargs": {"date_string": "26 Jul 2024"}})
    template_to_serve(adapters(root / "artifacts/model", {}), load_params())
    assert "params.yaml has the prompt template dolly (sha256 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("jinja", "message"),
    [("{% for %}", "refuses a conversation: "), ("Hello", "leaves out or changes the text of a user")],
)
def test_a_recorded_template_that_cannot_be_used_is_refused_before_vllm_starts(
    root: Path, jinja: str, message: str
) -> None:
    values = edited(record(root / "artifacts/model"), "template.jinja", jinja)
    broken = Adapter("x", Path("x"), 16, frozenset(), AdapterRecord(**values))
    with pytest.raises(UserError, match=rf"the prompt template in the trnlora\.json of x cannot be used: .*{message}"):
        template_to_serve([broken], load_params())


def test_adapters_that_contradict_each_other_are_refused(root: Path) -> None:
    model = root / "artifacts/model"
    with pytest.raises(UserError, match=r"the adapters a and b .*different prompt templates \(dolly .*; alpaca .*\)"):
        template_to_serve(adapters(model, {}, {"template": "alpaca"}), load_params())
    with pytest.raises(UserError, match=r"the adapters a and b .*other sampling \(greedy; temperature 0\.7\)"):
        common_generation(adapters(model, {}, {"temperature": 0.7}))
    assert common_generation(adapters(model, None, {"temperature": 0.7})).temperature == 0.7
    assert common_generation(adapters(model, None)) == GREEDY


def test_serve_starts_nothing_when_adapters_contradict_each_other(
    workdir: Path, adapter: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    other = write_record(Path(shutil.copytree(adapter, tmp_path / "other")), tiny_llama, template="alpaca")
    done = script("tools/serve.py", "--dry-run", "--adapters", f"a={adapter}", f"b={other}", cwd=workdir)
    assert_one_line(done, "the adapters a and b", "dolly", "alpaca", "start a server for each")
    assert done.stdout == ""
    done = script("tools/serve.py", "--dry-run", cwd=workdir)  # its params.yaml has alpaca
    assert "params.yaml has the prompt template alpaca" in done.stdout
    assert "tuned was trained with dolly" in done.stdout


def test_serve_refuses_an_adapter_that_was_edited(evaluated: Path, tmp_path: Path) -> None:
    """A template that somebody changed in trnlora.json would be served, but was not evaluated."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "edited", symlinks=True))
    file = folder / "artifacts/adapter" / RECORD
    file.write_text(file.read_text("utf-8").replace("### Response", "### Answer"), "utf-8")
    done = script("tools/serve.py", "--dry-run", cwd=folder)
    assert_one_line(done, "artifacts/adapter/trnlora.json is damaged", "run `dvc repro -f flatten_adapter`")


@pytest.fixture
def scored(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `evaluated`, as the working directory."""
    folder = Path(shutil.copytree(evaluated, tmp_path / "scored", symlinks=True))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "data.prepared_sha256",
            OTHER_DIGEST,
            "artifacts/adapter was trained on other rows than artifacts/prepared has",
        ),
        ("template.jinja", "{{ messages }}", "artifacts/adapter was trained with the prompt template dolly (sha256 "),
        ("template.name", "alpaca", "artifacts/adapter was trained with the prompt template alpaca (sha256 "),
        ("base_model.sha256", {"model.safetensors": OTHER_DIGEST}, "artifacts/adapter was trained on other weights"),
        ("generation.temperature", 0.7, "artifacts/adapter was evaluated with temperature 0.7, and here answers are"),
    ],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_eval_refuses_what_contradicts_the_record(
    scored: Path, tiny_llama: Path, key: str, value: Any, message: str, elsewhere: bool
) -> None:
    """For the pipeline's own adapter, and for the same one as eval.adapter, which may be of other rows."""
    own = scored / "artifacts/adapter"
    values = edited(record(tiny_llama, prepared=scored / "artifacts/prepared"), key, value)
    write_json(own / RECORD, values)
    write_sums(own, scored / "artifacts/adapter.SHA256SUMS")
    if elsewhere:
        set_params(scored, eval={"adapter": "path://artifacts/adapter"})
        message = message.replace("artifacts/adapter was trained w", "eval.adapter artifacts/adapter was trained w")
    if elsewhere and key.startswith("data."):
        assert read_inputs(load_params()).adapter.record
        return
    with pytest.raises(UserError) as caught:
        read_inputs(load_params())
    assert message in str(caught.value)


def test_eval_says_which_template_it_assumes(
    scored: Path, others: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    set_params(scored, eval={"adapter": f"path://{others[0]}"})
    read_inputs(load_params())
    assert f"eval.adapter {others[0]} has no trnlora.json, which would say its prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("template.jinja", "{{ messages }}", "was trained with the prompt template dolly (sha256 "),
        ("base_model.sha256", {"model.safetensors": OTHER_DIGEST}, "was trained on other weights than those of"),
    ],
)
def test_training_does_not_go_on_from_an_adapter_that_contradicts(
    root: Path, adapter: Path, tiny_llama: Path, key: str, value: Any, message: str
) -> None:
    shutil.copytree(adapter, root / "init")
    write_json(root / "init" / RECORD, edited(record(tiny_llama), key, value))
    lora = {"r": 16, "lora_alpha": 32, "target_modules": ["qkv_proj"], "share_a": False}
    set_params(root, lora=lora | {"init_adapter": "path://init"})
    assert_one_line(script("stages/finetune_lora.py", cwd=root), f"lora.init_adapter init {message}")


# Through the real stages and the real vLLM


@pytest.mark.slow
def test_served_is_what_was_evaluated(server: Server, evaluated: Path, eval_worker: EvalWorker, tmp_path: Path) -> None:
    """A request without any sampling settings gets the answer that eval_vllm scored.

    Although the model's generation_config.json has a repetition penalty, a temperature and a limit of 3 tokens, and
    the server's params.yaml another prompt template.
    """
    folder = Path(shutil.copytree(evaluated, tmp_path / "copy", symlinks=True))
    set_params(folder, eval={"max_prompts": 4})
    done = eval_worker.evaluate(folder)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (folder / "artifacts/answers.jsonl").open("rb")]
    rows = {row["id"]: row for row in read_examples(folder / "artifacts/prepared/test.jsonl")}
    tokens = {"base": 0, "tuned": 0}
    for answer in answers:
        row = rows[answer["id"]]
        for model in tokens:
            asked = {"model": model, "max_tokens": 16, "return_token_ids": True}
            of_ids = server.request("/v1/completions", prompt=prompt_token_ids(row), **asked)
            [choice] = of_ids["choices"]
            assert (choice["text"], choice["finish_reason"]) == (answer[model], answer[f"{model}_finish_reason"])
            tokens[model] += len(choice["token_ids"])
            [user] = row["messages"][:-1]
            content = user["content"] + ("\n\n### Context:\n" + user["context"] if user["context"] else "")
            chat = server.request("/v1/chat/completions", messages=[{"role": "user", "content": content}], **asked)
            assert chat["prompt_token_ids"] == prompt_token_ids(row)
            assert chat["choices"][0]["token_ids"] == choice["token_ids"]
    scored = metrics(folder, "eval_vllm")
    assert {model: count / len(answers) for model, count in tokens.items()} == {
        model: pytest.approx(scored[model]["response_tokens"]) for model in tokens
    }
    # A client's own temperature is used, and nothing but the model's length limits an answer that names no limit.
    hot = {"model": "base", "prompt": "A", "max_tokens": 16, "temperature": 2.0}
    first, second = (server.request("/v1/completions", **hot)["choices"][0]["text"] for _ in range(2))
    assert first != second
    free = server.request("/v1/chat/completions", model="tuned", messages=[{"role": "user", "content": "a " * 400}])
    assert free["usage"]["completion_tokens"] > 3


@pytest.mark.slow
def test_vllm_takes_nothing_but_the_stop_tokens_from_generation_config(tiny_llama: Path, tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    from trnlora.serving.vllm_args import sampling_args

    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    generation = read_json(model / "generation_config.json")
    write_json(model / "generation_config.json", generation | {"eos_token_id": [1, 77]})
    config = ModelConfig(model=str(model), dtype="float32", max_model_len=512, **sampling_args(GREEDY))
    assert config.get_diff_sampling_param() == GREEDY.model_dump()
    assert config.try_get_generation_config()["eos_token_id"] == [1, 77]
    spoiled = ModelConfig(model=str(model), dtype="float32", max_model_len=512).get_diff_sampling_param()
    assert spoiled["repetition_penalty"] == 1.8  # what would be used otherwise


@pytest.mark.slow
def test_a_running_server_takes_no_adapter_of_another_template(
    server: Server, workdir: Path, others: list[Path], tiny_llama: Path, tmp_path: Path
) -> None:
    load = ("tools/load_adapter.py", "--port", str(server.port))
    folder = write_record(Path(shutil.copytree(others[0], tmp_path / "other")), tiny_llama, template="alpaca")
    refused = script(*load, f"other={folder}", cwd=workdir)
    assert_one_line(refused, "trained with the prompt template alpaca", "the running server has dolly")
    write_record(folder, tiny_llama, temperature=0.7)
    assert_one_line(script(*load, f"other={folder}", cwd=workdir), "temperature 0.7, and the running server", "greedy")
    write_record(folder, tiny_llama)
    done = script(*load, f"other={folder}", cwd=workdir)
    assert done.stdout == f"other is served from {folder}\n", done.stderr
    server.unload("other")
