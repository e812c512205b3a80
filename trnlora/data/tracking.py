"""Whether DVC notices when a file changes that prepare_data reads."""

import os
from pathlib import Path

from trnlora.data.source_files import data_sources
from trnlora.errors import UserError
from trnlora.params import Data
from trnlora.readers import read_yaml
from trnlora.sources import parse_source

PIPELINE = Path("dvc.yaml")


def check_tracked(params: Data) -> None:
    """Raise UserError for a source, or a template of the user's own, that no dependency of prepare_data covers.

    That is, a path:// file or folder that is not, or is not in, one of the deps of prepare_data in dvc.yaml: DVC would
    not notice that it has changed, and `dvc repro` would keep the results of the old one. Where there is no dvc.yaml, a
    stage is run by itself and nothing is tracked.
    """
    if not PIPELINE.exists():
        return
    names = read_yaml(PIPELINE)["stages"]["prepare_data"]["deps"]
    tracked = [Path(name).absolute() for name in names]
    uris = [source.source for source in data_sources(params)]
    if params.prompt_template.startswith("path://"):
        uris.append(params.prompt_template)
    for uri in uris:
        source = parse_source(uri)
        if source.scheme != "path":
            continue
        path = Path(os.path.normpath(source.path.absolute()))  # data/../other is not in data
        if not any(path.is_relative_to(each) for each in tracked):
            raise UserError(
                f"{uri}: prepare_data does not depend on it in {PIPELINE}, so that DVC would not notice a change: "
                f"move it into data/, or add `- {source.path}` to the deps of prepare_data there"
            )
