"""Sources of models: folders, GGUF files, and names on the hub.

The network is used only for a name `owner/name` that is not a local path, and only
files that kronjax can read are fetched.

>>> find(".").is_dir()
True
"""

import re
from pathlib import Path
from typing import NoReturn

from kronjax.io import stand_ins
from kronjax.io.storage import expanded
from kronjax.lm.checkpoints.folder import MSGPACK
from kronjax.lm.text import chat

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
"""Patterns of the files that are fetched from the hub; none matches a pickle."""

OTHER_FOLDERS = [
    f"{chat.FOLDER[:i]}[!{chat.FOLDER[i]}]*/*" for i in range(len(chat.FOLDER))
]
"""Patterns of files that are not fetched: those in subfolders, which hold other formats
and are not needed, but for chat templates."""


def find(source: str | Path) -> Path:
    """Return the folder or file of a source, which may be fetched from the hub.

    Raises:
        ValueError: If the path is a file of another kind, or empty.
        OSError: If the path does not exist, and the hub has no such model or cannot be
            reached.
    """
    path = expanded(source)
    if not str(source):
        raise ValueError("the name of the model is empty")
    if path.exists():
        if path.is_file() and path.suffix != ".gguf":
            _refuse_file(path)
        return path
    name = str(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"there is no folder {name}; models on the hub are named owner/name, for "
            "example openai-community/gpt2"
        )
    return _fetch(name)


def _fetch(name: str) -> Path:
    """Return the local folder of a model of the hub; complete caches are reused."""
    import huggingface_hub

    def fetch(patterns):
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, ignore_patterns=OTHER_FOLDERS
            )
        )

    remote: list[str] = []
    try:
        folder = fetch(HUB_FILES)
        if not list(folder.glob("*.safetensors")):
            folder = fetch([*HUB_FILES, MSGPACK])
        if not [*folder.glob("*.safetensors"), *folder.glob(MSGPACK)]:
            remote = huggingface_hub.list_repo_files(name)
    except Exception as error:  # from the network, the hub or its client
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"there is no folder {name}, and it could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); give the path of a local folder that "
            "holds its config.json and *.safetensors"
        ) from error
    for file in remote:
        if Path(file).suffix in stand_ins.PICKLES:
            raise ValueError(stand_ins.PICKLE.format(where=name, file=file))
    return folder


def _refuse_file(path: Path) -> NoReturn:
    """Raise the error for a file that is no model by itself."""
    if path.suffix in stand_ins.PICKLES:
        raise ValueError(stand_ins.PICKLE.format(where=path, file=path.name))
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{path} holds weights without their config.json: give the folder that "
            "holds both"
        )
    raise ValueError(f"{path} is neither a folder nor a .gguf file")
