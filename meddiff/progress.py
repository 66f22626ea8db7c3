"""Progress bars with the time left, for work over two seconds; silent when standard error is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from tqdm import tqdm

_bar = partial(tqdm, disable=None, delay=2, leave=False)


def progress(label: str) -> Callable[[Sequence], Iterable]:
    """A wrapper that shows a bar while a sequence is walked: `for step in progress("sampling")(steps)`."""
    return partial(_bar, desc=label)


@contextmanager
def counted(total: float, label: str) -> Iterator[Callable[[float], object]]:
    """Show the share of `total` that is done, while the block runs and calls what it gets with each part."""
    with _bar(total=total, desc=label, bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        yield bar.update
