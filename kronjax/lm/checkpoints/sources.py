"""Where a model comes from: a folder, a GGUF file, or a name on the hub.

Only a name `owner/name` that is no local path reaches for the network, and of what is
there only what can be read is fetched.

>>> find(".").is_dir()
True
"""

import re
from pathlib import Path

from kronjax.io.storage import expanded
from kronjax.lm.checkpoints.folder import MSGPACK, PICKLES, REFUSAL

HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
"""What is fetched of a model on the hub; never a pickle."""


def find(source: str | Path) -> Path:
    """Return the folder or file that `source` names, fetched from the hub if need be.

    Raises:
        OSError: If there is no such path, and no such model or no network.
    """
    path = expanded(source)
    if not str(source):
        raise ValueError("the name of the model is empty")
    if path.exists():
        if path.is_file() and path.suffix != ".gguf":
            raise ValueError(f"{path} is neither a folder nor a .gguf file")
        return path
    name = str(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(
            f"there is no folder {name}; models on the hub are named owner/name, for "
            "example openai-community/gpt2"
        )
    return _fetch(name)


def _fetch(name: str) -> Path:
    """Return the folder of a model of the hub, from the cache where it is complete."""
    import huggingface_hub

    def fetch(patterns):
        # Folders inside hold other formats, of which we want none.
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )

    there: list[str] = []
    try:
        folder = fetch(HUB_FILES)
        if not list(folder.glob("*.safetensors")):
            folder = fetch([*HUB_FILES, MSGPACK])
        if not [*folder.glob("*.safetensors"), *folder.glob(MSGPACK)]:
            there = huggingface_hub.list_repo_files(name)
    except Exception as error:  # of the network, the hub, or its client
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"there is no folder {name}, and it could not be fetched from the hub "
            f"({type(error).__name__}: {reason}); give the path of a local folder that "
            "holds its config.json and *.safetensors"
        ) from error
    for file in there:
        if Path(file).suffix in PICKLES:
            raise ValueError(REFUSAL.format(where=name, file=file))
    return folder
