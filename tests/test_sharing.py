"""`make push` and `make bundle` of a real run, against a hub of this machine; and bundles that are not whole."""

import gzip
import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.model_hub import TOKEN, ModelHub
from support.project import Project
from support.stages import metrics

from trnlora.errors import UserError
from trnlora.weights.adapter_source import ADAPTER_FILES, open_bundle, write_bundle

MAKE = ("make", "--old-file=.venv/.ready")


@pytest.mark.slow
def test_push_shows_first_and_uploads_on_request(finished_copy: Project) -> None:
    project = finished_copy
    push = (*MAKE, "push", "REPO=me/tiny-lora", "BASE=org/tiny")
    with ModelHub() as hub:
        project.env |= {"HF_ENDPOINT": hub.address}
        project.env.pop("HF_TOKEN", None)
        shown = project.run(*push)
        assert "me/tiny-lora: would be created, as a private repository\n" in shown
        assert shown.count("  new      ") == 4
        assert "nothing was uploaded: UPLOAD=1 uploads" in shown
        assert "error: set HF_TOKEN to a token" in project.run(*push, "UPLOAD=1", check=False)
        project.env["HF_TOKEN"] = "hf_wrong"
        refused = project.run(*push, "UPLOAD=1", check=False)
        assert "error: the hub refused HF_TOKEN for me/tiny-lora" in refused
        assert "hf_wrong" not in refused
        assert hub.repositories == {}

        project.env["HF_TOKEN"] = TOKEN
        assert f"uploaded: {hub.address}/me/tiny-lora/commit/" in project.run(*push, "UPLOAD=1")
        folder = project.root / "reports/adapter"
        assert hub.repositories["me/tiny-lora"] == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert hub.private == {"me/tiny-lora": True}
        assert hub.large  # the weights went by LFS
        again = project.run(*push)
        assert "me/tiny-lora: a repository of the hub\n" in again
        assert again.count("  same     ") == 4
        hub.repositories["me/tiny-lora"]["README.md"] = b"another"
        assert "  changed  README.md" in project.run(*push)
        assert hub.commits == 1
    assert "cannot reach the hub" in project.run(*push, check=False)


@pytest.mark.slow
def test_a_bundle_is_scored_and_served_as_the_adapter_that_it_is(finished_copy: Project, tmp_path: Path) -> None:
    """In the project itself, whose own adapter is gone: as on another machine with the same base model."""
    project = finished_copy
    printed = project.run(*MAKE, "bundle", "BASE=org/tiny")
    archive = project.root / "reports/bundle.tar.gz"
    before = archive.read_bytes()
    assert "there: make serve BUNDLE=bundle.tar.gz" in printed
    project.run(*MAKE, "bundle", "BASE=org/tiny")
    assert archive.read_bytes() == before
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
    assert names > {"README.md", "params.yaml", "SHA256SUMS", "metrics/eval_vllm.json", *ADAPTER_FILES}
    archive = archive.rename(tmp_path / "other.tar.gz")
    scored = metrics(project.root, "eval_vllm")

    shutil.rmtree(project.root / "artifacts/adapter")
    dry = project.run(".venv/bin/python", "tools/serve.py", "--dry-run", "--bundle", str(archive))
    assert '"name": "tuned"' in dry
    project.set_params(eval={"adapter": f"path://{archive}"})
    project.run(".venv/bin/python", "stages/check_params.py")
    project.run(".venv/bin/python", "stages/eval_vllm.py")
    found = metrics(project.root, "eval_vllm")
    assert found["tuned"] == scored["tuned"]
    assert found["base"] == scored["base"]


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


def packed(*members: tuple[str, bytes | None]) -> bytes:
    """A compressed tar file. None: a symbolic link to /etc/passwd."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else:
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content or b""))
    return out.getvalue()


def edited(change: Callable[[Path], object]) -> Callable[[Path, bytes], bytes]:
    """A bundle whose files were changed without its SHA256SUMS."""

    def damage(folder: Path, whole: bytes) -> bytes:
        change(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return packed(*((path.relative_to(folder).as_posix(), path.read_bytes()) for path in files))

    return damage


DAMAGED: dict[str, tuple[Callable[[Path, bytes], bytes], str]] = {
    "empty": (lambda folder, whole: b"", "is not a whole bundle"),
    "cut": (lambda folder, whole: whole[: len(whole) // 2], "is not a whole bundle"),
    "not compressed": (lambda folder, whole: gzip.decompress(whole), "is not a whole bundle (not a gzip file"),
    "a flipped byte": (lambda folder, whole: whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "is not a whole bundle"),
    "outside": (lambda folder, whole: packed(("../x", b"x")), "'../x' in it is not a plain file of a bundle"),
    "absolute": (lambda folder, whole: packed(("/tmp/x", b"x")), "'/tmp/x' in it is not a plain file"),
    "deep": (lambda folder, whole: packed(("a/b/c", b"x")), "'a/b/c' in it is not a plain file"),
    "a link": (lambda folder, whole: packed(("README.md", None)), "'README.md' in it is not a plain file"),
    "many files": (lambda folder, whole: packed(*((f"f{n}", b"") for n in range(101))), "it holds too much"),
    "nothing in it": (lambda folder, whole: packed(), "it has no adapter_config.json and no"),
    "edited": (edited(lambda folder: (folder / "README.md").write_text("x")), "its files are not those of its SHA256"),
    "a file more": (edited(lambda folder: (folder / "x").touch()), "x is not in both it and its SHA256SUMS"),
    "a file less": (edited(lambda folder: (folder / "README.md").unlink()), "README.md is not in both"),
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


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the bundle none\.tar\.gz \(No such file or directory\)"):
        open_bundle(Path("none.tar.gz"))
