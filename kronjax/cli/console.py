"""What commands print: one line for a mistake."""

from kronjax.io.atomic import printable


def one_line(error: Exception) -> str:
    """Return the message on one line; a system error names its file."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename:
            text = f"{error.filename}: {text}"
    return printable(" ".join(text.split())).rstrip(".")
