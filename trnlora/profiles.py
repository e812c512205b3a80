"""Profiles: params for a model on a machine, each written as what differs from another profile.

`profiles/NAME.yaml` holds `extends: OTHER` and the keys with other values. Without `extends` it extends the default
profile, which is complete; a new param is added there alone. A comment at the end of a key's line replaces the comment
that the extended profile has there; comments on lines of their own stay in the profile's file.
"""

import io
import re
from pathlib import Path
from typing import Any

from trnlora import paths
from trnlora.errors import UserError
from trnlora.files import atomic_file
from trnlora.params import Params, check_params, read_mapping
from trnlora.readers import parse_yaml

PROFILES = Path("profiles")
DEFAULT = "smollm2-135m-cpu"
COMMENT_COLUMN = 34  # of the default profile; a longer value's comment follows after a space


def profile_names(folder: Path = PROFILES) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def profile_values(name: str, folder: Path = PROFILES) -> dict[str, Any]:
    """The profile's params as a nested dict, with those of the profiles that it extends. They are not validated.

    Raises UserError with one line for an unknown profile or key, a cycle of `extends`, or a file that is not valid.
    """
    first, *overlays = _chain(name, folder)
    values = _read(first, folder)
    for overlay in overlays:
        path = _path(overlay, folder)
        for key, value in _read(overlay, folder).items():
            if key not in values:
                raise UserError(f"{path}: {key} is not a known key (mistyped?)")
            if not isinstance(values[key], dict):
                values[key] = value
                continue
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} must hold keys, as in the default profile")
            for inner in value:
                if inner not in values[key]:
                    raise UserError(f"{path}: {key}.{inner} is not a known key (mistyped?)")
            values[key] |= value
    return values


def load_profile(name: str, folder: Path = PROFILES) -> Params:
    """The profile as validated params. Raises UserError as `profile_values` and `load_params` do."""
    return check_params(profile_values(name, folder), _path(name, folder))


def profile_text(name: str, folder: Path = PROFILES) -> str:
    """The profile as a whole params file: the default profile's keys, order and comments, with the profile's values.

    The first line names the target and the profile. Raises UserError as `profile_values` does.
    """
    profile_values(name, folder)
    round_trip = _round_trip_yaml()
    first, *overlays = _chain(name, folder)
    document = _load(round_trip, _path(first, folder))
    for overlay in overlays:
        changes = _load(round_trip, _path(overlay, folder))
        changes.pop("extends", None)
        _overlay(document, changes)
    written = io.StringIO()
    round_trip.dump(document, written)
    lines = written.getvalue().splitlines(keepends=True)
    if lines[0].startswith("# Target:"):
        del lines[0]
    header = f"# Target: {_target(name, folder)} (profiles/{name}.yaml). `make profile NAME=…` overwrites this file.\n"
    return "".join([header, *lines])


def write_profile(name: str, target: Path = paths.PARAMS, folder: Path = PROFILES) -> None:
    """Write the profile as a whole params file to `target`.

    Raises UserError, and writes nothing, if the profile is not valid, or is in a form of YAML whose values would not be
    the same in one file (a merge key).
    """
    load_profile(name, folder)
    text = profile_text(name, folder)
    if parse_yaml(text, str(target)) != profile_values(name, folder):
        raise UserError(f"{_path(name, folder)}: write its values out, without anchors, merge keys and tags")
    with atomic_file(target) as partial:
        partial.write_text(text, "utf-8")


def _path(name: str, folder: Path) -> Path:
    return folder / f"{name}.yaml"


def _read(name: str, folder: Path) -> dict[str, Any]:
    values = read_mapping(_path(name, folder))
    values.pop("extends", None)
    return values


def _chain(name: str, folder: Path) -> list[str]:
    """The profiles from the one that extends nothing to `name`."""
    known = profile_names(folder)
    if not known:
        raise UserError(f"{folder} holds no profiles: run from the project's root")
    if name not in known:
        raise UserError(f"no profile '{name}': use one of {' '.join(known)}")
    chain = [name]
    while True:
        path = _path(chain[-1], folder)
        extended = read_mapping(path).get("extends", None if chain[-1] == DEFAULT else DEFAULT)
        if extended is None and chain[-1] == DEFAULT:
            return chain[::-1]
        if extended in chain:
            raise UserError(f"{path}: `extends` goes in a circle: {' → '.join([*chain, extended])}")
        if extended not in known:
            raise UserError(f"{path}: extends {extended!r}, which is not a profile: use one of {' '.join(known)}")
        chain.append(extended)


def _target(name: str, folder: Path) -> str:
    """What the first line of a profile's file says it is for; the profile's name where it says nothing."""
    first_line = _path(name, folder).read_text("utf-8").partition("\n")[0]
    match = re.fullmatch(r"# Target: (.+?)(?: \(profiles/.*)?", first_line.rstrip())
    return match[1] if match else name


def _round_trip_yaml() -> Any:
    """ruamel.yaml that writes a file as it was, comments, quotes and the form of numbers included."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import RoundTripRepresenter

    class Representer(RoundTripRepresenter):
        """null as `null`, where ruamel.yaml writes nothing."""

    Representer.add_representer(type(None), lambda self, _: self.represent_scalar("tag:yaml.org,2002:null", "null"))
    yaml = YAML()
    yaml.Representer = Representer
    yaml.preserve_quotes = True
    yaml.width = 4096  # longer lines are never folded
    return yaml


def _load(round_trip: Any, path: Path) -> Any:
    from ruamel.yaml.error import YAMLError

    try:
        return round_trip.load(path.read_text("utf-8"))
    except YAMLError as error:  # which `read_mapping` would have found
        raise UserError(f"{path} is not valid YAML: {error}") from None


def _overlay(document: Any, changes: Any) -> None:
    """Set the values of `changes` in `document`, and the comments at the end of their lines."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    for key, value in changes.items():
        if isinstance(value, CommentedMap):
            _overlay(document[key], value)
            continue
        if isinstance(value, CommentedSeq):  # on the key's own line, where its comment is
            value = CommentedSeq(list(value))
            value.fa.set_flow_style()
        document[key] = value
        _overlay_comment(document, changes, key)


def _overlay_comment(document: Any, changes: Any, key: str) -> None:
    """The comment at the end of the key's line: that of `changes`, if there is one, else the one that was there.

    A ruamel.yaml token holds that comment and, after its line break, the lines up to the next key, which stay.
    """
    from ruamel.yaml.error import CommentMark
    from ruamel.yaml.tokens import CommentToken

    old, new = ((of.ca.items.get(key) or [None] * 4)[2] for of in (document, changes))
    kept, line_break, rest = old.value.partition("\n") if old else ("", "\n", "")
    comment = (new.value.partition("\n")[0] if new else "") or kept
    if comment:
        token = CommentToken(comment + line_break + rest, CommentMark(COMMENT_COLUMN))
        document.ca.items.setdefault(key, [None] * 4)[2] = token
