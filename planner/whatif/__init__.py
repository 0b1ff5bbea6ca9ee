"""What-if questions of the dashboard: a `Scenario` in, plain facts out; the same functions as the command line.

scenario   every input of the page as one frozen value, as link and as command
form       the inputs as data: labels, choices, help
question   the scenario as planner objects, or what is wrong with which field
catalogue  replicas of every layout with their steady states, put under any load
analytic   the answer: best layout, numbers with intervals, bottleneck, what is too close to call
front      throughput per GPU against interactivity, by layout
details    memory and step by part and how each is computed, sources, launch commands
edits      changes of an infeasible scenario that were checked to help
lab        what skew, placement, copies, capacity and residency of experts do together
tornado    what a little more of each input does
rivals     the same demand on other systems
pins       two answers side by side
jobs       a command in a process of its own, with progress and cancel
outcome    what a finished simulation shows
charts     facts as Vega-Lite specifications
rows       facts as rows of text
"""
