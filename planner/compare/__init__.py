"""Clusters side by side at one demand and one SLO, and how sure the choice between them is.

question     models with demand and SLO, offers, how wrong the demand may be
estimator    replicas of one demand on one system, as asked or with one thing changed
whatif       another fabric, a larger model, a longer context
entrant      one model on one system: its plan by simulation and its curves
standing     all models on one offer: GPUs and bill, now and in other worlds
bands        throughput per GPU by interactivity
inverse      what a budget, a power limit, racks or a cost ceiling buy
uncertainty  odds, regret, tornado
comparison   the main flow
"""
