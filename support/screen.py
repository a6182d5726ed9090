"""Progress where there is no terminal: a log gets a line now and then instead of a moving bar."""
import contextlib
import os
import re
import sys
import threading

EVERY = 30.0  # seconds between two lines


class Lines:
    """A stream in the place of stderr: what bars (tqdm) draw over and over becomes a line every
    `every` seconds, the bar's state then; all else is passed on as it comes."""

    def __init__(self, stream, every=EVERY):
        self.stream, self.bar, self.done = stream, "", threading.Event()
        self.thread = threading.Thread(target=self.tell, args=(every,), daemon=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def isatty(self):
        return True  # bars are not drawn elsewhere

    def write(self, text):
        """Keep what begins with a carriage return, as bars do; pass on the rest."""
        if not text.startswith("\r"):
            return self.stream.write(text)
        drawn = text.rsplit("\r", 1)[-1].strip()
        self.bar = re.sub(r"\|[^|]*\|", " ", drawn)  # 34%|####  | 190/560: in words alone
        return len(text)

    def tell(self, every):
        """Until the end, write the state of the bar that is there."""
        while not self.done.wait(every):
            if self.bar:
                with contextlib.suppress(ValueError, OSError):  # the log was closed
                    self.stream.write(f"{' '.join(self.bar.split())}\n")
                    self.stream.flush()


@contextlib.contextmanager
def lines():
    """For this block, have bars write lines where stderr is no terminal. Of several processes under
    torchrun, the first one's bars alone."""
    before, rank = sys.stderr, os.environ.get("RANK", "0")
    if before is None or before.isatty() or rank != "0":
        yield
        return
    sys.stderr = mine = Lines(before)
    mine.thread.start()
    try:
        yield
    finally:
        mine.done.set()
        if sys.stderr is mine:  # else somebody has put another in its place since
            sys.stderr = before
