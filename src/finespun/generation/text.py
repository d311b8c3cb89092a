"""Token ids → text, piece by piece, as soon as a piece is certain: no character of which bytes are missing, no
beginning of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from finespun.data.templates import Encoder


class TextStream:
    """The text that tokens make, one after another. It ends before the first of `stops`."""

    def __init__(self, encoder: Encoder, stops: Sequence[str]) -> None:
        self._encoder = encoder
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        # tokens before _begin never change the text again; those up to _read have made _settled
        self._begin = self._read = self._shown = 0
        self._settled = ""
        self.text = ""
        self.stopped = False
        self._emitted = 0

    def push(self, token: int) -> str:
        """Takes the next token; returns what has become certain. `stopped` says that a stop string is complete."""
        self._ids.append(token)
        window = self._encoder.decode(self._ids[self._begin :])
        self.text = self._settled + window[self._shown :]
        found = [at for at in (self.text.find(stop, self._emitted) for stop in self._stops) if at >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
            return self.rest()
        if not window.endswith("\ufffd"):
            self._settled = self.text
            self._begin, self._read = self._read, len(self._ids)
            self._shown = len(self._encoder.decode(self._ids[self._begin :]))
        return self._emit(self._certain())

    def rest(self, cut: bool = False) -> str:
        """What was held back, when nothing follows. A text that is `cut` ends before a character of which bytes are
        missing."""
        if cut:
            self.text = self.text.rstrip("\ufffd")
        return self._emit(len(self.text))

    def _emit(self, end: int) -> str:
        piece = self.text[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return piece

    def _certain(self) -> int:
        end = len(self.text.rstrip("\ufffd"))
        held = [
            length
            for stop in self._stops
            for length in range(1, min(len(stop), end + 1))
            if self.text.endswith(stop[:length], 0, end)
        ]
        return end - max(held, default=0)
