"""`orion sim`: a whole swarm in one process, on a virtual clock, with everything going wrong that a seed asks for."""
