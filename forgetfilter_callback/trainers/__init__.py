"""Trainers that remove the most forgotten samples before they train."""
