"""Fleets of thousands of GPUs through a day: replica-level aggregation instead of one simulation of everything.

    behaviour  a few replicas simulated at several loads: latency distributions, capacity
    scaling    how many replicas are wanted for a load, and how an autoscaler follows it
    day        minute by minute through the day, summed by hour: memory does not grow with the days
    answer     the flow: with and without autoscaling, with and without failures

How far this is from simulating every replica: docs/scale.md.
"""

from planner.fleet.answer import Fleet, FleetQuestion, plan_fleet
from planner.fleet.behaviour import Behaviour, measure
from planner.fleet.day import Day, Hour, Outage, live
from planner.fleet.scaling import Autoscaler, Policy

__all__ = [
    "Autoscaler",
    "Behaviour",
    "Day",
    "Fleet",
    "FleetQuestion",
    "Hour",
    "Outage",
    "Policy",
    "live",
    "measure",
    "plan_fleet",
]
