"""Measure models, judge gains and write the report."""
