"""One runnable file per model family. `python -m experiments` lists them."""
