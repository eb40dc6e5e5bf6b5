"""Judging of generated clips: a judge that reads digits, metrics, and the report that compares teacher and student."""
