"""The profiles: each resolves to valid params and is written in full, with comments. Errors are one line."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT

from trnlora.data.source_files import data_sources
from trnlora.errors import UserError
from trnlora.params import load_params
from trnlora.profiles import DEFAULT, load_profile, profile_names, profile_text, profile_values, write_profile
from trnlora.sources import parse_source

NAMES = profile_names(ROOT / "profiles")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the profiles."""
    return Path(shutil.copytree(ROOT / "profiles", tmp_path / "profiles"))


def comments(text: str) -> dict[str, str]:
    """The comment at the end of each key's line, by `section.key`."""
    found, section = {}, ""
    for line in text.splitlines():
        key, _, rest = line.partition(":")
        if not key or key.lstrip().startswith("#"):
            continue
        section = section if key.startswith(" ") else f"{key}."
        _, mark, comment = rest.partition(" # ")
        if mark:
            found[section + key.strip()] = comment
    return found


def whole_lines(text: str) -> list[str]:
    """The comments that fill a line, without the first one, which names the profile."""
    return [line for line in text.splitlines() if line.lstrip().startswith("#")][1:]


def test_all_profiles_exist() -> None:
    assert DEFAULT in NAMES
    assert set(NAMES) >= {"llama3-8b-trn2", "llama3-8b-trn2-3xl", "llama3-8b-trn2-nxd", "llama3-8b-trn1"}
    assert len(NAMES) == 10


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_resolves_and_is_written_in_full(name: str, tmp_path: Path) -> None:
    params = load_profile(name, ROOT / "profiles")
    parse_source(params.model.source)
    for source in data_sources(params.data):
        parse_source(source.source)
    target = tmp_path / "params.yaml"
    write_profile(name, target, ROOT / "profiles")
    written = target.read_text("utf-8")
    assert yaml.safe_load(written) == profile_values(name, ROOT / "profiles")
    assert load_params(target) == params
    first = written.splitlines()[0]
    assert first.startswith("# Target: ")
    assert f"(profiles/{name}.yaml)" in first
    default = (ROOT / "profiles" / f"{DEFAULT}.yaml").read_text("utf-8")
    assert comments(default).keys() <= comments(written).keys()
    assert whole_lines(default) == whole_lines(written)
    assert written.splitlines().count("") == default.splitlines().count("")  # blank lines between sections are kept
    write_profile(name, target, ROOT / "profiles")
    assert target.read_text("utf-8") == written
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_the_default_profile_is_written_unchanged() -> None:
    text = (ROOT / "profiles" / f"{DEFAULT}.yaml").read_text("utf-8")
    assert profile_text(DEFAULT, ROOT / "profiles") == text


def test_comments_of_the_nearest_profile_win() -> None:
    default, trn2, trn1 = (
        comments(profile_text(name, ROOT / "profiles")) for name in (DEFAULT, "llama3-8b-trn2-nxd", "llama3-8b-trn1")
    )
    assert trn2["convert.kv_size_multiplier"] == "8 KV heads × 4 copies = one per rank"
    assert trn1["convert.kv_size_multiplier"] == trn2["convert.kv_size_multiplier"]  # trn1 extends trn2
    assert trn1["convert.tp_size"].endswith("all 32 cores of the instance")
    assert trn1["train.dp_size"] == default["train.dp_size"]
    assert "gated" in trn2["model.source"]  # the default has no comment there


def test_a_new_key_needs_no_edit_of_an_overlay(folder: Path) -> None:
    path = folder / f"{DEFAULT}.yaml"
    text = path.read_text("utf-8").replace("  weight_decay:", "  beta2: 0.95  # of AdamW\n  weight_decay:")
    path.write_text(text + "\nextra:\n  answer: 42\n", "utf-8")
    for name in NAMES:
        assert profile_values(name, folder)["train"]["beta2"] == 0.95
        written = profile_text(name, folder)
        assert "  beta2: 0.95  # of AdamW\n" in written
        assert yaml.safe_load(written)["extra"] == {"answer": 42}


def test_values_in_any_yaml_form_are_written(folder: Path) -> None:
    """Block lists, significant quotes, and a profile without `extends`."""
    (folder / "mine.yaml").write_text(
        "data:\n  categories:  # two\n    - open_qa\n    - 'yes'\nserve:\n  host: '0'\neval:\n  adapter: path:///a\n"
        "neuron:\n  cc_flags: --model-type=transformer  # fewer\n",
        "utf-8",
    )
    written = profile_text("mine", folder)
    assert yaml.safe_load(written) == profile_values("mine", folder)
    assert profile_values("mine", folder)["data"]["categories"] == ["open_qa", "yes"]
    assert written.startswith("# Target: mine (profiles/mine.yaml).")
    assert comments(written)["neuron.cc_flags"] == "fewer"
    load_profile("mine", folder)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("extends: unknown\n", "mine.yaml: extends 'unknown', which is not a profile: use one of llama3-70b-trn2 "),
        ("extends: [a]\n", "mine.yaml: extends ['a'], which is not a profile"),
        ("extends: mine\n", "`extends` goes in a circle: mine → mine"),
        ("extends: other\n", "`extends` goes in a circle: mine → other → mine"),
        ("train: [\n", "mine.yaml is not valid YAML"),
        ("train:\n  lr: 1.0e-3\n  lr: 1.0e-4\n", "mine.yaml is not valid YAML"),
        ("", "mine.yaml holds no keys"),
        ("train:\n  learning_rate: 1.0e-3\n", "mine.yaml: train.learning_rate is not a known key"),
        ("trian:\n  lr: 1.0e-3\n", "mine.yaml: trian is not a known key"),
        ("train: 3\n", "mine.yaml: train must hold keys"),
        ('train:\n  lr: "1e-4"\n', "mine.yaml: train.lr: Input should be a valid number; write it unquoted"),
        ("backend: neuron\n", "mine.yaml: train.dp_size 1 × convert.tp_size 3 is 3 ranks, which AWS does not support"),
    ],
)
def test_a_wrong_profile_is_refused_in_one_line(folder: Path, text: str, line: str) -> None:
    (folder / "mine.yaml").write_text(text, "utf-8")
    (folder / "other.yaml").write_text("extends: mine\n", "utf-8")
    target = folder.parent / "params.yaml"
    target.write_text("as it was", "utf-8")
    with pytest.raises(UserError) as refusal:
        write_profile("mine", target, folder)
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert target.read_text("utf-8") == "as it was"


def test_an_unknown_profile_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no profile 'unknown': use one of llama3-70b-trn2 .* smollm2-135m-cpu"):
        load_profile("unknown", ROOT / "profiles")
    with pytest.raises(UserError, match="holds no profiles: run from the project's root"):
        load_profile(DEFAULT, tmp_path)


def test_profiles_are_read_without_torch() -> None:
    code = "import sys, trnlora.profiles as p; p.profile_text(p.DEFAULT); print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
