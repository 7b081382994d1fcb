"""The command ``python -m gpumodel.validate``."""

import sys

from .command import main

sys.exit(main())
