"""Loops: train, evaluate and record agents. Only these modules know agents and environments."""
