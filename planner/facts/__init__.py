"""Answers as plain dictionaries: the same facts for JSON, the terminal text and the report."""

from planner.facts.basic import fit_facts, model_facts, profile_facts, profile_rows, simulation_facts

__all__ = ["fit_facts", "model_facts", "profile_facts", "profile_rows", "simulation_facts"]
