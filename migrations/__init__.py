"""The history of the schema, one revision a file in `versions/`. `hythe serve` runs what is missing."""

from typing import Final

#: The newest revision; a test holds it against `versions/`.
HEAD: Final = "0003"
