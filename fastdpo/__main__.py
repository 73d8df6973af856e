"""``python -m fastdpo``, the same as ``fastdpo``."""

import sys

from fastdpo.cli import main

sys.exit(main())
