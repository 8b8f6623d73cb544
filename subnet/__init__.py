"""The protocol between nodes: chain, transport, swarm, trust. Nothing about processes."""
