"""``python -m fastd2o.cli`` is the ``fastd2o`` command."""

import sys

from fastd2o.cli import main

if __name__ == "__main__":
    sys.exit(main())
