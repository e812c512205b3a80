"""Dockerfiles without Docker: what they say, and their steps as Docker would run them, in a folder made by debootstrap.

Only the instructions and options that this project's Dockerfiles have; any other raises ValueError. A step runs in
namespaces of its own for mounts and processes, with a small /dev, in which /dev/shm is of Docker's default size, and as
the user that USER names, who cannot get more rights. What it does not have of Docker: layers, a network namespace, the
filter of system calls.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

SHM = "64m"
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Instruction(NamedTuple):
    """One instruction, its options (--name=value) and the rest of it, with its lines joined."""

    name: str
    options: dict[str, str]
    text: str

    @property
    def words(self) -> list[str]:
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile."""
    lines = "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#"))
    found = []
    for line in lines.replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        options = {}
        while match := re.match(r"\s*--([a-z-]+)=(\S+)\s+", rest):
            options[match[1]] = match[2]
            rest = rest[match.end() :]
        found.append(Instruction(name, options, rest.strip()))
    return found


def stage_of(steps: list[Instruction], target: str) -> list[Instruction]:
    """The instructions of one stage of several, after those of the stages that it is based on."""
    start = next(number for number, step in enumerate(steps) if step.words[1:] == ["AS", target])
    ends = (number for number, step in enumerate(steps) if number > start and step.name == "FROM")
    base = steps[start].words[0]
    named = {step.words[2] for step in steps if step.name == "FROM" and len(step.words) == 3}
    return [*(stage_of(steps, base) if base in named else []), *steps[start : next(ends, len(steps))]]


class Ignored:
    """What a .dockerignore leaves out: the last pattern that matches a path or a folder that it is in decides."""

    def __init__(self, text: str) -> None:
        lines = [line.strip() for line in text.splitlines()]
        self._patterns = [line for line in lines if line and not line.startswith("#")]

    def __contains__(self, path: str) -> bool:
        parts = path.split("/")
        ignored = False
        for pattern in self._patterns:
            wanted = pattern.removeprefix("!").strip("/").split("/")
            if any(_matches(parts[:end], wanted) for end in range(1, len(parts) + 1)):
                ignored = not pattern.startswith("!")
        return ignored


def _matches(parts: list[str], wanted: list[str]) -> bool:
    if not parts or not wanted:
        return not parts and not wanted
    if wanted[0] == "**":
        return any(_matches(parts[start:], wanted[1:]) for start in range(len(parts) + 1))
    return fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def context_files(context: Path, ignored: Ignored) -> list[str]:
    """The files of a build's context, by their paths in it."""
    found = []
    for folder, names, files in os.walk(context):
        here = Path(folder).relative_to(context)
        names[:] = [name for name in names if (here / name).as_posix() not in ignored]
        links = [name for name in names if (Path(folder) / name).is_symlink()]
        found += [(here / name).as_posix() for name in (*files, *links) if (here / name).as_posix() not in ignored]
    return found


