"""`orion simulate`: a swarm under a virtual clock, event by event, by the rules that its nodes follow."""
