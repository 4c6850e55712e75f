"""What no coordinator can ever finish a batch after, and what its owner is told."""

from __future__ import annotations

import msgspec

from penstock.serving.batches.assembly import SegmentLost
from penstock.serving.batches.lines import BadLine, Problem
from penstock.serving.files.objects import ObjectMissing

INPUT_LOST = Problem(
    "input_file_lost", "The input file's content is no longer in the file store.", param="input_file_id"
)
INPUT_CHANGED = Problem(
    "input_file_changed", "The input file's content is not what it was when it was uploaded.", param="input_file_id"
)
UNFINISHABLE = (ObjectMissing, SegmentLost, BadLine, msgspec.DecodeError)
"""What a step raises that would be raised for ever."""


def problem_of(error: Exception) -> Problem:
    """The entry of the batch's ``errors``."""
    if isinstance(error, SegmentLost):
        return Problem(error.code, f"{error}.")
    return INPUT_LOST if isinstance(error, ObjectMissing) else INPUT_CHANGED