@dataclass
class Image:
    """A folder in which a Dockerfile's steps run. `mounts`: files and folders of this machine that steps can read."""

    root: Path
    context: Path
    mounts: dict[Path, str] = field(default_factory=dict)
    build_env: dict[str, str] = field(default_factory=dict)  # as --build-arg
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    user: str = "root"
    workdir: str = "/"
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def build(self, steps: list[Instruction]) -> None:
        """Raises subprocess.CalledProcessError when a step fails."""
        arguments: dict[str, str] = {}
        for instruction in steps:
            name, rest = instruction.name, self._expand(instruction.text, arguments)
            match name:
                case "FROM" | "EXPOSE" | "HEALTHCHECK":
                    pass
                case "ARG":
                    key, _, default = rest.partition("=")
                    arguments[key] = self.build_env.get(key, default)
                case "ENV":
                    self.env |= dict(word.split("=", 1) for word in shlex.split(rest))
                case "USER":
                    self.user = rest
                case "WORKDIR":
                    self.workdir = str(Path(self.workdir) / rest)
                    self._inside(self.workdir).mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(instruction)
                case "CMD":
                    self.command = instruction.words
                case "ENTRYPOINT":
                    self.entry = instruction.words
                case "RUN":
                    self.run(["/bin/sh", "-c", instruction.text], env=arguments | self.build_env)
                case _:
                    raise ValueError(f"{name} is not an instruction that this can run")

    def run(
        self, command: list[str], env: dict[str, str] | None = None, volumes: dict[Path, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as `docker run` would, and print its output. `volumes`: folders, and where they are there.

        Raises subprocess.CalledProcessError, with the output, when it fails.
        """
        home, ids = self._user()
        binds = [("ro", str(source), target) for source, target in self.mounts.items()]
        binds += [("rw", str(source), target) for source, target in (volumes or {}).items()]
        entered = [
            *("env", "-i", f"HOME={home}", *(f"{k}={v}" for k, v in (self.env | (env or {})).items())),
            *("setpriv", *ids, "--no-new-privs", "--"),
            *("/bin/sh", "-c", f'cd {shlex.quote(self.workdir)} && exec "$@"', "sh", *command),
        ]
        script = [f"root={shlex.quote(str(self.root))}", _MOUNTS]
        script += [shlex.join(["bind", *bind]) for bind in binds]
        script.append('exec chroot "$root" ' + shlex.join(entered))
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", "\n".join(script)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        print(done.stdout, flush=True)
        done.check_returncode()
        return done

    def _user(self) -> tuple[str, list[str]]:
        """The user's home directory, and the options of setpriv that make one of its processes."""
        if self.user == "root":
            return "/root", ["--reuid=0", "--regid=0", "--clear-groups"]
        uid, gid, home = self._passwd(self.user)
        # Docker's users other than root have no capabilities.
        return home, [f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]

    def _passwd(self, user: str) -> tuple[int, int, str]:
        rows = [line.split(":") for line in (self.root / "etc/passwd").read_text("utf-8").splitlines()]
        uid, gid, _, home = next(row[2:6] for row in rows if user in (row[0], row[2]))
        return int(uid), int(gid), home

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _expand(self, text: str, arguments: dict[str, str]) -> str:
        values = arguments | self.env
        return re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], ""), text)

    def _copy(self, instruction: Instruction) -> None:
        """A folder above the target that is missing becomes root's, as with Docker's older builder."""
        if set(instruction.options) - {"chown"}:
            raise ValueError(f"COPY with {', '.join(instruction.options)} is not something that this can run")
        owner = self._passwd(instruction.options["chown"].split(":")[0])[:2] if instruction.options else (0, 0)
        *sources, to = instruction.words
        target = self._inside(str(Path(self.workdir) / to))
        files = context_files(self.context, Ignored((self.context / ".dockerignore").read_text("utf-8")))
        for source in sources:
            inside = [file for file in files if source in (".", file) or file.startswith(f"{source}/")]
            if not inside:
                raise FileNotFoundError(f"COPY {source}: the context has no such file")
            top = Path(source).parent if inside == [source] else Path(source)
            target.mkdir(parents=True, exist_ok=True)
            for file in inside:
                copy = target / Path(file).relative_to(top)
                for folder in [folder for folder in reversed(copy.parents) if not folder.exists()]:
                    folder.mkdir()
                    os.chown(folder, *owner)
                shutil.copy2(self.context / file, copy, follow_symlinks=False)
                os.chown(copy, *owner, follow_symlinks=False)


_MOUNTS = f"""set -e
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in {" ".join(DEVICES)}; do touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"; done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs -o size={SHM},mode=1777 tmpfs "$root/dev/shm"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"
bind() {{
    if [ -d "$2" ]; then mkdir -p "$root$3"; else mkdir -p "$(dirname "$root$3")"; touch "$root$3"; fi
    mount --bind "$2" "$root$3"
    if [ "$1" = ro ]; then mount -o remount,bind,ro "$root$3"; fi
}}"""
