"""Messages that commands print."""

from kronjax.io.atomic import printable


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, with the file of a system error."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
        if error.filename:
            text = f"{error.filename}: {text}"
    return printable(" ".join(text.split())).rstrip(".")
