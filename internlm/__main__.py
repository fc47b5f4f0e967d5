"""`python -m internlm`: the command line, so that `torchrun -m internlm` can start it."""

import sys

from internlm.cli import main

sys.exit(main())
