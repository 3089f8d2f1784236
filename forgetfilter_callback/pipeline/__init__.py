"""Run ForgetFilter end to end: train both sessions, filter, and finetune the base model on the kept rows."""
