"""`python -m harmony` is the `harmony` command; `torchrun ... -m harmony` starts it on several processes."""

import sys

from harmony.cli import main

sys.exit(main())
