"""The version of the project, in the one place where it is written."""

from typing import Final

__all__ = ["VERSION"]

VERSION: Final = "0.1.0"
