"""`orion plan`: what a run of some shape does and costs before anybody rents anything.

Arithmetic only, from the numbers given: how fast it trains and what holds it up (`speed`), what must be kept, fetched
and computed to audit it (`audits`), and whether that fits cards, machines and links. docs/plan.md explains the figures.
"""
