"""The one exception that the command turns into a line of text and exit code 2."""

from __future__ import annotations


class UsageError(Exception):
    """Something the user gave, or the machine lacks, stops the demo; the text says what to do."""
