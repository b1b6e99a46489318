"""Verdicts against worlds whose answer is known: how often they are found, and raised wrongly."""
