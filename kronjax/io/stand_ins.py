"""Recognition of files that are not what their names say, and what to do about them.

Checkpoints often arrive as something else: a Git LFS pointer where the download was
never made, an HTML page where it failed, an archive, a pickle. The first bytes tell.

>>> describe(b"version https://git-lfs.github.com/spec/v1")
'this is a Git LFS pointer: run git lfs pull'
>>> describe(b"{}") is None
True
"""

import re
from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
"""Suffixes of files that are, or may be, pickles."""

PICKLE = (
    "{where} holds its weights only as a pickle ({file}), which could run any code and "
    "is never opened; convert it where you trust it: "
    "transformers.AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
)
"""Message for a model whose weights are stored only as a pickle."""

LFS_POINTER = "this is a Git LFS pointer: run git lfs pull"

_PAGE = "this is an HTML page, saved in place of the file: download the file again"
_MAGIC = (
    (b"version https://git-lfs.github.com/spec/", LFS_POINTER),
    (b"/annex/objects/", "this is a git-annex pointer: run git annex get"),
    (b"# xet version ", "this is a Git Xet pointer: run git lfs pull with git-xet"),
    (b"\x1f\x8b", "this is compressed by gzip: unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "this is compressed by zstd: unpack it with unzstd"),
    (b"BZh", "this is compressed by bzip2: unpack it with bunzip2"),
    (b"\xfd7zXZ\x00", "this is compressed by xz: unpack it with unxz"),
    (b"GGUF", "this is a GGUF file: give it a name that ends in .gguf"),
    (b"\x89HDF\r\n", "this is an HDF5 file, which is not supported"),
)
_CONVERT = "convert it with save_pretrained of transformers"
ARCHIVE = f"this is a zip archive, perhaps a pickle of PyTorch: {_CONVERT}"
PICKLED = f"this is a pickle, which could run any code and is never opened: {_CONVERT}"
_HEAD = 512


def describe(content: bytes) -> str | None:
    """Return what the beginning of a file shows it to be, and the remedy.

    Args:
        content: The file, or at least its first 512 bytes.

    Returns:
        A clause for a message, or None for anything else.
    """
    for magic, words in _MAGIC:
        if content.startswith(magic):
            return words
    if content.startswith(b"PK\x03\x04"):
        return ARCHIVE
    # A safetensors file may begin so, too: its ninth byte opens the header.
    if re.match(rb"\x80[\x02-\x05]", content) and content[8:9] != b"{":
        return PICKLED
    text = content[:_HEAD].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return _PAGE
    return None


def describe_file(path: Path) -> str | None:
    """Return what a file is in place of its name's kind, and the remedy, or None.

    Raises:
        OSError: If the file cannot be read.
    """
    with open(path, "rb") as file:
        return describe(file.read(_HEAD))


def is_lfs_pointer(path: Path) -> bool:
    """Return whether a file is a Git LFS pointer."""
    return path.stat().st_size < 1024 and describe_file(path) == LFS_POINTER
