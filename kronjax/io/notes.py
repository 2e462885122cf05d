"""Notes: remarks for the user about a choice that was made, one line each.

A note is a warning of the class `Note`, so that programs can filter it; the command
line prints it as one line on standard error.

>>> import warnings
>>> with warnings.catch_warnings(record=True, action="always") as told:
...     tell("model.safetensors is read")
>>> told[0].category is Note, str(told[0].message)
(True, 'model.safetensors is read')
"""

import warnings


class Note(UserWarning):
    """A remark about a choice that was made for the user."""


def tell(text: str) -> None:
    """Give a note to the user."""
    warnings.warn(text, Note, stacklevel=3)
