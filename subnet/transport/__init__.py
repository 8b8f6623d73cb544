"""How bytes move between two hotkeys: synapse, axon, admission, dendrite."""
