"""What-if questions of the dashboard: a `Scenario` in, plain facts out; the same functions as the command line.

scenario   every input of the page as one frozen value, as link and as command
question   the scenario as planner objects, or what is wrong with which field
catalogue  layouts with their steady states, searched once and put under any load
analytic   the answer within a second: best layout, memory, step, bottleneck, front, price, how sure
lab        what skew, placement, copies, capacity and residency of experts do together
tornado    what a little more of each input does
pins       two answers side by side
jobs       a simulation in a process of its own, with progress and cancel
charts     facts as Vega-Lite specifications
"""
