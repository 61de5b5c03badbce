"""Recipes that run as they stand: `tensorpress recipes list`."""
