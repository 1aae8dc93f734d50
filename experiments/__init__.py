"""One runnable file per model family. `python -m experiments` lists them."""

import sys

from jaxdl import signals
from jaxdl.streams import mend_streams

if sys.argv[0] == "-m":  # A command, of which nothing else is imported yet: that takes seconds, in which signals may come.
    mend_streams()
    signals.watch()
