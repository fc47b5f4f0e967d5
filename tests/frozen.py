"""Imported last by the server of forks: what it has imported stays, and no fork's garbage collector looks at it."""

import gc

gc.collect()
gc.freeze()
