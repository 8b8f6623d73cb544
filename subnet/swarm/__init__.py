"""Who does what: roster, routing, merge, codec. Pure functions of what every node can read."""
