"""How far one reader has read one request's token log, and what it was told."""

from __future__ import annotations

from array import array

import msgspec

from penstock.queue.errors import StreamInterrupted
from penstock.queue.messages import TERMINAL, Frame

DIVERGED = "tokens that were delivered are no longer what the token log says; send the request again"


class Cursor:
    """One reader of one request.

    Tokens that were delivered are kept, 4 bytes each: a Redis that lost its last second gets them appended again, by
    the same engine or by another that ran the request anew, and only equal ones may pass for the same answer.
    """

    __slots__ = ("behind", "ended", "following", "frames", "last", "live", "paused", "reader", "request_id", "tokens")

    def __init__(self, request_id: str, reader: str, *, live: bool) -> None:
        self.request_id = request_id
        self.reader = reader
        self.tokens = array("I")
        self.frames = 0
        """Entries of the log that were read."""
        self.last = (0, 0)
        """Position and length of the last of them."""
        self.ended = False
        self.live = live
        """Whether frames are taken as they arrive; else they are read from the log, by one task at a time."""
        self.behind = False
        """Whether frames arrived meanwhile."""
        self.following = False
        self.paused = False

    def missed(self, frame: Frame) -> bool:
        """Whether frames before this one may not have been seen. An end without a position does not tell: look."""
        return not self.ended and (frame.index > len(self.tokens) or frame.index == TERMINAL)

    def take(self, frame: Frame) -> Frame | None:
        """The frame, or what is new in it; None when there is nothing.

        Raises:
            StreamInterrupted: it contradicts what was delivered.
        """
        if self.ended:
            return None
        if frame.index == len(self.tokens):
            self.tokens.extend(frame.tokens)
        elif frame.index != TERMINAL:
            again = self._again(frame)
            if again is None:
                return None
            frame = again
        self.frames += 1
        self.last = (frame.index, len(frame.tokens))
        self.ended = frame.finish is not None
        return frame

    def rewind(self) -> None:
        """Its end was taken back: read the log from the start again, passing over what was delivered."""
        self.ended = False
        self.frames = 0

    def _again(self, frame: Frame) -> Frame | None:
        """Check a frame that begins below the position."""
        position = len(self.tokens)
        known = self.tokens[frame.index : frame.index + len(frame.tokens)].tolist()
        if frame.index > position or known != frame.tokens[: len(known)]:
            raise StreamInterrupted(DIVERGED)
        rest = frame.tokens[len(known) :]
        if not rest and (frame.finish is None or frame.index + len(known) < position):
            return None
        if rest and frame.logprobs is not None:
            raise StreamInterrupted(DIVERGED)
        self.tokens.extend(rest)
        return msgspec.structs.replace(frame, index=position, tokens=rest, logprobs=None, usage=None)
