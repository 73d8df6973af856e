"""``python -m fastdpo.cli``, as ``accelerate launch -m`` runs it."""

import sys

from fastdpo.cli import main

sys.exit(main())
