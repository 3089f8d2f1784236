"""Forgetting measures: functions that map the losses at two or three checkpoints to one value per sample."""
