"""What the tests start shares its cores as what the product starts does: threads that wait sleep, from here on."""

from bitdistill_ray import env

env.share_cores()
