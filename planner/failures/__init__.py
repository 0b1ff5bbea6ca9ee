"""Failures of ranks and what it takes to come back: how often, how long, which experts survive, how many spares.

`settings` reads what a user may say, `recovery` the sourced numbers of engines, `readiness` times the start of a
replica, `risk` is renewal theory, `survival` counts experts that lose every copy. The simulated failures are in
`planner.incidents`.
"""
