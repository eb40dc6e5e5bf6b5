"""Evaluation of generated clips: a classifier of digits, metrics, and the report that compares teacher and student."""
