"""``python -m diffalign``: the form that torchrun and ``accelerate launch -m diffalign`` start."""

import sys

from diffalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
