"""python -m bitdistill_ray.bench KIND …    see `bench.command`."""

import sys

from bitdistill_ray.bench.command import main

sys.exit(main())
