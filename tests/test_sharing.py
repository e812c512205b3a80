"""`make push` and `make bundle` of a real run, against a hub of this machine; and bundles that are not whole."""

import gzip
import io
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.model_hub import COMMIT, READ_TOKEN, TOKEN, ModelHub
from support.project import Project
from support.server import Server, script

from trnlora.errors import UserError
from trnlora.params import load_params
from trnlora.weights.adapter_source import ADAPTER_FILES, open_bundle, write_bundle

MAKE = ("make", "--old-file=.venv/.ready")


@pytest.mark.slow
def test_push_shows_first_and_uploads_on_request(finished_copy: Project, tmp_path: Path) -> None:
    project, printed = finished_copy, []
    project.env |= {"HF_HOME": str(tmp_path / "hf")}
    project.env.pop("HF_TOKEN", None)

    def push(*settings: str, token: str | None = None, check: bool = True) -> str:
        project.env |= {"HF_TOKEN": token} if token else {}
        printed.append(project.run(*MAKE, "push", "REPO=me/tiny-lora", "BASE=org/tiny", *settings, check=check))
        return printed[-1]

    def refused(*settings: str, token: str | None = None) -> str:
        *_, line, makes = push(*settings, token=token, check=False).splitlines()
        assert (line[:7], makes[:6]) == ("error: ", "make: "), printed[-1]
        assert "Traceback" not in printed[-1]
        return line

    with ModelHub() as hub:
        project.env |= {"HF_ENDPOINT": hub.address}
        shown = push()
        assert "me/tiny-lora: would be created, as a private repository\n  unless there is a private one" in shown
        assert shown.count("  new      ") == 4
        assert "nothing was uploaded: UPLOAD=1 uploads" in shown
        assert "set HF_TOKEN to a token" in refused("UPLOAD=1")
        assert "the hub refused HF_TOKEN for me/tiny-lora" in refused("UPLOAD=1", token="hf_wrong")
        assert "your HF_TOKEN may not write to me/tiny-lora" in refused("UPLOAD=1", token=READ_TOKEN)
        assert hub.repositories == {}
        hub.broken = True
        assert "the upload to me/tiny-lora failed, and it is unchanged: try again (" in refused("UPLOAD=1", token=TOKEN)
        assert hub.repositories == {"me/tiny-lora": {}}
        hub.broken = False

        assert f"uploaded: {hub.address}/me/tiny-lora/commit/" in push("UPLOAD=1")
        folder = project.root / "reports/adapter"
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert hub.repositories["me/tiny-lora"] == files
        assert [asked["visibility"] for asked in hub.created] == ["private"]
        assert list(hub.large.values()) == [files["adapter_model.safetensors"]]
        hub.repositories["me/tiny-lora"]["README.md"] = b"another"
        before = len(hub.xorbs)
        shown = push("UPLOAD=1")
        assert "  changed  README.md" in shown
        assert shown.count("  same     ") == 3
        assert hub.commits == [sorted(files), ["README.md"]]
        assert "nothing to upload" in push("UPLOAD=1")
        assert (len(hub.commits), len(hub.xorbs)) == (2, before)

        fetch = (
            "import sys; from trnlora.weights.adapter_source import fetch_adapter; print(fetch_adapter(sys.argv[1]))"
        )
        fetched = Path(project.run(".venv/bin/python", "-c", fetch, f"hf://me/tiny-lora@{COMMIT}").strip())
        assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
            name: files[name] for name in ADAPTER_FILES
        }
        assert not [request for request in hub.requests if "telemetry" in request]
    assert "cannot reach the hub" in refused()
    left = [path.read_bytes() for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    for secret in (TOKEN, READ_TOKEN, "hf_wrong"):
        assert not [text for text in printed if secret in text]
        assert not [content for content in left if secret.encode() in content]


@pytest.mark.slow
def test_a_bundle_stands_for_the_adapter_elsewhere(finished_copy: Project, tmp_path: Path) -> None:
    """In the project itself, whose own adapter is gone: as on another machine with the same base model."""
    project = finished_copy
    python = ".venv/bin/python"
    printed = project.run(*MAKE, "bundle", "BASE=org/tiny")
    archive = project.root / "reports/bundle.tar.gz"
    before = archive.read_bytes()
    assert "there: make serve BUNDLE=bundle.tar.gz" in printed
    project.run(*MAKE, "bundle", "BASE=org/tiny")
    assert archive.read_bytes() == before
    with tarfile.open(archive) as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert contents.keys() > {"README.md", "params.yaml", "SHA256SUMS", "metrics/eval_vllm.json", *ADAPTER_FILES}
    assert not [name for name, content in contents.items() if str(tmp_path).encode() in content]
    assert not [name for name, content in contents.items() if b"path:///" in content]
    assert (
        yaml.safe_load(contents["params.yaml"])["lora"] == load_params(project.root / "params.yaml").lora.model_dump()
    )

    weights = contents["adapter_model.safetensors"]
    shutil.rmtree(project.root / "artifacts/adapter")
    elsewhere = tmp_path / "from a friend.tar.gz"
    archive.rename(elsewhere)
    dry = (python, "tools/serve.py", "--dry-run", "--bundle")
    [opened] = re.findall(r"--lora-modules tuned=(\S+)", project.run(*dry, elsewhere))
    assert (project.root / opened / "adapter_model.safetensors").read_bytes() == weights
    assert "there is no file none.tar.gz: name one that `make bundle`" in project.run(*dry, "none.tar.gz", check=False)
    (project.root / opened / "adapter_model.safetensors").write_bytes(b"")  # it is unpacked again

    uri = f"path://{elsewhere}"
    project.set_params(eval={"adapter": uri}, lora={"init_adapter": uri})
    project.run(python, "stages/check_params.py")
    for check in (READ_EVAL, READ_INIT):
        assert project.run(python, "-c", check).endswith(f"{opened}\n")
    project.set_params(eval={"adapter": f"{uri}.gone"})
    refused = project.run(python, "stages/check_params.py", check=False)
    assert f"error: eval.adapter: there is no {elsewhere}.gone" in refused

    sums = project.root / "artifacts/model/SHA256SUMS"
    sums.write_text(re.sub("^[0-9a-f]{8}", "0" * 8, sums.read_text(), flags=re.M))
    assert "was trained on other weights than those of artifacts/model" in project.run(*dry, elsewhere, check=False)
    shutil.rmtree(project.root / "artifacts")
    refused = project.run(*dry, elsewhere, check=False)
    assert refused == "error: artifacts/model/config.json is missing: run `dvc repro -f fetch_model`\n"


@pytest.mark.slow
def test_vllm_answers_with_a_bundle_as_with_its_adapter(server: Server, workdir: Path, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(workdir, tmp_path / "workdir", symlinks=True))
    write_bundle(Path(shutil.copytree(workdir / "artifacts/adapter", tmp_path / "made")), workdir / "a.tar.gz")
    load = ("tools/load_adapter.py", "--port", str(server.port), "bundled=a.tar.gz")
    assert script(*load, cwd=workdir).stdout.endswith("bundled is served from a.tar.gz\n")
    try:
        prompt = "### Instruction:\nName a river.\n\n### Response:\n"
        answer = server.complete("bundled", prompt, 24)
        assert answer == server.complete("tuned", prompt, 24)
        assert answer != server.complete("base", prompt, 24)
    finally:
        server.unload("bundled")


# What the stages do with the adapter before vLLM or the ranks start.
READ_EVAL = """
from trnlora.evaluation.run import read_inputs
from trnlora.params import load_params
print(read_inputs(load_params()).adapter.folder)
"""
READ_INIT = """
from trnlora.model.config import ModelConfig
from trnlora.params import load_params
from trnlora.paths import MODEL
from trnlora.weights.adapter_source import fetch_adapter
from trnlora.weights.peft_folder import read_init_adapter
params = load_params()
folder = fetch_adapter(params.lora.init_adapter)
assert list(read_init_adapter(folder, ModelConfig.from_folder(MODEL), params.lora))
print(folder)
"""


# Bundles


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "made"
    (made / "metrics").mkdir(parents=True)
    for name in (*ADAPTER_FILES, "README.md", "metrics/eval_vllm.json"):
        (made / name).write_text(f"{name}\n" * 100)
    return made


def test_a_bundle_comes_back_as_it_was(folder: Path) -> None:
    archive = Path("a.tar.gz")
    write_bundle(folder, archive)
    opened = open_bundle(archive)
    assert {path.relative_to(opened): path.read_bytes() for path in opened.rglob("*") if path.is_file()} == {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert open_bundle(archive) == opened
    first = archive.read_bytes()
    write_bundle(folder, Path("b.tar.gz"))
    assert Path("b.tar.gz").read_bytes() == first


def packed(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    """A compressed tar file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for entry in members:
            member, content = (
                (entry, b"") if isinstance(entry, tarfile.TarInfo) else (tarfile.TarInfo(entry[0]), entry[1])
            )
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def special(kind: bytes, **values: str) -> tarfile.TarInfo:
    """A member that is not a file, where a bundle has one."""
    member = tarfile.TarInfo("README.md")
    member.type = kind
    for key, value in values.items():
        setattr(member, key, value)
    return member


def with_size(size: int) -> bytes:
    """A compressed tar file whose only member has this size, says its header, and no content."""
    member = tarfile.TarInfo("README.md")
    member.size = size
    return gzip.compress(member.tobuf(tarfile.GNU_FORMAT))


def edited(change: Callable[[Path], object]) -> Callable[[Path, bytes], bytes]:
    """A bundle whose files were changed without its SHA256SUMS."""

    def damage(folder: Path, whole: bytes) -> bytes:
        change(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return packed(*((path.relative_to(folder).as_posix(), path.read_bytes()) for path in files))

    return damage


NAME = "in it is not a file of a bundle"
SUMS = "its files are not those of its SHA256SUMS"
DAMAGED: dict[str, tuple[Callable[[Path, bytes], bytes], str]] = {
    "empty": (lambda folder, whole: b"", "empty file"),
    "cut": (lambda folder, whole: whole[: len(whole) // 2], "end-of-stream marker"),
    "not compressed": (lambda folder, whole: gzip.decompress(whole), "Not a gzipped file"),
    "compressed text": (lambda folder, whole: gzip.compress(b"x" * 1000), "invalid header"),
    "a flipped byte": (lambda folder, whole: whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "CRC check failed"),
    "outside": (lambda folder, whole: packed(("../README.md", b"x")), f"'../README.md' {NAME}"),
    "inside and out": (lambda folder, whole: packed(("metrics/../../x.json", b"x")), NAME),
    "absolute": (lambda folder, whole: packed(("/tmp/README.md", b"x")), f"'/tmp/README.md' {NAME}"),
    "another name": (lambda folder, whole: packed(("x", b"x")), f"'x' {NAME}"),
    "a name of several lines": (lambda folder, whole: packed(("x\ny", b"x")), NAME),
    "a link": (lambda folder, whole: packed(special(tarfile.SYMTYPE, linkname="/etc/passwd")), NAME),
    "a hard link": (lambda folder, whole: packed(special(tarfile.LNKTYPE, linkname="/etc/passwd")), NAME),
    "a device": (lambda folder, whole: packed(special(tarfile.CHRTYPE)), NAME),
    "a pipe": (lambda folder, whole: packed(special(tarfile.FIFOTYPE)), NAME),
    "a folder": (lambda folder, whole: packed(special(tarfile.DIRTYPE)), NAME),
    "a sparse file": (lambda folder, whole: packed(special(tarfile.GNUTYPE_SPARSE)), NAME),
    "twice": (lambda folder, whole: packed(("README.md", b"x"), ("README.md", b"y")), "it has README.md twice"),
    "many files": (lambda folder, whole: packed(*((f"metrics/{n}.json", b"") for n in range(101))), "too many files"),
    "a bomb": (lambda folder, whole: packed(("README.md", b"0" * 2**23)), "it unpacks to too much"),
    "a header of a petabyte": (lambda folder, whole: with_size(2**50), "unexpected end of data"),
    "no sums": (lambda folder, whole: packed(*((name, b"") for name in ADAPTER_FILES)), "it has no SHA256SUMS"),
    "sums of another form": (edited(lambda folder: (folder / "SHA256SUMS").write_text("x")), SUMS),
    "edited": (edited(lambda folder: (folder / "README.md").write_text("x")), SUMS),
    "a file more": (edited(lambda folder: (folder / "params.yaml").touch()), "'params.yaml' is not in both it and its"),
    "a file less": (edited(lambda folder: (folder / "README.md").unlink()), "'README.md' is not in both"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_bundle_that_is_not_whole_is_refused(folder: Path, case: str) -> None:
    damage, message = DAMAGED[case]
    archive = Path("a.tar.gz")
    write_bundle(folder, archive)
    archive.write_bytes(damage(folder, archive.read_bytes()))
    with pytest.raises(UserError) as refused:
        open_bundle(archive)
    assert str(refused.value).startswith("a.tar.gz is not a whole bundle (")
    assert message in str(refused.value)
    assert not list(Path(".scratch/bundles").iterdir())
    assert sorted(path.name for path in Path().iterdir()) == [".scratch", "a.tar.gz", "made"]
