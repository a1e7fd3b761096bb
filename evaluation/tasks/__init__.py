"""Texts and tasks with known answers."""
