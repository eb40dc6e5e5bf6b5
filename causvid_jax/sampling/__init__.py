"""Samplers of the student and the teacher."""
