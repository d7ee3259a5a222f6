"""Where the frames stand in time that a chunk sees."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layout:
    """Temporal positions of the frames that a chunk sees; an empty tuple is a part that is not there."""

    anchor: tuple[int, ...]
    state: tuple[int, ...]
    window: tuple[int, ...]
    content: tuple[int, ...]

    @property
    def live(self) -> tuple[int, ...]:
        """Positions of the frames that are denoised: the state, then the content."""
        return self.state + self.content

    @property
    def cached(self) -> tuple[int, ...]:
        """Positions of the frames that are read from the cache: the anchor, then the window."""
        return self.anchor + self.window


def consecutive(anchor: int, state: int, window: int, content: int) -> Layout:
    """The layout of so many frames at the positions 0, 1, 2, …"""
    sizes = (anchor, state, window, content)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return Layout(*(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)))
