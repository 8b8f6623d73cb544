"""`orion doctor`: whether this machine can mine or validate, and exactly what to change if not.

Rooms: `options` (flags), `facts` (what is found, gathered at the edge), `machine`, `keys`, `chain`, `run`, `reach`
(checks: facts to findings, pure), `ask` (peers that call back), `runner` (in which order, and what needs what),
`report` (text and JSON). docs/doctor.md says what each check means.
"""
